"""Section 3: AdamW is AdamProx to first order; the remainder is O(lambda * eta^2)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from adamprox import AdamProx, AdamW

from . import data, networks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

ALPHA = 1e-3
WEIGHT_DECAY = 1e-3
ETAS = tuple(2.0**-k for k in range(7))
WEIGHT_DECAYS = tuple(1e-3 * 2.0**-k for k in range(7))
STEPS = 50
BATCH = 128
LAYERS = 10


class Point(NamedTuple):
    """How far AdamW and AdamProx are apart at most, over the steps from the same start."""

    eta: float
    weight_decay: float
    distance: float


def distances(over: str, steps: int) -> list[Point]:
    """Trains a smooth network on digits with both, in float64.

    Args:
        over: ``eta``, the learning rates' factor, at one weight decay, or ``weight_decay`` at
            ``eta = 1/8``.
    """
    settings = {
        "eta": [(eta, WEIGHT_DECAY) for eta in ETAS],
        "weight_decay": [(0.125, decay) for decay in WEIGHT_DECAYS],
    }[over]
    images = data.load("digits", 8)
    result = []
    for eta, weight_decay in settings:
        paths = [
            _train(optimizer, eta, weight_decay, steps, images) for optimizer in (AdamW, AdamProx)
        ]
        apart = [torch.linalg.vector_norm(a - b).item() for a, b in zip(*paths, strict=True)]
        result.append(Point(eta, weight_decay, max(apart)))
    return result


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line of least squares through ``(log2 x, log2 y)``."""
    logs = [(math.log2(x), math.log2(y)) for x, y in zip(xs, ys, strict=True)]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    above: float = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    spread: float = sum((x - mean_x) ** 2 for x, _ in logs)
    return above / spread


def _train(
    make: type[AdamW] | type[AdamProx],
    eta: float,
    weight_decay: float,
    steps: int,
    images: data.Images,
) -> list[Tensor]:
    """All weights in one vector, after each step."""
    torch.manual_seed(0)
    model = networks.TanhNetwork(LAYERS).double()
    # initial_lr stays alpha, so that the decay's strength is eta * weight_decay.
    optimizer = make(model.parameters(), ALPHA, weight_decay=weight_decay, decay_by="schedule")
    optimizer.param_groups[0]["lr"] = eta * ALPHA
    random = torch.Generator().manual_seed(0)
    result = []
    for _ in range(steps):
        batch = torch.randint(len(images.train), (BATCH,), generator=random)
        loss = F.cross_entropy(model(images.train[batch].double()), images.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    return result
