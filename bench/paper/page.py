"""The tables of the page of results, from the CSV beside it."""

from __future__ import annotations

import csv
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_TABLE = re.compile(r"(<!-- table: (\S+)(?: columns: (.+?))? -->\n).*?(?=<!-- end -->)", re.DOTALL)


def refresh(page: str, results: Path) -> str:
    """The page with each table between ``<!-- table: NAME -->`` and ``<!-- end -->`` anew.

    ``columns: A, B`` chooses some; a mean has its smallest and largest value beside it.

    Raises:
        OSError: a table has no CSV.
    """

    def table(match: re.Match[str]) -> str:
        opening, name, columns = match.groups()
        with (results / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        names = [c.strip() for c in columns.split(",")] if columns else list(rows[0])
        names = [name for name in names if not name.endswith(("_min", "_max"))]
        lines = [_line([name.replace("_", " ") for name in names]), "|---" * len(names) + "|\n"]
        lines += [_line([_cell(row, name) for name in names]) for row in rows]
        return opening + "".join(lines)

    return _TABLE.sub(table, page)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _cell(row: dict[str, str], name: str) -> str:
    ends = [row[key] for key in (f"{name}_min", f"{name}_max") if key in row]
    if ends and row["seeds"] != "1":
        return f"{_number(row[name])} ({_number(ends[0])} .. {_number(ends[1])})"
    return _number(row[name])


def _number(text: str) -> str:
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text
