"""What can run a step: the registry of backends and the choice among them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, get_num_threads
from torch.cuda import is_initialized

from . import _C, reference, telemetry
from .hyperparameters import FOLLOWERS, RULES
from .tensors import Row


class Backend(Protocol):
    """Runs one step over every row of a table; all tensors of a table are on one device."""

    follows_recipes: bool
    """Whether it makes scalars where the tensors are; if not, the host reads what they need."""
    at_once: bool
    """Whether ``step`` begins the table's step itself, in the call of C++ that runs it.

    The table is begun after all others, and run before them.
    """

    def why_not(self, device_type: str | None = None, index: int | None = None) -> str | None:
        """Why it cannot run (on that device; without an index the current one), or None."""

    def step(self, table: _C.Table, groups: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """One step; ``groups`` are the optimizer's param groups, which the rows refer to.

        It yields once, when all is ready and nothing is written yet.
        """


_RowNotes = tuple[Row, reference.Scalars, float]
"""What telemetry notes of a row: its scalars, and alpha."""


class ReferenceBackend:
    """Eager PyTorch, on any device: the specification of the others."""

    follows_recipes = at_once = False

    def why_not(self, device_type: str | None = None, index: int | None = None) -> str | None:
        return None

    def step(self, table: _C.Table, groups: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        with torch.inference_mode(False):
            writes, notes = self._computed(table, groups)
        yield
        with torch.inference_mode(False):
            reference.write(writes)
            if table.records is not None:
                self._note(table, notes)

    def _computed(
        self, table: _C.Table, groups: Sequence[Mapping[str, Any]]
    ) -> tuple[reference.Writes, list[_RowNotes]]:
        writes: reference.Writes = []
        notes: list[_RowNotes] = []
        for (index, deferred), rows in groupby(table.rows(), lambda r: (r.group, r.deferred)):
            values, members = groups[index], []
            if deferred:  # z first: a soft threshold of zero leaves it, to the bit
                values = {**values, **RULES["prox_l1"], "decay": "prox_l1", "weight_decay": 0.0}
            for row in rows:
                states = {k: s for k, s in row.states.items() if not deferred or k not in FOLLOWERS}
                scalars = reference.step_scalars(values, row.step, table.loss_scale)
                members.append(reference.Member(row.param, row.grad, states, scalars))
                notes.append((row, scalars, reference.alpha(values)))
            writes += reference.step(values, members)
        return writes, notes

    def _note(self, table: _C.Table, notes: Sequence[_RowNotes]) -> None:
        for row, scalars, alpha in notes:
            squares = row.states.get("max_exp_avg_sq", row.states["exp_avg_sq"])
            update = reference.noted_update(row.states["exp_avg"], squares, scalars)
            telemetry.write_update(reference.note_update(update, alpha, row.block), table, row)
            telemetry.write_param(reference.note_param(row.param, row.block), table, row)


class CpuBackend:
    """C++, vectorised, on ``torch.get_num_threads()`` threads."""

    follows_recipes = False
    at_once = True

    def why_not(self, device_type: str | None = None, index: int | None = None) -> str | None:
        return _only_on("cpu", device_type)

    def step(self, table: _C.Table, groups: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        yield
        table.step_cpu(get_num_threads())


_problems: dict[int, str] = {}


def device_problem(index: int | None = None) -> str:
    """Why a GPU (the current one), or its driver, cannot run what was built; empty if it can."""
    if index is None:
        index = torch.cuda.current_device()
    if index in _problems:
        return _problems[index]
    with torch.cuda.device(index):
        problem = _C.cuda_device_problem()
    if "out of memory" not in problem:  # which may pass
        _problems[index] = problem
    return problem


class CudaBackend:
    """CUDA C++ on NVIDIA GPUs, on the current stream.

    One launch for all elementwise rules, one for all blocks, and a small one before if the scalars
    are made there.
    """

    follows_recipes = True
    at_once = False

    def why_not(self, device_type: str | None = None, index: int | None = None) -> str | None:
        if not _C.cuda_architectures:
            return f"adamprox was built without CUDA: {_C.cuda_problem}"
        if torch.version.hip is not None:
            return "it is for NVIDIA GPUs; AMD's have backend='triton'"
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        if reason := _only_on("cuda", device_type):
            return reason
        # A device is asked when there are tensors on one, so that no context is made before.
        problem = device_problem(index) if device_type else ""
        return f"{problem} (built for {_C.cuda_architectures})" if problem else None

    def step(self, table: _C.Table, groups: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        device = torch.device(*table.device)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            metadata = _metadata(table, stream)
            payload = None  # it rides in the kernel's parameters
            if not table.payload_is_inline:
                payload = _upload(table, table.payload())
            prepared = torch.empty(table.prepared_size, dtype=torch.uint8, device=device)
            if capturing():
                table.keep((payload, prepared))
            table.load_cuda()
        yield
        with torch.cuda.device(device):
            table.launch_cuda(
                stream,
                metadata.data_ptr(),
                0 if payload is None else payload.data_ptr(),
                prepared.data_ptr(),
            )


class TritonBackend:
    """Triton's kernels on a GPU, or in its interpreter on CPU tensors; imported when asked for."""

    follows_recipes = True
    at_once = False

    def why_not(self, device_type: str | None = None, index: int | None = None) -> str | None:
        try:
            from .triton_kernels.update import INTERPRETED  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:  # also of numpy, which the interpreter needs
            return f"Triton cannot be imported: {error} (pip install triton)"
        if INTERPRETED:
            return _only_on("cpu", device_type, "in Triton's interpreter ")
        if not torch.cuda.is_available():
            return "torch sees no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1)"
        return _only_on("cuda", device_type)

    def step(self, table: _C.Table, groups: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        with _triton_device(table):
            from .triton_kernels.fused_adam import launches_of, ready  # type: ignore[import-not-found, unused-ignore]

            on_gpu = table.device[0] == "cuda"
            stream = torch.cuda.current_stream().cuda_stream if on_gpu else 0
            metadata, payload = _metadata(table, stream), _upload(table, table.payload())
            launches = launches_of(
                metadata,
                payload,
                table.num_rows,
                table.num_scalars if table.has_recipes else 0,
                table.num_chunks,
                table.num_of_blocks,
                table.num_slots,
                table.variants,
                table.records,
            )
            for launch in launches:
                ready(launch)
        yield
        with _triton_device(table):
            for launch in launches:
                launch.run()


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


_HAS_GPUS = torch.version.cuda is not None or torch.version.hip is not None


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return _HAS_GPUS and is_initialized() and torch.cuda.is_current_stream_capturing()


def recipes_and_threads(name: str | None) -> tuple[bool, bool, int]:
    """What reading a step must know of the backends that may run it.

    Returns:
        Whether tensors on a GPU, and those on the CPU, are stepped by one that follows recipes; and
        how many threads read and run a step in one call if all is on the CPU, or 0 if none may.
    """
    if name is None:
        return True, False, get_num_threads()
    backend = BACKENDS[name]
    recipes = backend.follows_recipes
    return recipes, recipes, get_num_threads() if backend.at_once else 0


def select(name: str | None, device_type: str, index: int | None = None) -> Backend:
    """The backend for tensors on a device: the one asked for, or else the best that can run.

    Raises:
        RuntimeError: none can; the message says why.
    """
    reasons = []
    for candidate in (name,) if name else _DEFAULTS.get(device_type, ()):
        reason = BACKENDS[candidate].why_not(device_type, index)
        if reason is None:
            return BACKENDS[candidate]
        reasons.append(f"backend={candidate!r} cannot run: {reason}")
    raise RuntimeError("; ".join(reasons) or f"no backend runs on {device_type} tensors")


def _only_on(supported: str, device_type: str | None, how: str = "") -> str | None:
    if device_type in (None, supported):
        return None
    return f"{how}it runs on {supported} tensors, and these are on {device_type}"


def _metadata(table: _C.Table, stream: int) -> Tensor:
    """A table's metadata on its device, uploaded anew if the rows or the stream have changed.

    So two streams never share a Workspace. A capture records an upload of its own, which only its
    replays carry out.
    """
    if table.uploaded is not None and table.metadata_is_uploaded and not capturing():
        uploaded: Tensor
        uploaded_for, uploaded = table.uploaded
        if uploaded_for == stream:
            return uploaded
    uploaded = _upload(table, table.metadata())
    if not capturing():
        table.uploaded = stream, uploaded
        table.note_upload()
    return uploaded


def _upload(table: _C.Table, data: bytes) -> Tensor:
    """Copies bytes to the table's device on the current stream, without waiting for it."""
    device = torch.device(*table.device)
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
