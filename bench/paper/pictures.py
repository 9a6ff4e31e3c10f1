"""The panels of the figures."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import TYPE_CHECKING, Any

from adamprox import plots

from . import quadratics
from .histograms import inner_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .grids import Grid
    from .store import Store
    from .training import Result

# Each has a look of its own.
SERIES = (
    *("AdamW", "Adam", "AdamProxL2", "AdamProxL1", "AdamProx"),
    *("AdamProxL2, block=group", "AdamProxL1, metric=adam", "AdamProx, metric=adam"),
)
NAMES = {"Adam": "Adam-l2"}  # the paper's, where it is not the class's
CHANCE = 90.0  # percent: the upper end of the scale of errors, as there are 10 classes


def save(figure: Figure, out: Path, name: str) -> None:
    """Writes NAME.png and NAME.svg."""
    for suffix in ("png", "svg"):
        plots.save(figure, out / f"{name}.{suffix}")


def name_of(optimizer: str) -> str:
    """As the paper calls it."""
    return NAMES.get(optimizer, optimizer)


def scale(grids: Iterable[Grid], store: Store) -> tuple[float, float]:
    """Of the errors of a figure in percent, so that what is good is told apart."""
    errors = (store[cell].test_error for grid in grids for cell in grid.cells())
    return min(max(100 * min(errors), 0.1), CHANCE / 2), CHANCE


def heatmaps(
    row: Sequence[Axes],
    grids: Sequence[Grid],
    store: Store,
    title: str,
    ends: tuple[float, float],
) -> None:
    """A grid's final test errors in each panel, and a colour bar.

    Args:
        ends: of the colours, the same in all of a figure: see :func:`scale`.
    """
    for axes, grid in zip(row, grids, strict=True):
        image = _heatmap(axes, grid, store, f"{title},\n{name_of(grid.name)}", ends)
    bar = row[0].figure.colorbar(image, ax=list(row))
    plots.log_ticks(bar.ax)
    bar.set_label("test error, %\n(grey: diverged)")


def _heatmap(axes: Axes, grid: Grid, store: Store, title: str, ends: tuple[float, float]) -> Any:
    """Square cells; the best setting in a frame."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    columns = plots.columns(axes)
    best = grid.best(store)
    errors = []
    for decay in grid.weight_decays:
        results = [store[grid.cell(lr, decay)] for lr in grid.lrs]
        errors.append(
            [math.nan if math.isnan(r.train_loss) else 100 * r.test_error for r in results]
        )
    axes.set_facecolor("0.8")
    image = axes.imshow(errors, cmap="viridis_r", origin="lower", norm=LogNorm(*ends, clip=True))

    def color(error: float) -> str:
        return "white" if error > math.sqrt(ends[0] * ends[1]) else "black"

    # Whether there is no room for text in or at each cell.
    large = len(grid.weight_decays) > 7 or len(grid.lrs) * columns > 21
    middle: dict[str, Any] = {"ha": "center", "va": "center", "size": 7}
    for y, row in enumerate(errors):
        for x, error in enumerate(row):
            if not large and not math.isnan(error):
                axes.text(x, y, f"{error:.1f}", color=color(error), **middle)
    x, y = grid.lrs.index(best.lr), grid.weight_decays.index(best.weight_decay)
    least = errors[y][x]
    frame: dict[str, Any] = {"fill": False, "edgecolor": color(least), "linewidth": 1.5}
    axes.add_patch(Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, **frame))
    lrs, decays = ([f"{number:g}" for number in axis] for axis in (grid.lrs, grid.weight_decays))
    step = (2 if len(lrs) * columns < 36 else 3) if large else 1
    rotation = 90 if len(lrs) * columns > 6 else 0
    axes.set_xticks(range(0, len(lrs), step), lrs[::step], rotation=rotation)
    axes.set_yticks(range(0, len(decays), step), decays[::step])
    axes.set_xlabel(r"$\alpha$")
    axes.set_ylabel(r"$\lambda$")
    axes.set_title(f"{title}\n" + ("diverged" if math.isnan(least) else f"chosen: {least:.1f} %"))
    return image


def curves(
    loss: Axes,
    accuracy: Axes,
    results: Mapping[str, Sequence[Result]],
    title: str,
    columns: int = 2,
) -> None:
    """Training loss and test accuracy over the epochs: the median over seeds, and a band of all."""
    from matplotlib.ticker import MaxNLocator

    for name, runs in results.items():
        longest = max(runs, key=lambda run: len(run.train_losses))
        epochs = longest.curve_epochs or list(range(1, len(longest.train_losses) + 1))
        style = {**plots.series(SERIES.index(name), len(epochs)), "label": name_of(name)}
        losses = [run.train_losses for run in runs]
        accuracies = [[100 * (1 - error) for error in run.test_errors] for run in runs]
        for axes, values in ((loss, losses), (accuracy, accuracies)):
            axes.plot(epochs, _over_seeds(values, statistics.median), **style)
            low, high = _over_seeds(values, min), _over_seeds(values, max)
            _band(axes, epochs, low, high, style["color"])
    plots.log_ticks(loss)
    loss.set_ylabel("training loss")
    accuracy.set_ylabel("test accuracy, %")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        plots.legend(axes, title, columns)


def _band(
    axes: Axes, xs: Sequence[float], low: Sequence[float], high: Sequence[float], color: str
) -> None:
    """From the least to the largest of the seeds."""
    axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)


def _over_seeds(
    values: Sequence[Sequence[float]], statistic: Callable[[Sequence[float]], float]
) -> list[float]:
    """Of the seeds that have not diverged by then."""
    columns = itertools.zip_longest(*values, fillvalue=math.nan)
    finite = ([value for value in column if not math.isnan(value)] for column in columns)
    return [statistic(column) if column else math.nan for column in finite]


def pace(axes: Axes, results: Mapping[str, Sequence[Result]], title: str) -> None:
    """The median magnitude of each tensor's updates at the end, a line a seed."""
    for name, runs in results.items():
        for run in runs:
            style = {**plots.series(SERIES.index(name), len(run.pace)), "label": name_of(name)}
            axes.plot(range(1, len(run.pace) + 1), run.pace, **style)
    axes.set_xlabel("tensor, the first layer's first")
    axes.set_ylabel(r"median of $\log_2$ |update| / $\alpha$")
    plots.legend(axes, title)


def advantage(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Differences of errors with their intervals, a network each."""
    places = range(len(rows))
    mean, low, high = ([100 * row[name] for row in rows] for name in ("mean", "low", "high"))
    axes.hlines(0, -0.5, len(rows) - 0.5, color="0.5", linewidth=0.8)
    axes.vlines(places, low, high, color="C0", linewidth=1.5)
    axes.plot(places, mean, "o", color="C0")
    axes.set_xticks(places, [row["network"] for row in rows])
    axes.set_xlabel("network")
    axes.set_ylabel("Adam-l2's test error\nminus AdamW's, points")
    axes.set_title("what AdamW gains: mean over seeds, 95 % interval")


def spreads(
    axes: Axes, results: Mapping[tuple[str, str], Sequence[Result]], inner_only: bool
) -> None:
    """The interquartile range of log2 magnitudes over the networks: means and ranges over seeds."""
    networks = list(dict.fromkeys(network for network, _ in results))
    for name in dict.fromkeys(name for _, name in results):
        values = [
            [
                inner_range(run.histograms) if inner_only else run.iqr
                for run in results[network, name]
            ]
            for network in networks
        ]
        style = {**plots.series(SERIES.index(name)), "label": name_of(name)}
        places = range(len(networks))
        axes.plot(places, list(map(statistics.mean, values)), **style)
        axes.vlines(places, list(map(min, values)), list(map(max, values)), color=style["color"])
    axes.set_xticks(range(len(networks)), networks)
    axes.set_xlabel("network")
    axes.set_ylabel("spread of updates, octaves")
    plots.legend(axes, "without the outer bins" if inner_only else "all updates")


def histograms(axes: Axes, results: Mapping[str, Result], index: int, network: str) -> None:
    """The magnitudes of updates of each optimizer, at one of the epochs where they were noted."""
    bins = {name_of(name): result.histograms[index] for name, result in results.items()}
    styles = {name_of(name): plots.series(SERIES.index(name)) for name in results}
    plots.histograms(axes, bins, styles)
    epoch = next(iter(results.values())).histogram_epochs[index]
    plots.legend(axes, f"{network}, epoch {epoch}", 3)


def factors(
    axes: Axes, curves: Mapping[float, Mapping[str, Sequence[float]]], name: str, divided: bool
) -> None:
    """The test error over lambda, or lambda / c, a line for each factor c of the loss.

    The median over seeds, and a band of all.
    """
    for index, (factor, points) in enumerate(curves.items()):
        xs = [float(x) for x in points]
        medians, low, high = (
            [100 * of(errors) for errors in points.values()] for of in (statistics.median, min, max)
        )
        style = plots.series(index)
        axes.plot(xs, medians, label=f"c = {factor:g}", **style)
        _band(axes, xs, low, high, style["color"])
    axes.set_xscale("log")
    plots.log_ticks(axes)
    axes.set_xlabel(r"$\lambda / c$" if divided else r"$\lambda$")
    axes.set_ylabel("test error, %")
    plots.legend(axes, name_of(name), 3)


def beside(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """AdamProx's error over AdamW's, a point for each setting."""
    for index, lr in enumerate(dict.fromkeys(row["lr"] for row in rows)):
        some = [row for row in rows if row["lr"] == lr]
        xs, ys = ([100 * row[name] for row in some] for name in ("AdamW", "AdamProx"))
        style = {**plots.series(index), "linestyle": "none", "label": rf"$\alpha$ = {lr:g}"}
        axes.plot(xs, ys, **style)
    ends = [100 * row[name] for row in rows for name in ("AdamW", "AdamProx")] or [1.0, 100.0]
    diagonal = [min(ends), max(ends)]
    axes.plot(diagonal, diagonal, color="0.6", linewidth=0.8, label="equal errors")
    plots.log_ticks(axes, horizontal=True)
    plots.log_ticks(axes)
    axes.set_xlabel("AdamW's test error, %")
    axes.set_ylabel("AdamProx's test error, %")
    plots.legend(axes, "the same settings", 4)


def sparsity(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy over zeros, a line for each way of making them; means and ranges over seeds."""
    dense = next(row for row in rows if row["training"] == "dense")
    accuracy = 100 * dense["accuracy"]
    axes.axhline(accuracy, color="0.6", linewidth=0.8, label="dense")
    names = dict.fromkeys(row["training"] for row in rows if row is not dense)
    for index, name in enumerate(names):
        some = [row for row in rows if row["training"] == name]
        xs, ys, low, high = (
            [100 * row[key] for row in some]
            for key in ("zeros", "accuracy", "accuracy_min", "accuracy_max")
        )
        axes.plot(xs, ys, label=name, **plots.series(index))
        axes.vlines(xs, low, high, color=f"C{index}", linewidth=1)
    axes.set_xlabel("zero weights, %")
    axes.set_ylabel("test accuracy, %")
    plots.legend(axes, "mean and range over seeds", 4)


def paths(out: Path, runs: Sequence[quadratics.Path]) -> None:
    """Figure 1: values over steps, and the way through the plane."""
    numbers = quadratics.CONDITION_NUMBERS[:2]
    figure, axes = plots.panels(2, len(numbers), 3.2)
    for column, number in enumerate(numbers):
        above, below = axes[0, column], axes[1, column]
        for run in runs:
            if run.condition_number != number:
                continue
            style = plots.series(run.algorithm != "AdamW", len(run.iterates))
            style["label"] = rf"{run.algorithm}, $\alpha$ = {run.lr:g}"
            distances = (run.iterates - run.iterates.new_tensor(quadratics.MINIMIZER)).norm(dim=1)
            above.plot(distances.clamp(min=1e-16), **style)
            below.plot(
                *run.iterates.T, **{**style, "markevery": 1, "markersize": 3, "linewidth": 1}
            )
        plots.log_ticks(above)
        above.set_xlabel("step")
        above.set_ylabel(r"distance $\|x - x^*\|$, at least $10^{-16}$")
        below.plot(*quadratics.MINIMIZER, "k*", label="minimizer")
        below.set_xlabel("first coordinate")
        below.set_ylabel("second coordinate")
        for each in (above, below):
            plots.legend(each, f"condition number {number:,.0f}", 3)
    save(figure, out, "figure-1")
