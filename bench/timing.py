"""Steps timed in turns, in one process, beside a copy: what a shared machine does hits them alike.

The turns are shuffled, so that what the one before left in the cache favours none. A timed step
starts from caches in one of three states:

- "cold", as in a training loop: a backward pass makes new grads, and the caches are flushed.
- "warm": the step follows a few of the same optimizer that are not timed. A small model is then in
  the cache, on a GPU in its L2.
- "-", for models much larger than a cache: nothing is done before the step.
"""

from __future__ import annotations

import math
import random
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .captured import is_captured
from .cold import FLUSH_NUMEL, ColdStart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.optim import Optimizer

TURNS = 25  # for a median, and for 20 and 80 in a hundred
WARM_UP = 2  # turns that do not count: threads start, kernels are compiled, caches fill
UNTIMED = 4  # steps before a timed one in the cache: after one, much is not there yet
COPY_EVERY = 0.25  # seconds
# Far larger than a cache; on a GPU so that it takes much longer than its launch.
COPY_NUMEL = {"cpu": FLUSH_NUMEL, "cuda": 1 << 28}
COLD, WARM, EITHER = "cold", "warm", "-"  # the states of the caches, as a row names them


class Step(NamedTuple):
    """Seconds of one step, and how many of them the host took, where that can be told."""

    total: float
    host: float | None


class Timing(NamedTuple):
    """The counted steps of each optimizer, and the copies between them in bytes a second."""

    steps: list[list[Step]]
    copies: list[float]


class Copy:
    """The bandwidth that a step could have: every element is read once and written once.

    On a CPU in place. From one buffer to another, it would also fetch the lines that it overwrites:
    a third access, which is not counted and which an optimizer step does not have. A step may still
    be faster where writing is what limits: it writes 3 times in 7 accesses, a copy once in 2.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.ones(COPY_NUMEL[device.type], device=device)
        self.source = torch.ones_like(self.buffer) if device.type == "cuda" else None
        self()

    def __call__(self) -> float:
        """Bytes a second of one copy."""
        return 2 * self.buffer.nbytes / time_call(self._copy, self.device).total

    def _copy(self) -> None:
        if self.source is None:
            self.buffer.neg_()
        else:
            self.buffer.copy_(self.source)


def measure(
    optimizers: Sequence[Optimizer],
    copy: Copy,
    seconds: float,
    caches: str,
    advance: Callable[[float], object] = lambda seconds: None,
) -> Timing:
    """Times one step of each in turns for so long; ``advance`` hears of the seconds gone by.

    Args:
        optimizers: each has made its states already.
        copy: timed now and then between the turns.
        seconds: to spend, without the warm-up; up to three times as many for ``TURNS`` turns.
        caches: ``COLD``, ``WARM`` or ``EITHER``, at the start of each timed step.
        advance: of a progress bar of so many seconds.
    """
    timing = Timing([[] for _ in optimizers], [])
    prepare = [_preparation(optimizer, copy, caches) for optimizer in optimizers]
    order = list(range(len(optimizers)))
    shuffle = random.Random(0).shuffle
    turn, shown = -WARM_UP, 0.0
    start = copied = -math.inf
    while not enough(turn, TURNS, time.perf_counter() - start, seconds):
        if turn == 0:
            start = time.perf_counter()
        if time.perf_counter() - copied > COPY_EVERY:
            timing.copies.append(copy())
            copied = time.perf_counter()
        shuffle(order)
        for index in order:
            prepare[index]()
            step = time_step(optimizers[index], copy.device)
            if turn >= 0:
                timing.steps[index].append(step)
        turn += 1
        if turn > 0:
            elapsed = min(time.perf_counter() - start, seconds)
            advance(elapsed - shown)
            shown = elapsed
    return timing


def _preparation(optimizer: Optimizer, copy: Copy, caches: str) -> Callable[[], object]:
    """What to call before each timed step of an optimizer, outside the time."""
    if caches == COLD:
        return ColdStart(optimizer, copy.buffer, new_grads=not is_captured(optimizer))
    untimed = UNTIMED if caches == WARM else 0
    return lambda: [optimizer.step() for _ in range(untimed)]


def enough(turns: int, wanted: int, elapsed: float, seconds: float) -> bool:
    """Whether to stop: the turns wanted may take three times the seconds; two there must be."""
    return turns >= (wanted if elapsed < 3 * seconds else 2) and elapsed >= seconds


def time_step(optimizer: Any, device: torch.device) -> Step:
    """The time of one step."""
    step = time_call(optimizer.step, device)
    # On a CPU, only the backend "cpu" tells how long the update itself took.
    engine = getattr(optimizer, "_engine", None)
    if device.type == "cpu" and engine is not None and engine.gather.update_seconds > 0:
        return Step(step.total, step.total - engine.gather.update_seconds)
    return step


def time_call(call: Callable[[], object], device: torch.device) -> Step:
    """How long it takes until the device is done with it, and on a GPU, until it has returned.

    A GPU that has nothing to do takes the time itself: the host would take the time as well that it
    needs to hear of the end.
    """
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return Step(time.perf_counter() - start, None)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        begin.record()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
    return Step(begin.elapsed_time(end) / 1e3, host)


def synchronize(device: torch.device) -> None:
    """Waits until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
