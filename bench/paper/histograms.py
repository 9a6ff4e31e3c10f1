"""The distribution of update magnitudes, as the paper's figures 3 and 7 to 12 show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

LOWEST, HIGHEST = -27, 0  # exponents: up to 2^-27 is one bin, from 1 on is another

# Bin 0 has what is at most 2^-27, bin k what is above 2^(k-28) and at most 2^(k-27), and the last
# one what is at least 1; so of the last but one, 1 itself is not a part.
_EDGES = [2.0**exponent for exponent in range(LOWEST, HIGHEST)]
BINS = len(_EDGES) + 2


def update_histogram(optimizer: Optimizer) -> Tensor:
    """Counts abs(update) / alpha of all coordinates in log2 bins, (BINS,), int64, on the CPU.

    The update is the one of the step just made, without the weight decay beside it, as in the
    authors' code: ``eta_t * mhat / (sqrt(vhat) + eps)``, taken from the states. NaN is not counted.
    """
    counts = torch.zeros(BINS, dtype=torch.int64)
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        eta = group["lr"] / group.get("initial_lr", group["lr"])
        for param in group["params"]:
            state = optimizer.state[param]
            step = int(state["step"])
            first = state["exp_avg"] / (1 - beta1**step)
            second = state["exp_avg_sq"] / (1 - beta2**step)
            magnitudes = (eta * first / (second.sqrt() + group["eps"])).abs().flatten()
            below_one = torch.nextafter(magnitudes.new_tensor(1.0), magnitudes.new_tensor(0.0))
            edges = torch.cat((magnitudes.new_tensor(_EDGES), below_one.view(1)))
            bins = torch.bucketize(magnitudes[~magnitudes.isnan()], edges)
            counts += torch.bincount(bins, minlength=BINS).cpu()
    return counts


def quantile(counts: Sequence[int], share: float) -> float:
    """The log2 magnitude below which this share lies: linear within a bin, NaN of no counts.

    What is in the first or the last bin counts as at 2^-27 or at 1.
    """
    total = sum(counts)
    if total == 0:
        return float("nan")
    wanted, below = share * total, 0.0
    for index, count in enumerate(counts[:-1]):
        if below + count >= wanted and count > 0:
            inside = (wanted - below) / count
            return float(LOWEST if index == 0 else LOWEST + index - 1 + inside)
        below += count
    return float(HIGHEST)


def interquartile_range(counts: Sequence[int]) -> float:
    """How many octaves the middle half of the update magnitudes spans."""
    return quantile(counts, 0.75) - quantile(counts, 0.25)
