"""Threads and forks: neither changes a bit, and neither hangs."""

from __future__ import annotations

import copy
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adamprox import backends
from registry import OPTIMIZERS, params_of

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)

# Well over what one thread takes alone, in tensors of many chunks and of few.
SHAPES = ((400_000,), (3, 5), (), (70_001,), *[(1000,)] * 50, (4 * 16384,))
TIMEOUT = 60  # for what would hang otherwise, and takes a second


def stepped(
    optimizer: str, seed: int = 0, grad_scale: float = 1.0, **arguments: Any
) -> torch.optim.Optimizer:
    """After two steps."""
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    spec = OPTIMIZERS[optimizer]
    arguments = {"lr": 1e-2, "weight_decay": spec.weight_decay, **arguments}
    opt = spec.cls(params, backend="cpu", **arguments)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator) * grad_scale
        opt.step()
    return opt


def digest(opt: torch.optim.Optimizer) -> str:
    """Of params and states. Without torch's operations: its threads hang in a forked child."""
    result = hashlib.sha256()
    for param in params_of(opt):
        for tensor in (param.detach(), *opt.state[param].values()):
            result.update(tensor.numpy().tobytes())
    return result.hexdigest()


CELLS = [
    *((name, {}) for name in OPTIMIZERS),
    *(("AdamProxL2", {"block": block}) for block in ("row", 3, "group")),
    *(("AdamW", {"ema_decay": 0.5}), ("AdamProxL1", {"bounds": (-0.5, 0.1)})),
]


@pytest.mark.parametrize(("optimizer", "options"), CELLS, ids=str)
def test_the_number_of_threads_changes_no_bit(optimizer, options):
    digests = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        digests.append(digest(stepped(optimizer, **options)))
    assert digests == digests[:1] * 4


@every_optimizer
def test_optimizers_in_several_python_threads_step_at_once(optimizer):
    """They give the bits that they give one after another."""
    expected = [digest(stepped(optimizer, seed)) for seed in range(3)]
    results: dict[int, str] = {}
    barrier = threading.Barrier(3)

    def work(seed: int) -> None:
        torch.set_num_threads(2)
        barrier.wait()
        results[seed] = digest(stepped(optimizer, seed))

    workers = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(TIMEOUT)
    assert [results.get(seed) for seed in range(3)] == expected


def in_threads(count: int, work) -> list[BaseException | None]:
    """What each call of ``work(index)`` raises, all at once."""
    barrier, errors = threading.Barrier(count), [None] * count

    def run(index: int) -> None:
        torch.set_num_threads(2)
        barrier.wait(TIMEOUT)
        try:
            work(index)
        except BaseException as error:
            errors[index] = error

    workers = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(TIMEOUT)
    assert not any(worker.is_alive() for worker in workers)
    return errors


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_optimizer
def test_threads_that_step_one_optimizer_wait_for_each_other(optimizer, backend):
    """The grads stay, so that it does not matter whose turn it is."""
    opt, twin = stepped(optimizer), stepped(optimizer)
    opt._backend = backend
    threads, steps = (4, 8) if backend == "cpu" else (2, 1)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        errors = in_threads(threads, lambda index: [opt.step() for _ in range(steps)])
    finally:
        sys.setswitchinterval(interval)
    assert errors == [None] * threads
    for _ in range(threads * steps):
        twin.step()
    assert digest(opt) == digest(twin)
    assert {state["step"].item() for state in opt.state.values()} == {2 + threads * steps}


class Calling:
    """A backend that calls something amid a step, and takes none."""

    follows_recipes = at_once = False

    def __init__(self, call):
        self.call, self.inside, self.most = call, 0, 0

    def why_not(self, device_type=None, index=None):
        return None

    def step(self, table, groups):
        yield
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            self.call()
        finally:
            self.inside -= 1


def test_no_thread_is_amid_an_optimizers_step_while_another_one_is(monkeypatch):
    """Steps of two optimizers do not wait for each other."""
    backend = Calling(lambda: time.sleep(0.01))
    monkeypatch.setitem(backends.BACKENDS, "calling", backend)
    opt, other = stepped("AdamW"), stepped("AdamW")
    opt._backend = other._backend = "calling"
    assert in_threads(4, lambda index: opt.step()) == [None] * 4
    assert backend.most == 1
    both_inside = threading.Barrier(2)
    backend.call = lambda: both_inside.wait(TIMEOUT)
    assert in_threads(2, lambda index: (opt, other)[index].step()) == [None] * 2


def test_a_step_amid_a_step_of_the_same_thread_is_an_error(monkeypatch):
    """It would wait for itself. What is called may catch it, and the step goes on."""
    opt, caught = stepped("AdamW"), []

    def call():
        with pytest.raises(RuntimeError, match=r"AdamW.step\(\) was called amid.*nothing was upd"):
            opt.step()
        caught.append(threading.get_ident())

    monkeypatch.setitem(backends.BACKENDS, "calling", Calling(call))
    monkeypatch.setitem(backends.BACKENDS, "again", Calling(opt.step))
    opt._backend = "calling"
    opt.step()
    assert caught == [threading.get_ident()]
    assert {state["step"].item() for state in opt.state.values()} == {3}
    opt._backend = "again"
    with pytest.raises(RuntimeError, match="amid a step of the same optimizer"):
        opt.step()
    assert {state["step"].item() for state in opt.state.values()} == {3}
    opt._backend = "cpu"
    assert in_threads(1, lambda index: opt.step()) == [None]  # nobody holds it
    assert {state["step"].item() for state in opt.state.values()} == {4}


@every_optimizer
def test_helper_threads_follow_the_callers_flush_to_zero_mode(optimizer):
    digests = {}
    for flush in (False, True):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.set_flush_denormal(flush)
            try:  # the squares of these grads are subnormal
                opt = stepped(optimizer, grad_scale=1e-20, eps=1e-20, weight_decay=0.0)
            finally:
                torch.set_flush_denormal(False)
            digests[flush, threads] = digest(opt)
    assert digests[False, 1] == digests[False, 3]
    assert digests[True, 1] == digests[True, 3]
    assert digests[False, 1] != digests[True, 1]


def fork_and_step(optimizer: str, busy: bool) -> None:
    """Children step where their parent has, perhaps while another of its threads is at it."""
    torch.set_num_threads(3)
    opt, other = stepped(optimizer), stepped("AdamW", seed=1)
    twin = copy.deepcopy(opt)
    for param, clone in zip(params_of(opt), params_of(twin), strict=True):
        clone.grad = param.grad.clone()
    twin.step()
    expected = digest(twin)
    stop = threading.Event()

    def keep_stepping() -> None:
        while not stop.is_set():
            other.step()

    worker = threading.Thread(target=keep_stepping, daemon=True)
    if busy:
        worker.start()
    for _ in range(10):
        child = os.fork()
        if child == 0:
            signal.alarm(TIMEOUT)  # kills it
            opt.step()
            if busy:  # a thread that is not here may have held its lock
                other.step()
            os._exit(0 if digest(opt) == expected else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
    stop.set()
    if busy:  # in a step when Python ends, it could not have the GIL back, and C++ would abort
        worker.join(TIMEOUT)
    opt.step()
    assert digest(opt) == expected


def fork_before_any_step(optimizer: str) -> None:
    """A child takes the first step; its parent has used torch's threads for something else."""
    torch.set_num_threads(3)
    torch.ones(1 << 20).exp()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # for torch's own operations, which would hang here
        signal.alarm(TIMEOUT)
        params = [nn.Parameter(torch.ones(1 << 18)) for _ in range(2)]
        opt = OPTIMIZERS[optimizer].cls(params, backend="cpu")
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
        torch.set_num_threads(3)
        opt.step()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status


def run_alone(call: str, **environment: str) -> str:
    """Calls a function of this file in a process of its own, and returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", f"import test_threads; test_threads.{call}"],
        cwd=Path(__file__).parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=3 * TIMEOUT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamProxL2"])  # of one sweep, and of two
def test_forked_children_step(optimizer, busy):
    run_alone(f"fork_and_step({optimizer!r}, {busy})")


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamProxL2"])
def test_forked_children_take_the_first_step(optimizer):
    run_alone(f"fork_before_any_step({optimizer!r})")
