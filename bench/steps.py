"""A row of results for each optimizer and model."""

from __future__ import annotations

import statistics
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .contenders import DTYPES, Contender, contenders
from .cost import bytes_per_element, launches
from .memory import peak_extra_bytes, peak_extra_bytes_of
from .providers import BASELINE
from .timing import COLD, EITHER, WARM, Copy, Step, Timing, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .models import Model
    from .providers import Provider

Row = dict[str, Any]

# What the host may take of a step of ours besides the update, in microseconds.
HOST_BUDGET_US = 15.0
HOST_BUDGET_US_PER_TENSOR = 0.25

HOST_SECONDS = 0.2  # on each model, for what the host takes by itself
# Bytes that AdamW's step moves: below the first, a model counts as fitting into a cache, and above
# the second, neither new grads nor the host's own data matter beside them.
IN_CACHE = 1 << 25
MEMORY = 1 << 27


class Settings(NamedTuple):
    """How to measure; the same for all models."""

    device: torch.device
    dtype: str  # of DTYPES
    seconds: float  # for each model
    copy: Copy
    advance: Callable[[float], object]  # of a progress bar, in seconds


def caches_of(model: Model, dtype: str) -> tuple[str, ...]:
    """The states of the caches in which the steps of a model are timed."""
    param, state = DTYPES[dtype]
    moved = model.numel * bytes_per_element(param, 2 * [state or param])
    if moved < IN_CACHE:
        return (COLD, WARM)
    return (COLD,) if moved < MEMORY else (EITHER,)


def rows_of(
    name: str,
    model: Model,
    providers: Sequence[Provider],
    settings: Settings,
    every_caches: Sequence[str],
) -> tuple[list[Row], dict[str, str]]:
    """The rows of one model, timed in turns, and why some providers have none.

    Args:
        every_caches: the states of the caches to time it in, one after the other.

    Raises:
        MemoryError: the model does not fit.
    """
    made, skipped = contenders(model, providers, settings.device, DTYPES[settings.dtype])
    optimizers = [contender.optimizer for contender in made]
    timings = {
        caches: measure(optimizers, settings.copy, settings.seconds, caches, settings.advance)
        for caches in every_caches
    }
    first = next(iter(timings.values()))
    hosts = (_host_us(steps) for steps in first.steps)
    told = [c.provider for c, host in zip(made, hosts, strict=True) if host is not None]
    alone = _host_alone_us(model, told, settings)
    rows = []
    for caches, timing in timings.items():
        about: Row = {"model": name, "dtype": settings.dtype, "tensors": len(model.shapes)}
        about |= {"groups": model.groups, "elements": model.numel, "caches": caches}
        rows += [about | row for row in _rows(made, timing, alone, len(model.shapes))]
    if settings.device.type != "cuda":
        return [row | {"extra_bytes": None} for row in rows], skipped
    extra = {c.provider.name: peak_extra_bytes(c.optimizer.step, settings.device) for c in made}
    return [row | {"extra_bytes": extra[row["name"]]} for row in rows], skipped


def _rows(
    made: Sequence[Contender], timing: Timing, alone: dict[str, float], tensors: int
) -> list[Row]:
    """What a timing says of each contender."""
    copied = statistics.median(timing.copies)
    medians = [statistics.median(step.total for step in steps) for steps in timing.steps]
    baseline = {c.provider.name: m for c, m in zip(made, medians, strict=True)}.get(BASELINE)
    rows = []
    for contender, steps, median in zip(made, timing.steps, medians, strict=True):
        row = _about(contender) | _times(steps) | _bandwidth(contender, median, copied)
        row["times_as_fast_as_torch_fused"] = baseline and round(baseline / median, 3)
        row |= _host(contender, alone.get(contender.provider.name), _host_us(steps), tensors)
        rows.append(row)
    return rows


def add_extra_bytes(rows: Sequence[Row], providers: Sequence[Provider]) -> str | None:
    """Measures the memory that the steps of these rows take, on a CPU, once the model is gone.

    Returns:
        why it could not be measured, if so.
    """
    choices = {provider.name: provider.choice for provider in providers}
    for row in rows:
        try:
            row["extra_bytes"] = peak_extra_bytes_of(
                row["model"], choices[row["name"]], row["backend"], row["dtype"]
            )
        except subprocess.CalledProcessError as error:  # it has told why
            return f"{row['name']}: its process ended with {error.returncode}"
    return None


def _about(contender: Contender) -> Row:
    provider, cost = contender.provider, contender.cost
    ours = provider.provider == "adamprox"
    return {
        "name": provider.name,
        "provider": provider.provider,
        "version": provider.version,
        "optimizer": provider.optimizer,
        "backend": provider.backend,
        "state_dtype": cost and str(cost.state_dtype).removeprefix("torch."),
        "bytes": cost and cost.bytes,
        "launches": launches(contender.optimizer, provider.backend) if ours else None,
    }


def _times(steps: Sequence[Step]) -> Row:
    tenths = statistics.quantiles((step.total for step in steps), n=10, method="inclusive")
    p20, p50, p80 = (round(1e6 * tenths[i], 1) for i in (1, 4, 7))
    return {"p50_us": p50, "p20_us": p20, "p80_us": p80, "steps": len(steps)}


def _bandwidth(contender: Contender, seconds: float, copied: float) -> Row:
    """What it moves a second, and that as a share of the copies between its steps."""
    achieved = contender.cost and contender.cost.bytes / seconds
    return {
        "gb_per_s": achieved and round(achieved / 1e9, 2),
        "copy_gb_per_s": round(copied / 1e9, 2),
        "share_of_copy": achieved and round(achieved / copied, 3),
    }


def _host_alone_us(
    model: Model, providers: Sequence[Provider], settings: Settings
) -> dict[str, float]:
    """By name, what the host takes on as many tensors of one element each, which stay in the cache.

    In the timed steps of a large model, it also waits for its own data, which the update drove out.
    """
    if not providers:
        return {}
    tiny = model._replace(shapes=[(1,)] * len(model.shapes))
    made, _ = contenders(tiny, providers, settings.device, DTYPES[settings.dtype])
    optimizers = [contender.optimizer for contender in made]
    timing = measure(optimizers, settings.copy, HOST_SECONDS, WARM)
    hosts = (_host_us(steps) for steps in timing.steps)
    return {c.provider.name: us for c, us in zip(made, hosts, strict=True) if us is not None}


def _host_us(steps: Sequence[Step]) -> float | None:
    """The median, where it can be told."""
    seconds = [step.host for step in steps if step.host is not None]
    return 1e6 * statistics.median(seconds) if seconds else None


def _host(contender: Contender, alone: float | None, in_step: float | None, tensors: int) -> Row:
    budget = HOST_BUDGET_US + HOST_BUDGET_US_PER_TENSOR * tensors
    ours = alone is not None and contender.provider.provider == "adamprox"
    return {
        "host_us": alone and round(alone, 1),
        "host_us_per_tensor": alone and round(alone / tensors, 3),
        "host_budget_us": budget if ours else None,
        "within_host_budget": alone <= budget if ours and alone is not None else None,
        "host_in_step_us": in_step and round(in_step, 1),
    }
