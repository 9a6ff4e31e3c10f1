"""Tensors that are not what they seem: freed, lazy, of a transform, in another layout."""

from __future__ import annotations

import collections
import types

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from adamprox import backends
from faults import (
    MOMENTS,
    NAME,
    TENSORS,
    alike,
    alone,
    params_of,
    put,
    randn,
    ready,
    refused,
    refuses,
    tensor_of,
    two_optimizers,
)
from registry import assert_same_bits


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

    refused(spoil, NAME)
    refused(spoil, NAME, steps=0)


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


def test_a_tensor_that_changes_between_reading_and_writing_is_refused(monkeypatch):
    opt = ready(backend="reference")
    select = backends.select

    def changing(*arguments):
        params_of(opt)[1].data = params_of(opt)[1].data.clone()
        return select(*arguments)

    monkeypatch.setattr(backends, "select", changing)
    refuses(opt, "was changed amid the step; nothing was updated")
