"""One step: read everything, mend what can be, choose the backends, run them, count.

There is one way through. On the CPU, reading and running are one call of C++, so no Python code
runs between them; a backend that Python drives is begun, run, and taken back if it fails.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from . import _C, backends, reference
from .grouping import name_of
from .hyperparameters import is_one_block
from .loss_scaling import LossScaling
from .mending import mend, refuse_overlaps
from .stand_ins import Given, StandIns
from .zeros import ZeroWatch

if TYPE_CHECKING:
    from .sparsity_target import SparsityTarget
    from .telemetry import Tracker
    from .tensors import Row
    from .zeros import FrozenZeros

Groups = list[dict[str, Any]]

# What is missing may turn out to lie otherwise than it must once it is made, and so on.
_MOST_ROUNDS = 8


class Engine:
    """What an optimizer keeps for its steps. It is no part of a checkpoint, nor of a copy."""

    def __init__(self) -> None:
        self.renew()
        self.steps = 0
        self.tracker: Tracker | None = None  # of track_updates()
        self.target: SparsityTarget | None = None
        self.watch = ZeroWatch()
        self.handle: int | None = None  # of compiled.py
        self.blocked: str | None = None  # why no step may be taken now
        self.frozen: FrozenZeros | None = None
        self.captured: list[FrozenZeros | Engine] = []  # whose tensors CUDA graphs read
        _engines.add(self)

    def renew(self) -> None:
        """Forgets a step that another thread was in: a forked child does not have that thread."""
        self.lock: Any = threading.RLock()
        self.gather = _C.Gather()

    def notes_of_step(
        self, optimizer: Stepped
    ) -> tuple[Tracker | None, Sequence[ZeroWatch | SparsityTarget]]:
        """What notes the step that begins now, and who reads the notes once it is over.

        One tracker notes the step. It is that of ``track_updates()``, if that is due. A capture is
        noted for ``track_updates()`` alone: only ``update_stats()`` can read what replays note.
        """
        tracker = self.tracker
        if tracker is not None and not tracker.due():
            tracker = None
        readers: list[ZeroWatch | SparsityTarget] = []
        if not backends.capturing():
            if self.target is not None and self.target._due():
                readers.append(self.target)
            if self.steps >= self.watch.at and self.watch._due(optimizer):
                readers.append(self.watch)
        if tracker is None and readers:
            tracker = readers[0]._tracker
        return tracker, readers


class Stepped(Optimizer):
    """An optimizer that takes its steps here."""

    _engine: Engine
    _backend: str | None
    _param_groups: Groups


_engines: WeakSet[Engine] = WeakSet()


def _renew_all() -> None:
    for engine in _engines:
        engine.renew()


os.register_at_fork(after_in_child=_renew_all)


def take_step(
    optimizer: Stepped, scaling: LossScaling | None = None, given: Given | None = None
) -> None:
    """Takes one step; ``given`` has tensors that stand in for the optimizer's own.

    Other threads wait until it is over.

    Raises:
        RuntimeError: a tensor cannot be used, no backend can run, or this thread is amid a step of
            the optimizer; nothing was updated.
    """
    engine = optimizer._engine
    if engine.lock._is_owned():
        raise RuntimeError(
            f"{type(optimizer).__name__}.step() was called amid a step of the same optimizer; "
            "nothing was updated"
        )
    with engine.lock:
        if engine.blocked is not None:
            raise RuntimeError(f"{type(optimizer).__name__}: {engine.blocked}; nothing was updated")
        engine.steps += 1
        tracker: Tracker | None = None
        readers: Sequence[ZeroWatch | SparsityTarget] = ()
        if (
            engine.steps >= engine.watch.at
            or engine.tracker is not None
            or engine.target is not None
        ):
            tracker, readers = engine.notes_of_step(optimizer)
        try:
            if engine.frozen is None:
                _take_step(optimizer, optimizer._param_groups, scaling, given, tracker)
            else:
                engine.frozen.check(optimizer)
                with Uninterrupted():
                    _take_step(optimizer, optimizer._param_groups, scaling, given, tracker)
                    engine.frozen.keep(optimizer, given)
                    if backends.capturing():
                        engine.captured.append(engine.frozen)
        finally:
            engine.gather.release()
        if tracker is not None and readers:
            with Uninterrupted():
                for reader in readers:
                    reader._read(optimizer, tracker, given)


def _take_step(
    optimizer: Stepped,
    groups: Groups,
    scaling: LossScaling | None,
    given: Given | None,
    tracker: Tracker | None,
) -> None:
    gather = optimizer._engine.gather
    stand_ins = StandIns(given) if given else None
    capturing = backends.capturing()
    if capturing:
        _check_capture(optimizer)
    on_gpu, on_cpu, threads = backends.recipes_and_threads(optimizer._backend)
    scaled = scaling is not None
    if tracker is not None or scaled or capturing:
        threads = 0
    state = optimizer.state
    for _ in range(_MOST_ROUNDS):
        by_id = {} if stand_ins is None else stand_ins.by_id
        if gather.read(groups, state, by_id, on_gpu, on_cpu, scaled, threads):
            return
        findings, groups = gather.findings, gather.groups()
        if not findings:
            break
        later = {(f.group, f.index) for f in findings if f.key == "overlap"}
        if 0 < len(later) < sum(table.num_rows for table in gather.tables()):
            with _forgetting(optimizer, stand_ins):
                refuse_overlaps(optimizer, groups, findings, stand_ins or StandIns({}))
                _refuse_divided_norms(optimizer, groups, {g for g, _ in later})
            _take_in_turns(optimizer, _divided(groups, later), stand_ins, scaling, given)
            return
        stand_ins = stand_ins or StandIns({})
        threads = 0  # what is copied is written back
        with _forgetting(optimizer, stand_ins):
            mend(optimizer, groups, findings, stand_ins, capturing)
    else:
        with _forgetting(optimizer, stand_ins):
            raise RuntimeError(
                f"{type(optimizer).__name__}: {findings[0].key} of "
                f"param_groups[{findings[0].group}]['params'][{findings[0].index}] cannot be used; "
                "nothing was updated"
            )
    tables = gather.tables()
    if stand_ins is not None and stand_ins.overlap(tables):
        with _forgetting(optimizer, stand_ins):
            _refuse_divided_norms(optimizer, groups, range(len(groups)))
        _take_in_turns(optimizer, _one_by_one(groups), stand_ins, scaling, given)
        return
    _run(optimizer, tables, groups, scaling, stand_ins, tracker, capturing)


def _take_in_turns(
    optimizer: Stepped,
    parts: Iterable[Groups],
    stand_ins: StandIns | None,
    scaling: LossScaling | None,
    given: Given | None,
) -> None:
    """Steps of some of the params each, one after the other."""
    with Uninterrupted():
        for index, part in enumerate(parts):
            # Once the first part has been stepped, its states stay.
            with _forgetting(optimizer, None if index else stand_ins):
                _take_step(optimizer, part, scaling, given, None)


@contextlib.contextmanager
def _forgetting(optimizer: Stepped, stand_ins: StandIns | None) -> Iterator[None]:
    """If a step is refused in it, the states that were made for the step are forgotten."""
    try:
        yield
    except BaseException:
        if stand_ins is not None:
            stand_ins.forget_states(optimizer)
        raise


def _divided(groups: Groups, later: Container[tuple[int, int]]) -> tuple[Groups, Groups]:
    """The groups without the params at those places, and with them alone: their order stays.

    Params that share memory are stepped one after the other. A step of this kind is not tracked.
    """
    halves: tuple[Groups, Groups] = ([], [])
    for g, group in enumerate(groups):
        for half, wanted in zip(halves, (False, True), strict=True):
            kept = [i for i in range(len(group["params"])) if ((g, i) in later) == wanted]
            names = [name_of(groups, g, i) for i in kept]
            params = [group["params"][i] for i in kept]
            half.append({**group, "params": params, "param_names": names})
    return halves


def _refuse_divided_norms(optimizer: Stepped, groups: Groups, divided: Iterable[int]) -> None:
    """Of groups whose params would be stepped apart."""
    for index in divided:
        if is_one_block(groups[index]) and len(groups[index]["params"]) > 1:
            raise RuntimeError(
                f"{type(optimizer).__name__}: params share memory, so that they are stepped one "
                f"after the other, but block='group' of param_groups[{index}] takes one norm of "
                "all; nothing was updated"
            )


def _one_by_one(groups: Groups) -> Iterator[Groups]:
    for g, group in enumerate(groups):
        for i in range(len(group["params"])):
            yield _divided(groups, {(g, i)})[1]


@_disable_dynamo  # which would trace it after a graph break
def _run(
    optimizer: Stepped,
    tables: list[_C.Table],
    groups: Groups,
    scaling: LossScaling | None,
    stand_ins: StandIns | None,
    tracker: Tracker | None,
    capturing: bool,
) -> None:
    """The step that has been read, table by table."""
    with _forgetting(optimizer, stand_ins):
        plan = _plan(optimizer, tables, groups, scaling, tracker, capturing)
    if plan is None:
        return
    chosen, deferred = plan
    with Uninterrupted():
        _run_tables(tables, chosen, groups)
        if deferred:
            from .block_norms import Member, shrink

            shrink([Member(row.owner, row.param, groups[row.group]) for row in deferred])
            for row in deferred:
                reference.write(reference.follow(row.param, row.states, groups[row.group]))
            if tracker is not None:
                tracker.note_params(tables)
        if stand_ins is not None:
            stand_ins.write_back()


def _run_tables(
    tables: Sequence[_C.Table], chosen: Sequence[backends.Backend], groups: Groups
) -> None:
    """Begins all of them before one is written to; an error takes back what was not run."""
    left = sorted(zip(tables, chosen, strict=True), key=lambda pair: not pair[1].at_once)
    try:
        for table, backend in left:
            if not backend.at_once:
                table.begin()
        steps = [backend.step(table, groups) for table, backend in left]
        for step in steps:
            next(step)
        for step in steps:
            next(step, None)
            del left[0]
    except BaseException:
        for table, _ in left:
            table.undo()
        raise


def _plan(
    optimizer: Stepped,
    tables: list[_C.Table],
    groups: Groups,
    scaling: LossScaling | None,
    tracker: Tracker | None,
    capturing: bool,
) -> tuple[list[backends.Backend], list[Row]] | None:
    """Each table's backend, and the rows whose decay is deferred; None: no step is to be taken."""
    chosen = [backends.select(optimizer._backend, *table.device) for table in tables]
    deferred = [
        row for table in tables if table.has_deferred for row in table.rows() if row.deferred
    ]
    deferred.sort(key=lambda row: (row.group, row.position))  # whatever their devices
    for row in deferred:
        from .block_norms import why_not

        if reason := why_not(row.owner, groups[row.group].get("block", "tensor")):
            raise RuntimeError(f"{type(optimizer).__name__}: {reason}; nothing was updated")
    if capturing and deferred:
        raise RuntimeError(
            f"{type(optimizer).__name__} on shards cannot be captured into a CUDA graph: "
            "other ranks have parts of its norms; nothing was updated"
        )
    if capturing and not all(table.has_recipes for table in tables):
        raise RuntimeError(
            f"{type(optimizer).__name__}: what the host steps cannot be captured into a CUDA "
            "graph: params on the CPU, or backend='reference'; nothing was updated"
        )
    if capturing and not all(_is_captured(table.device) for table in tables):
        raise RuntimeError(
            f"{type(optimizer).__name__}: a CUDA graph steps the params of all devices, and the "
            "current stream of one of these is not being captured; nothing was updated"
        )
    if deferred and scaling is not None and not scaling.host_lets_step():
        return None
    if scaling is not None and not scaling.apply(tables):
        return None
    for table in tables if capturing else ():  # a graph reads the tensors among them
        table.keep([{k: v for k, v in group.items() if k != "params"} for group in groups])
        table.keep(scaling)
    if tracker is not None:
        tracker.begin(tables, groups, capturing)
    return chosen, deferred


def _is_captured(device: tuple[str, int]) -> bool:
    if device[0] != "cuda":
        return True
    with torch.cuda.device(device[1]):
        return backends.capturing()


class Uninterrupted:
    """Signals that Python code handles wait until the end: a step is taken whole, or not at all."""

    def __enter__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._waiting: list[tuple[int, Any]] = []
        if threading.current_thread() is not threading.main_thread():
            return  # no handlers run in it
        try:
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._wait)
        except BaseException:
            self._restore()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._restore()
        finally:  # all that wait are handled, whatever one of the handlers raises
            with contextlib.ExitStack() as handled:
                for number, frame in reversed(self._waiting):
                    handled.callback(self._handlers[number], number, frame)

    def _wait(self, number: int, frame: Any) -> None:
        self._waiting.append((number, frame))

    def _restore(self) -> None:
        # SIGINT's is the last one, since it may raise as soon as it is back. So may others: all are
        # put back, whatever they raise.
        with contextlib.ExitStack() as stack:
            for number in sorted(self._handlers, key=lambda number: number != signal.SIGINT):
                stack.callback(signal.signal, number, self._handlers[number])


def _check_capture(optimizer: Stepped) -> None:
    """Refuses, in torch's words, to be captured into a CUDA graph without ``capturable``."""
    # Its name in newer versions of torch, and in older ones.
    names = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    check: Callable[[], None] = getattr(
        optimizer, next(name for name in names if hasattr(optimizer, name))
    )
    check()
