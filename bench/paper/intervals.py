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


LEVEL = 0.05  # of McNemar's tests


class Difference(NamedTuple):
    """Of errors: the first optimizer's minus the second's, so that it is what the second gains.

    Attributes:
        mean: over the seeds.
        low, high: the ends of its 95 % interval, of Student's t. It knows the seeds' chance, given
            the settings.
        first_better, second_better: in how many seeds McNemar's exact test, of the pictures that
            only one of them classifies right, tells this one to be better at the level of 5 %. It
            knows the pictures' chance.
    """

    mean: float
    low: float
    high: float
    first_better: int
    second_better: int


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's t interval of the mean, of 95 %; NaN for a single value, or where one is NaN."""
    from scipy.stats import t

    if len(values) < 2 or any(map(math.isnan, values)):
        return math.nan, math.nan
    mean = statistics.mean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = error * float(t.ppf(0.975, len(values) - 1))
    return mean - half, mean + half


def difference(first: Sequence[Result], second: Sequence[Result]) -> Difference:
    """Of the same seeds in the same order."""
    from scipy.stats import binomtest

    gains = [a.test_error - b.test_error for a, b in zip(first, second, strict=True)]
    better = [0, 0]
    for a, b in zip(first, second, strict=True):
        if a.correct and b.correct:
            right, other = unpacked(a.correct), unpacked(b.correct)
            alone = [int((right & ~other).sum()), int((other & ~right).sum())]
            if sum(alone) and float(binomtest(alone[0], sum(alone)).pvalue) < LEVEL:
                better[alone[1] > alone[0]] += 1
    low, high = interval(gains)
    return Difference(statistics.mean(gains), low, high, *better)


def loss_ratio(first: Sequence[Result], second: Sequence[Result]) -> tuple[float, float, float]:
    """The second's training loss over the first's, with its interval; below 1 it trains faster.

    Of the losses at the ends of epochs, the geometric mean over the training, paired by seed.
    """
    logs = [
        statistics.mean(map(_log, b.train_losses)) - statistics.mean(map(_log, a.train_losses))
        for a, b in zip(first, second, strict=True)
    ]
    low, high = interval(logs)
    return math.exp(statistics.mean(logs)), math.exp(low), math.exp(high)


def _log(loss: float) -> float:
    return math.log(loss) if loss > 0 else math.nan  # NaN of a training that diverged, too


def slope(
    xs: Sequence[float], first: Sequence[Sequence[Result]], second: Sequence[Sequence[Result]]
) -> tuple[float, float, float]:
    """How fast what the second gains grows with x, with its interval over the seeds.

    Args:
        xs: (n,), two different ones or more.
        first, second: n times the same seeds in the same order.
    """
    middle = statistics.mean(xs)
    of_seeds = []
    for seed in range(len(first[0])):
        gains = [
            a[seed].test_error - b[seed].test_error for a, b in zip(first, second, strict=True)
        ]
        products = [(x - middle) * gain for x, gain in zip(xs, gains, strict=True)]
        of_seeds.append(sum(products) / sum((x - middle) ** 2 for x in xs))
    return statistics.mean(of_seeds), *interval(of_seeds)


def packed(bits: Tensor) -> str:
    """Of a bool tensor, as text."""
    return base64.b85encode(zlib.compress(bits.to(torch.uint8).cpu().numpy().tobytes(), 9)).decode()


def unpacked(text: str) -> Tensor:
    """The bits of :func:`packed`, bool."""
    return torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(text))), dtype=torch.bool)
