"""The CUDA kernels as a backend on CPU tensors: compiled by g++ through a small shim."""

import ctypes
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adamprox import _C, reference

_HERE = Path(__file__).parent
_CSRC = _HERE.parents[1] / "csrc"


class CudaOnHostBackend:
    """Runs the device code of csrc/fused_adam.cuh; counts its launches."""

    def __init__(self, library: Path) -> None:
        self._step = ctypes.CDLL(str(library)).step
        self._step.restype = ctypes.c_char_p
        self.launches = 0

    def why_not(self, device_type: str | None = None) -> str | None:
        return None if device_type in (None, "cpu") else "it runs on cpu tensors"

    def step(self, table: _C.Table, decay: str, groups: Sequence[Mapping[str, Any]]) -> None:
        metadata = table.metadata(lambda b: torch.frombuffer(bytearray(b), dtype=torch.uint8))
        payload = table.payload()
        sums = torch.empty(table.num_chunks, dtype=torch.float64)
        launches = ctypes.c_int(0)
        error = self._step(
            ctypes.c_int(reference.DECAYS.index(decay)),
            ctypes.c_void_p(metadata.data_ptr()),
            ctypes.c_int64(table.num_rows),
            ctypes.c_int64(table.num_chunks),
            payload,
            ctypes.c_int64(len(payload)),
            ctypes.c_void_p(sums.data_ptr()),
            ctypes.byref(launches),
        )
        if error:
            raise RuntimeError(error.decode())
        self.launches += launches.value


def build(directory: Path) -> CudaOnHostBackend:
    """Compiles the kernels for the host and loads them."""
    library = directory / "cuda_on_host.so"
    subprocess.run(
        [
            os.environ.get("CXX", "g++"),
            *("-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-shared", "-fPIC"),
            f"-I{_CSRC}",
            str(_HERE / "cuda_on_host.cpp"),
            *("-o", str(library)),
        ],
        check=True,
    )
    return CudaOnHostBackend(library)
