"""Figure 1 and Corollary 1: gradient descent and AdamW on quadratics with a diagonal Hessian."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adamprox import AdamW

if TYPE_CHECKING:
    from collections.abc import Callable

CONDITION_NUMBERS = (1.0, 1e5, 2.0**17)  # the last one scales gradients by powers of two
STEPS = 200
MINIMIZER = (0.7, -0.4)
START = (-1.3, 1.1)
LEARNING_RATES = [mantissa * 10.0**exponent for exponent in range(-6, 1) for mantissa in (1, 2, 5)]


class Path(NamedTuple):
    """The best run of an algorithm: its iterates, (steps + 1, 2), and how far the last one is."""

    algorithm: str
    condition_number: float
    lr: float
    iterates: Tensor
    distance: float


def gradient_descent(hessian: Tensor, lr: float, steps: int = STEPS) -> Tensor:
    """``x <- x - lr * H (x - x*)``: the iterates, (steps + 1, 2)."""
    x, minimizer = _ends(hessian.dtype)
    iterates = [x]
    for _ in range(steps):
        x = x - lr * (hessian * (x - minimizer))
        iterates.append(x)
    return torch.stack(iterates)


def adamw(hessian: Tensor, lr: float, steps: int = STEPS, weight_decay: float = 0.0) -> Tensor:
    """AdamW with ``eps = 0`` and a cosine schedule: the iterates, (steps + 1, 2)."""
    x, minimizer = _ends(hessian.dtype)
    param = torch.nn.Parameter(x.clone())
    optimizer = AdamW([param], lr=lr, eps=0.0, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    iterates = [x]
    for _ in range(steps):
        param.grad = hessian * (param.detach() - minimizer)
        optimizer.step()
        schedule.step()
        iterates.append(param.detach().clone())
    return torch.stack(iterates)


def hessian_of(condition_number: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """The diagonal ``(condition_number, 1)``."""
    return torch.tensor([condition_number, 1.0], dtype=dtype)


def best_paths() -> list[Path]:
    """Both algorithms on each problem, each at the learning rate that ends nearest."""
    algorithms: dict[str, Callable[[Tensor, float], Tensor]] = {
        "GD": gradient_descent,
        "AdamW": adamw,
    }
    result = []
    for number in CONDITION_NUMBERS:
        hessian = hessian_of(number)
        for name, algorithm in algorithms.items():
            runs = []
            for lr in LEARNING_RATES:
                iterates = algorithm(hessian, lr)
                distance = torch.linalg.vector_norm(iterates[-1] - iterates.new_tensor(MINIMIZER))
                runs.append(Path(name, number, lr, iterates, distance.item()))
            finite = [run for run in runs if math.isfinite(run.distance)]
            result.append(min(finite, key=lambda run: run.distance))
    return result


def _ends(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.tensor(START, dtype=dtype), torch.tensor(MINIMIZER, dtype=dtype)
