"""Optimizers over params of a model, made ready for their first timed step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from .cost import Cost, cost_of
from .providers import LR, Provider

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

    from .models import Model


class DTypes(NamedTuple):
    """Of params and grads, and of states (None: as the optimizer makes them)."""

    param: torch.dtype
    state: torch.dtype | None = None


DTYPES = {
    "float32": DTypes(torch.float32),
    "bfloat16": DTypes(torch.bfloat16),
    "bfloat16_float32": DTypes(torch.bfloat16, torch.float32),
    "float16": DTypes(torch.float16),
}


class Contender(NamedTuple):
    """A provider's optimizer over params of its own, after one step."""

    provider: Provider
    optimizer: Optimizer
    cost: Cost | None


def contenders(
    model: Model, providers: Sequence[Provider], device: torch.device, dtypes: DTypes
) -> tuple[list[Contender], dict[str, str]]:
    """Their optimizers for a model, and why others are left out; all share one set of grads.

    Raises:
        MemoryError: they do not fit; the message says how much they need.
    """
    check_memory(model, len(providers), device, dtypes)
    grads = [torch.randn(shape, device=device, dtype=dtypes.param) for shape in model.shapes]
    result, skipped = [], {}
    for provider in providers:
        params = model.params(device, dtypes.param)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer = provider.make(model.param_groups(params, LR))
        if dtypes.state is not None and provider.provider == "adamprox":
            give_states(optimizer, dtypes.state)
        optimizer.step()
        cost = cost_of(optimizer)
        if cost is not None and dtypes.state not in (None, cost.state_dtype):
            skipped[provider.name] = (
                f"its states are {str(cost.state_dtype).removeprefix('torch.')}"
            )
            continue
        result.append(Contender(provider, optimizer, cost))
    return result, skipped


def give_states(optimizer: Optimizer, dtype: torch.dtype) -> None:
    """States as a checkpoint may bring them; made by a step, they have the param's dtype."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            step_device = param.device if group["capturable"] else None
            optimizer.state[param] = {
                "step": torch.tensor(0.0, device=step_device),
                "exp_avg": torch.zeros_like(param, dtype=dtype),
                "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
            }


def check_memory(model: Model, count: int, device: torch.device, dtypes: DTypes) -> None:
    """Whether grads, and params and states of so many optimizers, fit into what is available."""
    state = dtypes.state or dtypes.param
    each = dtypes.param.itemsize + 2 * state.itemsize
    # And the params once more, which foreach takes during its step.
    need = model.numel * (2 * dtypes.param.itemsize + count * each)
    available = available_bytes(device)
    if need > 0.9 * available:  # the rest is for what a step takes, and for others
        raise MemoryError(
            f"{count} optimizers need {need / 1e9:.1f} GB together, "
            f"of {available / 1e9:.1f} GB available; take fewer at a time"
        )


def available_bytes(device: torch.device) -> float:
    """Memory that can be had without driving anything out."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps is no one else's, but counts as used
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as file:
        host = next(1024 * int(line.split()[1]) for line in file if "MemAvailable" in line)
    return min(host, _left_to_container())


def _left_to_container(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """What a container's limit leaves; infinite where there is none."""
    try:
        limit, used = ((folder / f"memory.{name}").read_text() for name in ("max", "current"))
        return math.inf if limit.strip() == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return math.inf
