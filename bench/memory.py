"""How much memory a step takes beyond params, grads and states.

On a CPU by the peak of the resident set, in a process of its own: elsewhere, memory that was freed
before and kept by the allocator would hide what a step takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import adamprox

from .contenders import DTYPES, contenders
from .models import MODELS
from .providers import providers
from .timing import synchronize

if TYPE_CHECKING:
    from collections.abc import Callable

WAYS = ("step", "step_in_backward")
WIDTH, LAYERS = 1024, 16  # of the network for which they are compared
LAYER_BYTES = 4 * WIDTH * WIDTH


def peak_extra_bytes(step: Callable[[], object], device: torch.device) -> int:
    """How far memory rises during ``step()``, which has been called before."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The least of three: the readings themselves take a page now and then.
    return min(_resident_rise(step) for _ in range(3))


def _resident_rise(step: Callable[[], object]) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def peak_extra_bytes_of(model: str, optimizer: str, backend: str, dtype: str = "float32") -> int:
    """Of a step on the CPU, in a process of its own, on as many threads as here."""
    return _in_a_process("main", model, optimizer, backend, dtype)


def peak_training_bytes(way: str, device: torch.device) -> int:
    """How far memory rises in a training step of a network whose gradients are nearly all of it.

    Args:
        way: "step" for ``optimizer.step()`` after backward, or "step_in_backward".
    """
    layers = [nn.Linear(WIDTH, WIDTH, bias=False, device=device) for _ in range(LAYERS)]
    model = nn.Sequential(*layers)
    optimizer = adamprox.AdamW(model.parameters())
    if way == "step_in_backward":
        adamprox.step_in_backward(model, optimizer)
    batch = torch.randn(4, WIDTH, device=device)

    def train() -> None:
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    return peak_extra_bytes(train, device)


def peak_training_bytes_of(way: str) -> int:
    """:func:`peak_training_bytes` on the CPU, in a process of its own."""
    return _in_a_process("main_training", way)


def _in_a_process(main: str, *arguments: str) -> int:
    """The last word that a function of this module prints, on as many threads as here."""
    code = f"import sys; from adamprox.bench.memory import {main}; {main}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *arguments, str(torch.get_num_threads())]
    # So that malloc gives whatever is larger back to the system as soon as it is freed.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    result = subprocess.run(
        command, env={**os.environ, **malloc}, check=True, stdout=subprocess.PIPE
    )
    return int(result.stdout.split()[-1])  # peers print, too


def _status(key: str) -> int:
    """A value of /proc/self/status, which are in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def main(model: str, optimizer: str, backend: str, dtype: str, threads: str) -> None:
    """Prints the extra bytes of a step, in the process that :func:`peak_extra_bytes_of` starts."""
    torch.set_num_threads(int(threads))
    device = torch.device("cpu")
    found, _ = providers([optimizer], device, [backend])
    made, _ = contenders(MODELS[model], found, device, DTYPES[dtype])
    step = made[0].optimizer.step
    step()
    print(peak_extra_bytes(step, device))


def main_training(way: str, threads: str) -> None:
    """Prints what :func:`peak_training_bytes_of` asks for."""
    torch.set_num_threads(int(threads))
    print(peak_training_bytes(way, torch.device("cpu")))
