"""Both ways of reading torch: by its insides, which are tried at import, and by asking Python.

Run as a program, it imports adamprox under odd circumstances.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
WAY = os.environ.get("ADAMPROX_TORCH_ABI", "fast")


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextlib.contextmanager
def used_memory():
    """Where the next tensors will lie: in turns all bits are set, and none."""
    libc = ctypes.CDLL(None)
    size_t, pointer = ctypes.c_size_t, ctypes.c_void_p
    libc.malloc.argtypes, libc.malloc.restype = [size_t], pointer
    libc.malloc_usable_size.argtypes, libc.malloc_usable_size.restype = [pointer], size_t
    libc.free.argtypes, libc.free.restype = [pointer], None
    size = libc.malloc_usable_size(torch.empty(3)._cdata)
    blocks = [libc.malloc(size) for _ in range(8)]
    for i, block in enumerate(blocks):
        ctypes.memset(block, 0xFF if i % 2 else 0, size)
    for block in blocks:
        libc.free(block)
    yield


CIRCUMSTANCES = {
    "usual": contextlib.nullcontext,
    "used memory": used_memory,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "device meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "in a __torch_function__ mode": torch.overrides.BaseTorchFunctionMode,
    "deterministic": lambda: contextlib.nullcontext(torch.use_deterministic_algorithms(True)),
}


def main() -> None:
    """Prints, of each of them in a process of its own, which way it is then."""
    import torch._dynamo  # once: an optimizer imports it

    assert "adamprox" not in sys.modules
    for name, circumstances in CIRCUMSTANCES.items():
        if os.fork() == 0:
            with circumstances():
                import adamprox
            param = torch.nn.Parameter(torch.ones(3))
            param.grad = torch.ones(3)
            adamprox.AdamW([param], lr=0.25, weight_decay=0.0).step()
            stepped = torch.allclose(param.detach(), torch.full((3,), 0.75))
            print(f"{name}: {adamprox._C.torch_abi}, {stepped}", flush=True)
            os._exit(0)
        assert os.wait()[1] == 0, name


def run(*command: str, **environment: str) -> str:
    """What it prints; an error, if it fails."""
    result = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.both_abis
def test_the_way_is_the_one_asked_for():
    from adamprox import _C

    assert _C.torch_abi == WAY


@pytest.mark.skipif(WAY == "slow", reason="asked for the other one")
def test_the_fast_way_works_wherever_adamprox_is_imported():
    lines = run(str(Path(__file__))).splitlines()
    assert lines == [f"{name}: fast, True" for name in CIRCUMSTANCES]


def test_the_slow_way_gives_the_same_bits_and_errors():
    """All that is marked ``both_abis``."""
    marked = ("-m", "both_abis", "-k", "not triton and not cuda_on_host")
    files = sorted(str(file) for file in TESTS.glob("test_*.py") if "both_abis" in file.read_text())
    printed = run(
        "-m", "pytest", "-q", "-p", "no:xdist", *marked, *files, ADAMPROX_TORCH_ABI="slow"
    )
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None, printed
    assert int(passed[1]) > 700
    assert "skipped" not in printed


if __name__ == "__main__":
    main()
