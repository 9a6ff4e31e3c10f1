"""Finished cells on disk: a killed run goes on where it stopped."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import io
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_origin, get_type_hints

import torch

from adamprox.command_line import duration, progress_bar, write_whole

from .training import Cell, Result, estimate, train

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import TextIO

_CELL, _RESULT = get_type_hints(Cell), get_type_hints(Result)
_COLUMNS = {**_CELL, **_RESULT}


class Machine(NamedTuple):
    """Where cells are trained: ``jobs`` at a time, on a thread each if it is the CPU."""

    device: torch.device
    jobs: int
    path: Path | None = None  # of CIFAR's archives


def canonical(cell: Cell) -> Cell:
    """The cell that is trained in its place: without weight decay all rules are the same one."""
    if cell.weight_decay == 0 and cell.optimizer != "SGD" and "l2=" not in cell.options:
        return dataclasses.replace(cell, optimizer="AdamW", options="")
    return cell


class Store:
    """The cells finished so far, in ``cells.csv`` of a folder: a row each.

    The file is replaced as a whole when a cell is finished, so that it is complete at any time.

    Raises:
        RuntimeError: another run writes to the folder.
        ValueError: the file has other columns.
    """

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "cells.csv"
        self._lock: TextIO = (out / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise RuntimeError(f"another run writes to {out}") from error
        self._results: dict[Cell, Result] = {}
        try:
            if self.file.exists():
                self._read()
        except (KeyError, ValueError):
            self.close()
            raise

    def close(self) -> None:
        """Lets others write to the folder."""
        self._lock.close()

    def __contains__(self, cell: Cell) -> bool:
        return canonical(cell) in self._results

    def __getitem__(self, cell: Cell) -> Result:
        return self._results[canonical(cell)]

    def __len__(self) -> int:
        return len(self._results)

    def add(self, cell: Cell, result: Result) -> None:
        """Keeps a result, on disk too."""
        self._results[cell] = result
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(_COLUMNS)
        for pair in self._results.items():
            values = [value for part in pair for value in vars(part).values()]
            writer.writerow(map(_text, values))
        write_whole(self.file, text.getvalue())

    def fill(self, cells: Iterable[Cell], machine: Machine, title: str) -> None:
        """Trains those that are not there yet, the longest first."""
        missing = [cell for cell in dict.fromkeys(map(canonical, cells)) if cell not in self]
        missing.sort(key=_cost, reverse=True)
        if not missing:
            return
        costs = [_cost(cell) for cell in missing]
        longest = estimate(missing[0], machine.device, machine.path)
        seconds = longest * max(1.0, sum(costs) / costs[0] / machine.jobs)
        if seconds > 60:
            told = f"{title}: {len(missing)} trainings, about {duration(seconds)}"
            print(f"{told}; what is finished is kept", file=sys.stderr, flush=True)
        total = sum(cell.epochs for cell in missing)
        with progress_bar(total, desc=title, unit="epoch", smoothing=0) as progress:
            if machine.jobs == 1:
                for cell in missing:
                    before = progress.n
                    self.add(cell, train(cell, machine.device, machine.path, progress.update))
                    progress.update(before + cell.epochs - progress.n)
                return
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(machine.jobs, context, _start_worker)
            try:
                futures = {
                    pool.submit(train, cell, machine.device, machine.path): cell for cell in missing
                }
                for future in as_completed(futures):
                    cell = futures[future]
                    self.add(cell, future.result())
                    progress.update(cell.epochs)
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self) -> None:
        with self.file.open(newline="") as file:
            reader = csv.DictReader(file)
            # A column that older files have not has its default.
            known, names = list(_COLUMNS), list(reader.fieldnames or ())
            if names != [name for name in known if name in names] or "seed" not in names:
                raise ValueError(f"{self.file} has other columns than these cells: move it away")
            for row in reader:
                values = {name: _parse(row[name], _COLUMNS[name]) for name in names}
                cell = Cell(**{name: values[name] for name in _CELL if name in values})
                self._results[cell] = Result(
                    **{name: values[name] for name in _RESULT if name in values}
                )


def _text(value: Any) -> Any:
    """Lists are numbers with blanks between them; lists of lists have a bar."""
    if not isinstance(value, list):
        return value
    nested = bool(value) and isinstance(value[0], list)
    return ("|" if nested else " ").join(str(_text(each)) for each in value)


def _parse(text: str, kind: Any) -> Any:
    if get_origin(kind) is not list:
        return text == "True" if kind is bool else kind(text)
    (inner,) = get_args(kind)
    separator = "|" if get_origin(inner) is list else " "
    return [_parse(each, inner) for each in text.split(separator) if each]


def _cost(cell: Cell) -> int:
    """In some unit."""
    layers = cell.network.rpartition("-")[2]
    depth = int(layers) if layers.isdecimal() else 1  # The depth of a user's own is not known.
    return depth * cell.epochs * cell.size**2 * cell.width**2


def _start_worker() -> None:
    """One thread a worker, and none outlives its parent, however that ends."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
