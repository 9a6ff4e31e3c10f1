"""The share of a training step that the optimizer takes: with torch's, and with ours."""

from __future__ import annotations

import copy
import random
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from adamprox.resnet import ResNet

from .providers import BASELINE, VALUES, Provider, providers
from .small_gpt import SmallGPT
from .timing import enough, synchronize

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.optim import Optimizer

Row = dict[str, Any]

WARM_UP = 1  # turns that do not count
TURNS = 10


class Network(NamedTuple):
    """A network and a small batch of what it takes; its loss is the cross entropy."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: Callable[[], Tensor]


NETWORKS = {
    "small GPT": Network(
        SmallGPT,
        lambda: torch.randint(2048, (4, 128)),
        lambda: torch.randint(2048, (4, 128)),
    ),
    "ResNet-218 without BN": Network(
        lambda: ResNet(218),
        lambda: torch.randn(8, 3, 32, 32),
        lambda: torch.randint(10, (8,)),
    ),
}


def end_to_end(
    name: str, device: torch.device, seconds: float, advance: Callable[[float], object]
) -> list[Row]:
    """Trains a network for so many seconds, a step with each optimizer in turns."""
    default = partial(torch.optim.AdamW, **VALUES)  # torch chooses between for-loop and foreach
    default_torch = ("torch", torch.__version__, "AdamW", "default")
    before = Provider("torch default", "torch default", *default_torch, default)
    contenders = [before, *providers([BASELINE, "AdamW"], device)[0]]
    network = NETWORKS[name]
    inputs, targets = network.inputs().to(device), network.targets().to(device)
    first = network.make().to(device)
    models = [copy.deepcopy(first) for _ in contenders]
    optimizers = [c.make(m.parameters()) for c, m in zip(contenders, models, strict=True)]
    times: list[list[tuple[float, float]]] = [[] for _ in contenders]
    order = list(range(len(contenders)))
    shuffle = random.Random(0).shuffle
    turn, elapsed = -WARM_UP, 0.0
    while not enough(turn, TURNS, elapsed, seconds):
        start = time.perf_counter()
        shuffle(order)
        for index in order:
            took = _train(models[index], optimizers[index], inputs, targets, device)
            if turn >= 0:
                times[index].append(took)
        if turn >= 0:
            took_turn = time.perf_counter() - start
            advance(max(0.0, min(took_turn, seconds - elapsed)))
            elapsed += took_turn
        turn += 1
    tensors = [p.numel() for p in first.parameters()]
    about = {"network": name, "tensors": len(tensors), "elements": sum(tensors)}
    return [
        {**about, "name": contender.name, "backend": contender.backend, **_result(t)}
        for contender, t in zip(contenders, times, strict=True)
    ]


def _train(
    model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor, device: torch.device
) -> tuple[float, float]:
    """The seconds of forward and backward, and of the optimizer's step."""
    synchronize(device)
    start = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()
    synchronize(device)
    middle = time.perf_counter()
    optimizer.step()
    synchronize(device)
    return middle - start, time.perf_counter() - middle


def _result(times: list[tuple[float, float]]) -> Row:
    forward_backward, step = zip(*times, strict=True)
    tenths = statistics.quantiles(step, n=10, method="inclusive")
    forward_backward_ms = 1e3 * statistics.median(forward_backward)
    p20, p50, p80 = (1e3 * tenths[i] for i in (1, 4, 7))
    return {
        "forward_backward_ms": round(forward_backward_ms, 3),
        "optimizer_ms": round(p50, 4),
        "optimizer_p20_ms": round(p20, 4),
        "optimizer_p80_ms": round(p80, 4),
        "share_of_step": round(p50 / (forward_backward_ms + p50), 4),
        "steps": len(step),
    }
