"""Two optimizers paired by seed: the difference of their errors, with its uncertainty."""

from __future__ import annotations

import base64
import math
import statistics
import zlib
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .training import Result


class Difference(NamedTuple):
    """Of errors: the first optimizer's minus the second's, so that it is what the second gains.

    Attributes:
        mean: over the seeds.
        low, high: the ends of its 95 % interval, of Student's t.
        first_alone, second_alone: pictures that only one of them classifies right, over all seeds.
        p_value: McNemar's exact test of these two counts: how likely counts so far apart are, if
            the optimizers were equally good. It knows the pictures' chance, not the seeds'.
    """

    mean: float
    low: float
    high: float
    first_alone: int
    second_alone: int
    p_value: float


def interval(values: Sequence[float], share: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean; NaN for a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return math.nan, math.nan
    mean = statistics.mean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = error * float(t.ppf((1 + share) / 2, len(values) - 1))
    return mean - half, mean + half


def difference(first: Sequence[Result], second: Sequence[Result]) -> Difference:
    """Of the same seeds in the same order."""
    from scipy.stats import binomtest

    gains = [a.test_error - b.test_error for a, b in zip(first, second, strict=True)]
    only = [0, 0]
    for a, b in zip(first, second, strict=True):
        if a.correct and b.correct:
            right, other = unpacked(a.correct), unpacked(b.correct)
            only[0] += int((right & ~other).sum())
            only[1] += int((other & ~right).sum())
    p_value = float(binomtest(only[0], sum(only)).pvalue) if sum(only) else math.nan
    low, high = interval(gains)
    return Difference(statistics.mean(gains), low, high, only[0], only[1], p_value)


def packed(bits: Tensor) -> str:
    """Of a bool tensor, as text."""
    return base64.b85encode(zlib.compress(bits.to(torch.uint8).cpu().numpy().tobytes(), 9)).decode()


def unpacked(text: str) -> Tensor:
    """The bits of :func:`packed`, bool."""
    return torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(text))), dtype=torch.bool)
