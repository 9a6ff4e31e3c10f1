"""The rules of verdicts, and how intervals are told."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

Row = dict[str, str]  # of a CSV

SHOWN, IN_PART, CONTRARY = "shown", "in part", "contrary"
UNDECIDED, NOT_TESTED = "undecided", "not tested"
PAR = 0.01  # errors that differ by less are on a par: a point
POINTS = 100  # of a difference of 1


def together(verdicts: Iterable[str]) -> str:
    """Of several networks, say: shown in all, in some, or in none."""
    each = set(verdicts)
    if len(each) == 1:
        return each.pop()
    if SHOWN in each or IN_PART in each:
        return IN_PART
    return CONTRARY if CONTRARY in each else UNDECIDED


def all_or_part(flags: Iterable[bool]) -> str:
    """Of things that hold or not."""
    return together(SHOWN if flag else CONTRARY for flag in flags)


def between(row: Row, least: float, most: float, prefix: str = "") -> str:
    """Whether an interval is between two numbers; contrary if it is wholly outside.

    One with a single seed is NaN, and so undecided.
    """
    low, high = float(row[f"{prefix}low"]), float(row[f"{prefix}high"])
    if least < low and high < most:
        return SHOWN
    return CONTRARY if high < least or low > most else UNDECIDED


def above_zero(row: Row, prefix: str = "") -> str:
    """Whether an interval is."""
    return between(row, 0.0, inf, prefix)


def on_a_par(row: Row, prefix: str = "") -> str:
    """Whether an interval is within a point of 0."""
    return between(row, -PAR, PAR, prefix)


def interval(row: Row, unit: float = 1 / POINTS, prefix: str = "") -> str:
    """A mean with its 95 % interval."""
    numbers = (float(row[f"{prefix}{name}"]) / unit for name in ("mean", "low", "high"))
    return "{:+.1f} ({:+.1f} .. {:+.1f})".format(*numbers)


def by(key: str, rows: Iterable[Row], unit: float = 1 / POINTS) -> str:
    """The intervals of all rows."""
    return "; ".join(f"{row[key]} {interval(row, unit)}" for row in rows)
