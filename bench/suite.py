"""Everything that ``adamprox bench`` measures, part by part, behind a progress bar."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from adamprox.command_line import progress_bar

from .end_to_end import NETWORKS, end_to_end
from .memory import LAYER_BYTES, LAYERS, WAYS, peak_training_bytes, peak_training_bytes_of
from .models import LARGEST_ON_CPU, MODELS, SIZES, Model
from .records import provenance
from .steps import Settings, add_extra_bytes, caches_of, rows_of
from .timing import Copy

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from .providers import Provider

Row = dict[str, Any]

PARTS = ("steps", "sizes", "memory", "end-to-end", "picture")
LARGE = 1 << 26  # elements, from which on a step's extra memory is worth a process of its own

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s"


class Results(NamedTuple):
    """Rows with their provenance, and what has none, with the reason."""

    steps: list[Row]
    sizes: list[Row]
    end_to_end: list[Row]
    memory: list[Row]
    skipped: dict[str, str]


Keep = Callable[[list[Row], list[Row]], None]
"""Is told which list of the results got which rows."""


class Job(NamedTuple):
    """A model to be timed, and the list that its rows go to."""

    rows: list[Row]
    name: str
    model: Model
    caches: tuple[str, ...]
    seconds: float  # for each of its caches


def measure(
    parts: Sequence[str],
    models: Sequence[str],
    providers: Sequence[Provider],
    device: torch.device,
    dtype: str,
    seconds: float,
    results: Results,
    keep: Keep,
) -> None:
    """Measures so many seconds for each model and state of its caches, and for each network.

    A quarter for each size. Rows go to ``results`` and to ``keep`` when they are there.
    """
    where = provenance(device)

    def add(to: list[Row], rows: Iterable[Row]) -> None:
        complete = [row | where for row in rows]
        to.extend(complete)
        keep(to, complete)

    jobs = _jobs(parts, models, device, dtype, seconds, results)
    networks = NETWORKS if "end-to-end" in parts else {}
    total = sum(job.seconds * len(job.caches) for job in jobs) + seconds * len(networks)
    with progress_bar(total, bar_format=_BAR) as bar:
        copy = Copy(device)
        for job in jobs:
            bar.set_description_str(job.name, refresh=False)
            settings = Settings(device, dtype, job.seconds, copy, bar.update)
            try:
                rows, without = rows_of(job.name, job.model, providers, settings, job.caches)
            except MemoryError as error:
                results.skipped[job.name] = str(error)
                continue
            results.skipped.update(without)
            if job.rows is results.steps and "memory" in parts and device.type == "cpu":
                large = [row for row in rows if row["elements"] >= LARGE]
                if problem := add_extra_bytes(large, providers):
                    results.skipped[f"extra memory of {job.name}"] = problem
            add(job.rows, rows)
        if "memory" in parts:
            bar.set_description_str("memory", refresh=False)
            try:
                add(results.memory, [_memory_of_training(way, device) for way in WAYS])
            except (OSError, subprocess.CalledProcessError) as error:
                results.skipped["memory of training"] = str(error)
        for name in networks:
            bar.set_description_str(f"training {name}", refresh=False)
            add(results.end_to_end, end_to_end(name, device, seconds, bar.update))


def _jobs(
    parts: Sequence[str],
    models: Sequence[str],
    device: torch.device,
    dtype: str,
    seconds: float,
    results: Results,
) -> list[Job]:
    """Models in each state of the caches that matters to them; sizes in the last one alone."""
    jobs = []
    for name in models if "steps" in parts else ():
        caches = caches_of(MODELS[name], dtype)
        jobs.append(Job(results.steps, name, MODELS[name], caches, seconds))
    for name, model in SIZES.items() if "sizes" in parts else ():
        if device.type != "cpu" or model.numel <= LARGEST_ON_CPU:
            caches = caches_of(model, dtype)[-1:]
            jobs.append(Job(results.sizes, name, model, caches, seconds / 4))
    return jobs


def _memory_of_training(way: str, device: torch.device) -> Row:
    on_cpu = device.type == "cpu"
    peak = peak_training_bytes_of(way) if on_cpu else peak_training_bytes(way, device)
    return {"way": way, "grad_bytes": LAYERS * LAYER_BYTES, "peak_bytes": peak}
