"""Mixed precision: unscaled and skipped within the step, as torch.amp.GradScaler asks for it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from adamprox.hyperparameters import STATES
from registry import (
    BACKENDS,
    DTYPES,
    OPTIMIZERS,
    OPTIONS,
    Option,
    assert_same_bits,
    bits,
    build,
    params_of,
)

STEPS = 4
SHAPES = ((3, 5), (), (7,), (2, 2))
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)


def randn(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)


def make(
    optimizer: str, backend: str, option: str | Option = "groups", dtype: str = "float32"
) -> torch.optim.Optimizer:
    option = OPTIONS[option] if isinstance(option, str) else option
    values = [randn(i, shape, DTYPES[dtype].param) for i, shape in enumerate(SHAPES)]
    return build(optimizer, values, option, backend, DTYPES[dtype].state)


def set_grads(opt: torch.optim.Optimizer, step: int, scale: float = 1.0) -> None:
    for i, param in enumerate(params_of(opt)):
        param.grad = randn(100 * step + i, param.shape, param.dtype) * scale


def step_scaled(opt: torch.optim.Optimizer, scale: float | None, found_inf: float = 0.0) -> None:
    """As GradScaler.step does it."""
    opt.grad_scale = None if scale is None else torch.tensor(scale)
    opt.found_inf = torch.tensor(found_inf)
    opt.step()
    del opt.grad_scale, opt.found_inf


def everything(opt: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all params, grads, states and step counts."""
    tensors = []
    for param in params_of(opt):
        tensors += [param.detach(), param.grad, *opt.state[param].values()]
    return copy.deepcopy(tensors)


def changed(before: list[Tensor], after: list[Tensor]) -> list[int]:
    assert len(before) == len(after)
    pairs = enumerate(zip(before, after, strict=True))
    return [i for i, (old, new) in pairs if not torch.equal(bits(old), bits(new))]


# All of them in C++; a few in Triton's interpreter, which is slow.
CELLS = [
    pytest.param(backend, dtype, option, id=f"{backend}-{dtype}-{option}")
    for backend in (*BACKENDS, "reference")
    for dtype in DTYPES
    for option in ("groups", "maximize", "amsgrad", "strided")
    if backend != "triton" or (dtype, option) in (("float32", "groups"), ("float16", "amsgrad"))
]


@pytest.mark.parametrize(("backend", "dtype", "option"), CELLS, indirect=["backend"])
@every_optimizer
def test_a_scaled_step_is_the_unscaled_one_for_powers_of_two(backend, optimizer, dtype, option):
    scaled, plain = (make(optimizer, name, option, dtype) for name in (backend, "cpu"))
    for step in range(STEPS):
        scale = 2.0 ** (8 - 3 * step)
        set_grads(scaled, step, scale)
        set_grads(plain, step)
        step_scaled(scaled, scale)
        plain.step()
    assert_same_bits(scaled, plain)


@every_optimizer
@every_backend
def test_any_scale_has_the_bits_of_the_reference_and_of_unscaled_float32(backend, optimizer):
    """torch's unscale_ multiplies float32 grads by the same reciprocal."""
    scaled, reference, unscaled = (
        make(optimizer, name) for name in (backend, "reference", "reference")
    )
    for step in range(STEPS):
        scale = 3.0 + step
        for opt in (scaled, reference, unscaled):
            set_grads(opt, step, scale)
        for param in params_of(unscaled):
            param.grad *= torch.tensor(scale).double().reciprocal().float()
        for opt in (scaled, reference):
            step_scaled(opt, scale)
        unscaled.step()
    assert_same_bits(scaled, reference)
    assert_same_bits(scaled, unscaled)


@pytest.mark.parametrize("found_inf", [1.0, 2.0])  # GradScaler adds up what it finds on each device
@every_optimizer
@every_backend
def test_found_inf_changes_no_bit(backend, optimizer, found_inf):
    opt, twin = (make(optimizer, backend) for _ in range(2))
    for step in range(STEPS):
        set_grads(opt, step, 4.0)
        if step == 1:
            params_of(opt)[0].grad.view(-1)[0] = torch.inf
        before = everything(opt) if step > 0 else None
        if step % 2 == 1:
            step_scaled(opt, 4.0, found_inf)
            assert changed(before, everything(opt)) == []
        else:
            set_grads(twin, step)
            step_scaled(opt, 4.0)
            twin.step()
            if before is not None:
                assert changed(before, everything(opt)) != []
    for theirs, ours in zip(params_of(twin), params_of(opt), strict=True):
        assert torch.equal(theirs, ours)
        assert ours in opt.state
        assert opt.state[ours]["step"] == twin.state[theirs]["step"] == STEPS // 2


@every_optimizer
@every_backend
def test_found_inf_in_the_first_step(backend, optimizer):
    opt = make(optimizer, backend)
    set_grads(opt, 0, torch.inf)
    before = [param.detach().clone() for param in params_of(opt)]
    step_scaled(opt, 2.0, found_inf=1.0)
    assert changed(before, [param.detach() for param in params_of(opt)]) == []
    as_param = {state.key for state in STATES if state.starts == "param"}
    for param, state in opt.state.items():
        for key, value in state.items():
            assert torch.equal(value, param if key in as_param else torch.zeros_like(value)), key


@every_backend
def test_params_that_were_skipped_keep_their_count_when_scaled(backend):
    """Cohorts part and meet as they do without a GradScaler."""
    scaled, plain = (make("AdamW", name) for name in (backend, "reference"))
    for step in range(6):
        for opt, scale in ((scaled, 8.0), (plain, 1.0)):
            set_grads(opt, step, scale)
            if step in (2, 3):
                params_of(opt)[step].grad = None
        step_scaled(scaled, 8.0)
        plain.step()
    assert_same_bits(scaled, plain)


@every_backend
def test_a_scaled_step_after_plain_ones_and_before(backend):
    mixed, plain = (make("AdamProx", name) for name in (backend, "reference"))
    for step in range(6):
        scale = 16.0 if step in (2, 3) else None
        set_grads(mixed, step, scale or 1.0)
        set_grads(plain, step)
        if scale is None:
            mixed.step()
        else:
            step_scaled(mixed, scale)
        plain.step()
    assert_same_bits(mixed, plain)


def train(opt: Any, scaler: torch.amp.GradScaler, unscale: bool, bad_step: int | None) -> list[int]:
    """Least squares; returns the step count after each step."""
    counts = []
    for step in range(6):
        opt.zero_grad()
        loss = sum((p * randn(step, p.shape, p.dtype)).square().sum() for p in params_of(opt))
        if step == bad_step:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(params_of(opt), 1e6)
        scaler.step(opt)
        scaler.update()
        counts.append(int(opt.state_dict()["state"].get(0, {"step": 0})["step"]))
    return counts


@pytest.mark.parametrize(("fused", "unscale"), [(True, False), (True, True), (None, False)])
@pytest.mark.parametrize("bad_step", [None, 0, 3])
@every_optimizer
@every_backend
def test_grad_scaler(backend, optimizer, bad_step, fused, unscale):
    """A real one on CPU tensors: the same bits as without, and the scale halves at an infinity."""
    option = Option({"fused": fused})
    opt, plain = (make(optimizer, name, option) for name in (backend, "reference"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    off = torch.amp.GradScaler("cpu", enabled=False)
    counts = train(opt, scaler, unscale, bad_step)
    if bad_step is None:
        train(plain, off, False, None)
        assert_same_bits(opt, plain)
        assert counts == [1, 2, 3, 4, 5, 6]
        assert scaler.get_scale() == 2.0**10
    else:
        assert counts == [step + (step < bad_step) for step in range(6)]
        assert scaler.get_scale() == 2.0**9
        assert all(param.isfinite().all() for param in params_of(opt))


def test_the_grads_stay_scaled_and_the_attributes_go():
    opt = make("AdamW", "cpu")
    set_grads(opt, 0, 4.0)
    before = [param.grad.clone() for param in params_of(opt)]
    step_scaled(opt, 4.0)
    assert changed(before, [param.grad for param in params_of(opt)]) == []
    assert not hasattr(opt, "grad_scale")


def test_a_grad_scale_of_the_users_own():
    """torch's fused steps unscale by it without a GradScaler, too."""
    scaled, plain = (make("AdamW", "cpu") for _ in range(2))
    scaled.grad_scale = torch.tensor(32.0)
    set_grads(scaled, 0, 32.0)
    set_grads(plain, 0)
    scaled.step()
    plain.step()
    assert_same_bits(scaled, plain)


@pytest.mark.parametrize("fused", [None, False, True])
@every_optimizer
def test_who_unscales(optimizer, fused):
    """As in torch: without fused=True, what reads or clips the grads finds them unscaled."""
    opt, plain = (make(optimizer, "cpu", Option({"fused": fused})) for _ in range(2))
    for clone in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert clone._step_supports_amp_scaling == (fused is True)
    train(opt, torch.amp.GradScaler("cpu", init_scale=2.0**10), False, None)
    train(plain, torch.amp.GradScaler("cpu", enabled=False), False, None)
    assert_same_bits(opt, plain)
    for ours, theirs in zip(params_of(opt), params_of(plain), strict=True):
        assert torch.equal(ours.grad, theirs.grad * (2.0**10 if fused else 1))
