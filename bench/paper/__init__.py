"""The paper's experiments: ``adamprox paper``."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
