"""Everything that ``adamprox bench`` measures, part by part, behind a progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .end_to_end import NETWORKS, end_to_end
from .memory import LAYER_BYTES, LAYERS, WAYS, peak_training_bytes, peak_training_bytes_of
from .models import LARGEST_ON_CPU, MODELS, SIZES
from .records import provenance
from .steps import Settings, add_extra_bytes, rows_of
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


def measure(
    parts: Sequence[str],
    models: Sequence[str],
    providers: Sequence[Provider],
    device: torch.device,
    dtype: str,
    seconds: float,
) -> Results:
    """Measures so many seconds for each model and network, and a quarter for each size."""
    from tqdm import tqdm

    where = provenance(device)
    results = Results([], [], [], [], {})
    timed = {name: MODELS[name] for name in models if "steps" in parts}
    largest = LARGEST_ON_CPU if device.type == "cpu" else max(m.numel for m in SIZES.values())
    sizes = {n: m for n, m in SIZES.items() if "sizes" in parts and m.numel <= largest}
    networks = NETWORKS if "end-to-end" in parts else {}
    total = seconds * (len(timed) + len(sizes) / 4 + len(networks))
    with tqdm(total=total, disable=None, leave=False, bar_format=_BAR) as bar:
        copy = Copy(device)
        for rows, of_part, share in ((results.steps, timed, 1.0), (results.sizes, sizes, 0.25)):
            settings = Settings(device, dtype, share * seconds, copy, bar.update)
            for name, model in of_part.items():
                bar.set_description_str(name)
                try:
                    new, skipped = rows_of(name, model, providers, settings)
                except MemoryError as error:
                    results.skipped[name] = str(error)
                else:
                    rows.extend(new)
                    results.skipped.update(skipped)
        del copy, settings  # its buffer is large
        if "memory" in parts:
            bar.set_description_str("memory")
            if device.type == "cpu":
                add_extra_bytes([r for r in results.steps if r["elements"] >= LARGE], providers)
            results.memory.extend(_memory_of_training(way, device) for way in WAYS)
        for name in networks:
            bar.set_description_str(f"training {name}")
            results.end_to_end.extend(end_to_end(name, device, seconds, bar.update))
    for rows in (results.steps, results.sizes, results.end_to_end, results.memory):
        rows[:] = [row | where for row in rows]
    return results


def _memory_of_training(way: str, device: torch.device) -> Row:
    on_cpu = device.type == "cpu"
    peak = peak_training_bytes_of(way) if on_cpu else peak_training_bytes(way, device)
    return {"way": way, "grad_bytes": LAYERS * LAYER_BYTES, "peak_bytes": peak}
