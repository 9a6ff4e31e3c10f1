"""Rows with their provenance, appended to CSV files."""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import adamprox
from adamprox import _C
from adamprox.command_line import write_whole

from .steps import IN_CACHE
from .timing import EITHER, WARM

if TYPE_CHECKING:
    from collections.abc import Sequence

Row = dict[str, Any]


class OtherColumnsError(ValueError):
    """A file is of another kind of rows."""


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
    """Adds rows to a file, which is made if need be; columns that it lacks stay empty in it.

    Raises:
        OtherColumnsError: the file has columns that the rows lack.
    """
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    old = _read(path) if path.exists() else []
    if old and not set(old[0]) <= set(columns):
        raise OtherColumnsError(f"{path} has other columns than these rows: move it away")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows([*old, *rows])
    write_whole(path, text.getvalue())


def newest(path: Path, dtype: str) -> dict[str, dict[str, Row]]:
    """By model and optimizer's name, the rows of the last run of each model in a file.

    Rows of warm caches are left out: training does not find the caches warm.
    """
    rows = [row for row in _read(path) if row["dtype"] == dtype and caches_of(row) != WARM]
    dates = {row["model"]: row["date"] for row in rows}  # the last one stays
    result: dict[str, dict[str, Row]] = {model: {} for model in dates}
    for row in rows:
        if row["date"] == dates[row["model"]]:
            result[row["model"]][row["name"]] = row
    return result


def caches_of(row: Row) -> str:
    """The state of the caches that a row of a file was timed in, also where it does not say."""
    if caches := row.get("caches"):
        return str(caches)
    # Rows from before that column: float32, and warm where the model fitted into the cache.
    return WARM if 28 * int(row["elements"]) < IN_CACHE else EITHER


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _commit() -> str | None:
    """``ADAMPROX_COMMIT``, or git's, if this file is one of a checkout."""
    if commit := os.environ.get("ADAMPROX_COMMIT"):
        return commit

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    try:
        # An installed copy may lie in a checkout, of this project or of another one.
        if git("ls-files", "--error-unmatch", Path(__file__).name).returncode != 0:
            return None
        commit = git("describe", "--always").stdout.strip()
        # Records that have grown make no other code.
        records = ":(top,exclude,glob)bench/**/results/**"
        clean = git("diff", "--quiet", "HEAD", "--", ":/", records).returncode == 0
    except OSError:  # there is no git
        return None
    return commit and (commit if clean else f"{commit}-dirty")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
