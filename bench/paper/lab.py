"""What the experiments share: grids of settings, trainings with other seeds, tables."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from adamprox import plots

from . import pictures
from .grids import Grid, search
from .histograms import inner_range
from .settings import PAIR
from .training import Cell, Result

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from .settings import Settings
    from .store import Machine, Store

AT_CHANCE = 0.85  # errors of trainings that have learnt nothing, where there are ten classes

Row = dict[str, Any]
Grids = dict[str, list[Grid]]  # by the name of their network; one for each optimizer
Bests = dict[tuple[str, str], list[Result]]  # by network and optimizer; one for each seed


class Lab(NamedTuple):
    """What an experiment works with."""

    settings: Settings
    store: Store
    machine: Machine
    out: Path

    def grids(
        self,
        networks: Iterable[str],
        optimizers: Iterable[str] = PAIR,
        widths: Sequence[int] = (),
        **changes: Any,
    ) -> Grids:
        """Of the settings; ``changes`` are fields of all of their cells."""
        widths = widths or self.settings.widths[:1]
        return {
            network if len(widths) == 1 else f"{network}, width {width}": [
                self.settings.grid(network, name, width=width, **changes) for name in optimizers
            ]
            for network in networks
            for width in widths
        }

    def search(self, grids: Grids, title: str, extensions: int | None = None) -> None:
        """Trains all cells of grids, which are extended while a best setting is on the border."""
        every = [grid for row in grids.values() for grid in row]
        if extensions is None:
            extensions = self.settings.extensions
        search(every, self.store, self.machine, title, extensions)

    def fill(self, cells: Iterable[Cell], title: str) -> None:
        """Trains those that are missing."""
        self.store.fill(cells, self.machine, title)

    def bests(self, grids: Grids, title: str) -> Bests:
        """Searches, then trains the best settings with the seeds that are reported."""
        self.search(grids, title)
        every = [grid for row in grids.values() for grid in row]
        self.fill([cell for grid in every for cell in self.seeds(grid)], f"{title}, seeds")
        return {
            (network, grid.name): [self.store[cell] for cell in self.seeds(grid)]
            for network, row in grids.items()
            for grid in row
        }

    def seeds(self, grid: Grid) -> list[Cell]:
        """The best setting with the seeds that are reported."""
        best = grid.best(self.store)
        return [dataclasses.replace(best, seed=seed) for seed in self.settings.reported]

    def heatmaps(self, name: str, grids: Grids) -> None:
        """A picture of grids, a network a row."""
        figure, axes = plots.panels(len(grids), max(map(len, grids.values())), 3.4)
        for row, (title, pair) in zip(axes, grids.items(), strict=True):
            pictures.heatmaps(row, pair, self.store, title, self.scale(grids))
        pictures.save(figure, self.out, name)

    def scale(self, grids: Grids) -> tuple[float, float]:
        """Of the colours of a figure's errors."""
        return pictures.scale((grid for row in grids.values() for grid in row), self.store)

    def best_rows(self, grids: Grids, seeds: bool = True) -> list[Row]:
        """The best setting of each grid; over the seeds trained, means and spreads."""
        rows = []
        for title, pair in grids.items():
            for grid in pair:
                best = grid.best(self.store)
                cells = self.seeds(grid) if seeds else [best]
                results = [self.store[cell] for cell in cells if cell in self.store]
                rows.append(
                    {
                        "network": title,
                        "optimizer": pictures.name_of(grid.name),
                        "lr": best.lr,
                        "lambda": best.weight_decay,
                        "seeds": len(results),
                        "at_chance": sum(map(at_chance, results)),
                        **spread("test_error", [result.test_error for result in results]),
                        **spread("train_loss", [result.train_loss for result in results]),
                        **spread("iqr_octaves", [result.iqr for result in results]),
                        **spread("iqr_inner", [inner_range(r.histograms) for r in results]),
                        "zeros": statistics.mean(result.zeros for result in results),
                        "on_border": "; ".join(grid.on_border(self.store)),
                    }
                )
        return rows

    def finish(self, name: str, title: str, rows: Sequence[Row], shown: int | None = None) -> None:
        """Writes the CSV and prints the table, if it has rows; of wide ones the first columns."""
        from .tables import print_table

        if not rows:
            return

        with (self.out / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print_table(title, rows, shown)


def at_chance(result: Result) -> bool:
    """Whether a training has learnt nothing, or has diverged."""
    return result.test_error >= AT_CHANCE or math.isnan(result.train_loss)


def spread(name: str, values: Sequence[float]) -> Row:
    """Mean, smallest and largest; NaN of none."""
    values = values or [math.nan]
    return {name: statistics.mean(values), f"{name}_min": min(values), f"{name}_max": max(values)}
