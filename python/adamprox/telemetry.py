"""Statistics of the updates, noted by the step that makes them: the paper's figures 3 and 7-12."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _C, plots, reference
from .grouping import name_of
from .tensors import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PER = ("group", "tensor")

# csrc/math/telemetry.h's Record: the step, two sums of squares in double, 32 counts of 32 bits.
RECORD_WORDS = 19
LARGEST_COUNT = 2**31 - 1
STEP, PARAM_SQUARES, UPDATE_SQUARES, COUNTS = range(4)  # where they begin


@dataclass(frozen=True, eq=False)
class UpdateStats:
    r"""What one step did to a param group, or to one tensor; complex numbers are pairs of reals.

    The update is Adam's, :math:`\eta_t \alpha \hat m_t / (\sqrt{\hat v_t} + \epsilon)`, without
    what the decay adds: its magnitude over :math:`\alpha` is what the paper's figures 3 and 7-12
    show, and what is concentrated for a scale-free optimizer. :math:`\alpha` is the learning rate
    without its schedule: the param group's ``initial_lr``, which torch's schedulers write, or else
    its ``lr``. All tensors are on the CPU.
    """

    name: str
    """Of the group (``"group 0"``) or the tensor."""
    step: int
    """How many steps its params have made; the most, if they differ."""
    numel: int
    """How many numbers its params have; a complex one is two."""
    bins: Tensor
    """int64, of shape (29,): how many updates have ``abs(update) / alpha`` below 2^-27; in
    [2^-27, 2^-26); in [2^-26, 2^-25); ... in [1/2, 1); and at least 1. No bin counts a NaN,
    so ``numel - bins.sum()`` updates are NaN."""
    param_norm: Tensor
    """float64, of shape (): the l2 norm of the new param, within 2^-21. Unless that is float64
    itself, squares are taken in float32, as ``torch.linalg.vector_norm`` does: an element above
    2^64 makes the norm infinite, those below 2^-63 lose digits."""
    update_norm: Tensor
    """float64, of shape (): the l2 norm of the update, likewise."""
    zeros: Tensor
    """int64, of shape (): how many coordinates of the new param are exactly zero."""
    nans: Tensor
    """int64, of shape (): how many are NaN."""
    infs: Tensor
    """int64, of shape (): how many are infinite."""

    @property
    def ratio(self) -> Tensor:
        """``update_norm / param_norm``, float64, of shape ()."""
        return self.update_norm / self.param_norm

    def quantile(self, q: float) -> float:
        r"""The ``q``-quantile of :math:`\log_2(|update| / \alpha)`, from the 29 counts.

        The magnitudes are those of the paper's figures 3 and 7-12. It is linear within a bin. The
        outer bins have no width: what they hold is at -27 and at 0.

        Args:
            q: a share of the updates, 0 to 1; 0.5 is the median.

        Returns:
            A power of two's exponent, -27 to 0; NaN if there is no update.

        Raises:
            ValueError: ``q`` is not in [0, 1].
        """
        return quantile(self.bins.tolist(), q)

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        """Scalars for TensorBoard or W&B, by ``prefix + name + "/" + what``.

        Args:
            prefix: what all keys begin with.

        Returns:
            ``param_norm``, ``update_norm``, ``ratio``, ``zeros``, ``nans``, ``infs``, and from
            :meth:`quantile` the median and the interquartile range, ``log2_magnitude_median`` and
            ``log2_magnitude_iqr``.
        """
        scalars = {
            "param_norm": float(self.param_norm),
            "update_norm": float(self.update_norm),
            "ratio": float(self.ratio),
            "zeros": float(self.zeros),
            "nans": float(self.nans),
            "infs": float(self.infs),
            "log2_magnitude_median": self.quantile(0.5),
            "log2_magnitude_iqr": self.quantile(0.75) - self.quantile(0.25),
        }
        return {f"{prefix}{self.name}/{key}": value for key, value in scalars.items()}

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draws the bins, as shares of all updates, as the paper's figures do.

        The outer bins are hatched. The lowest one holds zeros, too.

        Args:
            axes: of matplotlib, which ``pip install matplotlib`` brings; None makes a figure.

        Returns:
            The axes; ``axes.figure`` is their figure.

        Raises:
            ImportError: ``axes`` is None, and there is no matplotlib.
        """
        if axes is not None:
            plots.histogram(axes, self.bins.tolist(), f"{self.name}, step {self.step}")
            return axes
        try:
            with plots.style():
                _, ((axes,),) = plots.panels(1, 1, 3.6)
                return self.plot(axes)
        except ImportError as error:
            raise ImportError(f"{error}; please pip install matplotlib") from error


def quantile(bins: Sequence[int], q: float) -> float:
    """The ``q``-quantile of ``log2(abs(update) / alpha)`` from the 29 counts, linear within a bin.

    The outer bins have no width: what they hold is at -27 and at 0. NaN if there is no update.

    Raises:
        ValueError: ``q`` is not in [0, 1].
    """
    if not 0 <= q <= 1:
        raise ValueError(f"Invalid q: {q}, expected a number from 0 to 1")
    wanted = q * sum(bins)
    below = 0
    for index, count in enumerate(bins):
        if count > 0 and below + count >= wanted:
            inside = (wanted - below) / count if 0 < index < reference.BINS - 1 else 0.0
            return float(max(index - reference.BINS + 1, 2 - reference.BINS)) + inside
        below += count
    return float("nan")


class _Noted(NamedTuple):
    """One table of a tracked step, and what the step writes; on the device until it is read."""

    device: tuple[str, int]
    tensors: Sequence[tuple[int, int, int, int, int]]
    """(its group, its place in the group, its first record, how many it has, its numel)"""
    records: Tensor


class _TensorNotes(NamedTuple):
    """The records of one tensor, folded."""

    step: int
    numel: int
    counts: Tensor
    squares: Tensor
    """(2,): of the param and of the update"""

    @staticmethod
    def of(records: Tensor, numel: int) -> _TensorNotes:
        doubles = _doubles(records)
        counts = _counts(records).sum(0, dtype=torch.int64)
        return _TensorNotes(
            int(doubles[0, STEP]), numel, counts, reference.tree_sum(doubles[:, STEP + 1 :].T)
        )


class ZeroCount(NamedTuple):
    """What of one tensor a tracked step has left zero; complex numbers are pairs of reals."""

    place: tuple[int, int]
    """Its group, and its position there."""
    name: str
    step: int
    numel: int
    zeros: int


class Tracker:
    """Has every so many-th step note its updates, and reads the notes of the last one."""

    def __init__(self, every: int, per: str) -> None:
        self.every, self.per = every, per
        self._steps = 0
        self._noted: list[_Noted] = []
        self._names: list[dict[str, list[str]]] = []

    def due(self) -> bool:
        """Whether the step that begins now is tracked."""
        self._steps += 1
        return self._steps % self.every == 0

    def begin(
        self, tables: Iterable[_C.Table], groups: Sequence[Mapping[str, Any]], capturing: bool
    ) -> None:
        """Gives each table the memory that its step writes to.

        It is that of the tracked step before, if that had the same tensors: so a step that the
        device skips leaves the notes as they were.
        """
        noted = []
        for table in tables:
            device = table.device
            tensors = [
                (r.group, r.position, r.first_chunk, _num_chunks(r), r.numel) for r in table.rows()
            ]
            known = (n.records for n in self._noted if n[:2] == (device, tensors))
            records = next(known, None)
            if records is None:
                if capturing and table.device[0] == "cuda":  # each replay would make them anew
                    raise RuntimeError(
                        "a tracked step in a CUDA graph needs one of the same tensors before the "
                        "capture; nothing was updated"
                    )
                shape = table.num_chunks, RECORD_WORDS
                with torch.inference_mode(False):
                    records = torch.zeros(shape, dtype=torch.int64, device=torch.device(*device))
            if capturing:  # for as long as the graph may write there
                table.keep(records)
            elif records.is_cuda:  # it may have been made on another stream
                records.record_stream(torch.cuda.current_stream(records.device))
            table.track(records)
            noted.append(_Noted(device, tensors, records))
        self._noted = noted
        # By place, as the params may be others when the notes are read; none is kept alive.
        self._names = [{"param_names": list(g.get("param_names", ()))} for g in groups]

    @torch.no_grad()
    def note_params(self, tables: Iterable[_C.Table]) -> None:
        """Notes the params anew, which have changed since the tables' step."""
        for table in tables:
            for row in table.rows():
                write_param(reference.note_param(row.param, row.block), table, row)

    def stats(self) -> list[UpdateStats]:
        """Waits for the step, if it is on a GPU."""
        members: dict[tuple[int, ...], list[_TensorNotes]] = {}
        for _, tensors, records in self._noted:
            if records.is_cuda:  # whatever stream it was stepped on
                torch.cuda.synchronize(records.device)
            on_host = records.cpu()
            for group, index, first, chunks, numel in tensors:
                of_tensor = on_host[first : first + chunks]
                # Nothing is noted of a tensor without elements, nor of a step that was skipped.
                if of_tensor.any():
                    place = (group,) if self.per == "group" else (group, index)
                    members.setdefault(place, []).append(_TensorNotes.of(of_tensor, numel))
        return [_merged(self._name(*place), parts) for place, parts in members.items()]

    def zeros(self) -> Iterator[ZeroCount]:
        """What the step has left zero of each tensor; waits for it, if it is on a GPU."""
        for _, tensors, records in self._noted:
            on_host = records.cpu()
            steps, zeros = _doubles(on_host)[:, STEP], _counts(on_host)[:, reference.BINS]
            for group, index, first, chunks, numel in tensors:
                step = int(steps[first]) if numel else 0
                if step > 0:  # else nothing is noted of it
                    count = int(zeros[first : first + chunks].sum())
                    name = self._tensor_name(group, index)
                    yield ZeroCount((group, index), name, step, numel, count)

    def copied(self) -> tuple[Tracker, Callable[[], bool]]:
        """The notes on their way to the host, and whether they are there; it waits for nothing."""
        copy = Tracker(self.every, self.per)
        copy._names = self._names
        arrivals = []
        for noted in self._noted:
            records = noted.records.to("cpu", non_blocking=True)
            copy._noted.append(noted._replace(records=records))
            if noted.records.is_cuda:
                arrivals.append(torch.cuda.current_stream(noted.records.device).record_event())
        return copy, lambda: all(arrival.query() for arrival in arrivals)

    def _name(self, group: int, index: int | None = None) -> str:
        return f"group {group}" if index is None else self._tensor_name(group, index)

    def _tensor_name(self, group: int, index: int) -> str:
        return name_of(self._names, group, index) or f"group {group}, param {index}"


def checked(every: int | None, per: str) -> Tracker | None:
    """A tracker, or None where there is nothing to track.

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
    """
    if per not in PER:
        raise ValueError(f"Invalid per: {per!r}, expected one of {', '.join(PER)}")
    if every is None or every == 0:
        return None
    if not isinstance(every, int) or every < 0:
        raise ValueError(f"Invalid every: {every!r}, expected None or an int, 0 or more")
    return Tracker(every, per)


def write_update(notes: reference.UpdateNotes, table: _C.Table, row: Row) -> None:
    """Writes a whole tensor's notes into the record of its first chunk; the others' are zero."""
    records = _records_of(table, row).zero_()
    _doubles(records)[:1, STEP] = row.step
    _doubles(records)[:1, UPDATE_SQUARES] = notes.squares
    _write_counts(_counts(records)[:, : reference.BINS], notes.bins)


def write_param(notes: reference.ParamNotes, table: _C.Table, row: Row) -> None:
    """The same of the new param, beside what is there of the update."""
    records = _records_of(table, row)
    _doubles(records)[:, PARAM_SQUARES] = 0
    _doubles(records)[:1, PARAM_SQUARES] = notes.squares
    _write_counts(_counts(records)[:, reference.BINS :], notes[1:])


def _write_counts(records: Tensor, counts: Sequence[int]) -> None:
    """Into 32 bits each: what the first record cannot have is in the next ones."""
    records.zero_()
    left = torch.tensor(counts)
    for record in records[: -(-int(left.max()) // LARGEST_COUNT)]:
        record.copy_(left.clamp(max=LARGEST_COUNT))
        left = (left - LARGEST_COUNT).clamp(min=0)


def _records_of(table: _C.Table, row: Row) -> Tensor:
    assert table.records is not None
    return table.records[row.first_chunk : row.first_chunk + _num_chunks(row)]


def _num_chunks(row: Row) -> int:
    return len(reference.chunk_sizes(row.numel, row.block))


def _doubles(records: Tensor) -> Tensor:
    return records[:, :COUNTS].view(torch.float64)


def _counts(records: Tensor) -> Tensor:
    return records.view(torch.int32)[:, 2 * COUNTS :]


def _merged(name: str, parts: Sequence[_TensorNotes]) -> UpdateStats:
    counts = torch.stack([part.counts for part in parts]).sum(0)
    squares = reference.tree_sum(torch.stack([part.squares for part in parts]).T)
    param_norm, update_norm = reference.sqrt(squares)
    zeros, nans, infs = counts[reference.BINS :]
    return UpdateStats(
        name=name,
        step=max(part.step for part in parts),
        numel=sum(part.numel for part in parts),
        bins=counts[: reference.BINS],
        param_norm=param_norm,
        update_norm=update_norm,
        zeros=zeros,
        nans=nans,
        infs=infs,
    )
