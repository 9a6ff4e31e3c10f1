"""The compiled part is CMake's; everything else is declared in pyproject.toml."""

import os
import shutil
import sys

from setuptools import setup

COMPILERS = ("c++", "g++", "clang++")
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}

# Those that CMake looks for. Its own error would be followed by a long traceback.
missing = not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS))
if missing and BUILDS & set(sys.argv):
    sys.exit(
        "adamprox is compiled, and no C++ compiler was found. Please install one (on Debian and "
        "Ubuntu: apt install g++), or set CXX to its path."
    )

setup(
    cmake_source_dir=".", cmake_args=[f"-DADAMPROX_CUDA={os.environ.get('ADAMPROX_CUDA', 'AUTO')}"]
)
