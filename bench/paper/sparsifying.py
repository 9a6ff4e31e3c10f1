"""Trainings that end with an asked share of zeros, all alike: sparsify, and fine-tune what is left.

The first 60 % of the epochs sparsify: a proximal rule led by :class:`adamprox.SparsityTarget`, or
any other training, after which the smallest weights are set to zero. The others are AdamW's without
decay, while zeros stay zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import adamprox

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

SHARE = 0.6  # of the epochs
RAMP = 0.8  # of their steps: after that many, the share is to be reached


def epochs_of(sparsity: float, epochs: int) -> int:
    """How many epochs sparsify; 0 where nothing is asked for."""
    return round(SHARE * epochs) if sparsity else 0


def begin(optimizer: Optimizer, sparsity: float, steps: int) -> None:
    """Leads a proximal rule that makes zeros; for other rules, nothing."""
    if optimizer.param_groups[0]["decay"] in ("prox_l1", "prox_l2"):
        adamprox.SparsityTarget(optimizer, sparsity, int(RAMP * steps))


@torch.no_grad()
def fine_tuner(model: nn.Module, sparsity: float, lr: float, before: Optimizer) -> Optimizer:
    """AdamW, for what is left; after a training that made no zeros, the smallest are pruned."""
    if before.param_groups[0]["decay"] not in ("prox_l1", "prox_l2"):
        weights = [param for param in model.parameters() if param.dim() > 1]
        magnitudes = torch.cat([weight.flatten() for weight in weights]).abs()
        last = magnitudes.kthvalue(max(1, round(sparsity * len(magnitudes)))).values
        for weight in weights:
            weight[weight.abs() <= last] = 0
    optimizer = adamprox.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    adamprox.freeze_zeros(optimizer)
    return optimizer
