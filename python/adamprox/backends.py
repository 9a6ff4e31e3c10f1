"""What can run a step: the registry of backends and the choice among them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _C, reference, telemetry


class Backend(Protocol):
    """Runs one step over every row of a table; all tensors of a table are on one device."""

    follows_recipes: bool
    """Whether it makes scalars where the tensors are; if not, the host reads what they need."""

    def why_not(self, device_type: str | None = None) -> str | None:
        """Why it cannot run (on that type of device), or None if it can."""

    def step(self, table: _C.Table, decay: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """One step; ``groups`` are the optimizer's param groups, which the rows refer to."""


class ReferenceBackend:
    """Eager PyTorch, on any device: the specification of the others."""

    follows_recipes = False

    def why_not(self, device_type: str | None = None) -> str | None:
        return None

    def step(self, table: _C.Table, decay: str, groups: Sequence[Mapping[str, Any]]) -> None:
        for index, row in enumerate(table.rows()):
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, group, step = row
            scalars = reference.step_scalars(decay, groups[group], step, table.loss_scale)
            reference.step(decay, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, scalars)
            if table.records is not None:
                squares = exp_avg_sq if max_exp_avg_sq is None else max_exp_avg_sq
                update = reference.noted_update(exp_avg, squares, scalars)
                of_update = reference.note_update(update, reference.alpha(groups[group]))
                telemetry.write_update(of_update, step, table, index)
                telemetry.write_param(reference.note_param(param), table, index)


class CpuBackend:
    """C++, vectorised, on ``torch.get_num_threads()`` threads."""

    follows_recipes = False

    def why_not(self, device_type: str | None = None) -> str | None:
        return _only_on("cpu", device_type)

    def step(self, table: _C.Table, decay: str, groups: Sequence[Mapping[str, Any]]) -> None:
        table.step_cpu(torch.get_num_threads())


class CudaBackend:
    """CUDA C++ on NVIDIA GPUs: one launch a step, on the current stream."""

    follows_recipes = True

    def why_not(self, device_type: str | None = None) -> str | None:
        if not _C.cuda_architectures:
            return "adamprox was built without CUDA (no nvcc was found, or ADAMPROX_CUDA=OFF)"
        if torch.version.hip is not None:
            return "it is for NVIDIA GPUs; AMD's have backend='triton'"
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        return _only_on("cuda", device_type)

    def step(self, table: _C.Table, decay: str, groups: Sequence[Mapping[str, Any]]) -> None:
        upload = _upload_to(table)
        captures = capturing()
        table.metadata(upload, captures)
        payload = None  # it needs no help, unless it has to stay for a graph's replays
        if captures and not table.payload_is_inline:
            payload = upload(table.payload())
        prepared = torch.empty(
            table.prepared_size, dtype=torch.uint8, device=torch.device(*table.device)
        )
        table.step_cuda(0 if payload is None else payload.data_ptr(), prepared.data_ptr())


class TritonBackend:
    """Triton's kernels on a GPU, or in its interpreter on CPU tensors; imported when asked for."""

    follows_recipes = True

    def why_not(self, device_type: str | None = None) -> str | None:
        try:
            from .triton_kernels.update import INTERPRETED  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:  # also of numpy, which the interpreter needs
            return f"Triton cannot be imported: {error} (pip install 'adamprox[triton]')"
        if INTERPRETED:
            return _only_on("cpu", device_type, "in Triton's interpreter ")
        if not torch.cuda.is_available():
            return "torch sees no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1)"
        return _only_on("cuda", device_type)

    def step(self, table: _C.Table, decay: str, groups: Sequence[Mapping[str, Any]]) -> None:
        if table.num_chunks == 0:
            return
        with _triton_device(table):
            from .triton_kernels.fused_adam import fused_adam  # type: ignore[import-not-found, unused-ignore]

            upload = _upload_to(table)
            fused_adam(
                table.metadata(upload, capturing()),
                upload(table.payload()),
                table.num_rows,
                table.num_scalars if table.has_recipes else 0,
                table.num_chunks,
                decay,
                table.dtypes,
                table.amsgrad,
                table.records,
            )


BACKENDS: dict[str, Backend] = {
    "cuda": CudaBackend(),
    "triton": TritonBackend(),
    "cpu": CpuBackend(),
    "reference": ReferenceBackend(),
}

_DEFAULTS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def requested(backend: str | None) -> str | None:
    """The backend asked for, by argument or by ``ADAMPROX_BACKEND``; None leaves the choice free.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it cannot run here; the message says why.
    """
    source, name = "backend", backend
    if name is None:
        source, name = "ADAMPROX_BACKEND", os.environ.get("ADAMPROX_BACKEND")
        if not name:
            return None
    if name not in BACKENDS:
        raise ValueError(f"Invalid {source}: {name!r}, expected one of {', '.join(BACKENDS)}")
    if reason := BACKENDS[name].why_not():
        raise RuntimeError(f"{source}={name!r} cannot run: {reason}")
    return name


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def follow_recipes(name: str | None) -> tuple[bool, bool]:
    """Whether tensors on a GPU, and those on the CPU, are stepped by one that follows recipes."""
    if name is None:
        return True, False
    return BACKENDS[name].follows_recipes, BACKENDS[name].follows_recipes


def select(name: str | None, device_type: str) -> Backend:
    """The backend for tensors on such a device: the one asked for, or else the best that can run.

    Raises:
        RuntimeError: none can; the message says why.
    """
    reasons = []
    for candidate in (name,) if name else _DEFAULTS.get(device_type, ()):
        reason = BACKENDS[candidate].why_not(device_type)
        if reason is None:
            return BACKENDS[candidate]
        reasons.append(f"backend={candidate!r} cannot run: {reason}")
    raise RuntimeError("; ".join(reasons) or f"no backend runs on {device_type} tensors")


def _only_on(supported: str, device_type: str | None, how: str = "") -> str | None:
    if device_type in (None, supported):
        return None
    return f"{how}it runs on {supported} tensors, and these are on {device_type}"


def _upload_to(table: _C.Table) -> Callable[[bytes], Tensor]:
    """Copies bytes to the table's device on the current stream, without waiting for it."""
    device = torch.device(*table.device)

    def upload(data: bytes) -> Tensor:
        # From a bytearray, since torch warns of memory that it must not write to.
        words = torch.frombuffer(bytearray(data), dtype=torch.int64)
        if device.type == "cpu":
            return words
        # Pinned memory is handed out again only once the copy from it is done.
        pinned = words.pin_memory()
        uploaded = pinned.to(device, non_blocking=True)
        if capturing():  # each replay copies anew
            table.keep((pinned, uploaded))
        return uploaded

    return upload


@contextlib.contextmanager
def _triton_device(table: _C.Table) -> Iterator[None]:
    """The table's device as the current one; in the interpreter, numpy without its warnings."""
    device = torch.device(*table.device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        import numpy as np

        with np.errstate(all="ignore"):  # a GPU does not warn of infinities either
            yield
