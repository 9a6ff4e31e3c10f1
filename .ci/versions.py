"""What `matrix` and `wheels` share: interpreters, and a table with a row for each thing tested."""

from __future__ import annotations

import csv
import datetime
import io
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
Row = dict[str, str]


def interpreter(version: str) -> str | None:
    """The newest one of that version: beside the other ones of pyenv, or on the path."""
    beside = Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python")
    plain = (path for path in beside if re.fullmatch(r"[\d.]+((a|b|rc)\d+)?", path.parts[-3]))
    names = sorted(plain, key=lambda path: _numbers(path.parts[-3]), reverse=True)
    found = (shutil.which(name) for name in (*map(str, names), f"python{version}"))
    return next(filter(None, found), None)


def _numbers(version: str) -> list[int]:
    """Of a version, with those of a prerelease: 2.15.0rc1 is before 2.15.0."""
    release, *last = re.split("[a-z]+", version)
    return [*map(int, release.split(".")), *(map(int, filter(None, last)) if last else [1000])]


def _origin() -> Row:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    return {"commit": commit, "date": datetime.date.today().isoformat()}


# Which commit is tested, and when; before a table is written to.
ORIGIN = _origin()


def keep(file: Path, row: Row, keys: tuple[str, ...]) -> None:
    """Puts a row into the table in order of its keys, instead of the old one with the same keys."""

    def key(of: Row) -> list[list[int]]:
        return [_numbers(of[name]) for name in keys]

    rows = list(csv.DictReader(file.open(newline=""))) if file.exists() else []
    rows = sorted([*(old for old in rows if key(old) != key(row)), row], key=key)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(row))
    writer.writeheader()
    writer.writerows(rows)
    file.write_text(text.getvalue(), newline="")
