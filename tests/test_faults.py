"""What people do to an optimizer between steps and amid them: each kind went wrong once.

What may hang or crash runs in a process of its own, many cases in one.
"""

from __future__ import annotations

import collections
import copy
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
from registry import OPTIMIZERS, assert_same_bits, same_bits

two_optimizers = pytest.mark.parametrize("optimizer", ["AdamW", "AdamProxL2"])  # one sweep, two
ERRORS = (RuntimeError, TypeError, ValueError)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
SECONDS = 3  # for what takes milliseconds, where others have the machine too
SHAPES = ((6,), (4, 3), (2,))


# Optimizers, what they hold, and a step that is refused.


def make(params, optimizer: str = "AdamW", **arguments) -> torch.optim.Optimizer:
    spec = OPTIMIZERS[optimizer]
    arguments = {"lr": 1e-2, "weight_decay": spec.weight_decay, "backend": "cpu", **arguments}
    return spec.cls(params, **arguments)


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


def ready(*shapes, steps: int = 2, dtype=torch.float32, **arguments) -> torch.optim.Optimizer:
    """After some steps, with the grads of the next one."""
    params = [nn.Parameter(randn(*s, seed=i, dtype=dtype)) for i, s in enumerate(shapes or SHAPES)]
    opt = make(params, **arguments)
    for seed in range(steps):
        set_grads(opt, seed)
        opt.step()
    set_grads(opt, steps)
    return opt


def readable(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return False
    if tensor.layout != torch.strided or tensor.is_nested or tensor.dtype == torch.qint8:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(
        tensor
    ):
        return False
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = tensor.storage_offset() + last + 1 if tensor.numel() else 0
    return tensor.untyped_storage().nbytes() >= end * tensor.itemsize


def frozen(value):
    """A tensor's dtype and bytes; of others, the value itself."""
    if isinstance(value, collections.abc.Mapping):
        return {key: frozen(entry) for key, entry in value.items()}
    if not isinstance(value, Tensor):
        return repr(value)
    if not readable(value):
        return id(value)
    value = value.detach().resolve_conj().resolve_neg()
    value = torch.view_as_real(value) if value.is_complex() else value
    return value.dtype, value.shape, value.contiguous().reshape(-1).view(torch.uint8).tolist()


def snapshot(opt) -> list:
    """Params, states and step counts, as values."""
    return [(frozen(param), frozen(opt.state.get(param, {}))) for param in params_of(opt)]


def kept(opt) -> list:
    """Copies, for :func:`restore`."""
    clone = torch.clone
    return [
        (
            clone(p.detach()),
            p.grad if p.grad is None else clone(p.grad),
            copy.deepcopy(opt.state[p]),
        )
        for p in params_of(opt)
    ]


def restore(opt, copies: list) -> None:
    opt.state.clear()
    for param, (value, grad, state) in zip(params_of(opt), copies, strict=True):
        param.data, param.grad = value, grad
        if state:
            opt.state[param] = state


def refuses(opt, match: str | None = None, step=None, errors=ERRORS) -> None:
    before = snapshot(opt)
    with pytest.raises(errors, match=match):
        (step or opt.step)()
    assert snapshot(opt) == before


def refused(spoil, match: str | None = None, errors=ERRORS, **arguments) -> None:
    """``spoil`` may return what steps; after its repair the step is the usual one."""
    opt, twin = ready(**arguments), ready(**arguments)
    copies = kept(opt)
    refuses(opt, match, spoil(opt, params_of(opt)[1]), errors)
    restore(opt, copies)
    opt.step()
    twin.step()
    assert_same_bits(opt, twin)


def like_resolved(spoil, resolve, **arguments) -> None:
    """The step after ``spoil`` has the bits of the one after ``resolve``."""
    opt, twin = ready(**arguments), ready(**arguments)
    spoil(opt, params_of(opt)[1])
    resolve(twin, params_of(twin)[1])
    for seed in range(10, 13):
        opt.step()
        twin.step()
        for p, q in zip(params_of(opt), params_of(twin), strict=True):
            assert frozen(p) == frozen(q)
            for key in twin.state[q]:
                assert frozen(opt.state[p][key]) == frozen(twin.state[q][key]), key
        set_grads(opt, seed)
        set_grads(twin, seed)


# Cases that may hang or crash.

ALONE: dict[str, functools.partial] = {}


def alone(*cases: str):
    """Runs the test, once a case, in the process of :func:`outcomes`."""

    def register(body):
        for case in cases:
            ALONE[f"{body.__name__}[{case}]"] = functools.partial(body, case)

        @pytest.mark.parametrize("case", cases)
        def test(case, outcomes):
            assert outcomes[f"{body.__name__}[{case}]"] == "ok"

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return register


def run_alone(names: list[str]) -> None:
    """Calls those of ALONE and prints what came of each."""

    def too_late(*_):
        raise TimeoutError("it does not end")

    signal.signal(signal.SIGALRM, too_late)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # so that collecting what comes later is cheap
    for name in names:
        faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
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
    """Of the cases that were asked for; after one that ends the process, the rest has another."""
    asked = {item.name for item in request.session.items if item.path == request.path}
    results: dict[str, str] = {}
    while rest := [name for name in ALONE if name in asked and name not in results]:
        process = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c"]
            + [f"import test_faults; test_faults.run_alone({rest!r})"],
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


def tensor_of(opt, param: Tensor, key: str) -> Tensor:
    return {"param": param, "grad": param.grad, **opt.state[param]}[key]


def put(opt, param: Tensor, key: str, value: Tensor) -> None:
    if key == "param":
        param.data = value
    elif key == "grad":
        param.grad = value
    else:
        opt.state[param][key] = value


KEYS = ("param", "grad", *MOMENTS, "step")


@alone(*KEYS)
def test_storage_that_was_freed_or_has_shrunk_is_named_and_nothing_is_updated(case):
    def shrink(by):
        def spoil(opt, param):
            storage = tensor_of(opt, param, case).untyped_storage()
            storage.resize_(max(0, storage.nbytes() - by))

        return spoil

    name = {"step": "step count", "param": ""}.get(case, case)
    for by in (1, 1 << 20):
        for steps in (0, 2)[case not in ("param", "grad") :]:
            match = rf"{name}.*param_groups\[0\]\['params'\]\[1\]"
            refused(shrink(by), match, RuntimeError, steps=steps, amsgrad=True)


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


def outlived(transform, value: Tensor) -> Tensor:
    """The tensor that a function saw amid a transform, which is over."""
    seen = []
    transform(lambda x: (seen.append(x), x.sum())[1])(value)
    return seen[0]


@alone(*FOREIGN)
def test_a_tensor_without_memory_of_its_own_is_refused(case):
    keys = ("grad", *MOMENTS, "step")
    if case in ("nested", "mkldnn", "quantized"):  # grads that torch refuses, counts that it reads
        keys = MOMENTS
    if case == "meta":
        keys = keys[1:]
    for key in keys:

        def spoil(opt, param, key=key):
            foreign = FOREIGN[case](
                torch.tensor([[2.0]]) if key == "step" else param.detach().clone()
            )
            put(opt, param, key, foreign)

        refused(spoil, amsgrad=True)


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x] * 3)),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x[None]),
}


@alone(*TRANSFORMS)
def test_a_step_amid_a_transform_is_refused(case):
    """Its grad is the transform's."""

    def spoil(opt, param):
        def f(grad):
            param.grad = grad
            opt.step()
            return grad * 2

        return lambda: TRANSFORMS[case](f, torch.ones_like(param.detach()))

    refused(spoil)
    refused(spoil, steps=0)


ZEROS = {
    "sgn's backward": lambda p: (setattr(p, "grad", None), torch.sgn(p).sum().backward()),
    "made": lambda p: setattr(p, "grad", torch._efficientzerotensor(p.shape, dtype=p.dtype)),
    "negated": lambda p: setattr(
        p, "grad", torch._neg_view(torch._efficientzerotensor(p.shape, dtype=p.dtype))
    ),
}


@alone(*ZEROS)
def test_a_grad_that_torch_knows_to_be_zero_is_stepped(case):
    for steps in (0, 2):
        for dtype in (torch.float32, torch.bfloat16, torch.complex64):
            like_resolved(
                lambda opt, p: ZEROS[case](p),
                lambda opt, p: setattr(p, "grad", torch.zeros_like(p)),
                dtype=dtype,
                steps=steps,
            )


class Mapping(collections.abc.MutableMapping):
    """Without a dict's layout."""

    def __init__(self, entries):
        self.items_ = list(entries.items())

    def __getitem__(self, key):
        return collections.OrderedDict(self.items_)[key]

    def __setitem__(self, key, value):
        self.items_ = [*(pair for pair in self.items_ if pair[0] != key), (key, value)]

    def __delitem__(self, key):
        self.items_ = [pair for pair in self.items_ if pair[0] != key]

    def __iter__(self):
        return iter([key for key, _ in self.items_])

    def __len__(self):
        return len(self.items_)


class Lazy(dict):
    """A dict whose entries are elsewhere."""

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
    "Mapping": Mapping,
    "Lazy": Lazy,
}


@alone(*MAPPINGS)
def test_any_mapping_may_be_a_params_state(case):
    kind = MAPPINGS[case]

    def spoil(opt, param):
        opt.state[param] = kind(opt.state[param])

    like_resolved(spoil, lambda opt, param: None, amsgrad=True)


@alone("UserDict", "OrderedDict", "Mapping")
def test_any_mapping_may_be_filled_by_the_first_step(case):
    like_resolved(
        lambda opt, param: opt.state.update({param: MAPPINGS[case]({})}),
        lambda opt, param: None,
        steps=0,
    )


@alone("dict", "UserDict", "OrderedDict")
def test_any_mapping_may_be_the_whole_state(case):
    kind = {**MAPPINGS, "dict": dict}[case]
    like_resolved(
        lambda opt, param: setattr(opt, "state", kind(opt.state)), lambda opt, param: None
    )


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
    "sequence of new floats": Pair(lambda x: x * 1.0),
    "sequence of new tensors": Pair(torch.tensor),
    "sequence of new arrays": Pair(np.float32),
    "sequence of new objects": Pair(Number),
    "tensor": torch.tensor([0.75, 0.875]),
    "fractions": (Fraction(3, 4), Fraction(7, 8)),
}
SCALARS = (float, torch.tensor, np.float32, np.float64, np.array, Fraction, Number)


@alone(*BETAS)
def test_numbers_of_any_kind_give_the_bits_of_floats(case):
    """Also those that end with the expression that made them; or a clear error."""
    for kind in SCALARS:
        opt, twin = (ready((6,), (4, 3), steps=0) for _ in range(2))
        for each in (opt, twin):
            each.param_groups[0]["params"].pop()
            each.add_param_group({"params": [nn.Parameter(randn(4, 3, seed=1))]})
            set_grads(each, 0)
        plain = {"lr": 2.0**-7, "eps": 2.0**-20, "weight_decay": 0.25}
        for group, other in zip(opt.param_groups, twin.param_groups, strict=True):
            group.update({key: kind(value) for key, value in plain.items()}, betas=BETAS[case])
            other.update(plain, betas=(0.75, 0.875))
        for seed in range(1, 4):
            before = snapshot(opt)
            try:
                opt.step()
            except (TypeError, ValueError):  # torch's steps raise of these, too
                assert kind in (Number, Fraction) or case in (
                    "fractions",
                    "sequence of new objects",
                )
                assert snapshot(opt) == before
                break
            twin.step()
            assert_same_bits(opt, twin)
            set_grads(opt, seed)
            set_grads(twin, seed)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2), np.float32(1e-2)], ids=str)
@pytest.mark.parametrize("betas", [np.array([0.9, 0.999]), torch.tensor([0.9, 0.999])], ids=type)
def test_betas_in_an_array_give_torchs_numbers(betas, lr):
    moments = []
    for cls in (torch.optim.AdamW, adamprox.AdamW):
        param = nn.Parameter(torch.zeros(4))
        opt = cls([param], lr=lr, betas=betas)
        for _ in range(3):
            param.grad = torch.ones(4)
            opt.step()
        moments.append(opt.state[param]["exp_avg"])
    torch.testing.assert_close(*moments)


# Python amid the read.


class InFunctions(TorchFunctionMode):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def __torch_function__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            self.act()
        return func(*args, **(kwargs or {}))


class InOperations(TorchDispatchMode):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.act()
        return func(*args, **(kwargs or {}))


class Acting:
    """A number, a state and a key that act when they are read."""

    def __init__(self, act, value):
        self.act, self.value = act, value

    def __float__(self):
        self.act()
        return self.value

    def __getitem__(self, key):
        self.act()
        return self.value[key]

    def __len__(self):
        self.act()
        return len(self.value)

    def __hash__(self):
        return hash(self.value)

    def __eq__(self, other):
        self.act()
        return False


class ActingState(Acting, Mapping):
    __hash__ = None

    def __iter__(self):
        return iter(self.value)

    def __setitem__(self, key, value):
        self.act()
        self.value[key] = value


class ActingParam(nn.Parameter):
    act = staticmethod(lambda: None)

    @property
    def grad(self):
        self.act()
        return Tensor.grad.__get__(self)

    @grad.setter
    def grad(self, value):
        Tensor.grad.__set__(self, value)


def with_mode(mode):
    def step(opt, act):
        with mode(act):
            opt.step()

    return step


def with_number(key):
    def step(opt, act):
        opt.param_groups[0][key] = Acting(act, (0.9, 0.999) if key == "betas" else 1e-2)
        opt.step()

    return step


def with_state(opt, act):
    last = params_of(opt)[-1]
    opt.state[last] = ActingState(act, dict(opt.state[last]))
    opt.step()


def put_first(key, entries: dict) -> None:
    """So that looking up an entry of the same hash meets it."""
    old = dict(entries)
    entries.clear()
    entries.update({key: None})
    entries.update(old)


def with_key(of):
    def step(opt, act):
        entries = opt.param_groups[0] if of == "group" else opt.state[params_of(opt)[-1]]
        key = Acting(lambda: None, "lr" if of == "group" else "exp_avg")
        put_first(key, entries)
        key.act = act
        opt.step()

    return step


def with_grad_property(opt, act):
    ActingParam.act = staticmethod(act)
    try:
        opt.step()
    finally:
        ActingParam.act = staticmethod(lambda: None)


class Collected:
    def __init__(self, act):
        self.act, self.itself = act, self

    def __del__(self):
        self.act()


def with_collection(opt, act):
    """The collector of cycles runs whenever objects are made."""
    gc.collect()
    before = gc.get_threshold()
    for _ in range(50):
        Collected(act)
    gc.set_threshold(1, 1, 1)
    try:
        opt.step()
    finally:
        gc.set_threshold(*before)


PLACES = {
    "a function mode": with_mode(InFunctions),
    "a dispatch mode": with_mode(InOperations),
    "the lr": with_number("lr"),
    "the betas": with_number("betas"),
    "a state": with_state,
    "a key of a group": with_key("group"),
    "a key of a state": with_key("state"),
    "a grad property": with_grad_property,
    "the collector": with_collection,
}


def drop_grads(opt):
    for param in params_of(opt):
        Tensor.grad.__set__(param, None)


def drop_params(opt):
    del opt.param_groups[0]["params"][1:]


def drop_groups(opt):
    del opt.param_groups[1:]


def drop_states(opt):
    opt.state.clear()


def drop_entries(opt):
    for state in opt.state.values():
        if isinstance(state, dict):
            state.clear()


def move_memory(opt):
    for param in params_of(opt):
        param.data = param.detach().clone()
        for state in opt.state.values():
            if isinstance(state, dict):
                state.update((k, v.clone()) for k, v in state.items() if isinstance(v, Tensor))


def free_memory(opt):
    for param in params_of(opt):
        param.untyped_storage().resize_(0)


def step_again(opt):
    if not getattr(opt, "again", False):
        opt.again = True
        opt.step()


def add_groups(opt):
    if len(opt.param_groups) < 50:
        opt.add_param_group({"params": [nn.Parameter(torch.ones(7))]})


def load(opt):
    if not getattr(opt, "loaded", False):
        opt.loaded = True
        opt.load_state_dict(opt.state_dict())


MISCHIEFS = (drop_grads, drop_params, drop_groups, drop_states, drop_entries, move_memory)
MISCHIEFS += (free_memory, step_again, add_groups, load)


@alone(*(f"{mischief.__name__} in {place}" for mischief in MISCHIEFS for place in PLACES))
def test_python_code_amid_a_step_does_no_harm(case):
    """A number that was made from freed memory would be far away from all others."""
    mischief, place = case.split(" in ")
    params = [ActingParam(randn(1000, seed=i)) for i in range(4)]
    opt = make([{"params": params[:1]}, {"params": params[1:]}])
    set_grads(opt, 0)
    opt.step()
    set_grads(opt, 1)
    # So that much is to be made and copied.
    opt.param_groups[1]["lr"] = torch.tensor(1e-2)
    opt.state.pop(params[1])
    opt.state[params[2]]["exp_avg"] = torch.zeros(1000, 2)[:, 0]
    opt.state[params[2]]["step"] = 1
    others = [p.detach().clone() for p in params]
    junk = []

    def act():
        junk.append(None)
        if len(junk) < 1000:
            globals()[mischief](opt)
            junk.append([torch.full((1000,), 9e9) for _ in range(4)])
            gc.collect()
            junk.pop()

    try:
        PLACES[place](opt, act)
    except ERRORS:
        if mischief not in ("free_memory", "step_again"):
            assert all(map(torch.equal, params, others)), "updated in spite of the error"
    for param in params if mischief != "free_memory" else []:
        assert param.detach().abs().max() < 100
    for state in opt.state.values():
        values = state.value if isinstance(state, ActingState) else state
        assert all(abs(v).max() < 100 for v in values.values() if isinstance(v, Tensor))


# Threads.


@alone("all at once", "grads come and go", "others change it")
def test_threads_that_share_an_optimizer_wait_for_each_other(case):
    threads, times = 4, 30
    torch.set_num_threads(2)
    opt = ready(*[(500,)] * 40, (70_000,), (70_000,), steps=1)
    problems, steps = [], []

    def work(index: int) -> None:
        try:
            for time in range(times):
                if case == "grads come and go":
                    for param in params_of(opt)[10 * index : 10 * index + 10]:
                        param.grad = None if time % 2 else torch.ones_like(param)
                if case == "others change it" and index == 0:
                    opt.load_state_dict(opt.state_dict())
                    opt.param_groups[0]["lr"] = torch.tensor(1e-2)
                    copy.deepcopy(opt)
                    continue
                opt.step()
                steps.append(1)
        except RuntimeError as error:
            if "nothing was updated" not in str(error):
                problems.append(error)
        except BaseException as error:
            problems.append(error)

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(threads)]
    [worker.start() for worker in workers]
    [worker.join(SECONDS) for worker in workers]
    torch.set_num_threads(1)
    assert not problems, problems
    assert not any(worker.is_alive() for worker in workers)
    assert all(p.isfinite().all() for p in params_of(opt))
    if case == "all at once":
        twin = ready(*[(500,)] * 40, (70_000,), (70_000,), steps=1)
        for _ in steps:
            twin.step()
        assert_same_bits(opt, twin)
        assert {float(state["step"]) for state in opt.state.values()} == {1 + len(steps)}


# Memory that several rows share: one after the other, in the order of the groups.


def same_memory(opt, a, b, c):
    b.data = a.data


def later_half(opt, a, b, c):
    a.data, b.data = (memory := randn(4500))[:3000], memory[1500:]


def interleaved(opt, a, b, c):
    a.data, b.data = (memory := randn(6000))[::2], memory[1:3001]


def real_and_complex(opt, a, b, c):
    pairs = torch.view_as_complex(a.data.view(-1, 2))
    opt.param_groups[0]["params"][1] = nn.Parameter(pairs)


def listed_again(opt, a, b, c):
    opt.param_groups[0]["params"].append(a)


def listed_in_another_group(opt, a, b, c):
    opt.param_groups.append({**opt.param_groups[0], "params": [b], "lr": 0.1})


def grad_in_another_param(opt, a, b, c):
    b.grad = a.detach()


def grad_in_a_later_param(opt, a, b, c):
    a.grad = b.detach()


def grad_in_a_state(opt, a, b, c):
    b.grad = opt.state[a]["exp_avg"]


def shared_exp_avg(opt, a, b, c):
    opt.state[b]["exp_avg"] = opt.state[a]["exp_avg"]


def shared_state(opt, a, b, c):
    opt.state[b] = opt.state[a]


def shared_count(opt, a, b, c):
    opt.state[b]["step"] = opt.state[a]["step"]


def state_in_a_param(opt, a, b, c):
    opt.state[b]["exp_avg"] = c.data[:3000]


AT_FIRST = (same_memory, later_half, interleaved, real_and_complex, listed_again)
AT_FIRST += (listed_in_another_group,)
EACH_TIME = (grad_in_another_param, grad_in_a_later_param, grad_in_a_state)
LATER = (shared_exp_avg, shared_state, shared_count, state_in_a_param)


def sharing(share, make_it=make, **arguments):
    params = [nn.Parameter(randn(size, seed=i)) for i, size in enumerate((3000, 3000, 100_000))]
    opt = make_it(params, **arguments)
    for time in range(20):
        if time == 0 and share in AT_FIRST:
            share(opt, *params)
        set_grads(opt, time)
        if (time == 1 and share in LATER) or (time > 0 and share in EACH_TIME):
            share(opt, *params)
        opt.step()
    return opt


@pytest.mark.parametrize("share", AT_FIRST + EACH_TIME + LATER, ids=lambda share: share.__name__)
def test_shared_memory_is_stepped_one_param_after_the_other(share):
    expected = sharing(share, torchs)
    reference = sharing(share, backend="reference")
    torch.set_num_threads(2)
    for _ in range(3):
        opt = sharing(share)
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
        (param,) = params_of(opt)
        memory = randn(80_000).abs()
        if key == "param":
            param.data = memory[10_000:70_000]
        else:
            opt.state[param][key] = memory[10_000:70_000]
        param.grad = memory[10_000 + shift : 70_000 + shift]
        opt.step()
        pair.append(opt)
    assert_same_bits(*pair)


@two_optimizers
def test_a_param_listed_twice_is_warned_of_at_once_and_stepped_twice(optimizer):
    pair = []
    for backend in ("cpu", "reference"):
        params = [nn.Parameter(randn(5, seed=i)) for i in range(2)]
        with pytest.warns(UserWarning, match="duplicate"):
            pair.append(make([params[0], params[1], params[0]], optimizer, backend=backend))
        for seed in range(3):
            set_grads(pair[-1], seed)
            pair[-1].step()
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
    for make_it in (torchs, make):
        opt = make_it([nn.Parameter(randn(50, 3, seed=i)) for i in range(3)])
        for seed in range(30):
            set_grads(opt, seed)
            opt.step()
            if seed == 19:
                for value in opt.state[params_of(opt)[1]].values():
                    value.zero_()
        results.append([*params_of(opt), *(opt.state[p]["step"] for p in params_of(opt))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_state_dict_aliases_the_states_as_torchs_does():
    opt = ready(amsgrad=True)
    for param, state in zip(params_of(opt), opt.state_dict()["state"].values(), strict=True):
        assert state is opt.state[param]


COUNTS = {
    "float32": torch.tensor(2.0),
    "float64": torch.tensor(2.0, dtype=torch.float64),
    "float16": torch.tensor(2.0, dtype=torch.float16),
    "bfloat16": torch.tensor(2.0, dtype=torch.bfloat16),
    "int64": torch.tensor(2),
    "int32": torch.tensor(2, dtype=torch.int32),
    "one element": torch.tensor([2.0]),
    "in a buffer": torch.full((3,), 2.0)[1],
    "negated": torch._neg_view(torch.tensor(-2.0)),
    "shared": torch.tensor(2.0).share_memory_(),
    "fraction": torch.tensor(2.5),
    "small fraction": torch.tensor(1e-3),
    "more than float16 can count": torch.tensor(2048.0, dtype=torch.float16),
    "more than float32 can count": torch.tensor(2.0**24),
    "2**40": torch.tensor(2**40),
    "huge": torch.tensor(1e30),
    "huge in float64": torch.tensor(1e300, dtype=torch.float64),
}


@pytest.mark.parametrize("case", COUNTS)
def test_the_count_that_is_there_is_counted_in_place_with_torchs_numbers(case):
    results = []
    for make_it in (torchs, make, functools.partial(make, backend="reference")):
        opt = make_it([nn.Parameter(randn(20, seed=i)) for i in range(3)])
        set_grads(opt, 0)
        opt.step()
        count = COUNTS[case].clone()
        count = torch._neg_view(-count) if case == "negated" else count
        count = count.share_memory_() if case == "shared" else count
        count = torch.stack([count] * 3)[1] if case == "in a buffer" else count
        opt.state[params_of(opt)[1]]["step"] = count
        where = count.data_ptr()
        for seed in range(1, 4):
            set_grads(opt, seed)
            opt.step()
        assert opt.state[params_of(opt)[1]]["step"] is count
        assert (count.data_ptr(), count.dtype) == (where, COUNTS[case].dtype)
        results.append([*(p.detach() for p in params_of(opt)), count])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, results[1], results[2]))


@pytest.mark.parametrize("number", [2, 2.0, 2.5, np.float64(2), np.int64(2), True], ids=repr)
def test_a_count_may_be_a_number(number):
    like_resolved(
        lambda opt, param: opt.state[param].update(step=number),
        lambda opt, param: opt.state[param].update(step=torch.tensor(float(number))),
    )


@pytest.mark.parametrize("as_tensor", [torch.tensor, float], ids=["tensor", "float"])
@pytest.mark.parametrize("count", [-1.0, -2.5, -1e30, float("nan"), float("inf"), -float("inf")])
@two_optimizers
def test_a_count_that_is_none_is_refused_by_name(optimizer, count, as_tensor):
    def spoil(opt, param):
        opt.state[param]["step"] = as_tensor(count)

    refused(spoil, r"param_groups\[0\]\['params'\]\[1\]", optimizer=optimizer)


def test_a_lazy_clone_of_a_count_stays_as_it_was():
    opt = ready()
    clone = opt.state[params_of(opt)[0]]["step"]._lazy_clone()
    opt.step()
    assert (clone, opt.state[params_of(opt)[0]]["step"]) == (2, 3)


def shared_by_processes(make_it) -> list[Tensor]:
    """Children step one after another; what their parent has then."""
    params = [nn.Parameter(randn(20, seed=i).share_memory_()) for i in range(2)]
    opt = make_it(params)
    for param in params:
        state = {"step": torch.zeros(())} | {key: torch.zeros(20) for key in MOMENTS[:2]}
        opt.state[param].update({key: value.share_memory_() for key, value in state.items()})
    for seed in range(3):
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            set_grads(opt, seed)
            opt.step()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    return [*params, *(opt.state[p]["step"] for p in params)]


@alone("forked")
def test_states_in_shared_memory_are_stepped_where_they_are(case):
    torch.testing.assert_close(
        shared_by_processes(make), shared_by_processes(torchs), rtol=1e-5, atol=1e-6
    )


# States of others.


def with_foreign_entries(opt) -> torch.optim.Optimizer:
    first = params_of(opt)[0]
    opt.state[first].update(slow=torch.full((6,), 7.0), note="x", more={"k": [torch.ones(2), None]})
    opt.state["wrapper"] = {"k": 2, "buffer": torch.ones(3, dtype=torch.float64)}
    return opt


def through_loading(opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    return opt


def into_a_new_one(opt):
    new = make([nn.Parameter(p.detach().clone()) for p in params_of(opt)])
    new.load_state_dict(opt.state_dict())
    return new


@pytest.mark.parametrize("copied", [through_loading, into_a_new_one, copy.deepcopy])
@pytest.mark.parametrize("source", [ready, lambda: torchs_ready()], ids=["ours", "torch's"])
def test_what_others_keep_in_the_state_survives(copied, source):
    opt = with_foreign_entries(source())
    if source is not ready:
        ours = ready()
        ours.load_state_dict(opt.state_dict())
        opt = ours
    opt = copied(opt)
    for seed in range(2):
        set_grads(opt, seed)
        opt.step()
    state = opt.state[params_of(opt)[0]]
    assert torch.equal(state["slow"], torch.full((6,), 7.0))
    assert state["note"] == "x"
    assert torch.equal(state["more"]["k"][0], torch.ones(2))
    assert opt.state["wrapper"]["k"] == 2
    assert float(state["step"]) == 4
    assert copy.deepcopy(opt.state_dict())["state"]["wrapper"]["k"] == 2


def torchs_ready():
    opt = torchs([nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(SHAPES)])
    for seed in range(2):
        set_grads(opt, seed)
        opt.step()
    return opt


NARROW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("way", ["loaded", "set"])
@pytest.mark.parametrize("wide", [("exp_avg",), ("exp_avg_sq",), MOMENTS[1:]], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@two_optimizers
def test_moments_of_mixed_dtypes_go_on(optimizer, dtype, wide, way):
    """As near to a step of float32 moments as one rounding of each moment is."""
    results = []
    for backend, keys in (("cpu", wide), ("reference", wide), ("cpu", MOMENTS)):
        arguments = {"optimizer": optimizer, "amsgrad": True, "backend": backend}
        opt = ready((20,), dtype=dtype, **arguments)
        state_dict = copy.deepcopy(opt.state_dict())
        states = state_dict["state"] if way == "loaded" else {0: opt.state[params_of(opt)[0]]}
        for key in keys:
            states[0][key] = states[0][key].float()
        if way == "loaded":
            opt.load_state_dict(state_dict)
        for seed in range(3):
            set_grads(opt, seed)
            opt.step()
        results.append(opt)
    assert_same_bits(*results[:2])
    eps = torch.finfo(dtype).eps
    ours, wider = params_of(results[0])[0], params_of(results[2])[0]
    torch.testing.assert_close(ours, wider, rtol=6 * eps, atol=6 * eps)


# Steps in backward.


def loop_with_shared_layer(in_backward: bool, reentrant: bool, uses: int):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    opt = make(layer.parameters())
    handle = adamprox.step_in_backward(layer, opt) if in_backward else None
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
    del handle
    return opt


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("uses", [1, 2, 3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_shared_layer_under_checkpoints_takes_the_plain_loops_steps(reentrant, uses):
    plain = loop_with_shared_layer(False, reentrant, uses)
    ours = loop_with_shared_layer(True, reentrant, uses)
    if ours is None:
        assert reentrant
        assert uses > 1
    else:
        assert_same_bits(ours, plain)


def prune(module, name, opt) -> None:
    """A copy of fewer rows takes a param's place, with its state."""
    old = getattr(module, name)
    new = nn.Parameter(old.detach()[:2].clone())
    state = opt.state.pop(old)
    opt.state[new] = {k: v[:2].clone() if v.dim() else v for k, v in state.items()}
    setattr(module, name, new)
    params = opt.param_groups[0]["params"]
    params[next(i for i, p in enumerate(params) if p is old)] = new


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("added", [False, True])
def test_a_param_that_is_replaced_is_stepped_in_backward_or_refused(others, added):
    model = nn.ParameterList([nn.Parameter(torch.ones(4, 3)) for _ in range(1 + others)])
    opt = make(model.parameters())
    handle = adamprox.step_in_backward(model, opt)
    sum((p**2).sum() for p in model).backward()
    if added:
        model.append(nn.Parameter(torch.ones(3)))  # in backward or, as others' params, by step()
        opt.add_param_group({"params": [model[-1]]})
    else:
        prune(model, "0", opt)
    before = [p.detach().clone() for p in model]
    try:
        sum((p**2).sum() for p in model).backward()
    except RuntimeError:
        pass
    else:
        if added:
            opt.step()
        assert not any(map(torch.equal, model, before))
    handle.remove()


# Telemetry.


@pytest.mark.parametrize("per", ["tensor", "group"])
def test_stats_are_of_what_was_stepped_although_params_were_replaced(per):
    module = nn.ParameterList([nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))])
    opt = make(module.named_parameters())
    opt.track_updates(every=2, per=per)
    for seed in range(2):
        set_grads(opt, seed)
        opt.step()
    sizes = [stats.numel for stats in opt.update_stats()]
    assert sizes == ([12, 5] if per == "tensor" else [17])
    prune(module, "0", opt)
    assert [stats.numel for stats in opt.update_stats()] == sizes
    opt.param_groups[0]["params"].pop()
    opt.param_groups[0]["param_names"].pop()
    assert [stats.numel for stats in opt.update_stats()] == sizes
    for seed in range(2):
        set_grads(opt, seed)
        opt.step()
    assert [stats.numel for stats in opt.update_stats()] == [6]


def test_telemetry_keeps_neither_params_nor_grads_alive():
    module = nn.ParameterList([nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))])
    opt = make(module.parameters())
    opt.track_updates(every=3)
    for seed in range(3):
        set_grads(opt, seed)
        opt.step()
    gone = weakref.ref(module[0]), weakref.ref(module[0].grad), weakref.ref(module[1].grad)
    prune(module, "0", opt)
    opt.zero_grad()
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    set_grads(opt, 3)
    opt.step()
    assert [stats.numel for stats in opt.update_stats()] == [17]


class CopyingWrapper:
    """Takes the optimizer's attributes and its class, as Lightning Fabric does."""

    def __init__(self, opt):
        self.__dict__ = {
            k: v for k, v in opt.__dict__.items() if k not in ("state_dict", "step", "zero_grad")
        }
        self.__class__ = type("Copied" + type(opt).__name__, (CopyingWrapper, type(opt)), {})
        self.optimizer = opt

    def step(self, closure=None):
        return self.optimizer.step(closure)


class DelegatingWrapper:
    """Takes its class and asks it for attributes, as Lightning's Trainer does."""

    def __init__(self, opt):
        self.optimizer = opt
        self.__class__ = type("Asking" + type(opt).__name__, (DelegatingWrapper, type(opt)), {})

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


@pytest.mark.parametrize("reading", ["wrapper", "optimizer"])
@pytest.mark.parametrize("tracking", ["wrapper", "optimizer", "optimizer before"])
@pytest.mark.parametrize("wrapper", [CopyingWrapper, DelegatingWrapper])
def test_telemetry_works_through_wrappers(wrapper, tracking, reading):
    opt = ready()
    if tracking == "optimizer before":
        opt.track_updates()
    wrapped = wrapper(opt)
    if tracking != "optimizer before":
        {"wrapper": wrapped, "optimizer": opt}[tracking].track_updates()
    wrapped.step()
    reader = {"wrapper": wrapped, "optimizer": opt}[reading]
    (stats,) = reader.update_stats()
    assert (stats.step, stats.numel) == (3, 20)
    {"wrapper": wrapped, "optimizer": opt}[reading].track_updates(every=0)
    assert wrapped.update_stats() == opt.update_stats() == []


# Values that are not what lies in memory.


LAZY = {
    "_neg_view": lambda t: torch._neg_view(-t),
    "strided _neg_view": lambda t: torch._neg_view(torch.stack([-t, t], -1))[..., 0],
    "imag of a conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "dense imag": lambda t: (
        torch.complex(torch.zeros(t.numel() * 2), torch.zeros(()))
        .conj()
        .imag.as_strided(t.shape, t.contiguous().stride())
        .copy_(t)
    ),
}


@pytest.mark.parametrize("key", ["param", "grad", *MOMENTS])
@pytest.mark.parametrize("lazy", LAZY.values(), ids=LAZY)
@two_optimizers
def test_a_negative_bit_counts(optimizer, lazy, key):
    def spoil(change):
        return lambda opt, param: put(
            opt, param, key, change(tensor_of(opt, param, key).detach().clone())
        )

    like_resolved(spoil(lazy), spoil(torch.clone), optimizer=optimizer, amsgrad=True)


@pytest.mark.parametrize("key", ["param", "grad", *MOMENTS])
def test_a_conjugate_bit_counts(key):
    def spoil(change):
        def put_it(opt, param):
            value = tensor_of(opt, param, key).detach()
            put(opt, param, key, change((value + 1j * value.real.square()).clone()))

        return put_it

    lazy, resolved = spoil(torch.conj), spoil(torch.conj_physical)
    like_resolved(lazy, resolved, dtype=torch.complex64, amsgrad=True)


# Layouts that change later.


@pytest.mark.parametrize("steps", [0, 2])
def test_states_follow_a_param_whose_layout_changes(steps):
    opt, twin = (ready((8, 4, 3, 3), (4, 3), steps=steps, amsgrad=True) for _ in range(2))
    for param in params_of(opt):
        if param.dim() == 4:
            param.data = param.data.to(memory_format=torch.channels_last)
            param.grad = param.grad.to(memory_format=torch.channels_last)
        else:
            param.data, param.grad = (t.t().contiguous().t() for t in (param.data, param.grad))
    places = []
    for seed in range(3):
        opt.step()
        twin.step()
        for p, q in zip(params_of(opt), params_of(twin), strict=True):
            assert torch.equal(p, q)
            for key in MOMENTS:
                assert torch.equal(opt.state[p][key], twin.state[q][key])
                assert opt.state[p][key].stride() == p.stride()
        places.append([opt.state[p][key].data_ptr() for p in params_of(opt) for key in MOMENTS])
        for param in params_of(opt):
            param.grad = torch.empty_like(param).copy_(randn(*param.shape, seed=seed))
        for param in params_of(twin):
            param.grad = randn(*param.shape, seed=seed)
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
    opt, twin = (ready((6,), (4, 3), decay_by=decay_by) for _ in range(2))
    groups = copy.deepcopy(opt.state_dict()["param_groups"])
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][-1].update({"lr": 0.5, key: value})
    for state in saved["state"].values():
        state["exp_avg"].fill_(7.0)
        state["step"].fill_(7.0)
    refuses(opt, step=lambda: opt.load_state_dict(saved))
    assert opt.state_dict()["param_groups"] == groups
    opt.step()
    twin.step()
    assert_same_bits(opt, twin)


def unusual(opt) -> torch.optim.Optimizer:
    """So that a step has much to make and to copy."""
    first, second, third = params_of(opt)
    first.data = torch.stack([first.data, first.data])[0]
    second.data = torch.stack([second.data] * 2, -1)[..., 0]
    if opt.state:
        opt.state.pop(first)
        opt.state[third].update(exp_avg=torch.stack([opt.state[third]["exp_avg"]] * 2, -1)[..., 1])
        opt.state[third]["step"] = 2
    return opt


SITUATIONS = {
    "the first step": lambda: ready(steps=0),
    "a later step": ready,
    "a step with copies": lambda: unusual(ready()),
    "a first step with copies": lambda: unusual(ready(steps=0)),
}


def as_started(opt) -> list:
    """A snapshot in which no state is one of zeros."""
    return [
        (
            frozen(param),
            float(opt.state.get(param, {}).get("step", 0)),
            *(
                frozen(opt.state.get(param, {}).get(k, torch.zeros_like(param)))
                for k in MOMENTS[:2]
            ),
        )
        for param in params_of(opt)
    ]


def all_or_nothing(situation: str, attempt) -> bool:
    """Whether ``attempt`` at a step was interrupted; it has stepped all or nothing."""
    opt, twin = SITUATIONS[situation](), SITUATIONS[situation]()
    before = as_started(opt)
    twin.step()
    after = as_started(twin)
    interrupted = False
    try:
        attempt(opt)
    except (KeyboardInterrupt, MemoryError, RuntimeError):
        interrupted = True
    torch.set_grad_enabled(True)
    now = as_started(opt)
    assert now == after or (interrupted and now == before), "half done"
    if now == before:
        opt.step()
        assert as_started(opt) == after
    return interrupted


class OutOfMemory(TorchDispatchMode):
    """The n-th tensor cannot be made."""

    def __init__(self, n: int):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if any(word in name for word in ("empty", "zeros", "clone", "full", "_to_copy")):
            self.left -= 1
            if self.left == 0:
                raise MemoryError
        return func(*args, **(kwargs or {}))


@alone(*SITUATIONS)
def test_a_step_that_runs_out_of_memory_has_done_nothing(case):
    def attempt(n):
        def step(opt):
            with OutOfMemory(n):
                opt.step()

        return step

    for n in range(1, 1000):
        if not all_or_nothing(case, attempt(n)):
            break


@alone(*SITUATIONS)
def test_a_step_that_cannot_make_zeros_has_done_nothing(case):
    zeros_like, left = torch.zeros_like, 0

    def failing(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            raise MemoryError
        return zeros_like(*args, **kwargs)

    def attempt(opt):
        torch.zeros_like = failing
        try:
            opt.step()
        finally:
            torch.zeros_like = zeros_like

    for n in range(1, 20):
        left = n
        all_or_nothing(case, attempt)


@alone(*SITUATIONS)
def test_ctrl_c_at_any_line_of_ours_leaves_all_or_nothing(case):
    ours = str(Path(adamprox.__file__).parent)

    def attempt(n):
        def trace(frame, event, _):
            nonlocal n
            if not frame.f_code.co_filename.startswith(ours):
                return None
            if event == "line":
                n -= 1
                if n == 0:
                    signal.raise_signal(signal.SIGINT)
            return trace

        def step(opt):
            sys.settrace(trace)
            try:
                opt.step()
            finally:
                sys.settrace(None)

        return step

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for n in range(1, 5000):
        if not all_or_nothing(case, attempt(n)):
            break


@alone("steps", "construction")
def test_ctrl_c_at_any_time_leaves_all_or_nothing(case):
    rng = random.Random(0)

    def interrupt(*_):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, interrupt)

    def attempt(opt):
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-4))
            if case == "steps":
                opt.step()
            else:
                [make(params_of(opt)) for _ in range(4)]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    try:
        for time in range(200):
            if case == "steps":
                all_or_nothing(list(SITUATIONS)[time % 4], attempt)
            else:
                opt = ready()
                try:
                    attempt(opt)
                except KeyboardInterrupt:
                    pass
                opt.step()
    finally:
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
    opt, twin = (ready(steps=steps, betas=(0.75, 0.875)) for _ in range(2))
    opt.param_groups[0][key] = kind(opt.param_groups[0][key])
    for seed in range(2):
        for each in (opt, twin):
            set_grads(each, seed)
            each.step()
    assert_same_bits(opt, twin)


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
        pass
    else:
        twin.step()
    key.act = lambda: None
    del entries[key]
    assert entries.keys() == old.keys()
    for each in (opt, twin):
        set_grads(each, 9)
        each.step()
    assert_same_bits(opt, twin)


@two_optimizers
def test_params_without_memory_are_stepped_as_torchs_are_or_refused(optimizer):
    param = nn.Parameter(torch.empty(3, device="meta"))
    opt = make([param], optimizer)
    for _ in range(2):
        param.grad = torch.empty(3, device="meta")
        try:
            opt.step()
        except RuntimeError as error:
            assert "nothing was updated" in str(error)
            assert not opt.state.get(param)
            return
    assert float(opt.state[param]["step"]) == 2


@two_optimizers
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_params_without_elements_count_their_steps(optimizer, shape):
    opt = ready(shape, shape, optimizer=optimizer)
    opt.step()
    assert [float(opt.state[p]["step"]) for p in params_of(opt)] == [3, 3]
