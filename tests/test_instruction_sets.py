"""Each instruction set that the CPU backend is compiled for gives the same bits."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import test_parity as parity
from adamprox import _C
from registry import CELLS, DTYPES, OPTIONS, assert_same_bits, build

OPTIONS_HERE = ("amsgrad", "blocks", "bounds", "cautious", "elastic_net", "ema", "metric", "rules")


@pytest.fixture(params=_C.cpu_instruction_sets())
def instruction_set(request):
    widest = _C.cpu_instruction_set()
    _C.use_cpu_instruction_set(request.param)
    yield request.param
    _C.use_cpu_instruction_set(widest)


def test_the_widest_one_is_used_until_another_is_wanted():
    assert _C.cpu_instruction_set() == _C.cpu_instruction_sets()[0]
    assert _C.cpu_instruction_sets()[-1] == "baseline"


def test_one_that_does_not_run_here_is_refused():
    before = _C.cpu_instruction_set()
    with pytest.raises(ValueError, match="'AVX-1024' does not run here"):
        _C.use_cpu_instruction_set("AVX-1024")
    assert _C.cpu_instruction_set() == before


@pytest.mark.parametrize(
    ("optimizer", "option"), [(name, option) for name, option in CELLS if option in OPTIONS_HERE]
)
@parity.every_dtype
def test_parity(instruction_set, dtype, optimizer, option):
    if instruction_set == _C.cpu_instruction_sets()[0]:
        pytest.skip("test_parity.py has it")
    assert _C.cpu_instruction_set() == instruction_set
    generator = torch.Generator().manual_seed(1)
    values = [parity.randn(generator, shape, DTYPES[dtype].param) for shape in parity.SHAPES]
    state = DTYPES[dtype].state
    parity.check("cpu", optimizer, values, option=OPTIONS[option], state=state, steps=5)


@parity.every_dtype
@parity.every_optimizer
def test_what_telemetry_notes(instruction_set, dtype, optimizer):
    generator = torch.Generator().manual_seed(2)
    sizes = parity.CHUNK_EDGES
    values = [parity.randn(generator, (size,), DTYPES[dtype].param) for size in sizes]
    pair = [
        build(optimizer, values, OPTIONS["groups"], backend, DTYPES[dtype].state)
        for backend in ("cpu", "reference")
    ]
    found = []
    for opt in pair:
        opt.track_updates()
        for group in opt.param_groups:
            for param in group["params"]:
                param.grad = param.detach().roll(1)
        opt.step()
        found.append([stats.to_dict() for stats in opt.update_stats()])
    assert_same_bits(*pair)
    assert found[0] == found[1]


@pytest.mark.skipif(len(_C.cpu_instruction_sets()) < 2, reason="there is one only")
@pytest.mark.skipif(not shutil.which("nm") or not shutil.which("c++"), reason="no compiler")
def test_an_instruction_set_shares_no_function_with_the_rest(tmp_path):
    """Or the linker could take that one, for processors that do not have it."""
    source = Path(__file__).parents[1] / "csrc/cpu/sweeps.cpp"
    options = "-O3 -std=c++17 -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math -w"
    machine = "-mavx2 -mf16c -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
    name = "-DADAMPROX_X86 -DADAMPROX_SWEEPS=sweeps_avx512"
    compiler = ["c++", *f"{options} {machine} {name}".split(), "-c", source, "-o", "sweeps.o"]
    subprocess.run(compiler, cwd=tmp_path, check=True)
    symbols = subprocess.run(
        ["nm", "--demangle", "sweeps.o"], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    defined = [line.split(maxsplit=2)[1:] for line in symbols.splitlines() if line[0] != " "]
    shared = [symbol for kind, symbol in defined if kind in "TWVuBDR"]
    assert any("sweeps_avx512" in symbol for symbol in shared)
    ours = ("adamprox::sweeps_avx512", "DW.ref.__gxx_personality")
    assert [symbol for symbol in shared if not symbol.startswith(ours)] == []
