"""A picture of the rows: achieved bandwidth against size, and what many small tensors cost."""

from __future__ import annotations

import statistics
from itertools import groupby
from typing import TYPE_CHECKING, Any

from adamprox import plots

from .steps import HOST_BUDGET_US, HOST_BUDGET_US_PER_TENSOR
from .timing import WARM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    Panel = Callable[[Axes, Sequence[dict[str, Any]]], None]

Row = dict[str, Any]

SMALL_TENSORS = ("400 x 16", "465 groups")


def draw(path: Path, sizes: Sequence[Row], steps: Sequence[Row]) -> None:
    """Writes the picture: a panel for rows of single tensors, and one for many small tensors.

    Without such rows, there is no panel; without a panel, no picture.
    """
    small = [row for row in steps if row["model"] in SMALL_TENSORS]
    sizes = [row for row in sizes if row["gb_per_s"] is not None]
    panels: list[tuple[Panel, Sequence[Row], float]] = [
        (_roofline, sizes, 5.0),
        (_small_tensors, small, 1.5 + 0.22 * len(small)),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return
    heights = [height for *_, height in panels]
    with plots.style():
        average = sum(heights) / len(heights)
        figure, every_axes = plots.panels(len(panels), 1, average, height_ratios=heights)
        for axes, (panel, rows, _) in zip(every_axes[:, 0], panels, strict=True):
            panel(axes, rows)
        about = "{device}, {threads} threads, {dtype}, torch {torch}, {date}"
        figure.supxlabel(about.format(**panels[0][1][0]), color="0.4")
        plots.save(figure, path)


def _roofline(axes: Axes, rows: Sequence[Row]) -> None:
    for index, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        points = [(row["elements"], row["gb_per_s"]) for row in rows if row["name"] == name]
        axes.plot(*zip(*points, strict=True), label=name, **plots.series(index))
    copied = statistics.median(row["copy_gb_per_s"] for row in rows)
    axes.axhline(copied, color="black", linewidth=1, zorder=1, label=f"copy, {copied:.0f} GB/s")
    axes.set_xscale("log", base=2)
    plots.log_ticks(axes)
    axes.set_xlabel("elements of one tensor")
    axes.set_ylabel("achieved bandwidth, GB/s")
    axes.grid(alpha=0.3)
    plots.legend(axes, "A step over one tensor", 3)


def _small_tensors(axes: Axes, rows: Sequence[Row]) -> None:
    """A bar for each optimizer's step, with the host's part of it in front."""
    from matplotlib.ticker import StrMethodFormatter

    ticks: list[tuple[float, str]] = []
    position = 0.0
    for (model, caches), group in groupby(rows, key=lambda row: (row["model"], row["caches"])):
        top = position - 0.5
        for row in group:
            tensors = row["tensors"]
            step = row["p50_us"] / tensors
            axes.barh(position, step, color="C0", alpha=0.45, label="step")
            if row["host_in_step_us"] is not None:
                host = row["host_in_step_us"] / tensors
                axes.barh(position, host, 0.4, color="C0", label="host time in it")
            axes.text(step, position, f" {step:.3g}", va="center")
            ticks.append((position, row["name"]))
            position += 1
        if caches == WARM:
            budget = HOST_BUDGET_US / tensors + HOST_BUDGET_US_PER_TENSOR
            ends: Row = {
                "ymin": top,
                "ymax": position - 0.5,
                "label": "budget of ours for host time",
            }
            axes.vlines(budget, **ends, color="black", linestyle="--", linewidth=1)
        heading: Row = {"transform": axes.get_yaxis_transform(), "ha": "right", "weight": "bold"}
        axes.text(1, top - 0.2, f"{model}, {caches} caches", **heading)
        position += 1.6  # a gap
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.set_ylim(position - 1.6, -1.6)
    axes.set_xscale("log")
    shortest, longest = (f(row["p50_us"] / row["tensors"] for row in rows) for f in (min, max))
    axes.set_xlim(shortest / 4, 2 * longest)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("time for each tensor, µs")
    axes.set_ylabel("optimizer")
    plots.legend(axes, "A step over many small tensors", 3)
