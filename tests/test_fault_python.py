"""Numbers of any kind, and Python code that runs amid a step."""

from __future__ import annotations

import collections
import contextlib
import gc
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import adamprox
from adamprox import _C
from faults import (
    ERRORS,
    Acting,
    alone,
    make,
    new_params,
    params_of,
    put_first,
    randn,
    ready,
    run,
    set_grads,
    snapshot,
)
from registry import assert_same_bits


class Fresh(list):
    """Makes its items anew."""

    def __getitem__(self, index):
        return float(str(super().__getitem__(index)))

    def __iter__(self):
        return (float(str(item)) for item in super().__iter__())


class Pair(collections.abc.Sequence):
    """Of numbers that nobody else holds."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.make((0.75, 0.875)[index])


class Number:
    """Any object with ``__float__``, as decimals are."""

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return float(str(self.value))


BETAS = {
    "array": np.array([0.75, 0.875]),
    "float32 array": np.array([0.75, 0.875], np.float32),
    "list that makes its items": Fresh([0.75, 0.875]),
    "new floats": Pair(lambda x: x * 1.0),
    "new tensors": Pair(torch.tensor),
    "new arrays": Pair(np.float32),
    "new objects": Pair(Number),
    "tensor": torch.tensor([0.75, 0.875]),
    "fractions": (Fraction(3, 4), Fraction(7, 8)),
}
SCALARS = (float, torch.tensor, np.float32, np.float64, np.array, Fraction, Number)


@alone(*BETAS)
def test_numbers_of_any_kind_give_the_bits_of_floats(case):
    """Also those that end with the expression that made them; some may have a clear error."""
    for kind in SCALARS:
        opt, twin = ready(steps=0), ready(steps=0)
        plain = {"lr": 2.0**-7, "eps": 2.0**-20, "weight_decay": 0.25}
        for each, numbers, betas in (opt, kind, BETAS[case]), (twin, float, (0.75, 0.875)):
            group = each.param_groups[0]
            group.update({k: numbers(v) for k, v in plain.items()}, betas=betas)
            each.param_groups = [{**group, "params": [p]} for p in group["params"]]
        for seed in range(1, 4):
            opt.step()
            twin.step()
            assert snapshot(opt) == snapshot(twin)
            set_grads(opt, seed)
            set_grads(twin, seed)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2), np.float32(1e-2)], ids=type)
@pytest.mark.parametrize("betas", [np.array([0.9, 0.999]), torch.tensor([0.9, 0.999])], ids=type)
def test_betas_in_an_array_give_torchs_numbers(betas, lr):
    results = []
    for cls in (torch.optim.AdamW, adamprox.AdamW):
        opt = run(cls(new_params((4,)), lr=lr, betas=betas), 0, 1, 2)
        results.append([*params_of(opt), opt.state[params_of(opt)[0]]["exp_avg"]])
    torch.testing.assert_close(*results)


# Python amid the read.


class Functions(TorchFunctionMode):
    """Acts in each function of torch's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            self.act()
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Acts in each operation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.act()
        return func(*args, **(kwargs or {}))


class ActingState(collections.UserDict):
    act = staticmethod(lambda: None)

    def __getitem__(self, key):
        self.act()
        return super().__getitem__(key)


class ActingParam(nn.Parameter):
    act = staticmethod(lambda: None)

    @property
    def grad(self):
        self.act()
        return Tensor.grad.__get__(self)

    @grad.setter
    def grad(self, value):
        Tensor.grad.__set__(self, value)


class Collected:
    """Acts when the collector of cycles finds it."""

    def __init__(self, act):
        self.act, self.itself = act, self

    def __del__(self):
        self.act()


@contextlib.contextmanager
def acting(place: str, opt, act):
    group, state = opt.param_groups[0], opt.state[params_of(opt)[-1]]
    if place in ("functions", "operations"):
        mode = {"functions": Functions, "operations": Operations}[place]()
        mode.act = act
        with mode:
            yield
    elif place == "a grad property":
        ActingParam.act = staticmethod(act)
        try:
            yield
        finally:
            ActingParam.act = staticmethod(lambda: None)
    elif place == "the collector":
        thresholds = gc.get_threshold()
        for _ in range(9):
            Collected(act)
        gc.set_threshold(1, 1, 1)
        try:
            yield
        finally:
            gc.set_threshold(*thresholds)
    elif place == "a state":
        opt.state[params_of(opt)[-1]] = ActingState(state)
        opt.state[params_of(opt)[-1]].act = act
        yield
    elif place in ("a group's key", "a state's key"):
        entries, like = (group, "lr") if place == "a group's key" else (state, "exp_avg")
        key = Acting(lambda: None, like)
        put_first(key, entries)
        key.act = act
        yield
    else:
        group[place] = Acting(act, (0.9, 0.999) if place == "betas" else 1e-2)
        yield


PLACES = ("functions", "operations", "lr", "betas", "a state", "a group's key", "a state's key")
PLACES += ("a grad property", "the collector")


def once(opt, action) -> None:
    if not getattr(opt, "done", False):
        opt.done = True
        action()


def states_of(opt) -> list[dict]:
    return [state for state in opt.state.values() if isinstance(state, dict)]


def move_memory(opt) -> None:
    for param in params_of(opt):
        param.data = param.detach().clone()
    for state in states_of(opt):
        state.update({k: v.clone() for k, v in state.items() if isinstance(v, Tensor)})


MISCHIEFS = {
    "drop grads": lambda opt: [Tensor.grad.__set__(param, None) for param in params_of(opt)],
    "drop params": lambda opt: opt.param_groups[-1]["params"].clear(),
    "drop groups": lambda opt: opt.param_groups.clear(),
    "drop states": lambda opt: opt.state.clear(),
    "drop entries": lambda opt: [state.clear() for state in states_of(opt)],
    "move memory": move_memory,
    "free memory": lambda opt: [p.untyped_storage().resize_(0) for p in params_of(opt)],
    "step again": lambda opt: once(opt, opt.step),
    "load": lambda opt: once(opt, lambda: opt.load_state_dict(opt.state_dict())),
    "add a group": lambda opt: once(opt, lambda: opt.add_param_group({"params": new_params((7,))})),
}


@alone(*(f"{mischief} in {place}" for mischief in MISCHIEFS for place in PLACES))
def test_python_code_amid_a_step_does_no_harm(case):
    """A number that was made from freed memory would be far away from all others."""
    mischief, place = case.split(" in ")
    params = [ActingParam(randn(1000, seed=i)) for i in range(4)]
    opt = make([{"params": params[:1]}, {"params": params[1:]}])
    run(opt, 0)
    # So that much is to be made and copied.
    opt.param_groups[1]["lr"] = torch.tensor(1e-2)
    opt.state.pop(params[1])
    opt.state[params[2]].update(exp_avg=torch.zeros(1000, 2)[:, 0], step=1)
    set_grads(opt, 1)
    before, times = [p.detach().clone() for p in params], []

    def act():
        times.append(1)
        if len(times) < 100:
            MISCHIEFS[mischief](opt)
            _ = [torch.full((1000,), 9e9) for _ in range(4)]

    problem = None
    with acting(place, opt, act):
        try:
            opt.step()
        except ERRORS as error:
            problem = error
    assert bool(times) != place.endswith("key")  # keys are compared without their own code
    if mischief == "free memory":
        return
    assert problem is None or all(map(torch.equal, params, before)), problem
    tensors = [*params, *(v for s in opt.state.values() for v in s.values())]
    assert all(abs(t.detach()).max() < 100 for t in tensors if isinstance(t, Tensor))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("decay_by", "Schedule", "Invalid decay_by: 'Schedule', expected 'lr' or 'schedule'"),
        ("metric", "Adam", "Invalid metric: 'Adam', expected 'identity' or 'adam'"),
        ("block_scaling", "SQRT", "Invalid block_scaling: 'SQRT', expected 'none' or 'sqrt'"),
        ("decay_by", "schedule", "decay_by='schedule' needs 'initial_lr' in the param group"),
        ("params", {1}, "Invalid params: expected a list or a tuple"),
        ("block", "rows", "Invalid block: 'rows', expected 'tensor', 'row', 'group' or"),
    ],
)
def test_a_value_that_is_set_later_is_refused_by_name(key, value, match):
    opt = ready()
    before = snapshot(opt)
    old = dict(opt.param_groups[0])
    opt.param_groups[0][key] = value
    with pytest.raises((ValueError, TypeError), match=match):
        opt.step()
    opt.param_groups[0].clear()
    opt.param_groups[0].update(old)
    assert snapshot(opt) == before
    opt.step()


def test_a_block_of_more_rows_than_a_float_can_tell_is_the_whole_tensor():
    opt, twin = (ready(optimizer="AdamProxL2", block=block) for block in (10**400, "tensor"))
    opt.step()
    twin.step()
    assert_same_bits(opt, twin)


@pytest.mark.parametrize("key", ["betas", "block"])
def test_an_interrupt_amid_a_value_is_passed_on(key):
    class Interrupting:
        def __iter__(self):
            raise KeyboardInterrupt

        __index__ = __iter__

    opt = ready(optimizer="AdamProxL2")
    opt.param_groups[0][key] = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        opt.step()


def test_findings_may_be_kept():
    gather = _C.Gather()
    opt = ready(steps=0)
    arguments = (opt.param_groups, opt.state, {}, False, False, False, 0)
    gather.read(*arguments)
    findings = gather.findings
    assert findings
    keys = [finding.key for finding in findings]
    gather.release()
    for param in params_of(opt):
        param.grad = None
    gather.read(*arguments)
    assert [finding.key for finding in findings] == keys


def test_a_refused_step_leaves_the_versions_of_params():
    opt = ready(capturable=True, backend="triton")
    opt.param_groups[0]["lr"] = torch.tensor([1.0, 2.0])
    versions = [param._version for param in params_of(opt)]
    with pytest.raises((RuntimeError, TypeError, ValueError), match="lr"):
        opt.step()
    assert [param._version for param in params_of(opt)] == versions


def test_a_state_that_the_group_does_not_use_is_no_beginning():
    opt = ready(steps=0)
    param = params_of(opt)[0]
    opt.state[param]["ema"] = torch.zeros_like(param)
    opt.step()
    assert opt.state[param]["step"] == 1


def test_hooks_of_a_subclass_with_a_step_of_its_own_are_called_once():
    class Mine(adamprox.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    opt, calls = Mine(new_params((3,))), []
    set_grads(opt, 0)
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    opt.step()
    assert calls == ["before", "after"]
