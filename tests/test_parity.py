"""Every backend gives the bits of the backend "reference", in every cell of the tables."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adamprox.hyperparameters import RULES
from adamprox.reference import CHUNK_SIZE, TILE_SIZE
from registry import (
    BACKENDS,
    CELLS,
    DTYPES,
    L2,
    OPTIMIZERS,
    OPTIONS,
    Option,
    assert_same_bits,
    build,
    params_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 50
SHAPES = ((), (0, 3), (1,), (3, 5, 7), (TILE_SIZE - 1,), (TILE_SIZE,), (16, TILE_SIZE // 16 + 1))
SHAPES += ((7, 37), (3, 300), (2, 3000))  # blocks of all sizes
# Where a tensor takes some milliseconds: a full tile, or tails for several groups.
FEW_SHAPES = ((8, TILE_SIZE // 8), (0, 3))
SMALL_SHAPES = ((5,), (0, 3), (), (2, 2))
CHUNK_EDGES = (
    *(0, 1),
    *(TILE_SIZE - 1, TILE_SIZE, TILE_SIZE + 1),
    *(CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1),
    2 * CHUNK_SIZE + 1,
)

every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def randn(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers, one in eight of them an exact zero."""
    values = torch.randn(shape, generator=generator, dtype=torch.complex128)
    values = values * (torch.rand(shape, generator=generator) > 1 / 8)
    return (values if dtype.is_complex else values.real).to(dtype)


def check(
    backend: str,
    optimizer: str,
    values: list[Tensor],
    *,
    option: Option = OPTIONS["plain"],
    state: torch.dtype | None = None,
    steps: int = STEPS,
    grad: Callable[[int, int], Tensor] | None = None,
) -> None:
    """Runs the backend beside the reference, on random grads or on ``grad(step, index)``."""
    generator = torch.Generator().manual_seed(0)
    pair = [build(optimizer, values, option, name, state) for name in (backend, "reference")]
    base_lrs = [group["lr"] for group in pair[0].param_groups]
    for step in range(steps):
        grads = [
            (grad(step, index) if grad else randn(generator, value.shape, value.dtype))
            if option.has_grad(step, index)
            else None
            for index, value in enumerate(values)
        ]
        for opt in pair:
            for group, lr in zip(opt.param_groups, base_lrs, strict=True):
                group["lr"] = lr * option.lr_factor(step)
            for index, (param, g) in enumerate(zip(params_of(opt), grads, strict=True)):
                param.data = option.param_layout(step, index)(param.data)
                param.grad = None if g is None else option.grad_layout(step, index)(g)
            opt.step()
        if step % 10 == 0 or step == steps - 1:
            assert_same_bits(*pair)


@pytest.mark.parametrize(("optimizer", "option"), CELLS)
@every_dtype
@every_backend
def test_parity(backend, dtype, optimizer, option):
    generator = torch.Generator().manual_seed(1)
    few = SMALL_SHAPES if option in ("groups", "rules", "skipped") else FEW_SHAPES
    shapes = SHAPES if backend == "cpu" else few
    shapes += few * (option == "rules")  # so that each group has some
    values = [randn(generator, shape, DTYPES[dtype].param) for shape in shapes]
    steps = 20 if backend == "triton" else STEPS  # its interpreter takes milliseconds a tensor
    option, state = OPTIONS[option], DTYPES[dtype].state
    check(backend, optimizer, values, option=option, state=state, steps=steps)


@every_dtype
@every_optimizer
@every_backend
def test_parity_at_chunk_edges(backend, optimizer, dtype):
    generator = torch.Generator().manual_seed(2)
    param_dtype, state = DTYPES[dtype]
    shapes = [
        (size // 2, 2) if param_dtype.is_complex and size % 2 == 0 else (size,)
        for size in CHUNK_EDGES
    ]
    values = [randn(generator, shape, param_dtype) for shape in shapes]
    check(backend, optimizer, values, state=state, steps=2)


@pytest.mark.both_abis
@every_optimizer
@every_backend
def test_parity_of_all_dtypes_in_one_step(backend, optimizer):
    generator = torch.Generator().manual_seed(3)
    dtypes = [dtype.param for dtype in DTYPES.values() if dtype.state is None]
    values = [randn(generator, shape, dtype) for shape in ((), (9, 5)) for dtype in dtypes]
    check(backend, optimizer, values, option=OPTIONS["groups"], steps=10)


@every_optimizer
@every_backend
def test_parity_of_many_tiny_tensors(backend, optimizer):
    generator = torch.Generator().manual_seed(4)
    count = 1000 if backend == "cpu" else 100
    values = [randn(generator, (index % 4,), torch.float32) for index in range(count)]
    check(backend, optimizer, values, steps=2, option=OPTIONS["groups"])


def special_values(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    magnitudes = [0.0, 1.0, info.tiny, info.tiny / 4, info.max, torch.inf]
    values = [*magnitudes, *(-x for x in magnitudes), torch.nan]
    reals = torch.tensor(values, dtype=dtype.to_real())
    return torch.complex(reals, reals.flip(0)) if dtype.is_complex else reals


@pytest.mark.parametrize(
    ("optimizer", "option"),
    [cell for cell in CELLS if cell[1] in ("plain", "amsgrad", "maximize", "cautious")],
)
@every_dtype
@every_backend
def test_parity_of_special_values(backend, dtype, optimizer, option):
    """Every special param with every special grad; blocks of their own where a norm is taken."""
    param_dtype, state = DTYPES[dtype]
    special = special_values(param_dtype)
    count = len(special)
    finite = special[special.isfinite()]
    values, grads = [special.repeat_interleave(count)], [special.repeat(count)]
    if OPTIMIZERS[optimizer].penalty is L2:
        values += [*special.split(1), finite]
        grads += [*special.flip(0).split(1), finite.flip(0)]
    check(
        backend,
        optimizer,
        values,
        grad=lambda step, index: grads[index],
        option=OPTIONS[option],
        state=state,
        steps=3,
    )


@pytest.mark.parametrize("flush", [False, True])
@every_dtype
@every_optimizer
def test_parity_of_subnormals(optimizer, dtype, flush):
    """Kept, or flushed to zero by the processor, where the user has asked torch for that."""
    param_dtype, state = DTYPES[dtype]
    generator = torch.Generator().manual_seed(5)
    (value,) = values = [randn(generator, (100,), param_dtype)]
    scale = torch.finfo(param_dtype).tiny ** torch.linspace(0.4, 1.05, 100, dtype=torch.float64)
    grads = [(randn(generator, (100,), value.dtype) * scale).to(value.dtype) for _ in range(3)]
    if not torch.set_flush_denormal(flush):
        pytest.skip("this processor cannot flush them")
    try:
        check("cpu", optimizer, values, grad=lambda step, index: grads[step], state=state, steps=3)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_backend
def test_parity_of_every_16_bit_number(backend, dtype):
    """As a param and, in another order, as a grad; in the second step as an exp_avg, too."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    grads = numbers.roll(12345)
    check(backend, "AdamProx", [numbers], grad=lambda step, index: grads, steps=2)


@st.composite
def laid_out(draw, values: Tensor) -> Tensor:
    """A tensor of these values with random strides and a random alignment."""
    order = draw(st.permutations(range(values.dim())))
    steps = draw(st.tuples(*[st.sampled_from([1, 1, 1, 2, 3])] * values.dim()))
    offset = draw(st.integers(0, 5))
    sizes = [values.shape[dim] * step for dim, step in zip(order, steps, strict=True)]
    buffer = values.new_zeros(offset + torch.Size(sizes).numel())[offset:].view(sizes)
    buffer = buffer[tuple(slice(None, None, step) for step in steps)]
    return buffer.permute([order.index(dim) for dim in range(values.dim())]).copy_(values)


@st.composite
def a_grad(draw, generator: torch.Generator, like: Tensor) -> Tensor:
    """A random grad: strided, expanded along some dims, lazily conjugated or negated."""
    expand = 0 not in like.shape and draw(st.booleans())
    shape = tuple(1 if expand and draw(st.booleans()) else size for size in like.shape)
    grad = draw(laid_out(randn(generator, shape, like.dtype))).expand(like.shape)
    if draw(st.booleans()):
        if like.is_complex():
            grad = grad.conj()
        elif like.dtype in (torch.float32, torch.float64):
            grad = torch.complex(grad, grad).conj().imag
            assert grad.is_neg()
    return grad


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    dtypes = sorted({dtype.param for dtype in DTYPES.values()}, key=str)
    shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
    large = st.integers(0, 3 * CHUNK_SIZE).map(lambda size: (size,))
    shape = st.one_of(shapes, shapes, shapes, large)
    values, grads = [], []
    for _ in range(draw(st.integers(1, 6))):
        value = draw(laid_out(randn(generator, draw(shape), draw(st.sampled_from(dtypes)))))
        values.append(value)
        grads.append([draw(a_grad(generator, value)) for _ in range(2)])
    rates = st.floats(0, 0.999)
    groups = st.fixed_dictionaries(
        {
            "lr": st.floats(0, 1),
            "betas": st.tuples(rates, rates),
            "eps": st.floats(0, 1e-2),
            "weight_decay": st.floats(0, 30),
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
        },
        optional={"decay": st.sampled_from(tuple(RULES))},
    )
    return values, grads, draw(st.lists(groups, min_size=1, max_size=3))


@pytest.mark.both_abis
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(problem=problems(), optimizer=st.sampled_from(tuple(OPTIMIZERS)))
def test_parity_of_random_problems(problem, optimizer):
    """Shapes, strides, alignments, groups: whatever they are, on the CPU."""
    values, grads, groups = problem
    option = Option(
        groups=tuple(groups),
        param_layout=lambda step, index: copy.deepcopy,  # of the storage, as it is laid out
        grad_layout=lambda step, index: lambda grad: grad,
    )
    check(
        "cpu",
        optimizer,
        values,
        grad=lambda step, index: grads[index][step],
        option=option,
        steps=2,
    )
