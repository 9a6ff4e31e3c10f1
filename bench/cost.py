"""What a step must cost: bytes moved and kernels launched, so that each time can be checked.

Every optimizer here reads the grad, and reads and writes the param and each state, once: a step of
n elements moves

    n * (grad + 2 * param + 2 * (exp_avg + exp_avg_sq [+ max_exp_avg_sq]))  bytes.

AdamProxL2 reads and writes the param a second time, to shrink it once its norm is known, where the
block is larger than one chunk; a smaller one is still in the cache (on a GPU, its L2).

| params and grads  | states  | AdamW, AdamProx, AdamProxL1, Adam | AdamProxL2, large blocks |
|-------------------|---------|-----------------------------------|--------------------------|
| float32           | float32 | 28                                | 36                       |
| bfloat16, float16 | same    | 14                                | 18                       |
| bfloat16          | float32 | 22                                | 26                       |

amsgrad adds two accesses of its state: 8 bytes in float32. A peer's bytes are counted as if it made
one pass as well, so a bandwidth says how fast the work is done, however often it moves the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adamprox.reference import CHUNK_SIZE, block_numel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer


class Cost(NamedTuple):
    """Of one step over all tensors of an optimizer."""

    bytes: int
    state_dtype: torch.dtype


def bytes_per_element(
    param: torch.dtype, states: Sequence[torch.dtype], second_sweep: bool = False
) -> int:
    """Bytes a step moves for an element; its grad has the param's dtype."""
    sweeps = 2 if second_sweep else 1
    return param.itemsize * (1 + 2 * sweeps) + 2 * sum(state.itemsize for state in states)


def launches(optimizer: Optimizer, backend: str) -> int | None:
    """Kernels a step of ours launches on a device, or None where that is torch's business."""
    if backend == "reference":  # the specification, in eager PyTorch
        return None
    second_sweep = _shrinks(optimizer) and backend == "triton"
    slots = second_sweep and optimizer.defaults["block"] == "group"
    recipes = bool(optimizer.defaults["capturable"])  # scalars are made where the step count lies
    return 1 + second_sweep + slots + recipes


def _shrinks(optimizer: Optimizer) -> bool:
    return type(optimizer).__name__ == "AdamProxL2"


def cost_of(optimizer: Optimizer) -> Cost | None:
    """From the states that a first step has made, or None if they are not plain tensors."""
    total = 0
    state_dtype = None
    shrinks = _shrinks(optimizer)
    for group in optimizer.param_groups:
        for param in group["params"]:
            items = optimizer.state[param].items()
            tensors = [value for key, value in items if key != "step" and isinstance(value, Tensor)]
            states = [tensor for tensor in tensors if tensor.shape == param.shape]
            if len(states) < 2 or any(type(state) is not Tensor for state in states):
                return None  # compressed: a layout of its own, in tensor subclasses
            state_dtype = states[0].dtype
            dtypes = [state.dtype for state in states]
            block = group["block"] if shrinks else None
            second_sweep = block == "group" or (
                block is not None and block_numel(param, block) > CHUNK_SIZE
            )
            total += param.numel() * bytes_per_element(param.dtype, dtypes, second_sweep)
    return None if state_dtype is None else Cost(total, state_dtype)
