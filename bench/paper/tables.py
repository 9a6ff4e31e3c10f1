"""Rows for people, in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adamprox.tables import table

if TYPE_CHECKING:
    from collections.abc import Sequence


def print_table(title: str, rows: Sequence[dict[str, Any]], shown: int | None = None) -> None:
    """A line a row; ``shown`` columns, or all. Of a mean, minimum and maximum, one cell."""
    names = [name for name in list(rows[0])[:shown] if not name.endswith(("_min", "_max"))]
    numbers = [isinstance(rows[0][name], float | int) for name in names]
    texts = numbers.index(True) if True in numbers else len(names)
    cells = [tuple(_cell(row, name) for name in names) for row in rows]
    header = tuple(name.replace("_", " ") for name in names)
    print(table(cells, header, texts=texts, title=title), end="\n\n")


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if f"{name}_min" in row and row["seeds"] > 1:
        return f"{value:.4g} ({row[f'{name}_min']:.4g} .. {row[f'{name}_max']:.4g})"
    return f"{value:.4g}"
