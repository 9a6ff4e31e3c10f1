"""A step is one launch, and its blocks may run in any order, any number of them at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from adamprox import backends
from adamprox.reference import CHUNK_SIZE, TILE_SIZE
from registry import OPTIMIZERS, OPTIONS
from test_parity import check, randn
from test_telemetry import check as check_stats

if TYPE_CHECKING:
    from cuda_on_host import CudaOnHostBackend

# Tensors of one chunk and of several, of which some end while blocks work on the ones before.
SIZES = (5 * CHUNK_SIZE + 7, 1, 2 * CHUNK_SIZE, TILE_SIZE, CHUNK_SIZE + 1, 3, 3 * CHUNK_SIZE - 1)


@pytest.fixture
def cuda(_built_for_the_host, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "cuda_on_host", _built_for_the_host)
    yield _built_for_the_host
    _built_for_the_host.reset()


def steps_of_l2(cuda: CudaOnHostBackend, dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(5)
    values = [randn(generator, (size,), dtype) for size in SIZES]
    check("cuda_on_host", "AdamProxL2", values, steps=2, option=OPTIONS["groups"])


def test_blocks_wait_for_one_another_in_any_order(cuda):
    cuda.blocks = cuda.resident = 4
    for seed in range(0, 20, 2):
        cuda.seed = seed
        steps_of_l2(cuda)
    assert cuda.sleeps > 0


def test_blocks_that_wait_note_what_all_of_them_do(cuda):
    generator = torch.Generator().manual_seed(6)
    values = [randn(generator, (size,), torch.float32) for size in SIZES]
    cuda.blocks = cuda.resident = 4
    for seed in range(0, 6, 2):
        cuda.seed = seed
        check_stats("cuda_on_host", "AdamProxL2", values, steps=2)
    assert cuda.sleeps > 0


@pytest.mark.parametrize(("blocks", "resident"), [(1, 1), (5, 1), (5, 2), (40, 3)])
def test_blocks_need_not_run_at_the_same_time(cuda, blocks, resident):
    cuda.blocks, cuda.resident = blocks, resident
    steps_of_l2(cuda)
    assert resident > 1 or cuda.sleeps == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_blocks_wait_for_one_another_in_any_dtype(cuda, dtype):
    cuda.blocks = cuda.resident = 4
    steps_of_l2(cuda, dtype)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_tensors_are_packed(cuda, optimizer, dtype):
    """Three packs, the last one not full, behind what is worth a block."""
    cuda.blocks = cuda.resident = 2
    generator = torch.Generator().manual_seed(7)
    sizes = (*range(1, 10), CHUNK_SIZE + 1, *range(120, 130), 1023, 1024, 1025)
    values = [randn(generator, (size,), dtype) for size in sizes]
    check("cuda_on_host", optimizer, values, steps=2, option=OPTIONS["groups"])


def step_of_400_tensors(optimizer: str, backend: str, tracked: bool) -> None:
    """In 3 groups and 2 dtypes."""
    params = [
        torch.nn.Parameter(torch.ones(1 + i % 5, dtype=(torch.float32, torch.bfloat16)[i % 2]))
        for i in range(400)
    ]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"params": params[i::3], "lr": 0.1 * i} for i in range(3)]
    opt = OPTIMIZERS[optimizer].cls(groups, backend=backend)
    opt.track_updates(tracked)
    opt.step()


@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_one_launch_with_cuda(cuda, optimizer, tracked):
    step_of_400_tensors(optimizer, "cuda_on_host", tracked)
    assert cuda.launches == 1


@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_one_launch_with_triton(optimizer, tracked, monkeypatch):
    """Two for AdamProxL2, whose second sweep is a launch of its own."""
    kernels = pytest.importorskip("adamprox.triton_kernels.fused_adam")
    launches = []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return lambda *args, **options: None

    for name in ("update_kernel", "shrink_kernel"):
        monkeypatch.setattr(kernels, name, Counted())
    step_of_400_tensors(optimizer, "triton", tracked)
    assert len(launches) == (2 if optimizer == "AdamProxL2" else 1)
