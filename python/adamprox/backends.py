"""What can run a step: the registry of backends and the choice among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _C, reference


class Backend(Protocol):
    """Runs one step over every row of a table; all tensors of a table are on one device."""

    def why_not(self, device_type: str | None = None) -> str | None:
        """Why it cannot run (on that type of device), or None if it can."""

    def step(self, table: _C.Table, decay: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """One step; ``groups`` are the optimizer's param groups, which the rows refer to."""


class ReferenceBackend:
    """Eager PyTorch, on any device: the specification of the others."""

    def why_not(self, device_type: str | None = None) -> str | None:
        return None

    def step(self, table: _C.Table, decay: str, groups: Sequence[Mapping[str, Any]]) -> None:
        for *tensors, group, step in table.rows():
            reference.step(decay, *tensors, reference.step_scalars(decay, groups[group], step))


class CpuBackend:
    """C++, vectorised, on ``torch.get_num_threads()`` threads."""

    def why_not(self, device_type: str | None = None) -> str | None:
        return _only_on("cpu", device_type)

    def step(self, table: _C.Table, decay: str, groups: Sequence[Mapping[str, Any]]) -> None:
        table.step_cpu(torch.get_num_threads())


class TritonBackend:
    """Triton's kernels on a GPU, or in its interpreter on CPU tensors; imported when asked for."""

    def why_not(self, device_type: str | None = None) -> str | None:
        try:
            from .triton_kernels.update import INTERPRETED  # type: ignore[import-not-found]
        except ImportError as error:  # also of numpy, which the interpreter needs
            return f"Triton cannot be imported: {error}"
        if INTERPRETED:
            return _only_on("cpu", device_type, "in Triton's interpreter ")
        if device_type is None and not torch.cuda.is_available():
            return "torch sees no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1)"
        return _only_on("cuda", device_type, "without Triton's interpreter (TRITON_INTERPRET=1) ")

    def step(self, table: _C.Table, decay: str, groups: Sequence[Mapping[str, Any]]) -> None:
        if table.num_chunks == 0:
            return
        device_type, index = table.device
        if device_type == "cpu":
            import numpy as np

            with np.errstate(all="ignore"):  # the interpreter's; a GPU does not warn of infinities
                self._launch(table, decay, 0, _words)
            return
        device = torch.device(device_type, index)

        def upload(data: bytes) -> Tensor:
            # Pinned memory is handed out again only once the copy from it is done.
            return _words(data).pin_memory().to(device, non_blocking=True)

        with torch.cuda.device(device):
            self._launch(table, decay, torch.cuda.current_stream().cuda_stream, upload)

    def _launch(
        self, table: _C.Table, decay: str, stream: int, upload: Callable[[bytes], Tensor]
    ) -> None:
        from .triton_kernels.fused_adam import fused_adam  # type: ignore[import-not-found]

        fused_adam(
            table.metadata(stream, upload),
            upload(table.payload()),
            table.num_rows,
            table.num_chunks,
            decay,
            table.dtypes,
            table.amsgrad,
        )


BACKENDS: dict[str, Backend] = {
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
    name = backend or os.environ.get("ADAMPROX_BACKEND") or None
    if name is None:
        return None
    if name not in BACKENDS:
        raise ValueError(f"Invalid backend: {name!r}, expected one of {', '.join(BACKENDS)}")
    if reason := BACKENDS[name].why_not():
        raise RuntimeError(f"backend={name!r} cannot run: {reason}")
    return name


def select(name: str | None, device_type: str) -> Backend:
    """The backend for tensors on such a device: the one asked for, or else the best that can run.

    Raises:
        RuntimeError: none can; the message says why.
    """
    reasons = []
    for candidate in (name,) if name else _DEFAULTS.get(device_type, ()):
        if candidate not in BACKENDS:
            continue
        reason = BACKENDS[candidate].why_not(device_type)
        if reason is None:
            return BACKENDS[candidate]
        reasons.append(f"backend={candidate!r} cannot run: {reason}")
    raise RuntimeError("; ".join(reasons) or f"no backend runs on {device_type} tensors")


def _only_on(supported: str, device_type: str | None, how: str = "") -> str | None:
    if device_type in (None, supported):
        return None
    return f"{how}it runs on {supported} tensors, and these are on {device_type}"


def _words(data: bytes) -> Tensor:
    # From a bytearray, since torch warns of memory that it must not write to.
    return torch.frombuffer(bytearray(data), dtype=torch.int64)
