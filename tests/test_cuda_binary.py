"""What the installed extension's machine code and PTX show: contract, accesses, registers."""

import functools
import re
import subprocess
from pathlib import Path

import pytest
import triton

from adamprox import _C

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS = 128  # 2 blocks of 256 threads a multiprocessor of 65,536 registers
RULES = ("Coupled", "Decoupled", "ProxSqL2", "ProxL1", "ProxL2")
ARCHITECTURES = [a.removesuffix("-real") for a in _C.cuda_architectures.split()]

# Whoever builds without nvcc has no CUDA binary to look at; CI builds with ADAMPROX_CUDA=ON.
pytestmark = pytest.mark.skipif(not ARCHITECTURES, reason="built without CUDA")


@functools.cache
def cuobjdump(*arguments: str) -> str:
    command = [TOOLS / "cuobjdump", *arguments, _C.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def functions(text: str, header: str) -> dict[str, str]:
    """The text of each kernel, by its mangled name."""
    parts = re.split(header, text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def kernels(text: str, header: str) -> dict[str, str]:
    found = functions(text, header)
    updates = {
        rule: next(
            body for name, body in found.items() if f"update_kernelINS_{len(rule)}{rule}" in name
        )
        for rule in RULES
    }
    shrink = next(body for name, body in found.items() if "shrink_kernel" in name)
    return {**updates, "shrink": shrink}


@functools.cache
def ptx() -> dict[str, str]:
    return kernels(cuobjdump("--dump-ptx"), r"\.entry (\w+)")


@functools.cache
def sass(architecture: str) -> dict[str, str]:
    dump = cuobjdump("--dump-sass", "--gpu-architecture", f"sm_{architecture}")
    return kernels(dump, r"Function : (\w+)")


@pytest.mark.parametrize("rule", RULES)
def test_ptx_rounds_every_operation_once(rule: str) -> None:
    assert not re.findall(r"\b(?:fma|mad)\.(?:rn|rz|sat|ftz)\S*", ptx()[rule])
    assert not re.findall(r"\S+\.(?:approx|full|ftz)\S*", ptx()[rule])
    for operation in ("div", "sqrt"):
        for dtype in ("f32", "f64"):
            assert f"{operation}.rn.{dtype}" in ptx()[rule]


def test_the_shrink_sweep_rounds_every_operation_once() -> None:
    assert not re.findall(r"\b(?:fma|mad)\.(?:rn|rz|sat|ftz)\S*", ptx()["shrink"])
    assert not re.findall(r"\S+\.(?:approx|full|ftz)\S*", ptx()["shrink"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", [*RULES, "shrink"])
def test_full_tiles_move_by_128_bits(kernel: str, architecture: str) -> None:
    code = sass(architecture)[kernel]
    # At least a vector of every tensor that is read or written, in each combination of dtypes.
    combinations, read, written = (4, 1, 1) if kernel == "shrink" else (6, 5, 4)
    assert len(re.findall(r"\bLDG\.E\.128\b", code)) >= combinations * read
    assert len(re.findall(r"\bSTG\.E\.128\b", code)) >= combinations * written


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", [*RULES, "shrink"])
def test_nothing_spills(kernel: str, architecture: str) -> None:
    assert not re.findall(r"\b(?:LDL|STL)\b\S*", sass(architecture)[kernel])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_are_within_the_budget(architecture: str) -> None:
    usage = cuobjdump("--dump-resource-usage", "--gpu-architecture", f"sm_{architecture}")
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage)
    assert len(found) == len(RULES) + 1
    assert {
        name: int(registers) for name, registers, _ in found if int(registers) > REGISTERS
    } == {}
    assert {name: int(stack) for name, _, stack in found if int(stack) > 0} == {}


def test_the_binary_serves_old_and_later_gpus() -> None:
    listed = cuobjdump("--list-elf")
    for architecture in ARCHITECTURES:
        assert f"sm_{architecture}.cubin" in listed
    assert f"sm_{ARCHITECTURES[-1]}.ptx" in cuobjdump("--list-ptx")
