"""Trainings that end with an asked share of zeros, all alike: sparsify, and fine-tune what is left.

The first 60 % of the epochs sparsify along one ramp: a proximal rule led by
:class:`adamprox.SparsityTarget`, or any other training, whose smallest weights are set to zero step
by step. The others are AdamW's without decay, while zeros stay zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import adamprox
from adamprox.sparsity_target import cubic_ramp

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

SHARE = 0.6  # of the epochs
RAMP = 0.8  # of their steps: after that many, the share is to be reached
EVERY = 5  # steps: how often the ramp is looked at, as SparsityTarget does


def epochs_of(sparsity: float, epochs: int) -> int:
    """How many epochs sparsify; 0 where nothing is asked for."""
    return round(SHARE * epochs) if sparsity else 0


def begin(model: nn.Module, optimizer: Optimizer, sparsity: float, steps: int) -> None:
    """Leads a rule that makes zeros, or prunes after the steps of another one."""
    ramp = int(RAMP * steps)
    if optimizer.param_groups[0]["decay"] in ("prox_l1", "prox_l2"):
        adamprox.SparsityTarget(optimizer, sparsity, ramp)
        return
    step, frozen = 0, adamprox.freeze_zeros(optimizer)

    def prune(*_: object) -> None:
        nonlocal step, frozen
        step += 1
        if step <= ramp and (step % EVERY == 0 or step == ramp):
            frozen.remove()
            zero_smallest(model, sparsity * cubic_ramp(step, ramp))
            frozen = adamprox.freeze_zeros(optimizer)

    optimizer.register_step_post_hook(prune)


@torch.no_grad()
def zero_smallest(model: nn.Module, share: float) -> None:
    """Sets this share of all weights, biases aside, to zero."""
    weights = [param for param in model.parameters() if param.dim() > 1]
    magnitudes = torch.cat([weight.flatten() for weight in weights]).abs()
    count = round(share * len(magnitudes))
    if count > 0:
        largest = magnitudes.kthvalue(count).values
        for weight in weights:
            weight[weight.abs() <= largest] = 0


def fine_tuner(model: nn.Module, lr: float) -> Optimizer:
    """AdamW, for what is left."""
    optimizer = adamprox.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    adamprox.freeze_zeros(optimizer)
    return optimizer
