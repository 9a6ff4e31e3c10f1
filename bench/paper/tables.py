"""Rows for people, in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def print_table(title: str, rows: Sequence[dict[str, Any]], shown: int | None = None) -> None:
    """A line a row; ``shown`` columns, or all. Of a mean, minimum and maximum, one cell."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    names = [name for name in list(rows[0])[:shown] if not name.endswith(("_min", "_max"))]
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        number = isinstance(rows[0][name], float | int)
        table.add_column(name.replace("_", " "), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_cell(row, name) for name in names))
    console = Console(highlight=False, emoji=False)
    console.width = max(console.width, 120)
    console.print(table)


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if f"{name}_min" in row and row["seeds"] > 1:
        return f"{value:.4g} ({row[f'{name}_min']:.4g} .. {row[f'{name}_max']:.4g})"
    return f"{value:.4g}"
