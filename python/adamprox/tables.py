"""Tables of text: by rich, if it is there, which folds long cells; or plain."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()) -> str:
    """The rows below each other; the first two columns are text, the others numbers."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [header, *rows] if header else rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
    result = Table(box=None, pad_edge=False, show_header=bool(header))
    for i in range(len(rows[0])):
        title = header[i] if header else ""
        result.add_column(title, justify="left" if i < 2 else "right", overflow="fold")
    for row in rows:
        result.add_row(*row)
    text, width = io.StringIO(), shutil.get_terminal_size().columns
    # Cells may hold square brackets, which are no markup.
    Console(file=text, width=width, markup=False, emoji=False, highlight=False).print(result)
    return text.getvalue().rstrip("\n")
