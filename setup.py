"""The compiled part is CMake's; everything else is declared in pyproject.toml."""

import os
import re
import shutil
import sys
import sysconfig

from setuptools import setup

COMPILERS = ("c++", "g++", "clang++")
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}

# The build would take the compiler that Python was built by, whether it is there or not. CMake's
# own error of it would be followed by a long traceback.
arguments = os.environ.get("CMAKE_ARGS", "")
named = os.environ.get("CXX") or re.search(r"CMAKE_CXX_COMPILER\b", arguments)
if not named and BUILDS & set(sys.argv):
    pythons = (sysconfig.get_config_var("CXX") or "").split()[:1]
    found = next(filter(shutil.which, (*pythons, *COMPILERS)), None)
    if found is None:
        sys.exit(
            "adamprox is compiled, and no C++ compiler was found. Please install one (on Debian "
            "and Ubuntu: apt install g++), or set CXX to its path."
        )
    if found not in pythons:
        os.environ["CXX"] = found

setup(cmake_source_dir=".")
