"""A step is taken whole or not at all; and smaller things that went wrong once."""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import adamprox
from adamprox import step
from adamprox.backends import BACKENDS
from adamprox.step import Uninterrupted
from faults import (
    MOMENTS,
    NAME,
    Acting,
    alike,
    alone,
    frozen,
    kept,
    make,
    params_of,
    put_first,
    randn,
    ready,
    refused,
    refuses,
    restore,
    run,
    two_optimizers,
)
from registry import assert_same_bits


@pytest.mark.parametrize("key", [*MOMENTS, "step"])
@pytest.mark.parametrize("strided", [False, True])
def test_a_state_made_in_inference_mode_is_refused(key, strided):
    opt, twin = (ready(amsgrad=True) for _ in range(2))
    copies, param = kept(opt), params_of(opt)[1]
    with torch.inference_mode():
        value = opt.state[param][key].clone()
        opt.state[param][key] = torch.stack([value, value], -1)[..., 0] if strided else value
    refuses(opt, "inference mode and cannot be written")
    restore(opt, copies)
    opt.step()
    twin.step()
    assert_same_bits(opt, twin)


BAD = {
    "lr": ("fast", None, [0.1]),
    "betas": (0.9, (0.9,), (0.9, "x"), None),
    "eps": ("small", None),
    "weight_decay": ("none", None),
}


@pytest.mark.parametrize("decay_by", ["lr", "schedule"])
@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in BAD.items() for v in vs], ids=str)
def test_a_checkpoint_with_a_bad_number_changes_nothing(key, value, decay_by):
    opt, twin = (ready(decay_by=decay_by) for _ in range(2))
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update({"lr": 0.5, key: value})
    for state in saved["state"].values():
        state["exp_avg"].fill_(7.0)
        state["step"].fill_(7.0)
    refuses(opt, step=lambda: opt.load_state_dict(saved))
    assert opt.state_dict()["param_groups"] == twin.state_dict()["param_groups"]
    opt.step()
    twin.step()
    assert_same_bits(opt, twin)


def unusual(opt) -> torch.optim.Optimizer:
    """So that a step has much to make and to copy."""
    first, second, third = params_of(opt)
    first.grad = first.grad.expand(2, 6)[1].flip(0)
    second.data = torch.stack([second.data] * 2, -1)[..., 0]
    if opt.state:
        opt.state.pop(first)
        opt.state[third].update(exp_avg=torch.stack([opt.state[third]["exp_avg"]] * 2, -1)[..., 1])
        opt.state[third]["step"] = 2
    return opt


SITUATIONS = {
    "the first step": functools.partial(ready, steps=0),
    "a later step": ready,
    "a step with copies": lambda **arguments: unusual(ready(**arguments)),
    "a first step with copies": lambda **arguments: unusual(ready(steps=0, **arguments)),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_step_in_inference_mode_is_one_as_any_other(situation, backend):
    """What it has made, later steps can write to, those of telemetry too."""
    opt, twin = (SITUATIONS[situation](backend=backend) for _ in range(2))
    for each, context in (opt, torch.inference_mode), (twin, torch.no_grad):
        each.track_updates()
        with context():
            each.step()
        run(each, 5, 6)
    assert_same_bits(opt, twin)


PROBLEMS = {
    "dtype": lambda state: state.update(exp_avg=state["exp_avg"].to(torch.int32)),
    "missing": lambda state: state.pop("max_exp_avg_sq"),
    "freed": lambda state: state["exp_avg_sq"].untyped_storage().resize_(0),
    "count": lambda state: state.update(step=torch.tensor(-1.0)),
}


OTHERS = ("dense", "strided", "in another param", "interleaved")


@alone(*(f"{problem}, {others}" for problem in PROBLEMS for others in OTHERS))
def test_a_step_that_is_refused_has_done_nothing_to_others(case):
    """Nor made a state; even if much is copied before, and others must go one after the other."""
    problem, others = case.split(", ")

    def spoil(opt, param):
        first, _, last = params_of(opt)
        opt.state.pop(first)
        PROBLEMS[problem](opt.state[param])
        if others == "in another param":
            first.data = (memory := randn(12))[:6]
            param.grad = memory.view(4, 3)
        elif others != "dense":
            param.grad = param.grad.t().contiguous().t()
        if others == "interleaved":
            first.data, last.data = (memory := randn(12))[::2], memory[1:4:2]

    refused(spoil, NAME, amsgrad=True)


@pytest.mark.parametrize("shared", [False, True])
def test_a_first_step_that_no_backend_can_take_makes_no_states(shared, monkeypatch):
    params = [nn.Parameter(randn(3)) for _ in range(2)]
    if shared:
        params[1].data = params[0].data
    for param in params:
        param.grad = randn(3)
    opt = adamprox.AdamW(params)
    monkeypatch.setattr(BACKENDS["cpu"], "why_not", lambda *_: "it is out of order")
    monkeypatch.setattr(BACKENDS["cpu"], "at_once", False)
    opt._backend = "cpu"
    with pytest.raises(RuntimeError, match="out of order"):
        opt.step()
    assert not opt.state


def with_zeros(opt) -> list:
    """A snapshot in which a missing state is one of zeros."""
    return [
        (
            frozen(p),
            float(opt.state.get(p, {}).get("step", 0)),
            [frozen(opt.state.get(p, {}).get(key, torch.zeros_like(p))) for key in MOMENTS[:2]],
        )
        for p in params_of(opt)
    ]


def all_or_nothing(situation: str, attempt) -> bool:
    """Whether the attempt at a step was broken off; nothing is swallowed."""
    opt, twin = SITUATIONS[situation](), SITUATIONS[situation]()
    before = with_zeros(opt)
    twin.step()
    after, struck, broken_off = with_zeros(twin), False, False
    try:
        struck = attempt(opt)
    except (KeyboardInterrupt, MemoryError, RuntimeError):
        broken_off = True
    assert not struck, "what struck was swallowed"
    now = with_zeros(opt)
    assert now == after or (broken_off and now == before), "half done"
    if now == before:
        opt.step()
        assert with_zeros(opt) == after, "the next step is not the usual one"
    return broken_off


class OutOfMemory(TorchDispatchMode):
    """The n-th tensor cannot be made."""

    def __init__(self, n: int):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in func.__name__ for word in ("empty", "zeros", "clone", "full", "_to_copy")):
            self.left -= 1
            if self.left == 0:
                raise MemoryError
        return func(*args, **(kwargs or {}))


@alone(*SITUATIONS)
def test_a_step_that_runs_out_of_memory_has_done_nothing(case):
    def attempt(opt):
        with OutOfMemory(n) as memory:
            opt.step()
        return memory.left <= 0

    for n in range(1, 1000):  # noqa: B007
        if not all_or_nothing(case, attempt):
            break
    else:
        raise AssertionError("it never had enough memory")
    assert n > 1 or case == "a later step"


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)


@alone(*SITUATIONS)
def test_ctrl_c_after_any_call_of_ours_leaves_all_or_nothing(case):
    """There, and when a function begins, Python looks for signals."""
    ours = str(Path(adamprox.__file__).parent)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = [signal.getsignal(number) for number in SIGNALS]

    def attempt(opt):
        left, before = n, {}  # the instruction before, of each frame

        def look(frame, event, _):
            nonlocal left
            if event == "call":
                before.pop(frame.f_back, None)  # which looks no more when that one returns
            if not frame.f_code.co_filename.startswith(ours):
                return None
            frame.f_trace_opcodes = True
            if event == "call" or (event == "opcode" and before.get(frame, "").startswith("CALL")):
                left -= 1
                if left == 0:
                    signal.raise_signal(signal.SIGINT)
            if event == "opcode":
                before[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            return look

        sys.settrace(look)
        try:
            opt.step()
        finally:
            sys.settrace(None)
        return left <= 0

    for n in range(1, 5000):  # noqa: B007
        broken_off = all_or_nothing(case, attempt)
        assert [signal.getsignal(number) for number in SIGNALS] == handlers, "handlers were lost"
        if not broken_off:
            break
    else:
        raise AssertionError("it never came to its end")
    assert n > 10


@alone(*SITUATIONS)
def test_ctrl_c_at_any_time_leaves_all_or_nothing(case):
    rng, armed = random.Random(0), False

    def interrupt(*_):
        if armed:  # a signal that comes late is none of the attempt's
            raise KeyboardInterrupt

    def attempt(opt):
        nonlocal armed
        armed = True
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-4))
            opt.step()
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    handler = signal.signal(signal.SIGALRM, interrupt)
    broken_off = [all_or_nothing(case, attempt) for _ in range(100)]
    signal.signal(signal.SIGALRM, handler)
    assert any(broken_off)


class Doubled(nn.Parameter):
    @property
    def grad(self):
        grad = Tensor.grad.__get__(self)
        return None if grad is None else 2 * grad

    @grad.setter
    def grad(self, value):
        Tensor.grad.__set__(self, value)


def test_a_grad_property_is_honoured():
    pair = make([Doubled(randn(5))]), make([nn.Parameter(randn(5))])
    for seed in range(3):
        for opt, factor in zip(pair, (1, 2), strict=True):
            params_of(opt)[0].grad = factor * randn(5, seed=seed)
            opt.step()
    assert_same_bits(*pair)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("key", "kind"), [("params", tuple), ("betas", torch.tensor), ("betas", list)]
)
def test_a_groups_values_may_be_other_sequences(key, kind, steps):
    def change(opt, param):
        opt.param_groups[0][key] = kind(opt.param_groups[0][key])

    alike(change, steps=steps, betas=(0.75, 0.875))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("like", ["lr", "betas", "params", "exp_avg", "step"])
def test_an_error_of_a_keys_comparison_is_passed_on(like, steps):
    def fail():
        raise ArithmeticError("no such comparison")

    opt, twin = (ready(steps=steps) for _ in range(2))
    entries = opt.state[params_of(opt)[1]] if like in ("exp_avg", "step") else opt.param_groups[0]
    old, key = dict(entries), Acting(lambda: None, like)
    put_first(key, entries)
    key.act = fail
    try:
        opt.step()
    except ArithmeticError:
        twin.param_groups[0]["params"], params = [], twin.param_groups[0]["params"]
        twin.step()
        twin.param_groups[0]["params"] = params
    else:
        twin.step()
    key.act = lambda: None
    del entries[key]
    assert entries.keys() >= old.keys()
    for each in (opt, twin):
        run(each, 9)
    assert_same_bits(opt, twin)


@two_optimizers
def test_params_without_memory_are_stepped_as_torchs_are_or_refused(optimizer):
    param = nn.Parameter(torch.empty(3, device="meta"))
    opt = make([param], optimizer)
    param.grad = torch.empty(3, device="meta")
    try:
        opt.step()
        assert float(opt.state[param]["step"]) == 1
    except RuntimeError:
        refuses(opt, "nothing was updated")
        assert not opt.state.get(param)


@two_optimizers
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_params_without_elements_count_their_steps(optimizer, shape):
    opt = ready(shape, shape, optimizer=optimizer)
    opt.step()
    assert [float(opt.state[p]["step"]) for p in params_of(opt)] == [3, 3]


@alone("SIGINT")
def test_ctrl_c_that_waits_is_not_in_the_way_of_other_signals(case):
    """Its handler raises: others' come back before, and what waits beside it is handled, too."""
    handled = []
    signal.signal(signal.SIGUSR1, lambda *_: handled.append("SIGUSR1"))
    waiting = getattr(signal, case)
    signal.signal(waiting, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), Uninterrupted():
        signal.raise_signal(waiting)
        signal.raise_signal(signal.SIGUSR1)
        assert not handled
    assert handled == ["SIGUSR1"]
    restored, leaving = [], False

    def restore(number, handler):
        if leaving and not restored:
            signal.raise_signal(signal.SIGUSR1)  # before any handler is back
        restored.append(number)
        return own(number, handler)

    own, signal.signal = signal.signal, restore
    try:
        with Uninterrupted():
            restored.clear()
            leaving = True
    finally:
        signal.signal = own
    assert restored[-1] == waiting
    assert handled == ["SIGUSR1"] * 2
    assert signal.SIGUSR1 in restored


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (None, "begin B, begin C, ready A, ready B, ready C, run A, run B, run C"),
        ("ready C", "begin B, begin C, ready A, ready B, ready C, undo A, undo B, undo C"),
        ("run B", "begin B, begin C, ready A, ready B, ready C, run A, run B, undo B, undo C"),
    ],
)
def test_no_table_is_written_to_before_all_are_ready(fails, expected):
    """C's device has no memory left, say. What C++ begins and runs at once comes first."""
    log = []

    def note(event):
        log.append(event)
        if event == fails:
            raise MemoryError("no memory left")

    class Table:
        def __init__(self, name):
            self.name = name

        def begin(self):
            note(f"begin {self.name}")

        def undo(self):
            note(f"undo {self.name}")

    class Backend:
        def __init__(self, at_once):
            self.at_once = at_once

        def step(self, table, groups):
            note(f"ready {table.name}")
            yield
            note(f"run {table.name}")

    tables, chosen = [Table(name) for name in "BAC"], [Backend(each == "A") for each in "BAC"]
    with pytest.raises(MemoryError) if fails else contextlib.nullcontext():
        step._run_tables(tables, chosen, [])
    assert ", ".join(log) == expected
