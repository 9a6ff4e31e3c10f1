"""The optimizers as ``torch.optim`` classes: arguments, errors, states, and what users do."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import inspect
import io
import pickle
import re
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn

import adamprox
from adamprox import _C, backends
from adamprox.hyperparameters import RULES
from registry import LAYOUTS, OPTIMIZERS, OPTIONS, assert_same_bits, bits, same_bits

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
every_twin = pytest.mark.parametrize(
    "optimizer", [name for name, spec in OPTIMIZERS.items() if spec.twin]
)


def make(optimizer: str, params, **arguments) -> torch.optim.Optimizer:
    spec = OPTIMIZERS[optimizer]
    return spec.cls(params, **{"lr": 1e-2, "weight_decay": spec.weight_decay, **arguments})


# Run again where torch's insides are not used: see test_torch_abi.py.
both_abis = pytest.mark.both_abis


def make_params(*shapes: tuple[int, ...], dtype=torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_grads(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def steps(opt, params, seeds) -> None:
    for seed in seeds:
        set_grads(params, seed)
        opt.step()


# Arguments.


@every_optimizer
def test_signature_is_that_of_torchs_adamw(optimizer):
    spec = OPTIMIZERS[optimizer]
    theirs = inspect.signature(torch.optim.AdamW).parameters
    ours = inspect.signature(spec.cls).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {"decay_by", "backend"} <= ours.keys()
    weight_decay = inspect.signature(spec.twin or torch.optim.AdamW).parameters["weight_decay"]
    for name, parameter in ours.items():
        if name in theirs:
            expected = weight_decay if name == "weight_decay" else theirs[name]
            assert (parameter.default, parameter.kind) == (expected.default, expected.kind), name
        else:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


INVALID_IN_TORCH = {
    "lr": {"lr": -1e-3},
    "lr_nan": {"lr": float("nan")},
    "lr_two_elements": {"lr": torch.ones(2)},
    "lr_tensor_foreach": {"lr": torch.tensor(1e-3), "foreach": True},
    "beta1": {"betas": (1.2, 0.999)},
    "beta2": {"betas": (0.9, 1.0)},
    "betas_negative": {"betas": (-0.1, 0.999)},
    "betas_mixed": {"betas": (0.9, torch.tensor(0.999))},
    "betas_int": {"betas": (0, 0)},
    "betas_two_elements": {"betas": (torch.tensor([[0.9]]), torch.tensor([]))},
    "betas_tensor_foreach": {"betas": (torch.tensor(0.9), torch.tensor(0.9)), "foreach": True},
    "eps": {"eps": -1e-8},
    "weight_decay": {"weight_decay": -1e-2},
    "foreach_and_fused": {"foreach": True, "fused": True},
    "fused_and_differentiable": {"fused": True, "differentiable": True},
}
INVALID_HERE = {
    "lr_type": ({"lr": "fast"}, TypeError, "lr: 'fast'"),
    "eps_type": ({"eps": None}, TypeError, "eps: None"),
    "weight_decay_type": ({"weight_decay": [0.1]}, TypeError, r"weight_decay: \[0.1\]"),
    "weight_decay_size": ({"weight_decay": torch.ones(2)}, ValueError, "weight_decay must be 1-"),
    "betas_type": ({"betas": 0.9}, TypeError, "betas: 0.9"),
    "beta_type": ({"betas": (0.9, "0.9")}, TypeError, r"betas: \(0.9, '0.9'\)"),
    "one_beta": ({"betas": (0.9,)}, TypeError, r"betas: \(0.9,\)"),
    "three_betas": ({"betas": (0.9, 0.9, 0.9)}, TypeError, r"betas: \(0.9, 0.9, 0.9\)"),
    "differentiable": ({"differentiable": True}, RuntimeError, "differentiable=True"),
    "decay_by": ({"decay_by": "magic"}, ValueError, "decay_by: 'magic'"),
    "initial_lr": ({"decay_by": "schedule", "lr": 0.0}, ValueError, "initial learning rate.*0.0"),
}
INVALID_RULES = {
    "unknown": ({"decay": "magic"}, "decay: 'magic', expected one of coupled, .*prox_l2"),
    "class": ({"decay": "AdamW"}, "decay: 'AdamW', expected one of"),
    "None": ({"decay": None}, "decay: None, expected one of"),
    "option": ({"decay": "prox_l1", "cautious": True}, "cautious: True, .*'prox_l1' has no such"),
}


def refusals(optimizer: str, arguments, error, match: str) -> None:
    """At construction, in a group at construction, in add_param_group."""
    a, b = make_params((2,), (3,))
    with pytest.raises(error, match=match):
        OPTIMIZERS[optimizer].cls([a], **arguments)
    with pytest.raises(error, match=match):
        OPTIMIZERS[optimizer].cls([{"params": [a]}, {"params": [b], **arguments}])
    opt = OPTIMIZERS[optimizer].cls([a])
    with pytest.raises(error, match=match):
        opt.add_param_group({"params": [b], **arguments})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("arguments", INVALID_IN_TORCH.values(), ids=INVALID_IN_TORCH)
@every_optimizer
def test_invalid_arguments_are_refused_in_torchs_words(optimizer, arguments):
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        torch.optim.AdamW(make_params((2,)), **arguments)
    message = "^" + re.escape(str(theirs.value)) + "$"
    refusals(optimizer, arguments, theirs.type, message)


@pytest.mark.parametrize(("arguments", "error", "match"), INVALID_HERE.values(), ids=INVALID_HERE)
@every_optimizer
def test_invalid_arguments_of_our_own_are_refused(optimizer, arguments, error, match):
    refusals(optimizer, arguments, error, match)


@pytest.mark.parametrize(("values", "match"), INVALID_RULES.values(), ids=INVALID_RULES)
@every_optimizer
def test_invalid_rules_of_a_group_are_refused(optimizer, values, match):
    a, b = make_params((2,), (3,))
    with pytest.raises(ValueError, match=match):
        make(optimizer, [{"params": [a]}, {"params": [b], **values}])
    opt = make(optimizer, [a])
    with pytest.raises(ValueError, match=match):
        opt.add_param_group({"params": [b], **values})
    assert len(opt.param_groups) == 1


@every_optimizer
def test_the_rule_is_no_argument_of_a_class(optimizer):
    with pytest.raises(TypeError, match=rf"{optimizer}.*unexpected keyword argument 'decay'"):
        make(optimizer, make_params((2,)), decay="prox_l1")


@every_optimizer
def test_params_are_checked_by_torch(optimizer):
    (a,) = make_params((2,))
    with pytest.raises(ValueError, match="empty parameter list"):
        OPTIMIZERS[optimizer].cls([])
    with pytest.raises(TypeError, match="should be an iterable"):
        OPTIMIZERS[optimizer].cls(a)
    with pytest.raises(ValueError, match="more than one parameter group"):
        OPTIMIZERS[optimizer].cls([{"params": [a]}, {"params": [a]}])


SAME_AS_DEFAULT = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "lr_tensor": {"lr": torch.tensor(2.0**-7)},
    "betas_tensors": {"betas": (torch.tensor(0.75), torch.tensor(0.875))},
    "weight_decay_int": {"weight_decay": 3},
}


@pytest.mark.parametrize("arguments", SAME_AS_DEFAULT.values(), ids=SAME_AS_DEFAULT)
@every_optimizer
def test_forms_of_an_argument_give_the_same_bits(optimizer, arguments):
    plain = {"lr": 2.0**-7, "betas": (0.75, 0.875), "weight_decay": 3.0}
    pair = [make(optimizer, make_params((5,)), **form) for form in (plain, {**plain, **arguments})]
    for opt in pair:
        steps(opt, opt.param_groups[0]["params"], range(5))
    assert_same_bits(*pair)


# Backends.


class Recorder:
    """A backend that only notes that it was called."""

    follows_recipes = at_once = False

    def __init__(self, why_not: dict[str | None, str] | None = None):
        self.reasons, self.calls = why_not or {}, 0

    def why_not(self, device_type=None, index=None):
        return self.reasons.get(device_type)

    def step(self, table, groups):
        yield
        self.calls += 1


def test_backend_by_argument_by_environment_and_by_default(monkeypatch):
    for name in ("by_argument", "by_environment", "cpu"):
        monkeypatch.setitem(backends.BACKENDS, name, Recorder())

    def calls(**arguments):
        params = make_params((2,))
        steps(make("AdamW", params, **arguments), params, [0])
        return [
            name for name, b in backends.BACKENDS.items() if isinstance(b, Recorder) and b.calls
        ]

    monkeypatch.delenv("ADAMPROX_BACKEND", raising=False)
    assert calls() == ["cpu"]
    backends.BACKENDS["cpu"].calls = 0
    monkeypatch.setenv("ADAMPROX_BACKEND", "by_environment")
    assert calls() == ["by_environment"]
    backends.BACKENDS["by_environment"].calls = 0
    assert calls(backend="by_argument") == ["by_argument"]


@every_optimizer
def test_unknown_backend(optimizer, monkeypatch):
    for name in ("abacus", ""):
        match = f"Invalid backend: '{name}', expected one of .*reference"
        with pytest.raises(ValueError, match=match):
            make(optimizer, make_params((2,)), backend=name)
    monkeypatch.setenv("ADAMPROX_BACKEND", "abacus")
    with pytest.raises(ValueError, match="Invalid ADAMPROX_BACKEND: 'abacus'"):
        make(optimizer, make_params((2,)))


class Failing(Recorder):
    """A backend that writes nothing, and raises."""

    def step(self, table, groups):
        yield from super().step(table, groups)
        raise MemoryError("no memory left")


@pytest.mark.parametrize("steps_before", [0, 2])
@every_optimizer
def test_a_step_that_its_backend_does_not_take_is_not_counted(optimizer, steps_before, monkeypatch):
    params = make_params((2,), ())
    opt = make(optimizer, params)
    steps(opt, params, range(steps_before))
    before = [param.detach().clone() for param in params]
    failing = Failing()
    monkeypatch.setitem(backends.BACKENDS, "cpu", failing)
    opt._backend = "cpu"
    with pytest.raises(MemoryError, match="no memory left"):
        steps(opt, params, [steps_before])
    assert failing.calls == 1
    assert [opt.state[param]["step"] for param in params] == [steps_before] * 2
    assert all(map(torch.equal, params, before))


SPOILED_GROUPS = {
    "one_beta": ({"betas": (0.9,)}, r"Invalid betas: \(0.9,\)"),
    "three_betas": ({"betas": (0.9, 0.9, 0.9)}, r"Invalid betas: \(0.9, 0.9, 0.9\)"),
    "rule": ({"decay": "magic"}, "Invalid decay: 'magic'"),
    "no_rule": ({"decay": None}, "Invalid decay: None"),
    "lr": ({"lr": "fast"}, "Invalid lr: 'fast', expected a number"),
}


@pytest.mark.parametrize(("values", "match"), SPOILED_GROUPS.values(), ids=SPOILED_GROUPS)
@every_optimizer
def test_values_of_a_group_are_looked_at_in_each_step(optimizer, values, match):
    params = make_params((2,))
    opt = make(optimizer, params)
    steps(opt, params, [0])
    before = params[0].detach().clone()
    opt.param_groups[0].update(values)
    for _ in range(3):
        with pytest.raises((TypeError, ValueError), match=match):
            steps(opt, params, [1])
        assert torch.equal(params[0], before)
        assert opt.state[params[0]]["step"] == 1


@every_optimizer
def test_backend_that_cannot_run_says_why(optimizer, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "broken", Recorder({None: "it has no wheels"}))
    with pytest.raises(RuntimeError, match="'broken' cannot run: it has no wheels"):
        make(optimizer, make_params((2,)), backend="broken")


@every_optimizer
def test_backend_that_cannot_run_on_the_device_says_why_and_updates_nothing(optimizer, monkeypatch):
    elsewhere = Recorder({"cpu": "it runs on the moon only"})
    monkeypatch.setitem(backends.BACKENDS, "elsewhere", elsewhere)
    params = make_params((2,))
    opt = make(optimizer, params, backend="elsewhere")
    with pytest.raises(RuntimeError, match="'elsewhere' cannot run: it runs on the moon only"):
        steps(opt, params, [0])
    assert elsewhere.calls == 0
    assert not opt.state


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_real_backends_either_run_or_say_why_not(name):
    reason = backends.BACKENDS[name].why_not()
    if reason is None:
        make("AdamW", make_params((2,)), backend=name)
    else:
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            make("AdamW", make_params((2,)), backend=name)


# Tensors that cannot be used: the error names them, and nothing is touched.


class Wrapper(Tensor):
    """A subclass that may keep its numbers elsewhere, as DTensor does."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("its data must not be read")


def wrapped(tensor: Tensor) -> Tensor:
    return torch.Tensor._make_wrapper_subclass(Wrapper, tensor.shape, dtype=tensor.dtype)


def set_grad(grad):
    return lambda opt, param: setattr(param, "grad", grad(param))


def set_data(data):
    return lambda opt, param: setattr(param, "data", data(param))


def set_state(key, value):
    return lambda opt, param: opt.state[param].update({key: value(opt.state[param][key])})


def drop_state(key):
    return lambda opt, param: opt.state[param].pop(key)


def any_grad_dtype(opt, param):
    param.grad_dtype = None
    param.grad = torch.ones_like(param, dtype=torch.float64)


SPOILED_PARAMS = {
    "grad_sparse": (set_grad(lambda p: torch.ones_like(p).to_sparse()), "sparse"),
    "grad_dtype": (any_grad_dtype, "grad of .*float64"),
    "grad_subclass": (set_grad(wrapped), "grad of .*Wrapper"),
    "param_expanded": (set_data(lambda p: torch.ones(1, 3).expand(4, 3)), "expanded"),
}
SPOILED_STATES = {
    "exp_avg_shape": (set_state("exp_avg", lambda t: t[:-1]), "exp_avg of .*shape"),
    "exp_avg_dtype": (set_state("exp_avg", Tensor.double), "exp_avg of .*float64"),
    "exp_avg_subclass": (set_state("exp_avg", wrapped), "exp_avg of .*Wrapper"),
    "exp_avg_device": (set_state("exp_avg", lambda t: t.to("meta")), "exp_avg of .*meta"),
    "exp_avg_missing": (drop_state("exp_avg"), "exp_avg of .*None"),
    "exp_avg_expanded": (
        set_state("exp_avg", lambda t: torch.ones(1, 3).expand(4, 3)),
        "exp_avg of .*expanded",
    ),
    "exp_avg_sq_shape": (set_state("exp_avg_sq", lambda t: t.flatten()), "exp_avg_sq of .*shape"),
    "exp_avg_sq_dtype": (set_state("exp_avg_sq", Tensor.bfloat16), "exp_avg_sq of .*bfloat16"),
    "exp_avg_sq_missing": (drop_state("exp_avg_sq"), "exp_avg_sq of .*None"),
    "exp_avg_sq_number": (set_state("exp_avg_sq", lambda t: 0.5), "exp_avg_sq of .*0.5"),
    "max_exp_avg_sq_missing": (drop_state("max_exp_avg_sq"), "max_exp_avg_sq of .*None"),
    "max_exp_avg_sq_dtype": (
        set_state("max_exp_avg_sq", Tensor.double),
        "max_exp_avg_sq of .*float64",
    ),
    "step_missing": (drop_state("step"), "step count of"),
    "step_text": (set_state("step", lambda t: "two"), "step count of"),
    "step_two_elements": (set_state("step", lambda t: torch.ones(2)), "step count of"),
    "step_negative": (set_state("step", lambda t: t - 4), "step count of .*-1.0"),
    "step_negative_int": (set_state("step", lambda t: -1), "step count of .*-1.0"),
    "step_nan": (set_state("step", lambda t: t * torch.nan), "step count of .*nan"),
    "step_infinite": (set_state("step", lambda t: t * torch.inf), "step count of .*inf"),
    "step_complex": (set_state("step", lambda t: t + 1j), "step count of"),
}


def snapshot(opt) -> list:
    """The bits of every param, and of every state's plain tensors; other values as they are."""

    def freeze(value):
        if type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu":
            return bits(value.detach().clone()).tolist()
        return value

    return [
        (freeze(param), {key: freeze(value) for key, value in opt.state.get(param, {}).items()})
        for group in opt.param_groups
        for param in group["params"]
    ]


def refuses_to_step(opt, match: str) -> None:
    before = snapshot(opt)
    with pytest.raises((RuntimeError, ValueError), match=match):
        opt.step()
    assert snapshot(opt) == before


def named(optimizer: str, params) -> torch.optim.Optimizer:
    """An optimizer of one group per param, amsgrad in the last, and named."""
    names = ("first", "second", "last")
    groups = [{"params": [pair]} for pair in zip(names, params, strict=True)]
    groups[-1]["amsgrad"] = True
    return make(optimizer, groups)


SHAPES = ((5,), (), (4, 3))


@both_abis
@pytest.mark.parametrize(
    ("spoil", "match"),
    (SPOILED_PARAMS | SPOILED_STATES).values(),
    ids=(SPOILED_PARAMS | SPOILED_STATES),
)
@every_optimizer
def test_bad_tensor_is_named_and_nothing_is_touched(optimizer, spoil, match):
    params = make_params(*SHAPES)
    opt = named(optimizer, params)
    steps(opt, params, range(3))
    set_grads(params, 3)
    spoil(opt, params[-1])
    refuses_to_step(opt, rf"(?=.*{match})(?=.*param_groups\[2\]\['params'\]\[0\] \(last\))")


@pytest.mark.parametrize(("spoil", "match"), SPOILED_PARAMS.values(), ids=SPOILED_PARAMS)
@every_optimizer
def test_bad_tensor_in_the_first_step_leaves_no_state(optimizer, spoil, match):
    params = make_params(*SHAPES)
    opt = named(optimizer, params)
    set_grads(params, 0)
    spoil(opt, params[-1])
    refuses_to_step(opt, rf"(?=.*{match})(?=.*\(last\))")
    assert not opt.state


@every_optimizer
def test_a_param_of_another_class_is_refused(optimizer):
    good, bad = nn.Parameter(torch.ones(2)), wrapped(torch.ones(2)).requires_grad_(True)
    opt = make(optimizer, [good, bad])
    for param in (good, bad):
        param.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"\['params'\]\[1\] is a .*, expected a plain one or"):
        opt.step()
    assert torch.equal(good, torch.ones(2))
    assert not opt.state


@every_optimizer
def test_dtype_that_cannot_be_used(optimizer):
    good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).to(torch.float8_e5m2))
    opt = make(optimizer, [good, bad])
    for param in (good, bad):
        param.grad = torch.ones_like(param)
    before = good.detach().clone()
    with pytest.raises(RuntimeError, match=r"\['params'\]\[1\].*float8_e5m2"):
        opt.step()
    assert torch.equal(good, before)
    assert not opt.state


def test_after_an_error_and_its_mending_the_step_is_the_usual_one():
    pair = []
    for spoiled in (False, True):
        params = make_params(*SHAPES)
        opt = make("AdamProx", params)
        steps(opt, params, range(2))
        set_grads(params, 2)
        if spoiled:
            grad, params[-1].grad = params[-1].grad, params[-1].grad.to_sparse()
            with pytest.raises(RuntimeError, match="sparse"):
                opt.step()
            params[-1].grad = grad
        opt.step()
        pair.append(opt)
    assert_same_bits(*pair)


# Step counts.


def skipping(opt, params, count: int) -> None:
    """Param i has no grad at every (i + 2)nd step."""
    for step in range(count):
        set_grads(params, step)
        for i, param in enumerate(params):
            if step % (i + 2) == 0:
                param.grad = None
        opt.step()


@both_abis
@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float64], ids=str)
@every_optimizer
def test_step_counts_are_torchs(optimizer, default_dtype):
    torch.set_default_dtype(default_dtype)
    try:
        ours, theirs = make_params(*SHAPES), make_params(*SHAPES)
        pair = make(optimizer, ours), torch.optim.AdamW(theirs)
        for opt, params in zip(pair, (ours, theirs), strict=True):
            skipping(opt, params, 13)
    finally:
        torch.set_default_dtype(torch.float32)
    for p, q in zip(ours, theirs, strict=True):
        count, expected = pair[0].state[p]["step"], pair[1].state[q]["step"]
        assert count.shape == ()
        assert count.device == expected.device
        assert same_bits(count, expected)


@every_optimizer
def test_every_param_has_a_step_count_of_its_own(optimizer):
    """In one buffer, if they are made in one step."""
    params = make_params((2,), (3,), (4,), (5,))
    opt = make(optimizer, [{"params": params[:2]}, {"params": params[2:]}])
    steps(opt, params[:3], range(2))
    counts = [opt.state[param]["step"] for param in params[:3]]
    assert list(opt.state) == params[:3]
    assert [c.data_ptr() - counts[0].data_ptr() for c in counts] == [0, 4, 8]
    assert len({count.untyped_storage().data_ptr() for count in counts}) == 1
    set_grads(params, 2)
    params[1].grad = None
    opt.step()
    assert [opt.state[p]["step"].item() for p in params] == [3, 2, 3, 1]
    assert all(opt.state[p]["step"] is c for p, c in zip(params[:3], counts, strict=True))
    counts[0].fill_(7)
    steps(opt, params, [3])
    assert [opt.state[p]["step"].item() for p in params] == [8, 3, 4, 2]


@every_optimizer
def test_state_dict_has_the_counts_themselves_as_torchs_does(optimizer):
    ours, theirs = make_params(*SHAPES), make_params(*SHAPES)
    pair = (make(optimizer, ours), ours), (torch.optim.AdamW(theirs), theirs)
    for opt, params in pair:
        steps(opt, params, range(2))
        saved = [state["step"] for state in opt.state_dict()["state"].values()]
        assert len({count.data_ptr() for count in saved}) == len(params)
        steps(opt, params, [2])
        assert saved == [3, 3, 3]


@pytest.mark.parametrize("copied", ["pickle", "deepcopy", "state_dict"])
@every_optimizer
def test_a_count_that_params_share_is_shared_no_more_in_a_copy(optimizer, copied):
    """As the first edition had it; while it is shared, each param counts, as in torch."""
    params = make_params(*SHAPES)
    opt = make(optimizer, params)
    shared = torch.tensor(0.0)
    steps(opt, params, [0])
    for state in opt.state.values():
        state["step"] = shared
    steps(opt, params, [1])
    assert shared == 3
    if copied == "state_dict":
        others = make_params(*SHAPES)
        other = make(optimizer, others)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        copying = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "deepcopy": copy.deepcopy}
        other, others = copying[copied]((opt, params))
    steps(other, others, [2])
    assert [other.state[param]["step"].item() for param in others] == [4, 4, 4]
    assert shared == 3


INTEGERS = (torch.int64, torch.int32, torch.uint8)


@both_abis
@pytest.mark.parametrize(
    "dtype", [*INTEGERS, torch.float64, torch.float16, torch.bfloat16], ids=str
)
@every_optimizer
def test_a_count_of_another_dtype_is_counted_in_place(optimizer, dtype):
    params, twins = make_params(*SHAPES), make_params(*SHAPES)
    opt, twin = make(optimizer, params), make(optimizer, twins)
    steps(opt, params, [0])
    steps(twin, twins, [0])
    counts = [state["step"].to(dtype) for state in opt.state.values()]
    for state, count in zip(opt.state.values(), counts, strict=True):
        state["step"] = count
    steps(opt, params, range(1, 5))
    steps(twin, twins, range(1, 5))
    assert counts == [5, 5, 5]
    for p, q, count in zip(params, twins, counts, strict=True):
        assert opt.state[p]["step"] is count
        assert count.dtype == dtype
        assert same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("count", [0.5, 2.25, 1e-3, 1e6 + 0.375, 2.0**60])
@every_twin
def test_a_fractional_count_gives_torchs_numbers(optimizer, count):
    spec = OPTIMIZERS[optimizer]
    ours, theirs = make_params((64,)), make_params((64,))
    for cls, params in ((spec.cls, ours), (spec.twin, theirs)):
        opt = cls(params, lr=1e-2, weight_decay=0.1)
        steps(opt, params, [0])
        opt.state[params[0]]["step"] = torch.tensor(count, dtype=torch.float64)
        steps(opt, params, [1, 2])
        assert opt.state[params[0]]["step"] == count + 2
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [0.5, 2.25, 1e-3, 1e6 + 0.375, 2.0**60])
@every_optimizer
def test_a_fractional_count_gives_the_bits_of_the_reference(optimizer, count):
    pair = []
    for backend in ("cpu", "reference"):
        params = make_params((64,), (3,))
        opt = make(optimizer, params, backend=backend)
        steps(opt, params, [0])
        opt.state[params[0]]["step"] = torch.tensor(count, dtype=torch.float64)
        steps(opt, params, range(1, 4))
        pair.append(opt)
    assert_same_bits(*pair)


# Params that share memory.


def in_turns(optimizer: str, whole: Tensor, views, order, seeds, **arguments):
    """The optimizer over views of one tensor; and one optimizer for each, one after the other."""
    results = []
    for alone in (False, True):
        buffer = whole.clone()
        params = [nn.Parameter(view(buffer)) for view in views]
        assert all(p.untyped_storage().data_ptr() == buffer.data_ptr() for p in params)
        if alone:
            opts = [make(optimizer, [param], **arguments) for param in params]
        else:
            opts = [make(optimizer, [{"params": params}], **arguments)]
            opts[0].param_groups[0]["params"] = [params[i] for i in order]
        for seed in seeds:
            set_grads(params, seed)
            for i in order if alone else [0]:
                opts[i].step()
        results.append((buffer, [opts[i * alone].state[p] for i, p in enumerate(params)]))
    return results


VIEWS = {
    "overlapping": (lambda t: t[0, :6], lambda t: t[0, 2:], lambda t: t[0, 3:7]),
    "the same": (lambda t: t, lambda t: t, lambda t: t[1]),
    "apart": (lambda t: t[0], lambda t: t[1], lambda t: t[1]),
    "strided": (lambda t: t[:, ::2], lambda t: t[:, 1::2], lambda t: t[:, :5]),
    "transposed": (lambda t: t, lambda t: t.T, lambda t: t[1]),
}


@both_abis
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1, 0)], ids=["once", "one of them twice"])
@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
@every_optimizer
def test_params_that_share_memory_are_stepped_one_after_the_other(optimizer, views, order, backend):
    whole = make_params((2, 8))[0].detach()
    together, alone = in_turns(optimizer, whole, views, order, range(4), backend=backend)
    assert same_bits(together[0], alone[0])
    for state, other in zip(together[1], alone[1], strict=True):
        assert all(same_bits(state[key], value) for key, value in other.items())


def as_params_twice(optimizer: str, backend: str, dtype, layout):
    """An optimizer whose group has the first of two params twice."""
    params = make_params((4, 3), (5,), dtype=dtype)
    for param in params:
        param.data = layout(param.data)
    with pytest.warns(UserWarning, match="duplicate"):
        return params, make(optimizer, [params[0], params[1], params[0]], backend=backend)


@both_abis
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_optimizer
def test_a_param_twice_in_a_group_is_stepped_twice(optimizer, backend, dtype, layout):
    """As in torch: one step after the other."""
    params, opt = as_params_twice(optimizer, backend, dtype, layout)
    twins = copy.deepcopy(params)
    alone = [make(optimizer, [twin], backend="reference") for twin in twins]
    for seed in range(4):
        set_grads(params, seed)
        set_grads(twins, seed)
        opt.step()
        for index in (0, 1, 0):
            alone[index].step()
    assert [opt.state[param]["step"].item() for param in params] == [8, 4]
    for param, twin, its in zip(params, twins, alone, strict=True):
        assert same_bits(param.detach(), twin.detach())
        for key, value in its.state[twin].items():
            assert same_bits(opt.state[param][key], value), key


@every_twin
def test_a_param_twice_in_a_group_is_torchs(optimizer):
    params, opt = as_params_twice(optimizer, "cpu", torch.float32, LAYOUTS[0])
    twins = copy.deepcopy(params)
    given = {"lr": 1e-2, "weight_decay": OPTIMIZERS[optimizer].weight_decay, "foreach": False}
    with pytest.warns(UserWarning, match="duplicate"):
        theirs = OPTIMIZERS[optimizer].twin([twins[0], twins[1], twins[0]], **given)
    for seed in range(4):
        for each, its in ((opt, params), (theirs, twins)):
            set_grads(its, seed)
            each.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)
        assert torch.equal(opt.state[p]["step"], theirs.state[q]["step"])


@pytest.mark.parametrize("steps_before", [0, 3])
@every_optimizer
def test_a_param_that_gets_into_two_groups_is_stepped_with_the_values_of_each(
    optimizer, steps_before
):
    """torch checks add_param_group; a list of params can be changed behind its back."""
    params, twins = make_params(*SHAPES), make_params(*SHAPES)
    values = {"lr": 0.1, "weight_decay": 0.2}
    opt = make(optimizer, [{"params": params[:2]}, {"params": params[2:], **values}])
    twin = make(optimizer, [{"params": twins[:2]}, {"params": twins[2:], **values}])
    steps(opt, params, range(steps_before))
    steps(twin, twins, range(steps_before))
    opt.param_groups[1]["params"].append(params[0])
    first = twin.param_groups[0]
    for seed in range(3, 6):
        steps(opt, params, [seed])
        steps(twin, twins, [seed])
        kept = {key: first[key] for key in values}
        first.update(values)
        twins[1].grad = twins[2].grad = None
        twin.step()
        first.update(kept)
    assert opt.state[params[0]]["step"] == steps_before + 6
    for p, q in zip(params, twins, strict=True):
        assert same_bits(p.detach(), q.detach())
        assert all(same_bits(opt.state[p][key], value) for key, value in twin.state[q].items())


@every_optimizer
def test_without_any_grad_nothing_happens(optimizer):
    params = make_params(*SHAPES)
    opt = make(optimizer, params)
    refuses = snapshot(opt)
    opt.step()
    assert snapshot(opt) == refuses
    assert not opt.state


# Nothing is remembered from one step to the next that may have changed.


def fresh_copy(opt) -> torch.optim.Optimizer:
    """An optimizer without a past, with the params, grads and states of this one."""
    groups = []
    result_state = {}
    for group in opt.param_groups:
        copies = []
        for param in group["params"]:
            twin = nn.Parameter(param.detach().clone())
            twin.grad = None if param.grad is None else param.grad.clone()
            result_state[twin] = copy.deepcopy(opt.state.get(param, {}))
            copies.append(twin)
        groups.append({**group, "params": copies})
    result = type(opt)(groups)
    for param, state in result_state.items():
        if state:
            result.state[param] = state
    return result


def swap_data(opt):
    for group in opt.param_groups:
        for param in group["params"]:
            param.data = param.data * 2


def replace_states(opt):
    for state in opt.state.values():
        for key, value in state.items():
            if key != "step":
                state[key] = value * 2


def move_states_there_and_back(opt):
    for state in opt.state.values():
        state["exp_avg"] = state["exp_avg"].double().neg_().float()


def replace_state_dicts(opt):
    for param, state in list(opt.state.items()):
        # In another order, under keys that are equal to the usual ones, and not the same objects.
        opt.state[param] = {"".join(list(k)): v.clone() for k, v in reversed(state.items())}


def reload_state_dict(opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def change_hyper_parameters(opt):
    opt.param_groups[0].update(lr=0.5, betas=(0.5, 0.5), eps=0.1, weight_decay=0.1, maximize=True)


def change_hyper_parameters_in_place(opt):
    group = opt.param_groups[0]
    group.update(lr=torch.tensor(0.1), betas=[0.5, 0.5])
    opt.step()
    group["lr"].fill_(0.5)
    group["betas"][0] = 0.7


def change_betas_in_place(opt):
    opt.param_groups[0]["betas"] = betas = torch.tensor(0.9), torch.tensor(0.75)
    opt.step()
    betas[0].fill_(0.5)
    opt.step()
    betas[1].fill_(0.5)


def replace_the_group(opt):
    # As replace_state_dicts; and with one more.
    group = {"".join(list(k)): v for k, v in reversed(opt.param_groups[0].items())}
    opt.param_groups[0] = {"name": "all", **group, "lr": 0.5}
    opt.step()
    opt.param_groups[0]["".join(["l", "r"])] = 0.3


def set_a_counter(opt):
    opt.state[opt.param_groups[0]["params"][1]]["step"] = torch.tensor(77.0)


def set_a_counter_in_place(opt):
    opt.state[opt.param_groups[0]["params"][1]]["step"].fill_(77.0)


def counter_of_another_type(opt):
    opt.state[opt.param_groups[0]["params"][1]]["step"] = 5


def counter_in_float64(opt):
    opt.state[opt.param_groups[0]["params"][1]]["step"] = torch.tensor(5.0, dtype=torch.float64)


def clear_states(opt):
    opt.state.clear()


def drop_one_state(opt):
    del opt.state[opt.param_groups[0]["params"][0]]


def reverse_params(opt):
    opt.param_groups[0]["params"].reverse()


def replace_a_param(opt):
    (opt.param_groups[0]["params"][1],) = make_params((6, 5), seed=9)


def change_the_rule(opt):
    opt.param_groups[0].update(decay="prox_l1", weight_decay=0.5)
    opt.step()
    opt.param_groups[0].update(decay="decoupled")
    opt.step()
    opt.param_groups[0].update(decay="".join(["prox", "_l2"]))


def turn_an_option_of_the_rule_on(opt):
    opt.param_groups[0].update(decay="decoupled", weight_decay=0.5, cautious=False)
    opt.step()
    opt.param_groups[0]["cautious"] = True


def add_a_group(opt):
    opt.add_param_group({"params": make_params((7,), (2, 2), seed=9), "lr": 0.3})


def resize_in_place(opt):
    param = opt.param_groups[0]["params"][2]
    param.data = torch.ones(2, 2)
    param.grad = None
    opt.state[param].update(exp_avg=torch.ones(2, 2), exp_avg_sq=torch.ones(2, 2))


def turn_amsgrad_on(opt):
    for state in opt.state.values():
        state["max_exp_avg_sq"] = state["exp_avg_sq"] * 2
    opt.step()
    opt.param_groups[0]["amsgrad"] = True


def turn_amsgrad_off(opt):
    turn_amsgrad_on(opt)
    opt.step()
    opt.param_groups[0]["amsgrad"] = False


CHANGES = (
    *(swap_data, replace_states, move_states_there_and_back, replace_state_dicts),
    *(change_hyper_parameters, change_hyper_parameters_in_place, change_betas_in_place),
    replace_the_group,
    *(turn_amsgrad_on, turn_amsgrad_off, change_the_rule, turn_an_option_of_the_rule_on),
    *(reload_state_dict, clear_states, drop_one_state),
    *(set_a_counter, set_a_counter_in_place, counter_of_another_type, counter_in_float64),
    *(reverse_params, replace_a_param, add_a_group, resize_in_place),
)


@both_abis
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@every_optimizer
def test_nothing_stale_is_used(optimizer, change):
    params = make_params(*SHAPES)
    opt = make(optimizer, params)
    steps(opt, params, range(3))
    change(opt)
    for seed in (3, 4):
        params = [param for group in opt.param_groups for param in group["params"]]
        set_grads(params, seed)
        fresh = fresh_copy(opt)
        for each in (opt, fresh):
            each.step()
        flat = [[p for g in o.param_groups for p in g["params"]] for o in (opt, fresh)]
        for p, q in zip(*flat, strict=True):
            assert same_bits(p.detach(), q.detach())
            for key, value in fresh.state[q].items():
                assert same_bits(opt.state[p][key], value), key


ALIKE = ({}, {"lr": torch.tensor(0.01)}, {"decay_by": "schedule", "initial_lr": 0.02})
DIFFERENCES = (
    *({"lr": 0.3}, {"betas": (0.5, 0.999)}, {"betas": (0.9, 0.5)}, {"eps": 0.1}),
    *({"weight_decay": 0.7}, {"maximize": True}, {"amsgrad": True}, {"decay_by": "schedule"}),
    *({"initial_lr": 0.05}, {"lr": torch.tensor(0.3)}),
    *({"decay": rule} for rule in RULES),
    {"decay": "decoupled", "cautious": True},
)


@every_optimizer
@pytest.mark.parametrize("alike", ALIKE, ids=str)
@pytest.mark.parametrize("difference", DIFFERENCES, ids=str)
def test_groups_with_one_difference_step_as_if_alone(optimizer, difference, alike):
    arguments = [{**alike, **d} for d in ({}, difference, {}, {}, difference)]
    together = [make_params(*SHAPES) for _ in arguments]
    alone = [make_params(*SHAPES) for _ in arguments]
    opts = [
        make(optimizer, [{"params": params, **a}])
        for params, a in zip(alone, arguments, strict=True)
    ]
    groups = [{**opt.param_groups[0], "params": p} for opt, p in zip(opts, together, strict=True)]
    opts.append(make(optimizer, groups))
    for seed in range(3):
        for params in (*alone, *together):
            set_grads(params, seed)
        for opt in opts:
            opt.step()
    for params, twins in zip(together, alone, strict=True):
        for p, q in zip(params, twins, strict=True):
            assert same_bits(p.detach(), q.detach())


def test_groups_that_are_alike_share_their_scalars():
    params = make_params(*[(2,)] * 9)
    opt = make("AdamW", [{"params": [param]} for param in params])
    steps(opt, params, range(2))

    def num_scalars() -> int:
        gather = opt._engine.gather
        assert not gather.read(opt.param_groups, opt.state, {}, False, False, False, 0)
        assert not gather.findings
        (table,) = gather.tables()
        table.begin()
        try:
            return table.num_scalars
        finally:
            table.undo()
            gather.release()

    assert num_scalars() == 1
    opt.param_groups[4]["lr"] = 0.3
    assert num_scalars() == 3  # those before it, its own, those after it
    opt.param_groups[4]["lr"] = opt.param_groups[0]["lr"]
    opt.param_groups[4]["decay"] = "prox_l1"
    assert num_scalars() == 3
    opt.param_groups[4]["decay"] = "decoupled"
    for param in params[::2]:
        opt.state[param]["step"] += 1
    assert num_scalars() == 2  # steps in turns
    assert [opt.state[param]["step"].item() for param in params] == [3, 2] * 4 + [3]


def move_by_set(tensor):
    tensor.set_(torch.stack((tensor, tensor * 2))[1])  # with an offset, too


def move_by_data(tensor):
    tensor.data = tensor * 2


def move_by_resizing(tensor):
    old, storage = tensor.clone(), tensor.untyped_storage()
    size = storage.nbytes()
    place = tensor.data_ptr()
    holes = []
    for _ in range(100):
        storage.resize_(0)
        holes.append(torch.empty(size // 4))  # takes the place that is free now
        storage.resize_(size)
        if tensor.data_ptr() != place:
            break
    assert tensor.data_ptr() != place
    tensor.copy_(old * 2)
    return holes


TENSORS = ("param", "grad", "exp_avg", "exp_avg_sq")


def tensor_of(opt, name: str) -> Tensor:
    param = opt.param_groups[0]["params"][0]
    found = {"param": param.detach(), "grad": param.grad, **opt.state[param]}
    return found[name]


@both_abis
@pytest.mark.parametrize("move", [move_by_set, move_by_data, move_by_resizing])
@pytest.mark.parametrize("name", TENSORS)
def test_memory_may_move_below_a_tensor(name, move):
    params = make_params(*SHAPES)
    opt = make("AdamW", params)
    steps(opt, params, (0, 0))
    opt.step()  # with the same grads
    with torch.no_grad():
        kept = move(params[0] if name == "param" else tensor_of(opt, name))
        fresh = fresh_copy(opt)
    for each in (opt, fresh):
        each.step()
    del kept
    for key in TENSORS:
        assert same_bits(tensor_of(opt, key), tensor_of(fresh, key)), key


@both_abis
@pytest.mark.parametrize("name", TENSORS)
def test_memory_that_a_lazy_clone_shares_is_not_written_to(name):
    params = make_params(*SHAPES)
    opt = make("AdamW", params)
    steps(opt, params, (0, 0))
    opt.step()
    tensor, fresh = tensor_of(opt, name), fresh_copy(opt)
    before, shared = tensor.clone(), tensor._lazy_clone()
    for each in (opt, fresh):
        each.step()
    assert same_bits(shared, before)
    for key in TENSORS:
        assert same_bits(tensor_of(opt, key), tensor_of(fresh, key)), key


@both_abis
@every_optimizer
def test_grads_are_not_kept_alive(optimizer):
    params = make_params(*SHAPES)
    opt = make(optimizer, params)
    for seed in range(2):
        set_grads(params, seed)
        opt.step()
        grads = [weakref.ref(param.grad) for param in params]
        opt.zero_grad()
        assert [grad() for grad in grads] == [None] * len(params)
    set_grads(params, 2)
    grads = [weakref.ref(param.grad) for param in params]
    opt.state[params[0]]["exp_avg"] = None
    with pytest.raises(RuntimeError, match="exp_avg"):
        opt.step()
    opt.zero_grad()
    assert [grad() for grad in grads] == [None] * len(params)


def test_params_are_not_kept_alive():
    params = make_params(*SHAPES)
    opt = make("AdamProxL2", params)
    steps(opt, params, range(2))
    alive = [weakref.ref(param) for param in params]
    del opt, params
    gc.collect()
    assert [param() for param in alive] == [None] * len(alive)


# The rule of decay is a value of a group.


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_optimizer
def test_groups_of_different_rules_step_as_their_classes_do(optimizer, backend):
    class_of = {spec.cls.decay: spec.cls for spec in OPTIMIZERS.values()}
    values = OPTIONS["rules"].groups
    alone = [make_params(*SHAPES, seed=seed) for seed in range(len(values))]
    together = copy.deepcopy(alone)
    opts = []
    for params, group in zip(alone, values, strict=True):
        arguments = {key: value for key, value in group.items() if key != "decay"}
        opts.append(class_of[group["decay"]](params, lr=1e-2, backend=backend, **arguments))
    groups = [{"params": params, **group} for params, group in zip(together, values, strict=True)]
    opt = make(optimizer, groups, backend=backend)
    assert {group["decay"] for group in opt.param_groups} == set(RULES)
    for seed in range(5):
        for params in (*alone, *together):
            set_grads(params, seed)
        for each in (*opts, opt):
            each.step()
    for params, twins, its in zip(together, alone, opts, strict=True):
        for p, q in zip(params, twins, strict=True):
            assert same_bits(p.detach(), q.detach())
            for key, value in its.state[q].items():
                assert same_bits(opt.state[p][key], value), key


@every_optimizer
def test_a_group_has_the_rule_of_the_class_and_says_whether_it_is_coupled(optimizer):
    """torch.optim.Adam goes by the latter."""
    rule = OPTIMIZERS[optimizer].cls.decay
    a, b = make_params((2,), (3,))
    opt = make(optimizer, [a])
    for decay in (rule, *RULES):
        opt.add_param_group({"params": make_params((2,)), "decay": decay})
    opt.add_param_group({"params": [b]})
    assert [group["decay"] for group in opt.param_groups] == [rule, rule, *RULES, rule]
    for group in opt.param_groups:
        assert group["decoupled_weight_decay"] == (group["decay"] != "coupled")


def test_options_of_a_rule_are_in_the_groups_that_have_the_rule():
    params = make_params((2,), (3,), (4,))
    opt = make("AdamProx", [{"params": [params[0]]}, {"params": [params[1]], "decay": "decoupled"}])
    opt.add_param_group({"params": [params[2]], "decay": "decoupled", "cautious": True})
    assert [group.get("cautious") for group in opt.param_groups] == [None, False, True]
    opt = make("AdamW", params[:1], cautious=True)
    opt.add_param_group({"params": [params[1]]})
    opt.add_param_group({"params": [params[2]], "cautious": False})
    assert [group["cautious"] for group in opt.param_groups] == [True, True, False]


# Saving, loading, copying.


def through_pickle(opt, params):
    return pickle.loads(pickle.dumps((opt, params)))


def through_deepcopy(opt, params):
    return copy.deepcopy((opt, params))


def through_state_dict(opt, params):
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    params = copy.deepcopy(params)
    result = type(opt)([{"params": params[:1]}, {"params": params[1:]}])
    result.load_state_dict(torch.load(buffer, weights_only=True))
    return result, params


@pytest.mark.parametrize("copied", [through_pickle, through_deepcopy, through_state_dict])
@pytest.mark.parametrize("decay_by", ["lr", "schedule"])
@every_optimizer
def test_copies_continue_with_the_same_bits(optimizer, decay_by, copied):
    params = make_params(*SHAPES)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.25}]
    opt = make(optimizer, groups, decay_by=decay_by, amsgrad=True)
    skipping(opt, params, 5)
    for group in opt.param_groups:
        group["lr"] /= 2
    other, others = copied(opt, params)
    for each, theirs in ((opt, params), (other, others)):
        skipping(each, theirs, 5)
    for p, q in zip(params, others, strict=True):
        assert same_bits(p.detach(), q.detach())
        assert opt.state[p].keys() == other.state[q].keys()
        for key, value in opt.state[p].items():
            assert same_bits(value, other.state[q][key])


def test_copies_keep_the_backend():
    params = make_params(*SHAPES)
    opt = make("AdamW", params, backend="reference")
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert copied._backend == "reference"


# Complex numbers are pairs of reals, and may be lazy conjugates.


@every_optimizer
def test_complex_is_a_pair_of_reals(optimizer):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(6, generator=generator, dtype=torch.complex64)
    as_complex, as_real = nn.Parameter(value), nn.Parameter(torch.view_as_real(value).clone())
    opts = make(optimizer, [as_complex]), make(optimizer, [as_real])
    for _ in range(5):
        grad = torch.randn(6, generator=generator, dtype=torch.complex64)
        as_complex.grad, as_real.grad = grad, torch.view_as_real(grad).clone()
        for opt in opts:
            opt.step()
    assert same_bits(torch.view_as_real(as_complex.detach()), as_real.detach())


@both_abis
@pytest.mark.parametrize("numel", [1, 2, 3])
@every_optimizer
def test_lazy_conjugates_and_negations(optimizer, numel):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(numel, generator=generator, dtype=torch.complex64)
    lazy = [grad.conj(), grad.conj().imag]
    assert lazy[0].is_conj()
    assert lazy[1].is_neg()
    results = []
    for resolve in (False, True):
        params = [nn.Parameter(torch.ones(numel, dtype=g.dtype)) for g in lazy]
        for param, g in zip(params, lazy, strict=True):
            param.grad = g.resolve_conj().resolve_neg() if resolve else g
        make(optimizer, params).step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert same_bits(p.detach(), q.detach())


@both_abis
@every_optimizer
def test_autograd_sees_the_write(optimizer):
    """A tensor that was saved for backward before the step is out of date after it."""
    (param,) = make_params((4,))
    opt = make(optimizer, [param])
    loss = (param * param).sum()
    set_grads([param], 0)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gpu_that_the_cuda_backend_was_not_built_for_is_tritons(monkeypatch):
    monkeypatch.setattr(_C, "cuda_architectures", "90-real")
    current = []  # devices, the innermost one last
    problems = {0: "no kernel image", 1: "", 2: "out of memory"}
    problem = lambda: problems[current[-1]]  # noqa: E731
    monkeypatch.setattr(_C, "cuda_device_problem", problem, raising=False)
    for name, value in (("is_available", True), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(backends, "_problems", {})

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    cuda, triton = backends.BACKENDS["cuda"], Recorder()
    monkeypatch.setitem(backends.BACKENDS, "triton", triton)
    assert cuda.why_not() is None  # no device is asked
    for index in (None, 0):
        assert cuda.why_not("cuda", index) == "no kernel image (built for 90-real)"
        assert backends.select(None, "cuda", index) is triton
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: no kernel image"):
        backends.select("cuda", "cuda")
    assert backends.select(None, "cuda", 1) is cuda
    assert backends.select(None, "cuda", 2) is triton
    problems[2] = ""  # memory was freed
    assert backends.select(None, "cuda", 2) is cuda


def test_a_subclass_has_the_signature_of_its_own_constructor():
    class Mine(adamprox.AdamW):
        def __init__(self, model, scale=1.0):
            super().__init__(model.parameters())

    class Renamed(adamprox.AdamProxL1):
        """Another name alone."""

    assert list(inspect.signature(Mine).parameters) == ["model", "scale"]
    assert inspect.signature(Renamed) == inspect.signature(adamprox.AdamProxL1)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_param_that_is_appended_to_a_group_with_names_is_stepped(backend):
    model = nn.Linear(2, 1)
    groups = adamprox.param_groups(model, 0.1)
    opt = adamprox.AdamW(groups, backend=backend)
    opt.track_updates(per="tensor")
    new = nn.Parameter(torch.ones(3, 2))
    opt.param_groups[0]["params"].append(new)
    for param in (*model.parameters(), new):
        param.grad = torch.ones_like(param)
    new.grad = torch.ones(2, 3).T
    opt.step()
    assert (new < 1).all()
    assert [stats.name for stats in opt.update_stats()] == ["weight", "group 0, param 1", "bias"]


def test_a_tensor_of_several_numbers_is_refused_by_name():
    message = r"Invalid lr: tensor\(\[1., 2.\]\), expected one number; nothing was updated"
    for arguments in ({}, {"capturable": True}):
        opt = make("AdamW", [nn.Parameter(torch.ones(3))], **arguments)
        opt.param_groups[0]["params"][0].grad = torch.ones(3)
        opt.param_groups[0]["lr"] = torch.tensor([1.0, 2.0])
        with pytest.raises(ValueError, match=message):
            opt.step()


def test_why_a_backend_cannot_run_is_in_the_error(monkeypatch):
    """Of one that is asked for by name."""

    def refused(backend: str, match: str) -> None:
        with pytest.raises(RuntimeError, match=match):
            adamprox.AdamW([nn.Parameter(torch.ones(2))], backend=backend)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_C, "cuda_architectures", "90")
    refused("cuda", "torch sees no GPU")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    refused("cuda", "it is for NVIDIA GPUs; AMD's have backend='triton'")
    update = importlib.import_module("adamprox.triton_kernels.update")
    monkeypatch.setattr(update, "INTERPRETED", False)
    refused("triton", "torch sees no GPU, and Triton's interpreter is off")
    monkeypatch.setitem(sys.modules, update.__name__, None)
    refused("triton", r"Triton cannot be imported.*pip install triton")
