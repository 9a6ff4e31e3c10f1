"""Figure 4 as curves: errors over lambda and over lambda / c, for factors c of the loss."""

from __future__ import annotations

import statistics
from math import nan
from typing import TYPE_CHECKING, NamedTuple

from adamprox import plots

from . import pictures
from .intervals import interval
from .lab import Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .grids import Grid
    from .lab import Lab
    from .training import Cell

LEARNT = 0.5  # a smaller error tells that something was learnt
Curve = dict[str, list[float]]  # the errors of the seeds, by lambda or lambda / c


class Panel(NamedTuple):
    """An optimizer, over lambda or over lambda / c."""

    optimizer: str
    divided: bool

    def x(self, weight_decay: float, factor: float) -> str:
        """As text, since 0.1 / 100 is not 0.001."""
        return f"{weight_decay / factor if self.divided else weight_decay:g}"

    @property
    def over(self) -> str:
        """In a table."""
        return "lambda / c" if self.divided else "lambda"


PANELS = (Panel("Adam", False), Panel("Adam", True), Panel("AdamW", False))
Curves = dict[Panel, dict[float, Curve]]  # by factor


def errors(lab: Lab, pairs: Mapping[float, Sequence[Grid]]) -> None:
    """A picture of the errors, each optimizer at its best alpha of c = 1, and how far they move.

    Args:
        lab: what trains.
        pairs: the grids of both optimizers, by factor.
    """
    lrs = {grid.name: grid.best(lab.store).lr for grid in pairs[1.0]}
    cells: dict[tuple[str, float, float], list[Cell]] = {}
    for factor, pair in pairs.items():
        for grid in pair:
            for decay in filter(None, grid.weight_decays):
                seeds = lab.settings.reported
                each = [grid.cell(lrs[grid.name], decay, seed) for seed in seeds]
                cells[grid.name, factor, decay] = each
    lab.fill([cell for each in cells.values() for cell in each], "figure 4, seeds")
    curves: Curves = {panel: {factor: {} for factor in pairs} for panel in PANELS}
    for (name, factor, decay), each in cells.items():
        for panel in PANELS:
            if panel.optimizer == name:
                of_seeds = [lab.store[cell].test_error for cell in each]
                curves[panel][factor][panel.x(decay, factor)] = of_seeds
    figure, axes = plots.panels(1, len(PANELS), 2.8, sharey=True)
    for place, panel in zip(axes[0], PANELS, strict=True):
        pictures.factors(place, curves[panel], *panel)
    pictures.save(figure, lab.out, "figure-4-over-lambda")
    _how_far(lab, curves)


def _how_far(lab: Lab, curves: Curves) -> None:
    """How far each factor moves the errors, and how much farther it does Adam-l2's over lambda."""
    rows: list[Row] = []
    distances: dict[Panel, list[list[float]]] = {panel: [] for panel in PANELS}  # by seed
    for panel, of_factors in curves.items():
        without = of_factors[1.0]
        for factor, curve in of_factors.items():
            if factor == 1:
                continue
            common = _learnt(curves, panel, factor)
            if not panel.divided:  # the same points of both optimizers
                common &= _learnt(curves, PANELS[0], factor) & _learnt(curves, PANELS[-1], factor)
            points = [
                [abs(a - b) for a, b in zip(without[x], curve[x], strict=True)] for x in common
            ]
            distances[panel] += points
            means = list(map(statistics.mean, points))
            rows.append(
                {
                    "optimizer": pictures.name_of(panel.optimizer),
                    "over": panel.over,
                    "factor": factor,
                    "points": len(points),
                    "moved_mean": statistics.mean(means) if means else nan,
                    "moved_most": max(means, default=nan),
                }
            )
    title = "Figure 4: how far a factor c of the loss moves the test error"
    lab.finish("figure-4-over-lambda", title, rows)
    first, *others = PANELS
    rows = []
    for panel in others:
        both = zip(_of_seeds(lab, distances[first]), _of_seeds(lab, distances[panel]), strict=True)
        farther = [a - b for a, b in both]
        low, high = interval(farther)
        than = f"{pictures.name_of(panel.optimizer)} over {panel.over}"
        rows.append({"than": than, "mean": statistics.mean(farther), "low": low, "high": high})
    title = "Figure 4: how much farther it moves Adam-l2's over lambda"
    lab.finish("figure-4-moved", title, rows)


def _learnt(curves: Curves, panel: Panel, factor: float) -> set[str]:
    """Where there is something to move: either curve has learnt."""
    without, curve = curves[panel][1.0], curves[panel][factor]
    common = without.keys() & curve
    return {x for x in common if min(map(statistics.mean, (without[x], curve[x]))) < LEARNT}


def _of_seeds(lab: Lab, points: Iterable[Sequence[float]]) -> list[float]:
    """The mean over the points, for each seed; NaN without any."""
    columns = list(zip(*points, strict=True)) or [(nan,)] * len(lab.settings.reported)
    return list(map(statistics.mean, columns))
