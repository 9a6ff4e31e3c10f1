"""What the installed extension's machine code and PTX show: contract, accesses, the budget."""

from __future__ import annotations

import functools
import re
from collections import Counter

import pytest

import sass
from adamprox import _C

# By kernel, a template of whether it is for blocks: how many rules its loops are for.
KERNELS = {"elementwise": len(_C.rules) - 1, "blocks": 1}
# In CMake's words: "90-real" is machine code, "90-virtual" PTX, "90" both.
BUILT = _C.cuda_architectures.split()
ARCHITECTURES = [name.removesuffix("-real") for name in BUILT if not name.endswith("-virtual")]
PTX = [name.removesuffix("-virtual") for name in BUILT if not name.endswith("-real")]

# The budget: 2 blocks of 256 threads a multiprocessor, whose 65,536 registers are given out to
# warps in units of 256. Blocks have 4 KB of sums in shared memory; CUDA takes 1 KB a block.
THREADS, BLOCKS = 256, 2
REGISTERS_PER_MULTIPROCESSOR = 65_536
SHARED_KB_PER_MULTIPROCESSOR = {"75": 64, "80": 164, "90": 228, "100": 228, "120": 100}

# By (param, state): the loads (of param, grad and states) and stores (of all but the grad) of 128
# bits of a vector, amsgrad's state included, and those loads that depend on a condition, amsgrad's.
VECTORS = {
    ("float32", "float32"): (5, 4, 1),
    ("float64", "float64"): (5, 4, 1),
    ("bfloat16", "bfloat16"): (5, 4, 1),
    ("bfloat16", "float32"): (8, 7, 2),
    ("float16", "float16"): (5, 4, 1),
    ("float16", "float32"): (8, 7, 2),
}


# The loops of the moving average, once a kernel: param and ema are loaded, ema is stored. A 16-bit
# param has a float32 ema.
AVERAGES = Counter({(2, 1, 0): 2, (3, 2, 0): 2})


def in_a_round(kernel: str, loads: int, stores: int, conditional: int) -> tuple[int, int, int]:
    """Blocks take two vectors of few loads at a time; the others load the next one ahead."""
    vectors = 2 if kernel == "blocks" and loads == 5 else 1
    return vectors * loads, vectors * stores, vectors * conditional


# A build without nvcc has no CUDA binary to look at; CI builds with ADAMPROX_CUDA=ON.
pytestmark = pytest.mark.skipif(not ARCHITECTURES, reason="built without CUDA")
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@functools.cache
def cuobjdump(*arguments: str) -> str:
    return sass.cuobjdump(_C.__file__, *arguments)


@functools.cache
def code(architecture: str) -> dict[str, str]:
    """The machine code of each kernel that updates; there is no other one but that of recipes."""
    dump = cuobjdump("--dump-sass", "--gpu-architecture", f"sm_{architecture}")
    names_and_bodies = re.split(r"Function : (\w+)", dump)[1:]
    found = {}
    for name, body in zip(names_and_bodies[::2], names_and_bodies[1::2], strict=True):
        for_blocks = re.search(r"update_kernelILb([01])E", name)
        key = ("elementwise", "blocks")[int(for_blocks[1])] if for_blocks else name
        assert key not in found
        found[key] = body
    (prepare,) = found.keys() - KERNELS.keys()
    assert "prepare_kernel" in prepare
    return found


@functools.cache
def vector_loops(architecture: str, kernel: str) -> list[sass.Loop]:
    return sass.vector_loops(code(architecture)[kernel])


def test_ptx_rounds_every_operation_once():
    ptx = cuobjdump("--dump-ptx")
    assert not re.findall(r"\b(?:fma|mad)\.(?:rn|rz|sat|ftz)\S*", ptx)
    assert not re.findall(r"\S+\.(?:approx|full|ftz)\S*", ptx)
    for operation in ("div", "sqrt"):
        for dtype in ("f32", "f64"):
            assert f"{operation}.rn.{dtype}" in ptx


@every_architecture
@every_kernel
def test_tiles_move_by_128_bits_only(kernel, architecture):
    """And only amsgrad's loads can be left out: a step without it reads four streams, and none of
    these depends on a condition."""
    loops = vector_loops(architecture, kernel)
    assert [loop.others for loop in loops if loop.others] == []
    found = [(*loop.vectors, loop.conditional_loads) for loop in loops]
    updates = [accesses for accesses in found if accesses[0] != accesses[1]]
    of_a_rule = Counter(in_a_round(kernel, *vector) for vector in VECTORS.values())
    of_rules = Counter({v: KERNELS[kernel] * n for v, n in of_a_rule.items()})
    assert Counter(updates) == of_rules + AVERAGES
    assert set(found) - set(updates) == ({(4, 4, 0)} if kernel == "blocks" else set())


@every_architecture
@every_kernel
def test_a_loops_loads_are_all_under_way_before_the_first_is_needed(kernel, architecture):
    for loop in vector_loops(architecture, kernel):
        assert loop.loads_in_flight == loop.vectors[0]


@every_architecture
@every_kernel
def test_nothing_spills(kernel, architecture):
    assert not re.findall(r"\b(?:LDL|STL)\b\S*", code(architecture)[kernel])


def blocks_per_multiprocessor(registers: int, shared: int, architecture: str) -> int:
    of_a_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS_PER_MULTIPROCESSOR // of_a_warp * 32 // THREADS
    reserved = 1024 if architecture == "80" else 0  # sm_75 has none, and later ones' is counted
    capacity = SHARED_KB_PER_MULTIPROCESSOR[architecture] * 1024
    return min(by_registers, capacity // (shared + reserved))


@every_architecture
def test_the_budget_holds(architecture):
    usage = cuobjdump("--dump-resource-usage", "--gpu-architecture", f"sm_{architecture}")
    pattern = r"Function \w+update_kernel\w+:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found = [tuple(map(int, usage)) for usage in re.findall(pattern, usage)]
    assert len(found) == len(KERNELS)
    for registers, stack, shared, local in found:
        assert stack == local == 0
        assert blocks_per_multiprocessor(registers, shared, architecture) >= BLOCKS


def test_the_binary_serves_old_and_later_gpus():
    listed = cuobjdump("--list-elf")
    for architecture in ARCHITECTURES:
        assert f"sm_{architecture}.cubin" in listed
    listed = cuobjdump("--list-ptx")
    assert PTX
    for architecture in PTX:
        assert f"sm_{architecture}.ptx" in listed
