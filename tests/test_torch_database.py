"""PyTorch's own database of optimizers, its entries for Adam and AdamW, drives each class here.

Adam's drives ``Adam``, AdamW's the others. What a step must give is torch's step without weight
decay, in float64, and then the rule of the registry.
"""

from __future__ import annotations

import copy
import io
import itertools
import re
import warnings

import pytest
import torch
from torch import nn

from registry import OPTIMIZERS, same_bits

pytest.importorskip("expecttest")  # by torch.testing._internal
with warnings.catch_warnings():  # of its own, with a NumPy newer than that torch
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_optimizers import (
        OptimizerErrorEnum,
        OptimizerInput,
        optim_db,
    )

INFOS = {info.optim_cls: info for info in optim_db}
SCHEDULERS = INFOS[torch.optim.Adam].scheduler_inputs  # AdamW's are among them

# Flags of the database that are excluded, with the reason; the refusal is tested.
EXCLUDED = {
    "differentiable": (
        "a step writes in place, outside of autograd: no gradient could flow through it",
        "differentiable=True is not supported",
    ),
}


def info_of(optimizer: str):
    return INFOS[torch.optim.Adam if OPTIMIZERS[optimizer].coupled else torch.optim.AdamW]


def flagged(optimizer: str, flags: bool = True) -> list:
    """Each class with each of its inputs, alone and with each flag of which one may be set."""
    info = info_of(optimizer)
    settable = [flag for flag in info.supported_impls if flags and flag not in EXCLUDED]
    configurations = {
        name: each.kwargs for device in ("cpu", "cuda") for name, each in inputs_on(info, device)
    }
    return [
        pytest.param(
            optimizer,
            {**kwargs, **({flag: True} if flag else {})},
            id="-".join(filter(None, (optimizer, name, flag))),
        )
        for name, kwargs in configurations.items()
        for flag in (None, *settable)
    ]


def inputs_on(info, device: str) -> list[tuple[str, OptimizerInput]]:
    """More for a GPU; what torch supports there only (capturable) is tried on the CPU here, too."""
    return [(re.sub(r"\W+", "_", each.desc), each) for each in info.optim_inputs_func(device)]


every_input = pytest.mark.parametrize(
    ("optimizer", "kwargs"), [each for name in OPTIMIZERS for each in flagged(name)]
)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def test_the_database_has_what_is_expected_of_it():
    """So that an empty list does not pass for a tested one."""
    for info in map(info_of, OPTIMIZERS):
        assert len(inputs_on(info, "cpu")) >= 5
        assert len(inputs_on(info, "cuda")) >= 10
        assert set(info.supported_impls) == {"foreach", "fused", *EXCLUDED}
        assert len(info.optim_error_inputs_func("cpu", torch.float32)) >= 10
        assert info.has_capturable_arg
        assert info.supports_complex
        assert not info.supports_sparse
    assert len(SCHEDULERS) >= 7


def make(optimizer: str, params, kwargs) -> torch.optim.Optimizer:
    return OPTIMIZERS[optimizer].cls(params, **copy.deepcopy(kwargs))  # tensors are not shared


def make_params(dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 3), (4,), (), (2, 1, 3))
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def set_grads(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


def steps(opt, params, seeds) -> None:
    for seed in seeds:
        set_grads(params, seed)
        opt.step()


def same_params(ours, theirs) -> bool:
    return all(same_bits(p.detach(), q.detach()) for p, q in zip(ours, theirs, strict=True))


# What it equals.


def plain(kwargs) -> dict:
    """The same for torch on a CPU: numbers instead of tensors, nothing about the implementation."""
    result = {k: v for k, v in kwargs.items() if k not in ("capturable", "foreach", "fused")}
    if "lr" in result:
        result["lr"] = float(result["lr"])
    if "betas" in result:
        result["betas"] = tuple(map(float, result["betas"]))
    return result


def torchs_steps(optimizer: str, groups: list[dict], kwargs, seeds) -> None:
    """In float64: torch's own step, and the rule after it."""
    spec = OPTIMIZERS[optimizer]
    if spec.coupled:
        theirs = torch.optim.Adam(groups, **kwargs)
    else:
        theirs = torch.optim.AdamW([{**g, "weight_decay": 0.0} for g in groups], **kwargs)
    weight_decay = spec.cls([nn.Parameter(torch.ones(1))], **kwargs).defaults["weight_decay"]
    params = [param for group in theirs.param_groups for param in group["params"]]
    for seed in seeds:
        before = [param.detach().clone() for param in params]
        set_grads(params, seed)
        theirs.step()
        if spec.coupled:
            continue
        values = iter(before)
        for group, given in zip(theirs.param_groups, groups, strict=True):
            for param in group["params"]:
                x = next(values)
                s = group["lr"] * given.get("weight_decay", weight_decay)
                param.data.copy_(spec.rule(x, x - param.detach(), s))


@every_input
def test_steps_are_torchs_and_then_the_rule(optimizer, kwargs):
    ours, expected = make_params(torch.float64), make_params(torch.float64)
    settings = ({"lr": 0.05, "weight_decay": 2.0}, {})  # and what the input says
    groups = [
        [{"params": p[:2], **settings[0]}, {"params": p[2:], **settings[1]}]
        for p in (ours, expected)
    ]
    steps(make(optimizer, groups[0], kwargs), ours, range(20))
    torchs_steps(optimizer, groups[1], plain(kwargs), range(20))
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@every_input
def test_complex_params_are_pairs_of_reals(optimizer, kwargs):
    as_complex = make_params(torch.complex64)
    as_real = [nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in as_complex]
    opts = make(optimizer, as_complex, kwargs), make(optimizer, as_real, kwargs)
    for seed in range(5):
        set_grads(as_complex, seed)
        for p, q in zip(as_complex, as_real, strict=True):
            q.grad = torch.view_as_real(p.grad).clone()
        for opt in opts:
            opt.step()
    assert same_params([torch.view_as_real(p.detach()) for p in as_complex], as_real)


# What it does.


@pytest.mark.parametrize(
    ("optimizer", "kwargs"), [each for name in OPTIMIZERS for each in flagged(name, flags=False)]
)
def test_it_goes_in_the_right_direction(optimizer, kwargs):
    """With each set of schedulers, on a param group with a lr of its own."""
    for constructors in SCHEDULERS:
        weight, bias, x = torch.linspace(-1, 1, 12).view(3, 4), torch.zeros(3), torch.ones(4)
        weight, bias = nn.Parameter(weight), nn.Parameter(bias)
        groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
        opt = make(optimizer, groups, {**kwargs, "weight_decay": 1e-3})
        schedulers = [constructor(opt) for constructor in constructors]

        def closure(opt=opt, weight=weight, bias=bias, x=x):
            opt.zero_grad()
            loss = (weight @ x + bias).square().sum() - 3 * bias.sum()
            loss.backward()
            return loss

        sign = -1 if kwargs.get("maximize") else 1
        first = closure().item()
        for _ in range(20):
            loss = opt.step(closure)
            for scheduler in schedulers:
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(loss.detach())
                else:
                    scheduler.step()
        assert sign * closure().item() < sign * first


@every_input
def test_without_grads_nothing_happens(optimizer, kwargs):
    params = make_params()
    opt = make(optimizer, params, kwargs)
    before = copy.deepcopy(params)
    opt.step()
    assert same_params(params, before)
    assert not opt.state


@every_input
def test_params_without_elements(optimizer, kwargs):
    empty, full = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(3))
    opt = make(optimizer, [empty, full], kwargs)
    steps(opt, [empty, full], range(3))
    assert int(opt.state[empty]["step"]) == 3
    assert empty.shape == (0, 3)
    assert (full != 1).all()


@every_input
def test_grads_are_never_written_to(optimizer, kwargs):
    params = make_params()
    opt = make(optimizer, params, kwargs)
    set_grads(params, 0)
    grads = [param.grad for param in params]
    before = [(grad.clone(), grad._version) for grad in grads]
    opt.step()
    assert all(same_bits(g, b) and g._version == v for g, (b, v) in zip(grads, before, strict=True))
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))


@every_input
def test_lr_as_a_tensor(optimizer, kwargs):
    finals = []
    for lr in (2.0**-6, torch.tensor(2.0**-6)):
        if isinstance(lr, torch.Tensor) and kwargs.get("foreach") and not kwargs.get("capturable"):
            with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
                make(optimizer, make_params(), {**kwargs, "lr": lr})
            return
        params = make_params()
        steps(make(optimizer, params, {**kwargs, "lr": lr}), params, range(5))
        finals.append(params)
    assert same_params(*finals)


# Saving and loading.


def through_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def without_newer_flags(state_dict, info):
    state_dict = copy.deepcopy(state_dict)
    for group, flag in itertools.product(state_dict["param_groups"], info.not_og_supported_flags):
        # maximize is new, too, but decides what is computed.
        if flag != "maximize":
            group.pop(flag)
    return state_dict


def with_steps_as_numbers(state_dict):
    state_dict = copy.deepcopy(state_dict)
    for state in state_dict["state"].values():
        state["step"] = float(state["step"])
    return state_dict


@every_input
def test_state_dicts_new_and_old_go_on_with_the_same_bits(optimizer, kwargs):
    params = make_params()
    opt = make(optimizer, params, kwargs)
    steps(opt, params, range(5))
    state_dict = opt.state_dict()
    others = []
    for changed in (
        copy.deepcopy(state_dict),
        through_file(state_dict),
        without_newer_flags(state_dict, info_of(optimizer)),
        with_steps_as_numbers(state_dict),
    ):
        restored = copy.deepcopy(params)
        other = make(optimizer, restored, {})
        other.load_state_dict(changed)
        others.append((other, restored))
    for each, its in ((opt, params), *others):
        steps(each, its, range(5, 8))
    assert all(same_params(params, restored) for _, restored in others)


@every_input
def test_a_deep_copy_has_all_public_attributes(optimizer, kwargs):
    params = make_params()
    opt = make(optimizer, params, kwargs)
    steps(opt, params, range(2))
    copied = copy.deepcopy(opt)

    def public(opt):
        return {name for name in vars(opt) if not name.startswith("_")}

    assert public(copied) == public(opt)
    for each in (opt, copied):
        steps(each, each.param_groups[0]["params"], range(2, 4))
    assert same_params(params, copied.param_groups[0]["params"])


# Errors.


@pytest.mark.parametrize(("flag", "message"), [(f, e[1]) for f, e in EXCLUDED.items()])
@every_optimizer
def test_what_is_excluded_is_refused(optimizer, flag, message):
    for _, each in inputs_on(info_of(optimizer), "cpu"):
        with pytest.raises(RuntimeError, match=message):
            make(optimizer, make_params(), {**each.kwargs, flag: True})


@pytest.mark.parametrize(
    "device",
    # The database makes the params of its errors on a GPU; that fused goes with neither foreach
    # nor differentiable, test_optimizer.py asks without one.
    ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
@every_optimizer
def test_error_inputs(optimizer, device):
    for each in info_of(optimizer).optim_error_inputs_func(device, torch.float32):
        given = each.optimizer_error_input
        params = make_params() if given.params is None else given.params
        assert each.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        expected = pytest.warns if issubclass(each.error_type, Warning) else pytest.raises
        with expected(each.error_type, match=each.error_regex):
            OPTIMIZERS[optimizer].cls(params, **given.kwargs)


@every_optimizer
def test_sparse_grads_are_refused(optimizer):
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse gradients are not supported.*SparseAdam"):
        make(optimizer, [param], {}).step()
