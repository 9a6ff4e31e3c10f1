"""What `matrix` and `wheels` share: interpreters, and a table with a row for each thing tested."""

from __future__ import annotations

import csv
import datetime
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
Row = dict[str, str]


def interpreter(version: str) -> str | None:
    """The newest one of that version: beside the other ones of pyenv, or on the path."""
    beside = Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python")
    names = sorted(beside, key=lambda path: int(path.parts[-3].split(".")[2]), reverse=True)
    for name in (*map(str, names), f"python{version}"):
        if shutil.which(name):
            return name
    return None


def _origin() -> Row:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "date": datetime.date.today().isoformat()}


# Which commit is tested, and when; before a table is written to.
ORIGIN = _origin()


def keep(file: Path, row: Row, keys: tuple[str, ...]) -> None:
    """Puts a row into the table in order of its keys, instead of the old one with the same keys."""

    def key(of: Row) -> list[list[int]]:
        return [[int(part) for part in of[name].split(".")] for name in keys]

    rows = list(csv.DictReader(file.open(newline=""))) if file.exists() else []
    rows = sorted([*(old for old in rows if key(old) != key(row)), row], key=key)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(row))
        writer.writeheader()
        writer.writerows(rows)
