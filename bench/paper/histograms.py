"""The distribution of update magnitudes, as the paper's figures 3 and 7 to 12 show it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adamprox.telemetry import quantile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adamprox.optimizers import _FusedAdam


def update_histogram(optimizer: _FusedAdam) -> Tensor:
    """Counts abs(update) / alpha of all coordinates in log2 bins, (BINS,), int64, on the CPU.

    Of the last step that was tracked, in the bins of :class:`adamprox.UpdateStats`: without the
    weight decay beside the update, as in the authors' code.
    """
    return torch.stack([stats.bins for stats in optimizer.update_stats()]).sum(0)


def interquartile_range(counts: Sequence[int]) -> float:
    """How many octaves the middle half of the update magnitudes spans."""
    return quantile(counts, 0.75) - quantile(counts, 0.25)


def inner_range(histograms: Sequence[Sequence[int]]) -> float:
    """The same of the last one's inner bins: no zeros as of a dead rectifier, no ones."""
    inner = histograms[-1][1:-1] if histograms else []
    return interquartile_range([0, *inner, 0]) if sum(inner) else math.nan
