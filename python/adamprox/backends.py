"""What can run a step: the registry of backends and the choice among them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

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


BACKENDS: dict[str, Backend] = {
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
        reason = BACKENDS[candidate].why_not(device_type)
        if reason is None:
            return BACKENDS[candidate]
        reasons.append(f"backend={candidate!r} cannot run: {reason}")
    raise RuntimeError("; ".join(reasons) or f"no backend runs on {device_type} tensors")


def _only_on(supported: str, device_type: str | None) -> str | None:
    if device_type in (None, supported):
        return None
    return f"it runs on {supported} tensors, and these are on {device_type}"
