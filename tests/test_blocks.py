"""Blocks of AdamProxL2: rows, several rows, and whole groups; their norms and their scaling."""

from __future__ import annotations

import pytest

import registry
from adamprox.reference import CHUNK_SIZE
from registry import BACKENDS, DTYPES
from test_capturable import randn, set_grads

every_backend = pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
every_block = pytest.mark.parametrize("block", ["tensor", "row", 2, 3, "group"])
both_scalings = pytest.mark.parametrize("scaling", ["none", "sqrt"])

# Rows around what vectors, warps, tiles and chunks have; several chunks, odd and even.
ROWS = (
    *((1, 3), (20, 1), (3, 5, 2), (41, 9), (700, 31), (9, 32), (9, 33), (3, 64)),
    *((17, 255), (4, 257), (5, 1023), (3, 1025), (9, 2048), (3, 2049), (2, 5000)),
    *((3, CHUNK_SIZE - 1), (2, CHUNK_SIZE), (3, CHUNK_SIZE + 1), (2, 2 * CHUNK_SIZE + 5)),
    *((), (0, 3), (7,), (CHUNK_SIZE + 3,), (5 * CHUNK_SIZE, 1), (70_001,)),
)
FEW_ROWS = ((20, 1), (41, 9), (9, 33), (5, 300), (3, 2049), (2, CHUNK_SIZE + 1), (), (0, 3), (7,))


@every_block
@both_scalings
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_rows_of_every_size_give_the_references_bits(backend, dtype, block, scaling):
    param_dtype, state = DTYPES[dtype]
    shapes = ROWS if backend == "cpu" else FEW_ROWS
    values = [randn(i, shape, param_dtype) for i, shape in enumerate(shapes)]
    # Times lr: what some of the blocks have as a norm, whose elements are about 1.
    strength = 30.0 if scaling == "sqrt" else {"tensor": 300.0, "group": 1000.0}.get(block, 100.0)
    option = registry.Option({"block": block, "block_scaling": scaling, "weight_decay": strength})
    pair = [registry.build("AdamProxL2", values, option, n, state) for n in (backend, "reference")]
    for step in range(2):
        for opt in pair:
            set_grads(opt, step)
            opt.step()
        registry.assert_same_bits(*pair)
