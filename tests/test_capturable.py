"""capturable=True: step counts and hyper-parameters are read where the tensors are.

The CUDA kernels run on the host here, so "on the device" is in memory that only they read. What
they make of it has the very bits of what the host computes: the difference is zero.
"""

from __future__ import annotations

import decimal
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import adamprox
from adamprox import backends, reference
from registry import (
    BACKENDS,
    DTYPES,
    OPTIMIZERS,
    OPTIONS,
    Option,
    assert_same_bits,
    build,
    params_of,
)

SHAPES = ((3, 5), (), (7,), (2, 2))
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@pytest.fixture
def cuda(_built_for_the_host, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cuda_on_host", _built_for_the_host)
    yield _built_for_the_host
    _built_for_the_host.reset()


every_backend = pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)


def randn(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def numbers(wrap: Any) -> tuple[dict[str, Any], ...]:
    """Groups whose hyper-parameters are made by ``wrap``."""
    return (
        {"lr": wrap(2.0**-5), "weight_decay": wrap(0.5), "betas": (wrap(0.75), wrap(0.875))},
        {"lr": wrap(2.0**-6), "decay_by": "schedule", "initial_lr": wrap(0.25), "maximize": True},
        {"betas": (wrap(0.9), wrap(0.98)), "amsgrad": True, "ema_decay": wrap(0.75)},
    )


def make(
    optimizer: str,
    backend: str,
    groups: tuple[dict[str, Any], ...],
    capturable: bool,
    dtype: str = "float32",
) -> torch.optim.Optimizer:
    values = [randn(i, shape, DTYPES[dtype].param) for i, shape in enumerate(SHAPES)]
    option = Option({"capturable": capturable}, groups)
    return build(optimizer, values, option, backend, DTYPES[dtype].state)


def set_grads(opt: torch.optim.Optimizer, step: int) -> None:
    for i, param in enumerate(params_of(opt)):
        grad = randn(100 * step + i, param.shape, param.dtype)
        if param.grad is None:
            param.grad = grad
        else:  # in place: a graph reads the same memory
            param.grad.copy_(grad)


@pytest.mark.parametrize("number", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_optimizer
@every_backend
def test_tensors_as_hyper_parameters_give_the_bits_of_floats(backend, optimizer, number):
    if backend == "triton" and number != torch.float64:
        pytest.skip("tested below")

    def tensor(value: float) -> Tensor:
        return torch.tensor(value, dtype=number)

    def rounded(value: float) -> float:
        return tensor(value).item()

    ours = make(optimizer, backend, numbers(tensor), capturable=True)
    theirs = make(optimizer, "reference", numbers(rounded), capturable=False)
    for step in range(4):
        for opt in (ours, theirs):
            set_grads(opt, step)
            opt.step()
    assert_same_bits(ours, theirs)


@every_backend
def test_groups_may_differ_in_a_tensor_alone(backend):
    rates = 0.25, 0.5
    tensors = tuple({"lr": torch.tensor(rate)} for rate in rates)
    ours = make("AdamW", backend, tensors, capturable=True)
    theirs = make("AdamW", "reference", tuple({"lr": rate} for rate in rates), capturable=False)
    for opt in (ours, theirs):
        set_grads(opt, 1)
        opt.step()
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_a_number_in_triton(dtype):
    """And every dtype of a param."""
    number = DTYPES[dtype].param.to_real()

    def tensor(value: float) -> Tensor:
        return torch.tensor(value, dtype=number)

    pair = [
        make("AdamProxL2", "triton", numbers(tensor), capturable=True, dtype=dtype),
        make("AdamProxL2", "reference", numbers(lambda x: tensor(x).item()), False, dtype),
    ]
    for opt in pair:
        for step in range(2):
            set_grads(opt, step)
            opt.step()
    assert_same_bits(*pair)


def step_both(cuda, captured, eager, step: int) -> None:
    """The first step is captured, the others replay it."""
    if step == 0:
        captured.step()
    else:
        cuda.replay()
    eager.step()


@pytest.mark.parametrize("change", ["lr", "betas", "weight_decay", "ema_decay"])
@every_optimizer
def test_replays_equal_eager_steps_while_hyper_parameters_change(optimizer, change, cuda):
    """100 times the same launches with the same arguments; hyper-parameters change in place."""

    def tensor(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)

    captured = make(optimizer, "cuda_on_host", numbers(tensor), capturable=True)
    eager = make(optimizer, "reference", numbers(float), capturable=False)
    for step in range(100):
        factor = 1 / (1 + step % 9)
        set_grads(captured, step)
        set_grads(eager, step)
        for ours, theirs in zip(captured.param_groups, eager.param_groups, strict=True):
            if change != "betas" and isinstance(ours[change], Tensor):
                theirs[change] = factor
                ours[change].fill_(factor)
            elif change == "betas" and isinstance(ours["betas"][0], Tensor):
                theirs["betas"] = (factor / 2, 1 - factor / 3)
                for beta, value in zip(ours["betas"], theirs["betas"], strict=True):
                    beta.fill_(value)
        step_both(cuda, captured, eager, step)
    assert_same_bits(captured, eager)
    assert {state["step"].item() for state in captured.state.values()} == {100.0}


def test_replays_follow_the_options_of_a_rule(cuda):
    l2, low, high = (torch.tensor(v, dtype=torch.float64) for v in (0.5, -2.0, 2.0))
    options = {"l2": l2, "bounds": (low, high)}
    captured = make("AdamProxL1", "cuda_on_host", (options,), capturable=True)
    eager = make("AdamProxL1", "reference", ({"l2": 0.5, "bounds": (-2.0, 2.0)},), capturable=False)
    for step in range(9):
        for opt in (captured, eager):
            set_grads(opt, step)
        l2.fill_(3.0 * (step % 2))
        for end, number in ((low, -1 / (1 + step)), (high, 1 / (2 + step))):
            end.fill_(number)
        eager.param_groups[0].update(l2=l2.item(), bounds=(low.item(), high.item()))
        step_both(cuda, captured, eager, step)
        assert_same_bits(captured, eager)
    assert max(param.detach().max() for param in params_of(captured)) == pytest.approx(0.1)


def test_replays_follow_a_scheduler(cuda):
    """torch's schedulers write into a tensor, and step counts stay right when steps are skipped."""
    lr = torch.tensor(0.5, dtype=torch.float64)
    captured = make("AdamProxL1", "cuda_on_host", ({"lr": lr},), capturable=True)
    eager = make("AdamProxL1", "reference", ({"lr": 0.5},), capturable=False)
    pairs = [(opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)) for opt in (captured, eager)]
    captured.grad_scale, captured.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for step in range(20):
        for opt in (captured, eager):
            set_grads(opt, step)
        for param in params_of(captured):
            param.grad.mul_(8.0)
        captured.found_inf.fill_(step % 4 == 3)
        if step == 0:
            captured.step()
        else:
            cuda.replay()
        if step % 4 != 3:
            eager.step()
        for _, scheduler in pairs:
            scheduler.step()
    del captured.grad_scale, captured.found_inf
    assert_same_bits(captured, eager)
    assert captured.state[params_of(captured)[0]]["step"] == 15


@every_backend
def test_loaded_and_skipped_step_counts(backend):
    """Each param has a count of its own after loading; one that was skipped stays behind."""
    groups = numbers(float)
    ours = make("AdamProx", backend, groups, capturable=True)
    theirs = make("AdamProx", "reference", groups, capturable=False)
    for opt in (ours, theirs):
        for step in range(8):
            set_grads(opt, step)
            if step in (2, 5):
                params_of(opt)[step // 2].grad = None
            if step == 4:
                opt.load_state_dict(opt.state_dict())
            opt.step()
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("count", [0.5, 2.25, 1e6 + 0.375, 2.0**60])
@every_backend
def test_fractional_step_counts(backend, count):
    ours = make("AdamProx", backend, numbers(float), capturable=True)
    theirs = make("AdamProx", "reference", numbers(float), capturable=False)
    for opt in (ours, theirs):
        for step in range(4):
            set_grads(opt, step)
            opt.step()
            if step == 1:
                opt.state[params_of(opt)[step]]["step"].copy_(torch.tensor(count))
    assert_same_bits(ours, theirs)


@every_backend
def test_groups_of_different_rules(backend):
    groups = OPTIONS["rules"].groups
    values = [randn(i, (3, 1 + i)) for i in range(2 * len(groups))]
    ours, theirs = (
        build("AdamProx", values, Option({"capturable": capturable}, groups), name, None)
        for name, capturable in ((backend, True), ("reference", False))
    )
    assert all(group["params"] for group in ours.param_groups)
    for opt in (ours, theirs):
        for step in range(3):
            set_grads(opt, step)
            opt.step()
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("scaled", [False, True])
@every_backend
def test_a_param_twice_is_stepped_twice(backend, scaled):
    """And both times skipped."""
    ours = make("AdamProxL2", backend, numbers(torch.tensor), capturable=True)
    theirs = make("AdamProxL2", "reference", numbers(lambda x: torch.tensor(x).item()), False)
    for opt in (ours, theirs):
        params = params_of(opt)
        for step in range(4):
            set_grads(opt, step)
            opt.param_groups[1]["params"] = [params[3], params[1], params[0]]
            if scaled:
                opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(float(step == 2))
            opt.step()
            opt.param_groups[1]["params"] = [params[1]]
        counts = [int(opt.state[param]["step"]) for param in params]
        assert counts == ([6, 3, 3, 6] if scaled else [8, 4, 4, 8])
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_capturable_group_beside_others(backend):
    """Scalars of the host and of the device in one launch."""
    groups = ({"capturable": False, "lr": 0.25}, {"capturable": True}, {"lr": 0.125})
    ours, theirs = (
        make("AdamProxL2", name, groups, capturable=False) for name in (backend, "reference")
    )
    for opt in (ours, theirs):
        for step in range(4):
            set_grads(opt, step)
            opt.step()
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("base", [0.0, 0.5, 0.9, 0.999, 0.9999, 1 - 2.0**-20])
def test_power(base):
    """Within exponent * 2^-53 of the true one; exact where a double holds it."""
    for exponent in (0, 1, 2, 3, 7, 10, 100, 1000, 4097):
        true = Fraction(base) ** exponent
        error = abs(Fraction(reference.power(base, exponent)) - true)
        assert error <= true * exponent / 2**53 + Fraction(1, 2**1000)  # where it underflows
    assert reference.power(0.5, 1000) == 2.0**-1000
    assert math.isclose(reference.power(base, 10**6), base**10**6, rel_tol=2e-10, abs_tol=5e-324)


@pytest.mark.parametrize("base", [0.5, 0.9, 0.999, 1 - 2.0**-20])
def test_power_of_a_fraction(base):
    """Each of its binary places is a square root, and perhaps a product."""
    for exponent, places in ((0.5, 1), (2.25, 2), (1e-3, 62), (100.1, 46), (1000.375, 3)):
        true = Fraction(decimal.Context(60).power(Decimal(base), Decimal(exponent)))
        error = abs(Fraction(reference.power(base, exponent)) - true)
        assert error <= true * Fraction(exponent + 4 * places) / 2**53
    assert reference.power(0.25, 1.5) == 0.125
    assert reference.power(base, 2.0**63) == reference.power(0.0, 0.5) == 0.0
    assert all(math.isnan(reference.power(base, t)) for t in (-1.0, -0.5, math.nan, -math.inf))


# What a capture refuses; torch's own refusal needs a GPU: test_gpu.py.


@pytest.mark.usefixtures("cuda")
def test_a_capture_without_a_step_before_is_refused(monkeypatch):
    opt = make("AdamW", "cuda_on_host", numbers(torch.tensor), capturable=True)
    set_grads(opt, 0)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "capturing", lambda: True)
        with pytest.raises(RuntimeError, match="step once before"):
            opt.step()
    assert len(opt.state) == 0
    opt.step()
    before = [param.detach().clone() for param in params_of(opt)]
    with monkeypatch.context() as patch:
        patch.setattr(backends, "capturing", lambda: True)
        opt.step()
    assert not all(map(torch.equal, before, params_of(opt)))


def test_a_capture_of_what_the_host_steps_is_refused(monkeypatch):
    opt = make("AdamW", "reference", numbers(torch.tensor), capturable=True)
    set_grads(opt, 0)
    opt.step()
    before = [param.detach().clone() for param in params_of(opt)]
    monkeypatch.setattr(backends, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        opt.step()
    assert all(map(torch.equal, before, params_of(opt)))


def test_a_capture_in_which_no_param_has_a_grad(monkeypatch):
    """There is nothing to step, and nothing that a graph reads."""
    param = torch.nn.Parameter(torch.ones(3))
    opt = adamprox.AdamW([param], capturable=True)
    monkeypatch.setattr(backends, "capturing", lambda: True)
    opt.step()
    assert (param == 1).all()
    assert not opt.state


@every_backend
def test_a_bound_of_negative_zero_keeps_its_sign(backend):
    given = {"bounds": (None, -0.0), "capturable": True}
    pair = [
        build("AdamProx", [torch.ones(5)], Option(given), name, None)
        for name in (backend, "reference")
    ]
    for opt in pair:
        set_grads(opt, 1)
        opt.step()
    assert_same_bits(*pair)
    assert torch.signbit(params_of(pair[0])[0]).all()
