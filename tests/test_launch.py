"""A step is one launch for all elementwise rules and one for all blocks.

The blocks of CUDA may run in any order, any number of them at a time.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch

from adamprox import _C, backends
from adamprox.reference import CHUNK_SIZE, TILE_SIZE
from registry import OPTIMIZERS, OPTIONS, Option
from test_parity import check, randn
from test_telemetry import check as check_stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cuda_on_host import CudaOnHostBackend

DECAYS = list(dict.fromkeys(decay for _, decay, _ in _C.rules))
RULES = Option(groups=tuple({"decay": decay} for decay in DECAYS))  # a group each
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
    for seed in range(0, 10, 2):
        cuda.seed = seed
        steps_of_l2(cuda)
    assert cuda.sleeps > 0


BLOCKS = Option(
    groups=(
        {"block": "row", "weight_decay": 300.0},
        {"block": "group", "weight_decay": 3000.0},
        {"block": 2, "block_scaling": "sqrt"},
        {"block": "group", "block_scaling": "sqrt"},
        {"decay": "decoupled", "weight_decay": 0.5},
    )
)
# Rows of several chunks, of one, and many in one.
SHAPES_OF_ROWS = ((3, CHUNK_SIZE + 7), (2, 2 * CHUNK_SIZE), (25, 770), (9, 5), (CHUNK_SIZE + 1,))


@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
def test_rows_and_groups_wait_in_any_order_and_share_a_launch(cuda, tracked):
    cuda.blocks = cuda.resident = 4
    for seed in range(0, 6, 2):
        cuda.seed = seed
        generator = torch.Generator().manual_seed(seed)
        shapes = [shape for shape in SHAPES_OF_ROWS for _ in BLOCKS.groups]
        values = [randn(generator, shape, torch.float32) for shape in shapes]
        compare = check_stats if tracked else check
        compare("cuda_on_host", "AdamProxL2", values, steps=2, option=BLOCKS)
    assert cuda.sleeps > 0
    assert cuda.launches == ["update", "blocks"] * 6


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
    assert cuda.sleeps > 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_tensors_are_packed(cuda, optimizer, dtype):
    """Three packs, the last one not full, behind what is worth a block."""
    cuda.blocks = cuda.resident = 2
    generator = torch.Generator().manual_seed(7)
    sizes = (*range(1, 10), CHUNK_SIZE + 1, *range(120, 130), 1023, 1024, 1025)
    values = [randn(generator, (size,), dtype) for size in sizes]
    check("cuda_on_host", optimizer, values, steps=2, option=OPTIONS["groups"])


@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
def test_both_launches_take_tickets_in_turn(cuda, tracked):
    """Every rule has tensors of several chunks, of one, and tiny ones."""
    cuda.blocks = cuda.resident = 4
    generator = torch.Generator().manual_seed(8)
    sizes = [2 * CHUNK_SIZE + 3] * len(DECAYS) + [2000] * len(DECAYS) + [5] * (20 * len(DECAYS))
    values = [randn(generator, (size,), torch.float32) for size in sizes]
    if tracked:
        check_stats("cuda_on_host", "AdamW", values, steps=3, option=RULES)
    else:
        check("cuda_on_host", "AdamW", values, steps=3, option=RULES)
    assert cuda.launches == ["update", "blocks"] * 3


def step_of_400_tensors(
    optimizer: str, backend: str, tracked: bool = False, decays: Sequence[str] = (), **options: bool
) -> None:
    """In 3 groups or one for each of ``decays``, and 2 dtypes."""
    params = [
        torch.nn.Parameter(torch.ones(1 + i % 5, dtype=(torch.float32, torch.bfloat16)[i % 2]))
        for i in range(400)
    ]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"decay": decay} for decay in decays] or [{"lr": 0.1 * i} for i in range(3)]
    groups = [{"params": params[i :: len(groups)], **group} for i, group in enumerate(groups)]
    opt = OPTIMIZERS[optimizer].cls(groups, backend=backend, **options)
    opt.track_updates(tracked)
    opt.step()


@pytest.fixture
def triton_launches(monkeypatch):
    """The launches with Triton, as (kernel, number of programs); none of them takes place."""
    kernels = pytest.importorskip("adamprox.triton_kernels.fused_adam")
    launches = []

    class Counted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            launches.append((self.name, *grid))
            return lambda *args, **options: None

    for name in ("prepare", "update", "slot", "shrink"):
        monkeypatch.setattr(kernels, f"{name}_kernel", Counted(name))
    return launches


def test_triton_compiles_all_kernels_before_one_is_launched(triton_launches, monkeypatch):
    """As on a GPU, where a compilation may fail; each kernel once for what it is called with."""
    kernels = sys.modules["adamprox.triton_kernels.fused_adam"]
    monkeypatch.setattr(kernels, "INTERPRETED", type(kernels.INTERPRETED)(False))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    compiled, loaded = [], []

    class Loaded:
        def __getitem__(self, grid):
            loaded.append(grid)

    def warmup(self, *args, grid, **options):
        if self.name == "shrink":
            assert triton_launches == []
            if broken:
                raise MemoryError("no place for a kernel")
        compiled.append(self.name)
        return Loaded()

    for name in ("prepare", "update", "slot", "shrink"):
        kernel = getattr(kernels, f"{name}_kernel")
        monkeypatch.setattr(type(kernel), "warmup", warmup, raising=False)
        kernel.__name__ = f"{name} of this test"
    broken = True
    with pytest.raises(MemoryError):
        step_of_400_tensors("AdamProxL2", "triton")
    assert (compiled, triton_launches) == (["update"], [])
    broken = False
    for times in (1, 2):
        triton_launches.clear()
        step_of_400_tensors("AdamProxL2", "triton")
        assert compiled == ["update", "shrink"]
        assert loaded == [(400, 1, 1)] * 2
        assert len(triton_launches) == 2, times


@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_one_launch_with_cuda(cuda, optimizer, tracked):
    step_of_400_tensors(optimizer, "cuda_on_host", tracked)
    assert cuda.launches == ["blocks" if optimizer == "AdamProxL2" else "update"]


@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_one_launch_with_triton(triton_launches, optimizer, tracked):
    """Two for AdamProxL2, whose second sweep is a launch of its own."""
    step_of_400_tensors(optimizer, "triton", tracked)
    second = [("shrink", 400)] if optimizer == "AdamProxL2" else []
    assert triton_launches == [("update", 400), *second]


@pytest.mark.parametrize("capturable", [False, True])
def test_rules_share_launches_with_cuda(cuda, capturable):
    step_of_400_tensors("AdamW", "cuda_on_host", decays=DECAYS, capturable=capturable)
    assert cuda.launches == ["prepare"] * capturable + ["update", "blocks"]


@pytest.mark.parametrize("capturable", [False, True])
def test_rules_share_launches_with_triton(triton_launches, capturable):
    step_of_400_tensors("AdamW", "triton", decays=DECAYS, capturable=capturable)
    of_blocks = len(range(DECAYS.index("prox_l2"), 400, len(DECAYS)))
    launches = [("update", 400), ("shrink", of_blocks)]
    assert triton_launches == [("prepare", 2)] * capturable + launches


def test_all_kinds_of_blocks_share_launches_with_triton(triton_launches):
    """And one more adds up the sums of the tensors of a group."""
    params = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(10)]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"params": params[i::5], **group} for i, group in enumerate(BLOCKS.groups)]
    OPTIMIZERS["AdamProxL2"].cls(groups, backend="triton").step()
    assert triton_launches == [("update", 10), ("slot", 10), ("shrink", 8)]


@pytest.mark.parametrize("backend", ["triton", "cuda_on_host"], indirect=True)
def test_steps_of_empty_tensors_are_counted(backend):
    """There is nothing to update, as on a rank of empty shards; the counts are on the device."""
    param = torch.nn.Parameter(torch.ones(0, 3))
    opt = OPTIMIZERS["AdamW"].cls([param], capturable=True, backend=backend)
    for step in range(3):
        param.grad = torch.ones_like(param)
        opt.step()
        assert opt.state[param]["step"] == step + 1
