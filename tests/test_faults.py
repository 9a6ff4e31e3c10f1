"""What people do to an optimizer between its steps and amid them; each kind went wrong once.

What may hang or crash runs in a process of its own, many cases in one.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dis
import faulthandler
import functools
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import types
import weakref
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import adamprox
from registry import OPTIMIZERS, assert_same_bits, bits, same_bits

two_optimizers = pytest.mark.parametrize("optimizer", ["AdamW", "AdamProxL2"])  # one sweep, two
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
TENSORS = ("param", "grad", *MOMENTS)
NAME = r"param_groups\[0\]\['params'\]\[1\]"
ERRORS = (RuntimeError, TypeError, ValueError)
SECONDS = 20  # for what takes milliseconds, on a machine that others use


# Optimizers, what they hold, and how two of them compare.


def make(params, optimizer: str = "AdamW", **arguments) -> torch.optim.Optimizer:
    defaults = {"lr": 1e-2, "weight_decay": OPTIMIZERS[optimizer].weight_decay, "backend": "cpu"}
    return OPTIMIZERS[optimizer].cls(params, **{**defaults, **arguments})


def torchs(params, **arguments) -> torch.optim.Optimizer:
    """One param after the other."""
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.3, foreach=False, **arguments)


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def params_of(opt) -> list[Tensor]:
    return [param for group in opt.param_groups for param in group["params"]]


def set_grads(opt, seed: int) -> None:
    for index, param in enumerate(params_of(opt)):
        param.grad = randn(*param.shape, seed=100 * seed + index, dtype=param.dtype)


def run(opt, *seeds: int) -> torch.optim.Optimizer:
    for seed in seeds:
        set_grads(opt, seed)
        opt.step()
    return opt


def new_params(*shapes, dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*s, seed=i, dtype=dtype)) for i, s in enumerate(shapes)]


def ready(*shapes, steps=2, dtype=torch.float32, make=make, **arguments) -> torch.optim.Optimizer:
    """After some steps, with the grads of the next one."""
    params = new_params(*(shapes or ((6,), (4, 3), (2,))), dtype=dtype)
    opt = run(make(params, **arguments), *range(steps))
    set_grads(opt, steps)
    return opt


def tensor_of(opt, param: Tensor, key: str) -> Tensor:
    return {"param": param, "grad": param.grad, **opt.state.get(param, {})}[key]


def put(opt, param: Tensor, key: str, value) -> None:
    if key in ("param", "grad"):
        setattr(param, {"param": "data"}.get(key, key), value)
    else:
        opt.state[param][key] = value


def readable(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.is_nested:
        return False
    if tensor.layout != torch.strided or torch._is_functional_tensor(tensor):
        return False
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (tensor.storage_offset() + last + 1) * tensor.itemsize if tensor.numel() else 0
    return not tensor.is_quantized and tensor.untyped_storage().nbytes() >= size


def frozen(value):
    """A tensor's numbers; of what has none that can be read, which object it is."""
    if isinstance(value, collections.abc.Mapping):
        return {key: frozen(entry) for key, entry in value.items()}
    if not isinstance(value, Tensor):
        return repr(value)
    if not readable(value):
        return id(value)
    value = value.detach().resolve_conj().resolve_neg()
    is_real = value.is_floating_point() or value.is_complex()
    return value.dtype, (bits(value) if is_real else value).tolist()


def snapshot(opt) -> list:
    return [(frozen(param), frozen(opt.state.get(param, {}))) for param in params_of(opt)]


def refuses(opt, match: str | None = None, step=None, errors=ERRORS) -> None:
    before = snapshot(opt)
    with pytest.raises(errors, match=match):
        (step or opt.step)()
    assert snapshot(opt) == before


def kept(opt) -> list:
    """Copies, for :func:`restore`."""
    tensors = [(p.detach(), p.grad, dict(opt.state.get(p, {}))) for p in params_of(opt)]
    return copy.deepcopy(tensors)


def restore(opt, copies: list) -> None:
    opt.state.clear()
    for param, (value, grad, state) in zip(params_of(opt), copies, strict=True):
        param.data, param.grad = value, grad
        if state:
            opt.state[param] = state


def refused(spoil, match: str | None = None, errors=ERRORS, **arguments) -> None:
    """``spoil`` may return what steps; after its repair the step is the usual one."""
    opt, twin = ready(**arguments), ready(**arguments)
    copies = kept(opt)
    refuses(opt, match, spoil(opt, params_of(opt)[1]), errors)
    restore(opt, copies)
    opt.step()
    twin.step()
    assert_same_bits(opt, twin)


def alike(spoil, plain=lambda opt, param: None, **arguments) -> None:
    """Steps after ``spoil`` have the numbers of those after ``plain``."""
    opt, twin = ready(**arguments), ready(**arguments)
    spoil(opt, params_of(opt)[1])
    plain(twin, params_of(twin)[1])
    for seed in range(10, 13):
        opt.step()
        twin.step()
        assert [p for p, _ in snapshot(opt)] == [q for q, _ in snapshot(twin)]
        for p, q in zip(params_of(opt), params_of(twin), strict=True):
            for key in twin.state[q]:
                assert frozen(opt.state[p][key]) == frozen(twin.state[q][key]), key
        set_grads(opt, seed)
        set_grads(twin, seed)


# Cases that may hang or crash.

ALONE: dict[str, functools.partial] = {}


def alone(*cases: str):
    """Has the test run once a case, in the process of :func:`outcomes`."""

    def register(body):
        names = {case: f"{body.__name__}[{case}]" for case in cases}
        ALONE.update({name: functools.partial(body, case) for case, name in names.items()})

        @pytest.mark.parametrize("case", cases)
        def test(case, outcomes):
            assert outcomes[names[case]] == "ok"

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return register


def run_alone(names: list[str]) -> None:
    """Prints what comes of each."""

    def too_late(*_):
        raise TimeoutError("it does not end")

    signal.signal(signal.SIGALRM, too_late)
    torch.set_num_threads(1)
    ready()
    gc.collect()
    gc.freeze()  # so that collecting what comes later is cheap
    for name in names:
        faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
        signal.alarm(SECONDS)
        try:
            ALONE[name]()
            outcome = "ok"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        print(json.dumps([name, outcome]), flush=True)


@pytest.fixture(scope="module")
def outcomes(request) -> dict[str, str]:
    """Of the cases that were asked for; after one that ends the process, another takes the rest."""
    asked = {item.name for item in request.session.items if item.path == request.path}
    results: dict[str, str] = {}
    while rest := [name for name in ALONE if name in asked and name not in results]:
        code = f"import test_faults; test_faults.run_alone({rest!r})"
        process = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", code],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        results.update(json.loads(line) for line in process.stdout.splitlines() if line[:1] == "[")
        if missing := [name for name in rest if name not in results]:
            results[missing[0]] = f"exit status {process.returncode}: {process.stderr[-2000:]}"
    return results


# A step ends.


@alone(*TENSORS, "step")
def test_storage_that_was_freed_or_has_shrunk_is_named_and_nothing_is_updated(case):
    def shrink(opt, param):
        storage = tensor_of(opt, param, case).untyped_storage()
        storage.resize_(max(0, storage.nbytes() - by))

    # Counts that were made together may share a storage.
    match = {"param": NAME, "step": "step count of param_groups"}.get(case, f"{case} of {NAME}")
    for by in (1, 1 << 20):  # noqa: B007
        for steps in (0, 2) if case in ("param", "grad") else (2,):
            refused(shrink, match, RuntimeError, steps=steps, amsgrad=True)


def outlived(transform, value: Tensor) -> Tensor:
    """The tensor that a function saw amid a transform, which is over."""
    seen = []
    transform(lambda x: (seen.append(x), x.sum())[1])(value)
    return seen[0]


FOREIGN = {
    "fake": lambda like: FakeTensorMode().from_tensor(like),
    "functional": torch._to_functional_tensor,
    "nested": lambda like: torch.nested.nested_tensor(list(like)),
    "mkldnn": Tensor.to_mkldnn,
    "meta": lambda like: like.to("meta"),
    "quantized": lambda like: torch.quantize_per_tensor(like, 1.0, 0, torch.qint8),
    "vmap": lambda like: outlived(torch.func.vmap, like.repeat(3, 1, 1)),
    "grad": lambda like: outlived(torch.func.grad, like),
}


@alone(*FOREIGN)
def test_a_tensor_that_is_none_of_plain_memory_is_refused(case):
    keys = [*MOMENTS]
    keys += ["grad"] * (case in ("fake", "functional", "vmap", "grad"))  # torch refuses others
    keys += ["step"] * (case in ("fake", "meta", "vmap"))  # others can be counted
    for key in keys:

        def spoil(opt, param, key=key):
            like = torch.full((1, 1), 2.0) if key == "step" else param.detach().clone()
            put(opt, param, key, FOREIGN[case](like))

        refused(spoil, NAME, amsgrad=True)


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x] * 3)),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x[None]),
}


@alone(*TRANSFORMS)
def test_a_step_amid_a_transform_is_refused(case):
    """The grad is the transform's."""

    def spoil(opt, param):
        def f(grad):
            param.grad = grad
            opt.step()
            return grad * 2

        return lambda: TRANSFORMS[case](f, torch.ones_like(param.detach()))

    refused(spoil)
    refused(spoil, steps=0)


def zeros_of(case: str, p: Tensor) -> None:
    p.grad = None
    if case == "sgn's":
        torch.view_as_real(p).sgn().sum().backward() if p.is_complex() else p.sgn().sum().backward()
    else:
        zeros = torch._efficientzerotensor(p.shape, dtype=p.dtype)
        p.grad = torch._neg_view(zeros) if case == "negated" else zeros


@alone("sgn's", "made", "negated")
def test_a_grad_that_torch_knows_to_be_zero_is_stepped(case):
    for steps in (0, 2):
        for dtype in (torch.float32, torch.bfloat16, torch.complex64):
            alike(
                lambda opt, p: zeros_of(case, p),
                lambda opt, p: setattr(p, "grad", torch.zeros_like(p)),
                dtype=dtype,
                steps=steps,
            )


class Elsewhere(dict):
    """A dict that has its values elsewhere."""

    def __init__(self, entries):
        super().__init__(dict.fromkeys(entries))
        self.entries = entries

    def __getitem__(self, key):
        return self.entries[key]

    def get(self, key, default=None):
        return self.entries.get(key, default)

    def items(self):
        return self.entries.items()


MAPPINGS = {
    "UserDict": collections.UserDict,
    "ChainMap": collections.ChainMap,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": lambda entries: collections.defaultdict(Tensor, entries),
    "MappingProxyType": types.MappingProxyType,
    "Elsewhere": Elsewhere,
}


@alone(*MAPPINGS)
def test_any_mapping_may_be_a_params_state(case):
    def spoil(opt, param):
        opt.state[param] = MAPPINGS[case](opt.state.get(param, {}))

    alike(spoil, amsgrad=True)
    if case in ("UserDict", "OrderedDict"):
        alike(spoil, steps=0)


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_any_dict_may_be_the_whole_state(kind):
    alike(lambda opt, param: setattr(opt, "state", kind(opt.state)))


# Numbers.


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
            before = snapshot(opt)
            try:
                opt.step()
            except (TypeError, ValueError):
                assert kind in (Number, Fraction) or case in ("fractions", "new objects")
                assert snapshot(opt) == before
                break
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


class Acting:
    """A number, a sequence or a key that acts when it is looked at."""

    def __init__(self, act, value):
        self.act, self.value = act, value

    def __float__(self):
        self.act()
        return self.value

    def __getitem__(self, index):
        self.act()
        return self.value[index]

    def __len__(self):
        return 2

    def __hash__(self):
        return hash(self.value)

    def __eq__(self, other):
        self.act()
        return False


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


def put_first(key, entries: dict) -> None:
    """So that a look-up of an entry of the same hash meets it."""
    old = dict(entries)
    entries.clear()
    entries.update({key: None})
    entries.update(old)


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
        yield
        ActingParam.act = staticmethod(lambda: None)
    elif place == "the collector":
        thresholds = gc.get_threshold()
        for _ in range(9):
            Collected(act)
        gc.set_threshold(1, 1, 1)
        yield
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
    if mischief == "free memory":
        return
    assert problem is None or all(map(torch.equal, params, before)), problem
    tensors = [*params, *(v for s in opt.state.values() for v in s.values())]
    assert all(abs(t.detach()).max() < 100 for t in tensors if isinstance(t, Tensor))


# Threads.


@alone("all at once", "grads come and go", "others change it")
def test_threads_that_share_an_optimizer_wait_for_each_other(case):
    torch.set_num_threads(2)
    shapes = (*[(500,)] * 40, (70_000,), (70_000,))
    opt, problems, steps = ready(*shapes, steps=1), [], []

    def change(index: int, time: int) -> None:
        if case == "grads come and go":
            for param in params_of(opt)[10 * index : 10 * index + 10]:
                param.grad = None if time % 2 else torch.ones_like(param)
        elif case == "others change it" and index == 0:
            opt.load_state_dict(opt.state_dict())
            opt.param_groups[0]["lr"] = torch.tensor(1e-2)
            copy.deepcopy(opt)

    def work(index: int) -> None:
        for time in range(30):
            try:
                change(index, time)
                opt.step()
                steps.append(1)
            except BaseException as error:
                if "nothing was updated" not in str(error):
                    problems.append(error)

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS)
    torch.set_num_threads(1)
    assert not problems
    assert not any(worker.is_alive() for worker in workers)
    assert all(p.isfinite().all() for p in params_of(opt))
    if case == "all at once":
        twin = ready(*shapes, steps=1)
        for _ in steps:
            twin.step()
        assert_same_bits(opt, twin)


# Memory that several params share: one after the other, in the order of the groups.


def halves(opt, a, b, c):
    a.data, b.data = (memory := randn(4500))[:3000], memory[1500:]


def interleaved(opt, a, b, c):
    a.data, b.data = (memory := randn(6000))[::2], memory[1:3001]


def real_and_complex(opt, a, b, c):
    pairs = torch.view_as_complex(a.data.view(-1, 2))
    opt.param_groups[0]["params"][1] = nn.Parameter(pairs)


def in_another_group(opt, a, b, c):
    opt.param_groups.append({**opt.param_groups[0], "params": [b], "lr": 0.1})


AT_FIRST = {
    "memory": lambda opt, a, b, c: setattr(b, "data", a.data),
    "halves": halves,
    "interleaved": interleaved,
    "real and complex": real_and_complex,
    "listed again": lambda opt, a, b, c: opt.param_groups[0]["params"].append(a),
    "listed in another group": in_another_group,
}
LATER = {
    "exp_avg": lambda opt, a, b, c: opt.state[b].update(exp_avg=opt.state[a]["exp_avg"]),
    "step": lambda opt, a, b, c: opt.state[b].update(step=opt.state[a]["step"]),
    "state": lambda opt, a, b, c: opt.state.update({b: opt.state[a]}),
    "exp_avg in a param": lambda opt, a, b, c: opt.state[b].update(exp_avg=c.data[:3000]),
}
EACH_TIME = {
    "grad in a param": lambda opt, a, b, c: setattr(b, "grad", a.detach()),
    "grad in a later param": lambda opt, a, b, c: setattr(a, "grad", b.detach()),
    "grad in a state": lambda opt, a, b, c: setattr(b, "grad", opt.state[a]["exp_avg"]),
}
SHARED = {**AT_FIRST, **LATER, **EACH_TIME}


def sharing(what: str, make=make, **arguments) -> torch.optim.Optimizer:
    params = new_params((3000,), (3000,), (100_000,))
    opt = make(params, **arguments)
    for time in range(20):
        if time == 0 and what in AT_FIRST:
            SHARED[what](opt, *params)
        set_grads(opt, time)
        if (time == 1 and what in LATER) or (time > 0 and what in EACH_TIME):
            SHARED[what](opt, *params)
        opt.step()
    return opt


@pytest.mark.parametrize("what", SHARED)
def test_params_that_share_memory_are_stepped_one_after_the_other(what):
    expected, reference = sharing(what, torchs), sharing(what, backend="reference")
    torch.set_num_threads(2)
    for _ in range(3):
        opt = sharing(what)
        for p, q, r in zip(*map(params_of, (opt, reference, expected)), strict=True):
            assert same_bits(p.detach(), q.detach())
            torch.testing.assert_close(p, r, rtol=1e-5, atol=1e-6)
            assert float(opt.state[p]["step"]) == float(expected.state[r]["step"])


@two_optimizers
@pytest.mark.parametrize("shift", [-9000, -1, 0, 1])
@pytest.mark.parametrize("key", ["param", *MOMENTS])
def test_a_grad_in_the_params_own_memory_is_read_first(key, shift, optimizer):
    pair = []
    for backend in ("cpu", "reference"):
        opt = ready((60_000,), backend=backend, optimizer=optimizer, amsgrad=True)
        memory = randn(80_000).abs()
        put(opt, params_of(opt)[0], key, memory[10_000:70_000])
        params_of(opt)[0].grad = memory[10_000 + shift : 70_000 + shift]
        opt.step()
        pair.append(opt)
    assert_same_bits(*pair)


@two_optimizers
def test_a_param_listed_twice_is_warned_of_at_once_and_stepped_twice(optimizer):
    pair = []
    for backend in ("cpu", "reference"):
        first, second = new_params((5,), (5,))
        with pytest.warns(UserWarning, match="duplicate"):
            pair.append(make([first, second, first], optimizer, backend=backend))
        run(pair[-1], 0, 1, 2)
    assert_same_bits(*pair)
    assert [float(pair[0].state[p]["step"]) for p in params_of(pair[0])] == [6, 3, 6]


# Step counts.


@two_optimizers
@pytest.mark.parametrize("how", ["zero_", "state_dict", "replaced"])
def test_a_count_belongs_to_one_param(optimizer, how):
    opt = ready(optimizer=optimizer)
    counts = [opt.state[p]["step"] for p in params_of(opt)]
    assert len({count.data_ptr() for count in counts}) == len(counts)
    if how == "zero_":
        counts[1].zero_()
    elif how == "state_dict":
        opt.state_dict()["state"][1]["step"].zero_()
    else:
        opt.state[params_of(opt)[1]]["step"] = counts[1] = torch.tensor(0.0)
    opt.step()
    assert counts == [3, 1, 3]
    assert all(opt.state[p]["step"] is c for p, c in zip(params_of(opt), counts, strict=True))


def test_a_state_that_is_reset_in_place_goes_on_as_torchs():
    results = []
    for maker in (torchs, make):
        opt = run(maker(new_params((50, 3), (50, 3), (50, 3))), *range(20))
        for value in opt.state[params_of(opt)[1]].values():
            value.zero_()
        run(opt, *range(20, 30))
        results.append([*params_of(opt), *(opt.state[p]["step"] for p in params_of(opt))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_state_dict_aliases_the_states_as_torchs_does():
    opt = ready(amsgrad=True)
    for param, state in zip(params_of(opt), opt.state_dict()["state"].values(), strict=True):
        assert state is opt.state[param]


COUNTS = {
    "float32": lambda: torch.tensor(2.0),
    "float64": lambda: torch.tensor(2.0, dtype=torch.float64),
    "float16": lambda: torch.tensor(2.0, dtype=torch.float16),
    "bfloat16": lambda: torch.tensor(2.0, dtype=torch.bfloat16),
    "int64": lambda: torch.tensor(2),
    "int32": lambda: torch.tensor(2, dtype=torch.int32),
    "one element": lambda: torch.tensor([2.0]),
    "in a buffer": lambda: torch.full((3,), 2.0)[1],
    "negated": lambda: torch._neg_view(torch.tensor(-2.0)),
    "shared": lambda: torch.tensor(2.0).share_memory_(),
    "fraction": lambda: torch.tensor(2.5),
    "small fraction": lambda: torch.tensor(1e-3),
    "more than bfloat16 can count": lambda: torch.tensor(256.0, dtype=torch.bfloat16),
    "more than float32 can count": lambda: torch.tensor(2.0**24),
    "2**40": lambda: torch.tensor(2**40),
    "huge": lambda: torch.tensor(1e30),
    "huge in float64": lambda: torch.tensor(1e300, dtype=torch.float64),
}


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_the_count_that_is_there_is_counted_in_place_with_torchs_numbers(count):
    results = []
    for maker in (torchs, make, functools.partial(make, backend="reference")):
        opt = ready((20,), (20,), (20,), steps=1, make=maker)
        own = opt.state[params_of(opt)[1]]["step"] = count()
        where, dtype = own.data_ptr(), own.dtype
        run(opt, 1, 2, 3)
        assert opt.state[params_of(opt)[1]]["step"] is own
        assert (own.data_ptr(), own.dtype) == (where, dtype)
        results.append([*(p.detach() for p in params_of(opt)), own])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, results[1], results[2]))


@pytest.mark.parametrize("number", [2, 2.0, 2.5, np.float64(2), np.int64(2), True], ids=repr)
def test_a_count_may_be_a_number(number):
    tensor = torch.tensor(float(number))
    alike(lambda o, p: put(o, p, "step", number), lambda o, p: put(o, p, "step", tensor))


@pytest.mark.parametrize("as_tensor", [torch.tensor, float], ids=["tensor", "float"])
@pytest.mark.parametrize("count", [-1.0, -2.5, -1e30, float("nan"), float("inf"), -float("inf")])
@two_optimizers
def test_a_count_that_cannot_be_one_is_refused_by_name(optimizer, count, as_tensor):
    refused(lambda o, p: put(o, p, "step", as_tensor(count)), NAME, optimizer=optimizer)


def test_a_lazy_clone_of_a_count_stays_as_it_was():
    opt = ready()
    clone = opt.state[params_of(opt)[0]]["step"]._lazy_clone()
    opt.step()
    assert (clone, opt.state[params_of(opt)[0]]["step"]) == (2, 3)


def shared_by_processes(make) -> list[Tensor]:
    """Children step one after another; what their parent has then."""
    params = [nn.Parameter(randn(20, seed=i).share_memory_()) for i in range(2)]
    opt = make(params)
    for param in params:
        states = {"step": torch.zeros(()), **{key: torch.zeros(20) for key in MOMENTS[:2]}}
        opt.state[param].update({key: value.share_memory_() for key, value in states.items()})
    for seed in range(3):
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            run(opt, seed)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    return [*params, *(opt.state[p]["step"] for p in params)]


@alone("forked")
def test_states_in_shared_memory_are_stepped_where_they_are(case):
    ours, theirs = shared_by_processes(make), shared_by_processes(torchs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# States of others.


def through_loading(opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    return opt


def into_a_new_one(opt):
    new = make([nn.Parameter(p.detach().clone()) for p in params_of(opt)])
    new.load_state_dict(opt.state_dict())
    return new


@pytest.mark.parametrize("copied", [through_loading, into_a_new_one, copy.deepcopy])
@pytest.mark.parametrize("maker", [make, torchs])
def test_what_others_keep_in_the_state_survives(copied, maker):
    opt = ready(make=maker)
    opt.state[params_of(opt)[0]].update(slow=torch.full((6,), 7.0), n=3, more={"k": [None, 2.0]})
    opt.state["wrapper"] = {"k": 2, "buffer": torch.ones(3, dtype=torch.float64)}
    opt = run(copied(opt if maker is make else into_a_new_one(opt)), 2, 3)
    for holder in (opt.state, opt.state_dict()["state"]):
        assert holder["wrapper"]["k"] == 2
        assert torch.equal(holder["wrapper"]["buffer"], torch.ones(3, dtype=torch.float64))
    state = opt.state[params_of(opt)[0]]
    assert torch.equal(state["slow"], torch.full((6,), 7.0))
    assert (state["n"], state["more"], float(state["step"])) == (3, {"k": [None, 2.0]}, 4)


@pytest.mark.parametrize("way", ["loaded", "set"])
@pytest.mark.parametrize("wide", [MOMENTS[:1], MOMENTS[1:2], MOMENTS[1:]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@two_optimizers
def test_moments_of_mixed_dtypes_go_on(optimizer, dtype, wide, way):
    """As near to steps of float32 moments as a rounding of each number at each step is."""
    results = []
    for backend, keys in (("cpu", wide), ("reference", wide), ("cpu", MOMENTS)):
        opt = ready((20,), dtype=dtype, optimizer=optimizer, amsgrad=True, backend=backend)
        state_dict = copy.deepcopy(opt.state_dict())
        state = state_dict["state"][0] if way == "loaded" else opt.state[params_of(opt)[0]]
        state.update({key: state[key].float() for key in keys})
        if way == "loaded":
            opt.load_state_dict(state_dict)
        results.append(run(opt, 2, 3, 4))
    assert_same_bits(*results[:2])
    mixed, wider = params_of(results[0])[0], params_of(results[2])[0]
    error = 6 * torch.finfo(dtype).eps
    torch.testing.assert_close(mixed, wider, rtol=error, atol=error)


@pytest.mark.parametrize("lazy", [None, *MOMENTS])
@pytest.mark.parametrize("key", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_moments_of_a_dtype_that_loses_numbers_are_refused_and_stay(dtype, key, lazy):
    other = torch.float64 if dtype == torch.float32 else torch.float32

    def spoil(opt, param):
        state = opt.state[param]
        state[key] = state[key].real.to(other)
        if lazy is not None:
            state[lazy] = torch._neg_view(-state[lazy])

    refused(spoil, NAME, dtype=dtype, amsgrad=True)


# Steps in backward.


def loop_with_shared_layer(in_backward: bool, reentrant: bool, uses: int):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    opt = make(layer.parameters())
    handle = adamprox.step_in_backward(layer, opt) if in_backward else contextlib.nullcontext()
    with handle:
        for time in range(5):
            y = torch.ones(2, 4, requires_grad=True) * (time + 1)
            for _ in range(uses):
                y = checkpoint(layer, y, use_reentrant=reentrant)
            try:
                (y**2).sum().backward()
            except RuntimeError:
                assert (in_backward, time) == (True, 0), "only the first iteration may refuse"
                return None
            opt.step()
            opt.zero_grad()
    return opt


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("uses", [1, 2, 3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_shared_layer_under_checkpoints_takes_the_plain_loops_steps(reentrant, uses):
    ours = loop_with_shared_layer(True, reentrant, uses)
    if ours is None:
        assert (reentrant, uses > 1) == (True, True)
    else:
        assert_same_bits(ours, loop_with_shared_layer(False, reentrant, uses))


def prune(module, opt) -> None:
    """A copy of fewer rows takes the first param's place, with its state."""
    old, new = module[0], nn.Parameter(module[0].detach()[:2].clone())
    state = opt.state.pop(old)
    opt.state[new] = {k: v[:2].clone() if v.dim() else v for k, v in state.items()}
    module[0] = opt.param_groups[0]["params"][0] = new


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("added", [False, True])
def test_a_param_that_is_replaced_is_stepped_in_backward_or_refused(others, added):
    model = nn.ParameterList([nn.Parameter(torch.ones(4, 3)) for _ in range(1 + others)])
    opt = make(model.parameters())
    with adamprox.step_in_backward(model, opt):
        sum((p**2).sum() for p in model).backward()
        if added:
            model.append(nn.Parameter(torch.ones(3)))
            opt.add_param_group({"params": [model[-1]]})
        else:
            prune(model, opt)
        before = [p.detach().clone() for p in model]
        with contextlib.suppress(RuntimeError):
            sum((p**2).sum() for p in model).backward()
            if added:  # as params that are none of the model's
                opt.step()
            assert not any(map(torch.equal, model, before))


# Telemetry.


def two_params() -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))])


@pytest.mark.parametrize("per", ["tensor", "group"])
def test_stats_are_of_what_was_stepped_although_params_were_replaced(per):
    module = two_params()
    opt = make(module.named_parameters())
    opt.track_updates(every=2, per=per)
    run(opt, 0, 1)
    sizes = [12, 5] if per == "tensor" else [17]
    assert [stats.numel for stats in opt.update_stats()] == sizes
    prune(module, opt)
    assert [stats.numel for stats in opt.update_stats()] == sizes
    opt.param_groups[0]["params"].pop()
    opt.param_groups[0]["param_names"].pop()
    assert [stats.numel for stats in opt.update_stats()] == sizes
    run(opt, 2, 3)
    assert [stats.numel for stats in opt.update_stats()] == [6]


def test_telemetry_keeps_neither_params_nor_grads_alive():
    module = two_params()
    opt = make(module.parameters())
    opt.track_updates(every=3)
    run(opt, 0, 1, 2)
    gone = [weakref.ref(t) for t in (module[0], module[0].grad, module[1].grad)]
    prune(module, opt)
    opt.zero_grad()
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    run(opt, 3)
    assert [stats.numel for stats in opt.update_stats()] == [17]


class Wrapper:
    """Has the optimizer's class and leaves its step to it."""

    def step(self, closure=None):
        return self.optimizer.step(closure)


class CopyingWrapper(Wrapper):
    """Has the attributes that the optimizer had, as Lightning Fabric's."""

    def __init__(self, opt):
        self.__dict__ = {k: v for k, v in opt.__dict__.items() if k not in ("state_dict", "step")}
        self.__class__ = type("Fabric" + type(opt).__name__, (CopyingWrapper, type(opt)), {})
        self.optimizer = opt


class AskingWrapper(Wrapper):
    """Asks the optimizer for attributes, as that of Lightning's Trainer."""

    def __init__(self, opt):
        self.optimizer = opt
        self.__class__ = type("Lightning" + type(opt).__name__, (AskingWrapper, type(opt)), {})

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


@pytest.mark.parametrize("reading", ["wrapper", "optimizer"])
@pytest.mark.parametrize("tracking", ["wrapper", "optimizer", "before"])
@pytest.mark.parametrize("wrapper", [CopyingWrapper, AskingWrapper])
def test_telemetry_works_through_wrappers(wrapper, tracking, reading):
    opt = ready()
    if tracking == "before":
        opt.track_updates()
    either = {"wrapper": wrapper(opt), "optimizer": opt}
    if tracking != "before":
        either[tracking].track_updates()
    either["wrapper"].step()
    (stats,) = either[reading].update_stats()
    assert (stats.step, stats.numel) == (3, 20)
    either[reading].track_updates(every=0)
    assert all(each.update_stats() == [] for each in either.values())


# Values that are not what lies in memory.

NEGATED = {
    "_neg_view": lambda t: torch._neg_view(-t),
    "strided _neg_view": lambda t: torch._neg_view(torch.stack([-t, t], -1))[..., 0],
    "imag of a conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "dense imag": lambda t: (
        torch.zeros(2 * t.numel(), dtype=torch.complex64)
        .conj()
        .imag.as_strided(t.shape, t.contiguous().stride())
        .copy_(t)
    ),
}


@pytest.mark.parametrize("key", TENSORS)
@pytest.mark.parametrize("lazy", NEGATED.values(), ids=NEGATED)
@two_optimizers
def test_a_negative_bit_counts(optimizer, lazy, key):
    def spoil(change):
        return lambda o, p: put(o, p, key, change(tensor_of(o, p, key).detach().clone()))

    alike(spoil(lazy), spoil(torch.clone), optimizer=optimizer, amsgrad=True)


@pytest.mark.parametrize("key", TENSORS)
def test_a_conjugate_bit_counts(key):
    def spoil(change):
        def put_it(opt, param):
            value = tensor_of(opt, param, key).detach()
            put(opt, param, key, change(value + 1j * value.real.square()))

        return put_it

    lazy, plain = spoil(torch.conj), spoil(torch.conj_physical)
    alike(lazy, plain, dtype=torch.complex64, amsgrad=True)


@pytest.mark.parametrize("steps", [0, 2])
def test_states_follow_a_param_whose_layout_changes(steps):
    opt, twin = (ready((8, 4, 3, 3), (4, 3), steps=steps, amsgrad=True) for _ in range(2))
    for param in params_of(opt):
        param.data = param.data.movedim(1, -1).contiguous().movedim(-1, 1)  # channels_last
    places = []
    for seed in range(3):
        for p, q in zip(params_of(opt), params_of(twin), strict=True):
            q.grad = randn(*q.shape, seed=seed)
            p.grad = torch.empty_like(p).copy_(q.grad)
        opt.step()
        twin.step()
        assert_same_bits(opt, twin)
        moments = [(p, opt.state[p][key]) for p in params_of(opt) for key in MOMENTS]
        assert all(moment.stride() == p.stride() for p, moment in moments)
        places.append([moment.data_ptr() for _, moment in moments])
    assert places[0] == places[1] == places[2]


# All or nothing.


@pytest.mark.parametrize("key", [*MOMENTS, "step"])
@pytest.mark.parametrize("strided", [False, True])
def test_a_state_made_in_inference_mode_is_stepped_or_refused(key, strided):
    opt, twin = (ready(amsgrad=True) for _ in range(2))
    copies, param = kept(opt), params_of(opt)[1]
    with torch.inference_mode():
        value = opt.state[param][key].clone()
        opt.state[param][key] = torch.stack([value, value], -1)[..., 0] if strided else value
    before = snapshot(opt)
    try:
        opt.step()
    except RuntimeError:
        assert snapshot(opt) == before
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
    """Whether the attempt at a step was broken off."""
    opt, twin = SITUATIONS[situation](), SITUATIONS[situation]()
    before = with_zeros(opt)
    twin.step()
    after, broken_off = with_zeros(twin), False
    try:
        attempt(opt)
    except (KeyboardInterrupt, MemoryError, RuntimeError):
        broken_off = True
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
        with OutOfMemory(n):
            opt.step()

    for n in range(1, 1000):  # noqa: B007
        if not all_or_nothing(case, attempt):
            break


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

    for n in range(1, 5000):  # noqa: B007
        broken_off = all_or_nothing(case, attempt)
        assert [signal.getsignal(number) for number in SIGNALS] == handlers, "handlers were lost"
        if not broken_off:
            break


@alone("steps", "construction")
def test_ctrl_c_at_any_time_leaves_all_or_nothing(case):
    rng = random.Random(0)

    def interrupt(*_):
        raise KeyboardInterrupt

    def attempt(opt):
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-4))
            if case == "steps":
                opt.step()
            else:
                [make(params_of(opt)) for _ in range(4)]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    handler = signal.signal(signal.SIGALRM, interrupt)
    for time in range(200):
        if case == "steps":
            all_or_nothing(list(SITUATIONS)[time % 4], attempt)
        else:
            opt = ready()
            with contextlib.suppress(KeyboardInterrupt):
                attempt(opt)
            opt.step()
    signal.signal(signal.SIGALRM, handler)


# Smaller ones.


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
