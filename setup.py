"""The compiled part is CMake's; everything else is declared in pyproject.toml."""

import os

from setuptools import setup

setup(
    cmake_source_dir=".", cmake_args=[f"-DADAMPROX_CUDA={os.environ.get('ADAMPROX_CUDA', 'AUTO')}"]
)
