"""Tables of text that fit the terminal: texts are folded, numbers never."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

_GAP = 2  # between columns
_LEAST = 16  # a column of text that is narrower is hard to read


def terminal_width() -> int:
    """The columns of the terminal, or ``COLUMNS``; 120 where there is neither."""
    return shutil.get_terminal_size(fallback=(120, 24)).columns


def table(
    rows: Sequence[tuple[str, ...]],
    header: tuple[str, ...] = (),
    *,
    texts: int = 2,
    title: str = "",
    caption: str = "",
    width: int | None = None,
) -> str:
    """The rows below each other; the first ``texts`` columns are text, the others numbers.

    A row of one cell is a heading. No line is longer than ``width`` (default: the terminal's):
    where the columns do not fit beside each other, each row becomes a paragraph.
    """
    width = width or terminal_width()
    columns = list(zip(*(row for row in [header, *rows] if len(row) > 1), strict=True))
    widths = _widths(columns, bool(header), texts, width)
    lines = textwrap.wrap(title, width)
    if widths is not None:
        if header:
            lines += [*_line(header, widths, texts), "-" * (sum(widths) + _GAP * (len(widths) - 1))]
        for row in rows:
            lines += _line(row, widths, texts) if len(row) > 1 else textwrap.wrap(row[0], width)
    else:
        for row in rows:
            lines += textwrap.wrap(row[0], width)
            cells = zip_longest(header, row, fillvalue="")
            pairs = [f"{name} {cell}".strip() for name, cell in list(cells)[1:] if cell]
            lines += _paragraph(pairs, width)
    return "\n".join([*lines, *textwrap.wrap(caption, width)])


def _widths(
    columns: Sequence[Sequence[str]], has_header: bool, texts: int, width: int
) -> list[int] | None:
    """Of each column, or None if they do not fit; a heading may be folded between its words."""
    room = width - _GAP * (len(columns) - 1)
    whole = [max(map(len, column)) for column in columns]
    if sum(whole) <= room:
        return whole
    result = []
    for i, column in enumerate(columns):
        if i < texts:
            result.append(min(whole[i], _LEAST))
        else:
            words = column[0].split() if has_header else [column[0]]
            result.append(max(map(len, (*words, *column[has_header:]))))
    left = room - sum(result)
    for i in range(len(columns)):
        more = min(max(left, 0), whole[i] - result[i])
        result[i] += more
        left -= more
    return result if left >= 0 else None


def _line(cells: Sequence[str], widths: Sequence[int], texts: int) -> list[str]:
    """Of one row; several lines where cells are folded."""
    folded = [
        textwrap.wrap(cell, width, break_on_hyphens=False)
        for cell, width in zip(cells, widths, strict=True)
    ]
    return [
        (" " * _GAP)
        .join(
            part.ljust(width) if i < texts else part.rjust(width)
            for i, (part, width) in enumerate(zip(parts, widths, strict=True))
        )
        .rstrip()
        for parts in zip_longest(*folded, fillvalue="")
    ]


def _paragraph(items: Sequence[str], width: int) -> list[str]:
    """The items one after the other, each in one line if it fits."""
    indent, lines = " " * 4, [""]
    for item in items:
        line = f"{lines[-1]}, {item}" if lines[-1] else indent + item
        if lines[-1] and len(line) > width:
            lines[-1] += ","
            line = ""
        if line:
            lines[-1] = line
        else:
            lines.append(indent + item)
    return [part for line in lines for part in textwrap.wrap(line, width, subsequent_indent=indent)]
