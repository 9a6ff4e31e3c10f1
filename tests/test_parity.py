"""Every backend gives the bits of the backend "reference", in every cell of the tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adamprox.reference import CHUNK_SIZE, TILE_SIZE
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

STEPS = 50
SHAPES = ((), (0, 3), (1,), (3, 5, 7), (TILE_SIZE - 1,), (TILE_SIZE,), (16, TILE_SIZE // 16 + 1))
FEW_SHAPES = ((), (0, 3), (3, 5, 7), (TILE_SIZE + 1,))  # where a tensor takes a millisecond
CHUNK_EDGES = tuple(
    edge + offset for edge in (0, TILE_SIZE, CHUNK_SIZE) for offset in (-1, 0, 1) if edge + offset >= 0
) + (2 * CHUNK_SIZE + 1,)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
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
    grad=None,
    seed: int = 0,
) -> None:
    """Runs the backend beside the reference; ``grad(index)`` is a grad for a param, or random."""
    generator = torch.Generator().manual_seed(seed)
    pair = [build(optimizer, values, option, name, state) for name in (backend, "reference")]
    base_lrs = [group["lr"] for group in pair[0].param_groups]
    for step in range(steps):
        grads = [
            (grad(index) if grad else randn(generator, value.shape, value.dtype))
            if option.has_grad(step, index)
            else None
            for index, value in enumerate(values)
        ]
        for opt in pair:
            for group, lr in zip(opt.param_groups, base_lrs, strict=True):
                group["lr"] = lr * (option.lr_factor(step) if option.lr_factor else 1)
            for index, (param, g) in enumerate(zip(params_of(opt), grads, strict=True)):
                param.data = option.param_layout(step, index)(param.data)
                param.grad = None if g is None else option.grad_layout(step, index)(g)
            opt.step()
        if step % 10 == 0 or step == steps - 1:
            assert_same_bits(*pair)


@pytest.mark.parametrize("option", OPTIONS)
@every_dtype
@every_optimizer
@every_backend
def test_parity(backend, optimizer, dtype, option):
    generator = torch.Generator().manual_seed(1)
    shapes = SHAPES if backend == "cpu" else FEW_SHAPES
    values = [randn(generator, shape, DTYPES[dtype].param) for shape in shapes]
    check(backend, optimizer, values, option=OPTIONS[option], state=DTYPES[dtype].state)
