"""A picture of the rows: achieved bandwidth against size, and what many small tensors cost."""

from __future__ import annotations

import statistics
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .steps import HOST_BUDGET_US, HOST_BUDGET_US_PER_TENSOR
from .timing import WARM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    Panel = Callable[[Axes, Sequence[dict[str, Any]], dict[str, Any]], None]

Row = dict[str, Any]
Colors = dict[str, Any]

SMALL_TENSORS = ("400 x 16", "465 groups")


def draw(path: Path, sizes: Sequence[Row], steps: Sequence[Row]) -> None:
    """Writes the picture: a panel for rows of single tensors, and one for many small tensors.

    Without such rows, there is no panel; without a panel, no picture.
    """
    # Not pyplot, whose figures look for a window system: only a file is written.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    small = [row for row in steps if row["model"] in SMALL_TENSORS]
    sizes = [row for row in sizes if row["gb_per_s"] is not None]
    panels: list[tuple[Panel, Sequence[Row]]] = [(_roofline, sizes), (_small_tensors, small)]
    panels = [(panel, rows) for panel, rows in panels if rows]
    if not panels:
        return
    names = dict.fromkeys(row["name"] for row in [*sizes, *small])
    map_of_colors = colormaps["tab10" if len(names) <= 10 else "tab20"]
    colors = {name: map_of_colors(index % map_of_colors.N) for index, name in enumerate(names)}
    figure = Figure(figsize=(6.2 * len(panels), 6.4), layout="constrained")
    every_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (panel, rows) in zip(every_axes, panels, strict=True):
        panel(axes, rows, colors)
        axes.spines[["top", "right"]].set_visible(False)
    about = "{device}, {threads} threads, {dtype}, torch {torch}, {date}"
    figure.supxlabel(about.format(**panels[0][1][0]), fontsize=8, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _roofline(axes: Axes, rows: Sequence[Row], colors: Colors) -> None:
    from matplotlib.ticker import StrMethodFormatter

    for name, color in colors.items():
        points = [(row["elements"], row["gb_per_s"]) for row in rows if row["name"] == name]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, color=color, label=name)
    copied = statistics.median(row["copy_gb_per_s"] for row in rows)
    axes.axhline(copied, color="black", linestyle="--", linewidth=1)
    label = f"copy, {copied:.0f} GB/s"
    smallest = min(row["elements"] for row in rows)
    axes.annotate(label, (smallest, copied), (0, 4), textcoords="offset points")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("elements of one tensor")
    axes.set_ylabel("GB/s")
    axes.set_title("Achieved bandwidth")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _small_tensors(axes: Axes, rows: Sequence[Row], colors: Colors) -> None:
    """A bar for each optimizer's step, with the host's part of it in front."""
    from matplotlib.ticker import StrMethodFormatter

    ticks: list[tuple[float, str]] = []
    position = 0.0
    for (model, caches), group in groupby(rows, key=lambda row: (row["model"], row["caches"])):
        top = position - 0.5
        for row in group:
            tensors = row["tensors"]
            color = colors[row["name"]]
            step = row["p50_us"] / tensors
            axes.barh(position, step, color=color, alpha=0.45)
            if row["host_in_step_us"] is not None:
                axes.barh(position, row["host_in_step_us"] / tensors, color=color)
            axes.text(step, position, f" {step:.2f}", va="center", fontsize=8)
            ticks.append((position, row["name"]))
            position += 1
        if caches == WARM:
            budget = HOST_BUDGET_US / tensors + HOST_BUDGET_US_PER_TENSOR
            axes.vlines(budget, top, position - 0.5, color="black", linestyle="--", linewidth=1)
        heading: Row = {"transform": axes.get_yaxis_transform(), "ha": "right", "weight": "bold"}
        axes.text(1, top - 0.3, f"{model}, {caches}", **heading)
        position += 1.6  # a gap
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xscale("log")
    axes.set_xlim(left=0.05)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("us a tensor (solid: host time; dashed: the budget of ours)")
    axes.set_title("A step over many small tensors")
