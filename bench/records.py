"""Rows with their provenance, appended to CSV files."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import adamprox
from adamprox import _C

if TYPE_CHECKING:
    from collections.abc import Sequence

Row = dict[str, Any]


def provenance(device: torch.device) -> Row:
    """What a time depends on; ``date`` is the same for all rows of a run, and its own."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.cpu_instruction_set(),
        "adamprox": adamprox.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": now.isoformat(timespec="seconds"),
    }


def append(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a file, which is made if need be.

    Raises:
        ValueError: the file has other columns.
    """
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            if next(csv.reader(file), None) != columns:
                raise ValueError(f"{path} has other columns than these rows: move it away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def newest(path: Path, dtype: str) -> dict[str, dict[str, Row]]:
    """By model and optimizer's name, the rows of the last run of each model in a file."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dtype"] == dtype]
    dates = {row["model"]: row["date"] for row in rows}  # the last one stays
    result: dict[str, dict[str, Row]] = {model: {} for model in dates}
    for row in rows:
        if row["date"] == dates[row["model"]]:
            result[row["model"]][row["name"]] = row
    return result


def _commit() -> str | None:
    """``ADAMPROX_COMMIT``, or what git says of the folder of this file."""
    if commit := os.environ.get("ADAMPROX_COMMIT"):
        return commit
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # there is no git
        return None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
