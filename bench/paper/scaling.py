"""Section 4.2 with ``eps = 0``: the loss times a constant, and who notices."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

import adamprox

from . import data, networks

if TYPE_CHECKING:
    from collections.abc import Callable

FACTORS = (1.0, 10.0, 100.0, 128.0)  # the last one is a power of two
OPTIMIZERS = ("AdamW", "AdamProx", "Adam")
STEPS = 150
LAYERS = 10
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-3


class Curve(NamedTuple):
    """The losses of a training, a step each, before they are multiplied."""

    optimizer: str
    dtype: str
    factor: float
    losses: list[float]


def curves(steps: int, advance: Callable[[], object] | None = None) -> list[Curve]:
    """Each optimizer, float32 and float64, each factor; the same weights and images for all."""
    result = []
    for optimizer in OPTIMIZERS:
        for dtype in (torch.float32, torch.float64):
            for factor in FACTORS:
                losses = train(optimizer, dtype, factor, steps)
                result.append(Curve(optimizer, str(dtype).split(".")[1], factor, losses))
                if advance is not None:
                    advance()
    return result


def deviation(curve: Curve, original: Curve) -> float:
    """The largest relative difference of two curves' losses; 0 where they agree to the bit."""
    pairs = zip(curve.losses, original.losses, strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def train(
    name: str, dtype: torch.dtype, factor: float, steps: int, weight_decay: float = WEIGHT_DECAY
) -> list[float]:
    """The losses of one of adamprox's optimizers with ``eps = 0``, on a factor times the loss."""
    images = data.load("digits", 8)
    torch.manual_seed(0)
    model = networks.TanhNetwork(LAYERS).to(dtype)
    optimizer = getattr(adamprox, name)(
        model.parameters(), LEARNING_RATE, eps=0.0, weight_decay=weight_decay, decay_by="schedule"
    )
    random = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(images.train), (64,), generator=random)
        loss = F.cross_entropy(model(images.train[batch].to(dtype)), images.train_labels[batch])
        optimizer.zero_grad()
        (factor * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
