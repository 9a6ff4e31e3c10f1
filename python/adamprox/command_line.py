"""What the commands of ``adamprox`` share: how they read arguments, and their errors."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Number = TypeVar("Number", int, float)


def usable_device(text: str) -> torch.device:
    """A device that can be used here, of type cpu or cuda."""
    try:
        result = torch.device(text)
        if result.type not in ("cpu", "cuda"):
            raise RuntimeError("it is neither cpu nor cuda")
        torch.empty(0, device=result)
    except (AssertionError, RuntimeError) as error:  # torch's own differ by device
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {error}") from error
    return result


def positive(kind: type[Number]) -> Callable[[str], Number]:
    """What makes a positive number of an argument."""

    def convert(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive {kind.__name__}")
        return value

    return convert


def need(command: str, packages: Iterable[str]) -> None:
    """Ends the command, which is also the name of an extra, where a package is missing."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            fail(command, f"{error}; please pip install 'adamprox[{command}]'")


def fail(command: str, message: str) -> NoReturn:
    """Ends the command with an error's message."""
    sys.exit(f"adamprox {command}: error: {message}")
