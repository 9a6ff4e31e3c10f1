"""The figures: matplotlib, as PNG and SVG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from . import quadratics
from .histograms import HIGHEST, LOWEST

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .grids import Grid
    from .store import Store
    from .training import Result

COLORS = {"Adam": "C1", "AdamW": "C0", "AdamProx": "C2", "AdamProxL1": "C3", "AdamProxL2": "C4"}
NAMES = {"Adam": "Adam-l2"}  # the paper's, where it is not the class's


def panels(rows: int, columns: int, width: float = 3.2, height: float = 2.8) -> tuple[Figure, Any]:
    """A figure and its axes, an array of two dimensions."""
    # Not pyplot, whose figures look for a window system: only files are written.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, out: Path, name: str) -> None:
    """Writes NAME.png and NAME.svg, the same bytes from the same numbers."""
    import matplotlib

    figure.savefig(out / f"{name}.png", dpi=100, metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})


def name_of(optimizer: str) -> str:
    """As the paper calls it."""
    return NAMES.get(optimizer, optimizer)


def heatmap(axes: Axes, grid: Grid, store: Store, title: str) -> None:
    """The final test error in percent; the best setting in a circle, what diverged in grey."""
    best = grid.best(store)
    errors = []
    for decay in grid.weight_decays:
        results = [store[grid.cell(lr, decay)] for lr in grid.lrs]
        errors.append(
            [math.nan if math.isnan(r.train_loss) else 100 * r.test_error for r in results]
        )
    axes.set_facecolor("0.8")
    axes.imshow(errors, cmap="viridis_r", origin="lower", aspect="auto", vmin=0, vmax=90)
    for y, row in enumerate(errors):
        for x, error in enumerate(row):
            text = "div." if math.isnan(error) else f"{error:.1f}"
            color = "white" if error > 45 else "black"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color=color)
    spot = (grid.lrs.index(best.lr), grid.weight_decays.index(best.weight_decay))
    axes.plot(*spot, "o", markersize=22, markerfacecolor="none", markeredgecolor="black")
    axes.set_xticks(range(len(grid.lrs)), [f"{lr:g}" for lr in grid.lrs], fontsize=7)
    decays = [f"{decay:g}" for decay in grid.weight_decays]
    axes.set_yticks(range(len(decays)), decays, fontsize=7)
    axes.set_xlabel("alpha", fontsize=8)
    axes.set_ylabel("lambda", fontsize=8)
    axes.set_title(title, fontsize=9)


def curves(loss: Axes, accuracy: Axes, results: Mapping[str, Sequence[Result]]) -> None:
    """Training loss and test accuracy over the epochs, a line a seed."""
    for optimizer, runs in results.items():
        for index, run in enumerate(runs):
            epochs = range(1, len(run.train_losses) + 1)
            style: dict[str, Any] = {"color": COLORS[optimizer], "linewidth": 1, "alpha": 0.8}
            label = name_of(optimizer) if index == 0 else None
            loss.plot(epochs, run.train_losses, label=label, **style)
            accuracies = [100 * (1 - error) for error in run.test_errors]
            accuracy.plot(epochs, accuracies, label=label, **style)
    loss.set_yscale("log")
    loss.set_title("training loss", fontsize=9)
    accuracy.set_title("test accuracy, %", fontsize=9)
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch", fontsize=8)
        axes.legend(fontsize=7, frameon=False)


def histogram(axes: Axes, counts: Sequence[int], title: str, color: str) -> None:
    """Shares of all coordinates by the log2 of their update's magnitude, without alpha."""
    total = sum(counts)
    # A bin's place is its upper end: 2^-27, which everything below is counted at, up to 1 and more.
    places = range(LOWEST, HIGHEST + 2)
    axes.bar(places, [count / total for count in counts], width=0.9, color=color)
    ticks = range(LOWEST, HIGHEST + 1, 9)
    axes.set_xticks(ticks, [f"$2^{{{tick}}}$" for tick in ticks], fontsize=7)
    axes.set_ylim(0, 0.6)
    axes.tick_params(labelsize=7)
    axes.set_title(title, fontsize=8)


def paths(out: Path, runs: Sequence[quadratics.Path]) -> None:
    """Figure 1: values over steps, and the way through the plane."""
    numbers = quadratics.CONDITION_NUMBERS[:2]
    figure, axes = panels(2, len(numbers), 4.2, 3.2)
    for column, number in enumerate(numbers):
        above, below = axes[0, column], axes[1, column]
        for run in runs:
            if run.condition_number != number:
                continue
            color = "C0" if run.algorithm == "AdamW" else "C1"
            label = f"{run.algorithm}, lr {run.lr:g}"
            distances = (run.iterates - run.iterates.new_tensor(quadratics.MINIMIZER)).norm(dim=1)
            above.plot(distances.clamp(min=1e-16), color=color, label=label)
            below.plot(*run.iterates.T, ".-", color=color, markersize=3, linewidth=1, label=label)
        above.set_yscale("log")
        above.set_title(f"condition number {number:g}")
        above.set_xlabel("step")
        above.set_ylabel("norm(x - x*)")
        below.plot(*quadratics.MINIMIZER, "k*", label="minimizer")
        below.set_xlabel("first coordinate")
        below.set_ylabel("second coordinate")
        for each in (above, below):
            each.legend(fontsize=7, frameon=False)
    save(figure, out, "figure-1")
