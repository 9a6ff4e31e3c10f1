"""The CUDA kernels as a backend on CPU tensors: compiled by g++ through a small shim."""

import ctypes
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamprox import _C

_HERE = Path(__file__).parent
_CSRC = _HERE.parents[1] / "csrc"


class _Step(ctypes.Structure):
    """As in cuda_on_host.cpp."""

    _fields_ = (
        ("metadata", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_chunks", ctypes.c_int64),
        ("num_packed", ctypes.c_int64),
        ("num_of_blocks", ctypes.c_int64),
        ("num_slots", ctypes.c_int64),
        ("num_recipes", ctypes.c_int64),
        ("payload", ctypes.c_char_p),
        ("payload_bytes", ctypes.c_int64),
        ("prepared", ctypes.c_void_p),
        ("records", ctypes.c_void_p),
        ("blocks", ctypes.c_uint),
        ("resident", ctypes.c_uint),
        ("seed", ctypes.c_uint),
        ("prepare_launches", ctypes.c_int),
        ("update_launches", ctypes.c_int),
        ("block_launches", ctypes.c_int),
        ("sleeps", ctypes.c_int),
    )


class CudaOnHostBackend:
    """Runs the device code of csrc/cuda/kernel.cuh, and lists its launches by kernel.

    ``blocks`` in the random order of ``seed``, of which ``resident`` at a time; ``sleeps`` counts
    how often one had to wait for another.
    """

    follows_recipes = True
    at_once = False

    def __init__(self, library: Path) -> None:
        self._step = ctypes.CDLL(str(library)).step
        self._step.restype = ctypes.c_char_p
        self.reset()

    def reset(self) -> None:
        """One block after another, so that each step takes the least time."""
        self.blocks, self.resident, self.seed = 3, 1, 0
        self.launches: list[str] = []
        self.sleeps = 0

    def why_not(self, device_type: str | None = None, index: int | None = None) -> str | None:
        return None if device_type in (None, "cpu") else "it runs on cpu tensors"

    def step(self, table: _C.Table, groups: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        if table.uploaded is None or not table.metadata_is_uploaded:
            table.uploaded = torch.frombuffer(bytearray(table.metadata()), dtype=torch.uint8)
            table.note_upload()
        metadata = table.uploaded
        payload = table.payload()
        prepared = torch.empty(table.prepared_size, dtype=torch.uint8)
        step = _Step(
            metadata=metadata.data_ptr(),
            num_rows=table.num_rows,
            num_chunks=table.num_chunks,
            num_packed=table.num_packed,
            num_of_blocks=table.num_of_blocks,
            num_slots=table.num_slots,
            num_recipes=table.num_scalars if table.has_recipes else 0,
            payload=payload,
            payload_bytes=len(payload),
            prepared=prepared.data_ptr() if table.has_recipes else None,
            records=None if table.records is None else table.records.data_ptr(),
            blocks=self.blocks,
            resident=self.resident,
            seed=self.seed,
        )
        yield
        self._last = step, metadata, payload, prepared, table.records
        self._launch(step)
        self.launches += ["prepare"] * step.prepare_launches
        self.launches += ["update"] * step.update_launches + ["blocks"] * step.block_launches
        self.sleeps += step.sleeps
        self.seed += 1
        chunks = table.num_chunks * _C.layout["chunk"]
        work = metadata[8 * (table.num_rows * _C.layout["row"] + chunks) :]
        places = table.num_chunks + table.num_slots
        assert _counts(work, places).count_nonzero() == 0, "not ready for the next launch"

    def _launch(self, step: _Step) -> None:
        if error := self._step(ctypes.byref(step)):
            raise RuntimeError(error.decode())

    def replay(self) -> None:
        """The launches of the last step again, with the same arguments: as a CUDA graph does it."""
        self._launch(self._last[0])


def _counts(work: Tensor, num_places: int) -> Tensor:
    """What counts in a Workspace: its ticket; Progress::done and ready, if there are any."""
    words = work.view(torch.int32)
    progress = words[2 + 2 * num_places :]
    return torch.cat([words[:2], progress[::4], progress[1::4]])


def build(directory: Path) -> CudaOnHostBackend:
    """Compiles the kernels for the host and loads them."""
    library = directory / "cuda_on_host.so"
    subprocess.run(
        [
            os.environ.get("CXX", "g++"),
            *("-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-shared", "-fPIC"),
            f"-I{_CSRC}",
            str(_HERE / "cuda_on_host.cpp"),
            *("-o", str(library), "-pthread"),
        ],
        check=True,
    )
    return CudaOnHostBackend(library)
