"""The Triton kernels compiled for GPUs that need not be there: what their assembly shows.

Every operation rounds once, and full aligned tiles move 128 bits at a time.
"""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any

import pytest

import sass
from adamprox import _C

pytest.importorskip("triton")

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
NVIDIA = [target for target in TARGETS if target.startswith("sm")]

# As dispatch.h numbers them, with their sizes.
DTYPES = {"f32": (0, 4), "f64": (1, 8), "bf16": (2, 2)}
STORAGE = [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32"), ("f64", "f64")]
# Of the blocks that are shrunk: 0 of the only one, 1 and more of several, 13 of more than a tile.
SIZES = (0, 1, 7, 11, 13)
DIVISIONS = {"ProxSqL2Metric": 2, "ProxL1Metric": 3}  # of an element; of other rules 1
RULES = [name for name, _, _ in _C.rules]  # as decay.h numbers them
MOMENTS = [needs is None for _, type, needs in _C.states if type == "moment"]  # without options
ELEMENTS_PER_THREAD = _C.layout["tile_size"] // 256


def variant(param: str, state: str, rule: str) -> int:
    """As triton_kernels/table.py has it, without options."""
    bits = sum(there << i for i, there in enumerate(MOMENTS))
    return DTYPES[param][0] | DTYPES[state][0] << 8 | RULES.index(rule) << 16 | bits << 24


def compile_kernel(
    target: str,
    kernel: str,
    options: dict[str, object],
    storage: list[tuple[str, str]],
    tracked: bool,
) -> dict[str, Any]:
    """The texts that Triton makes on its way, and the binary, for all of storage in one kernel.

    It is the update's for one rule, or for "every rule", or "prepare", "slot" or "shrink".
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from adamprox.triton_kernels import fused_adam, update

    backend, arch, warp_size = TARGETS[target]
    update.HIP = tl.constexpr(backend == "hip")
    constants: dict[str, object] = {}
    if kernel == "slot":
        function = fused_adam.slot_kernel
        signature = {"metadata": "*i64", "sums": "*fp64", "num_rows": "i32", "num_chunks": "i32"}
    elif kernel == "prepare":
        function = fused_adam.prepare_kernel
        signature = {"payload": "*i64", "prepared": "*i64", "num_rows": "i32", "num_recipes": "i32"}
    else:
        signature = {"metadata": "*i64", "payload": "*i64", "sums": "*fp64", "records": "*i64"}
        signature["num_rows"] = "i32"
        constants["prepared"] = None
        if not tracked:
            constants["records"] = None
        if kernel == "shrink":
            function = fused_adam.shrink_kernel
            signature |= {"num_chunks": "i32", "first_chunk": "i32"}
            constants["VARIANTS"] = tuple(
                sorted({DTYPES[param][0] | size << 8 for param, _ in storage for size in SIZES})
            )
        else:
            function = fused_adam.update_kernel
            rules = RULES if kernel == "every rule" else [kernel]
            if "ProxL2" not in rules:
                constants["sums"] = None
            constants["VARIANTS"] = tuple(variant(*d, rule) for d in storage for rule in rules)
    compiled = triton.compile(
        triton.compiler.ASTSource(
            function,
            {**signature, **dict.fromkeys(constants, "constexpr")},
            {(function.arg_names.index(name),): value for name, value in constants.items()},
        ),
        target=GPUTarget(backend, arch, warp_size),
        options={**fused_adam.OPTIONS, "num_warps": 256 // warp_size, **options},
    )
    return dict(compiled.asm)


@pytest.fixture(scope="module")
def compiled():
    """compile_kernel in a process without Triton's interpreter, which this one may have."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            pool.submit(int).result()  # it starts here

        @cache
        def call(
            target: str,
            kernel: str,
            fusion: bool | None = None,
            only: tuple[str, str] | None = None,
            tracked: bool = False,
        ) -> dict[str, Any]:
            options = {} if fusion is None else {"enable_fp_fusion": fusion}
            storage = STORAGE if only is None else [only]
            return pool.submit(compile_kernel, target, kernel, options, storage, tracked).result()

        yield call


def instructions(text: str) -> Counter[str]:
    return Counter(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\w*(?:\.\w+)*)\s", text, re.MULTILINE))


def count(found: Counter[str], pattern: str) -> int:
    return sum(n for name, n in found.items() if re.fullmatch(pattern, name))


def contractions(ptx: Counter[str]) -> list[str]:
    # Without .rn, an addition or a multiplication is ptxas's to contract.
    loose = r"(fma|mad)\..*f\d+(x2)?|(add|sub|mul)\.(ftz\.)?b?f\d+(x2)?"
    return [name for name in ptx if re.fullmatch(loose, name)]


def vectors(kernel: str) -> tuple[int, int]:
    """How many 128-bit loads and stores a thread makes for a tile of each of STORAGE."""
    loads = stores = 0
    if kernel == "shrink":
        loads = stores = len(SIZES) * sum({DTYPES[param][1] for param, _ in STORAGE})
    else:
        for param, state in STORAGE:
            param_bytes, state_bytes = DTYPES[param][1], DTYPES[state][1]
            loads += 2 * param_bytes + 2 * state_bytes
            stores += param_bytes + 2 * state_bytes
    return loads * ELEMENTS_PER_THREAD // 16, stores * ELEMENTS_PER_THREAD // 16


@pytest.mark.parametrize("kernel", ["Decoupled", "ProxL2", "shrink"])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_is_tracked_compiles(compiled, target, kernel):
    asm = compiled(target, kernel, tracked=True)
    if "ptx" in asm:
        ptx = instructions(asm["ptx"])
        assert contractions(ptx) == []
        assert count(ptx, r"atom\.shared\..*|red\.shared\..*") > 0


# What differs by rule is arithmetic, and that does not differ by target.
PTX = [
    (target, kernel)
    for target in NVIDIA
    for kernel in (*RULES, "shrink")
    if target == "sm_90" or kernel in ("ProxL2", "ProxL1Metric", "shrink")
]


@pytest.mark.parametrize(("target", "kernel"), PTX)
def test_ptx(compiled, target, kernel):
    ptx = instructions(compiled(target, kernel)["ptx"])
    assert contractions(ptx) == []
    assert [name for name in ptx if re.search(r"ftz|approx|full", name)] == []
    elements = 2 * ELEMENTS_PER_THREAD  # on the unmasked path and on the masked one
    f32, f64 = (count(ptx, rf"div\.rn\.{dtype}") for dtype in ("f32", "f64"))
    roots = [count(ptx, rf"sqrt\.rn\.{dtype}") for dtype in ("f32", "f64")]
    if kernel == "shrink":  # of a sum of squares, and of a block's size
        assert f32 == roots[0] == 0
        assert roots[1] == 2 * f64 > 0
    else:
        divisions = DIVISIONS.get(kernel, 1)
        assert (f32, f64) == (3 * elements * divisions, elements * divisions)
        assert roots == [3 * elements, elements]
    assert count(ptx, r"cvt\.rn\.bf16(x2)?\.f32") > 0
    loads, stores = vectors(kernel)
    assert count(ptx, r"ld\.global\.(v4\.b32|v2\.b64)") == loads
    assert count(ptx, r"st\.global\.(v4\.b32|v2\.b64)") == stores


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_rules_share_a_kernel(compiled, target):
    asm = compiled(target, "every rule", only=("f32", "f32"))
    pattern = r"v_div_fixup_f32" if target == "gfx942" else r"div\.rn\.f32"
    divisions = count(instructions(asm["amdgcn" if target == "gfx942" else "ptx"]), pattern)
    of_an_element = sum(DIVISIONS.get(rule, 1) for rule in RULES)
    assert divisions == of_an_element * 2 * ELEMENTS_PER_THREAD


@pytest.mark.parametrize("target", NVIDIA)
def test_ptx_of_recipes(compiled, target):
    ptx = instructions(compiled(target, "prepare")["ptx"])
    assert contractions(ptx) == []
    # step_size, lr / initial_lr, s / (1 + s) and l2's, 1 / loss scale, both ends of bounds
    assert count(ptx, r"div\.rn\.f64") == 7


@pytest.mark.parametrize("target", TARGETS)
def test_sums_of_tensors_that_are_one_block_compile(compiled, target):
    asm = compiled(target, "slot")
    assert contractions(instructions(asm.get("ptx", ""))) == []
    assert re.search(r"add\.(rn\.)?f64|v_add_f64", asm.get("ptx", asm.get("amdgcn")))


def test_contraction_would_show(compiled):
    assert contractions(instructions(compiled("sm_90", "shrink", True)["ptx"])) != []


@pytest.mark.parametrize("only", STORAGE[:3], ids="-".join)
@pytest.mark.parametrize("kernel", ["Decoupled", "ProxL2"])
def test_the_budget_of_the_machine_code(compiled, kernel, only, tmp_path):
    """A loop over full tiles whose loads are all under way at once; 2 blocks a multiprocessor."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled("sm_90", kernel, only=only)["cubin"])
    (loop,) = sass.vector_loops(sass.cuobjdump(binary, "--dump-sass"))
    param_bytes, state_bytes = (DTYPES[dtype][1] for dtype in only)
    loads = 2 * (param_bytes + state_bytes) * ELEMENTS_PER_THREAD // 16
    assert loop.vectors[0] == loop.loads_in_flight == loads
    assert loop.others == []
    usage = sass.cuobjdump(binary, "--dump-resource-usage")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    assert registers <= 128
    assert stack == 0


@pytest.mark.parametrize("kernel", [*RULES, "shrink"])
def test_amdgcn(compiled, kernel):
    texts = compiled("gfx942", kernel)
    flags = r"= f(?:add|sub|mul|div|neg) (?:fast|contract|afn|arcp|reassoc|nnan|ninf|nsz)"
    assert re.findall(flags, texts["llir"]) == []
    gcn = instructions(texts["amdgcn"])
    # Divisions and roots are built from FMAs: that many, and no more, by the LLVM of Triton 3.7,
    # which constraints.txt names (3.6: 10 for both in float32).
    for in_division, in_root, dtype in ((5, 2, "f32"), (5, 7, "f64")):
        divisions = count(gcn, rf"v_div_fixup_{dtype}")
        roots = count(gcn, rf"v_(sqrt|rsq)_{dtype}.*")
        scalar = count(gcn, rf"v_(fma|fmac|mad|mac)_{dtype}.*")
        packed = count(gcn, rf"v_pk_fma_{dtype}.*")
        assert scalar + 2 * packed == in_division * divisions + in_root * roots
    loads, stores = vectors(kernel)
    assert count(gcn, r"buffer_load_dwordx4") == loads
    assert count(gcn, r"buffer_store_dwordx4") == stores
