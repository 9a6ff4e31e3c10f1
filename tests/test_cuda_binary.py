"""What the installed extension's machine code and PTX show: contract, accesses, the budget."""

from __future__ import annotations

import functools
import re
from collections import Counter

import pytest

import sass
from adamprox import _C

RULES = ("Coupled", "Decoupled", "ProxSqL2", "ProxL1", "ProxL2")
# In CMake's words: "90-real" is machine code, "90-virtual" PTX, "90" both.
BUILT = _C.cuda_architectures.split()
ARCHITECTURES = [name.removesuffix("-real") for name in BUILT if not name.endswith("-virtual")]
PTX = [name.removesuffix("-virtual") for name in BUILT if not name.endswith("-real")]

# The budget: 2 blocks of 256 threads a multiprocessor, whose 65,536 registers are given out to
# warps in units of 256. AdamProxL2 has 4 KB of sums in shared memory; CUDA takes 1 KB a block.
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


def in_a_round(rule: str, loads: int, stores: int, conditional: int) -> tuple[int, int, int]:
    """AdamProxL2 takes two vectors of few loads at a time; the others load the next one ahead."""
    vectors = 2 if rule == "ProxL2" and loads == 5 else 1
    return vectors * loads, vectors * stores, vectors * conditional


# Whoever builds without nvcc has no CUDA binary to look at; CI builds with ADAMPROX_CUDA=ON.
pytestmark = pytest.mark.skipif(not ARCHITECTURES, reason="built without CUDA")
every_rule = pytest.mark.parametrize("rule", RULES)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@functools.cache
def cuobjdump(*arguments: str) -> str:
    return sass.cuobjdump(_C.__file__, *arguments)


PREPARE = "prepare_kernel"  # of recipes: one block, beside the rules' kernels


def kernels(text: str, header: str) -> dict[str, str]:
    """The text of each rule's kernel; there is no other one but the recipes'."""
    names_and_bodies = re.split(header, text)[1:]
    bodies = dict(zip(names_and_bodies[::2], names_and_bodies[1::2], strict=True))
    assert sum(PREPARE in name for name in bodies) == 1
    rules = {
        re.search(r"update_kernelINS_\d+([A-Z]\w*?)EEEv", name)[1]: body
        for name, body in bodies.items()
        if PREPARE not in name
    }
    assert sorted(rules) == sorted(RULES)
    return rules


@functools.cache
def ptx() -> dict[str, str]:
    return kernels(cuobjdump("--dump-ptx"), r"\.entry (\w+)")


@functools.cache
def code(architecture: str) -> dict[str, str]:
    dump = cuobjdump("--dump-sass", "--gpu-architecture", f"sm_{architecture}")
    return kernels(dump, r"Function : (\w+)")


@functools.cache
def vector_loops(architecture: str, rule: str) -> list[sass.Loop]:
    return sass.vector_loops(code(architecture)[rule])


@every_rule
def test_ptx_rounds_every_operation_once(rule):
    assert not re.findall(r"\b(?:fma|mad)\.(?:rn|rz|sat|ftz)\S*", ptx()[rule])
    assert not re.findall(r"\S+\.(?:approx|full|ftz)\S*", ptx()[rule])
    for operation in ("div", "sqrt"):
        for dtype in ("f32", "f64"):
            assert f"{operation}.rn.{dtype}" in ptx()[rule]


@every_architecture
@every_rule
def test_tiles_move_by_128_bits_only(rule, architecture):
    """And only amsgrad's loads can be left out: a step without it reads four streams, and none of
    these depends on a condition."""
    loops = vector_loops(architecture, rule)
    assert [loop.others for loop in loops if loop.others] == []
    found = [(*loop.vectors, loop.conditional_loads) for loop in loops]
    updates = [accesses for accesses in found if accesses[0] != accesses[1]]
    assert Counter(updates) == Counter(in_a_round(rule, *vector) for vector in VECTORS.values())
    assert set(found) - set(updates) == ({(4, 4, 0)} if rule == "ProxL2" else set())


@every_architecture
@every_rule
def test_a_loops_loads_are_all_under_way_before_the_first_is_needed(rule, architecture):
    for loop in vector_loops(architecture, rule):
        assert loop.loads_in_flight == loop.vectors[0]


@every_architecture
@every_rule
def test_nothing_spills(rule, architecture):
    assert not re.findall(r"\b(?:LDL|STL)\b\S*", code(architecture)[rule])


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
    assert len(found) == len(RULES)
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
