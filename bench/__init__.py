"""Benchmarks: ``adamprox bench``, and in the repository ``pytest bench``."""

# Not relative: to pytest, which finds the folder, this package is called `bench`.
from adamprox.bench.command import add_arguments, run

__all__ = ["add_arguments", "run"]
