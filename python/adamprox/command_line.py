"""What the commands of ``adamprox`` share: how they read arguments, and their errors."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Number = TypeVar("Number", int, float)


def usable_device(text: str) -> torch.device:
    """A device that can be used here, of type cpu or cuda."""
    try:
        if text.partition(":")[0] not in ("cpu", "cuda"):
            raise RuntimeError("it is neither cpu nor cuda")
        result = torch.device(text)
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
    """Ends the command where packages are missing, which an extra of its name installs."""
    missing = {}
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            missing[{"sklearn": "scikit-learn"}.get(package, package)] = str(error)
    if missing:
        reasons = "; ".join(missing.values())
        fail(command, f"{reasons}; please run: pip install {' '.join(missing)}")


def check_folder(command: str, argument: str, folder: Path) -> None:
    """Makes the folder, and ends the command where no file can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 12))
    except OSError as error:
        fail(command, f"argument {argument}: cannot write to {folder}: {error.strerror}")


def is_stream(file: Path) -> bool:
    """Whether it is a device or a pipe, which cannot be replaced."""
    return "/dev" in map(str, file.absolute().parents) or (file.exists() and not file.is_file())


def write_whole(file: Path, text: str) -> None:
    """Replaces a file, which is the old one or the new one at any time.

    What is no file of a disk (/dev/stdout, a pipe) is written to.
    """
    if is_stream(file):
        with file.open("w", newline="") as opened:
            opened.write(text)
        return
    file = file.resolve()  # what a link leads to
    new = file.with_name(file.name + ".new")
    try:
        with new.open("w", newline="") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        new.replace(file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


class _Lines:
    """Where there is no terminal, progress is a line now and then."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Each line has been flushed."""


def progress_bar(total: float, **arguments: Any) -> Any:
    """A bar of tqdm; without a terminal, a line every half minute."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        arguments |= {"file": _Lines(), "delay": 30, "mininterval": 30, "ascii": True, "ncols": 70}
    return tqdm(total=total, leave=False, **arguments)


def duration(seconds: float) -> str:
    """In the unit that leaves one or two digits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def fail(command: str, message: str) -> NoReturn:
    """Ends the command with an error's message."""
    sys.exit(f"adamprox {command}: error: {message}")
