"""What each figure needs and how it is put together: cells, a picture, a table, its CSV.

All figures are in this one file, since they are one registry.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from adamprox import plots

from . import adagrad, pictures, quadratics, scaling, taylor, theory
from .grids import Grid, search
from .histograms import interquartile_range
from .intervals import difference
from .settings import PAIR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from .settings import Settings
    from .store import Machine, Store
    from .training import Cell, Result

Row = dict[str, Any]

SGD_LEARNING_RATES = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1e-1)
SGD_WEIGHT_DECAY = 1e-4


class Lab(NamedTuple):
    """What an experiment works with."""

    settings: Settings
    store: Store
    machine: Machine
    out: Path


def figure_1(lab: Lab) -> None:
    """Gradient descent and AdamW on quadratics of condition number 1 and 1e5; Corollary 1."""
    runs = quadratics.best_paths()
    pictures.paths(lab.out, runs)
    rows = [
        {
            "algorithm": run.algorithm,
            "condition_number": run.condition_number,
            "lr": run.lr,
            "last_distance": run.distance,
        }
        for run in runs
    ]
    _finish(lab, "figure-1", "Figure 1: the best learning rate of each", rows)
    rows = []
    for dtype in (torch.float32, torch.float64):
        for decay in (0.0, 1.0):
            paths = [
                quadratics.adamw(quadratics.hessian_of(number, dtype), 0.1, weight_decay=decay)
                for number in quadratics.CONDITION_NUMBERS
            ]
            rows += [
                {
                    "dtype": str(dtype).split(".")[1],
                    "weight_decay": decay,
                    "condition_number": number,
                    "same_bits": torch.equal(path, paths[0]),
                    "largest_difference": (path - paths[0]).abs().max().item(),
                }
                for number, path in zip(quadratics.CONDITION_NUMBERS, paths, strict=True)
            ]
    title = "Corollary 1: AdamW's iterates, eps = 0, against those of condition number 1"
    _finish(lab, "corollary-1", title, rows)


def figure_2(lab: Lab) -> None:
    """Adam-l2 and AdamW with BN: the test error over alpha and lambda."""
    networks = lab.settings.batch_norm_networks
    grids = _pairs(lab.settings, networks, batch_norm=True)
    _search(lab, [grid for pair in grids.values() for grid in pair], "figure 2")
    _heatmaps(lab, "figure-2", grids)
    _finish(lab, "figure-2", "Figure 2: with BN", _best_rows(lab, grids))


def figure_3(lab: Lab) -> None:
    """Adam-l2 and AdamW without BN: test errors, curves, and magnitudes of updates."""
    names = lab.settings.optimizers
    grids = _rows(lab.settings, lab.settings.networks, names, lab.settings.widths)
    bests = _bests(lab, grids, "figure 3")
    figure, axes = plots.panels(2 * len(grids), len(names) + 1, 2.6)
    for index, (network, row) in enumerate(grids.items()):
        above, below = axes[2 * index : 2 * index + 2]
        pictures.heatmaps(above[:-1], row, lab.store, network)
        results = {name: bests[network, name] for name in names}
        pictures.curves(above[-1], below[-1], results, network)
        for place, name in zip(below, names, strict=False):
            pictures.histogram(place, results[name][0], -1, name)
            place.sharey(axes[1, 0])
    axes[1, 0].autoscale(axis="y")  # to the highest bar of all
    pictures.save(figure, lab.out, "figure-3")
    _finish(lab, "figure-3", "Figure 3: networks without BN", _best_rows(lab, grids))
    if set(PAIR) <= set(names):
        _advantage(lab, "advantage", list(grids), bests)


def _advantage(
    lab: Lab, name: str, networks: Sequence[str], bests: dict[tuple[str, str], list[Result]]
) -> None:
    """What AdamW gains over Adam-l2, paired by seed, in a table and over the networks."""
    rows = []
    for network in networks:
        first, second = (bests[network, optimizer] for optimizer in PAIR)
        row = {"network": network, "seeds": len(first), **difference(first, second)._asdict()}
        rows.append(row)
    figure, axes = plots.panels(1, 1, 3)
    pictures.advantage(axes[0, 0], rows)
    pictures.save(figure, lab.out, name)
    _finish(lab, name, "Adam-l2's test error minus AdamW's, by seed", rows)


def mechanism(lab: Lab) -> None:
    """What carries AdamW's advantage: scale-freeness, or the strength of the shrinkage.

    Figure 3's best settings, with one thing changed in each control. Adam-l2 that is shrunk has
    AdamW's learning rate, too, so that its weights shrink as fast.
    """
    settings = lab.settings
    names = [name for name in settings.networks if name.startswith("ResNet")]
    grids = _pairs(settings, names)
    _search(lab, [grid for pair in grids.values() for grid in pair], "mechanism, settings")
    trained: dict[str, dict[str, list[Cell]]] = {}
    for network, (coupled, decoupled) in grids.items():
        adam, adamw = coupled.best(lab.store), decoupled.best(lab.store)
        decay = adamw.weight_decay
        cells = {
            "AdamW": adamw,
            "Adam-l2": adam,
            "neither": dataclasses.replace(adamw, weight_decay=0.0),
            "Adam-l2, shrunk as AdamW": dataclasses.replace(adam, lr=adamw.lr, shrinkage=decay),
            "AdamW, eps = 1e-3": dataclasses.replace(adamw, eps=1e-3),
            "AdamW, Fixup": dataclasses.replace(adamw, start="fixup"),
            "Adam-l2, Fixup": dataclasses.replace(adam, start="fixup"),
        }
        trained[network] = {
            control: [dataclasses.replace(cell, seed=seed) for seed in settings.reported]
            for control, cell in cells.items()
        }
    every = [cell for controls in trained.values() for cells in controls.values() for cell in cells]
    lab.store.fill(every, lab.machine, "mechanism")
    rows: list[Row] = []
    figure, axes = plots.panels(1, len(trained), 2.8, sharey=True)
    for place, (network, controls) in zip(axes[0], trained.items(), strict=True):
        results = {
            control: [lab.store[cell] for cell in cells] for control, cells in controls.items()
        }
        pictures.pace(place, {name: results[name] for name in ("Adam-l2", "AdamW")}, network)
        for control, those in results.items():
            cell = controls[control][0]
            gain = difference(those, results["AdamW"])
            rows.append(
                {
                    "network": network,
                    "control": control,
                    "lr": cell.lr,
                    "lambda": cell.weight_decay,
                    "seeds": len(those),
                    **_spread("test_error", [result.test_error for result in those]),
                    "AdamW_gains": gain.mean,
                    "AdamW_gains_min": gain.low,
                    "AdamW_gains_max": gain.high,
                }
            )
    pictures.save(figure, lab.out, "pace")
    _finish(lab, "mechanism", "Controls of AdamW's advantage, without BN", rows)


def figure_4(lab: Lab) -> None:
    """The loss times 10 and 100, without BN; and with eps = 0, step for step."""
    network = lab.settings.scaled_network
    grids = {}
    for factor in (1.0, 10.0, 100.0):
        pair = _pairs(lab.settings, [network])[network]
        for grid in pair:
            grid.base = dataclasses.replace(grid.base, loss_factor=factor)
        grids[f"{network}, loss x {factor:g}"] = pair
    _search(lab, [grid for pair in grids.values() for grid in pair], "figure 4")
    _heatmaps(lab, "figure-4", grids)
    _finish(lab, "figure-4", "Figure 4: without BN", _best_rows(lab, grids, seeds=False))
    total = len(scaling.FACTORS) * len(scaling.OPTIMIZERS) * 2
    with tqdm(total=total, desc="loss times a factor", disable=None, leave=False) as progress:
        curves = scaling.curves(scaling.STEPS, progress.update)
    original = {(c.optimizer, c.dtype): c for c in curves if c.factor == 1}
    rows = [
        {
            "optimizer": pictures.name_of(curve.optimizer),
            "dtype": curve.dtype,
            "factor": curve.factor,
            "largest_relative_difference": scaling.deviation(
                curve, original[curve.optimizer, curve.dtype]
            ),
            "last_loss": curve.losses[-1],
        }
        for curve in curves
    ]
    title = "Section 4.2: the loss of each step with eps = 0, against that of factor 1"
    _finish(lab, "loss-factor", title, rows)


def figure_5(lab: Lab) -> None:
    """AdamW and AdamProx at ``eta_t = 1``, and the remainder of the Taylor expansion."""
    settings = lab.settings
    grids = _rows(settings, settings.taylor_networks, ("AdamW", "AdamProx"), settings.widths[:1])
    _search(lab, [grid for pair in grids.values() for grid in pair], "figure 5")
    _heatmaps(lab, "figure-5", grids)
    _finish(lab, "figure-5", "Figure 5: without BN", _best_rows(lab, grids, seeds=False))
    figure, axes = plots.panels(1, 2, 3.2)
    rows = []
    labels = {"eta": "eta", "weight_decay": "lambda"}
    for place, (over, label) in zip(axes[0], labels.items(), strict=True):
        points = taylor.distances(over, taylor.STEPS)
        xs, ys = [getattr(p, over) for p in points], [p.distance for p in points]
        slope = taylor.slope(xs, ys)
        place.loglog(xs, ys, base=2, **plots.series(0))
        place.set_xlabel(rf"$\{label}$")
        place.set_ylabel("largest distance of AdamW and AdamProx")
        place.set_title(f"slope {slope:.3f}")
        rows += [{"over": label, **p._asdict(), "slope_of_all": slope} for p in points]
    pictures.save(figure, lab.out, "taylor")
    _finish(lab, "taylor", "Section 3: the remainder of the Taylor expansion", rows)


def figure_6(lab: Lab) -> None:
    """AdamProxL2 and AdamProxL1 beside AdamW; for L1, zeros and accuracy over lambda."""
    settings, network = lab.settings, lab.settings.section5_network
    names = ("AdamW", "AdamProxL2", "AdamProxL1")
    grids = _rows(settings, [network], names, settings.widths[:1])
    bests = _bests(lab, grids, "figure 6")
    figure, axes = plots.panels(2, 3, 2.8)
    pictures.heatmaps(axes[0], grids[network], lab.store, network)
    of_best = {name: bests[network, name] for name in names}
    pictures.curves(axes[1, 0], axes[1, 1], of_best, "best settings")
    grid = grids[network][2]
    path = []
    for index, lr in enumerate(grid.lrs):
        for decay in grid.weight_decays:
            result = lab.store[grid.cell(lr, decay)]
            path.append(
                {
                    "lr": lr,
                    "lambda": decay,
                    "zeros": result.zeros,
                    "accuracy": 1 - result.test_error,
                    "train_loss": result.train_loss,
                }
            )
        of_lr = [row for row in path if row["lr"] == lr]
        zeros = [100 * row["zeros"] for row in of_lr]
        accuracies = [100 * row["accuracy"] for row in of_lr]
        label = rf"$\alpha$ = {lr:g}"
        axes[1, 2].plot(zeros, accuracies, label=label, **plots.series(index))
    axes[1, 2].set_xlabel("zero weights, %")
    axes[1, 2].set_ylabel("test accuracy, %")
    plots.legend(axes[1, 2], r"AdamProxL1, a point for each $\lambda$")
    pictures.save(figure, lab.out, "figure-6")
    _finish(lab, "figure-6", "Figure 6: without BN", _best_rows(lab, grids))
    _finish(lab, "l1-path", "Section 5: AdamProxL1's zeros over lambda", path)


def _histograms(number: int) -> Callable[[Lab], None]:
    def figure(lab: Lab) -> None:
        settings = lab.settings
        network = settings.histogram_networks[number]
        # A network without a grid of its own has the best settings of one that has.
        has_grid = network in settings.networks
        source = network if has_grid else settings.networks[-1]
        shorter: Row = {} if has_grid else {"epochs": settings.histogram_epochs}
        grids = _pairs(settings, [source])
        _search(lab, grids[source], f"figure {number}, settings")
        cells = [
            dataclasses.replace(grid.best(lab.store), network=network, **shorter)
            for grid in grids[source]
        ]
        lab.store.fill(cells, lab.machine, f"figure {number}")
        results = [lab.store[cell] for cell in cells]
        epochs = max(len(result.histograms) for result in results)
        figure, axes = plots.panels(max(1, epochs), 2, sharey=True)
        rows = []
        for column, cell, result in zip(axes.T, cells, results, strict=True):
            for place in column[len(result.histograms) :]:
                place.set_axis_off()
            for index, (epoch, counts) in enumerate(
                zip(result.histogram_epochs, result.histograms, strict=True)
            ):
                pictures.histogram(column[index], result, index, cell.optimizer)
                rows.append(
                    {
                        "network": network,
                        "optimizer": pictures.name_of(cell.optimizer),
                        "lr": cell.lr,
                        "lambda": cell.weight_decay,
                        "epoch": epoch,
                        "iqr_octaves": interquartile_range(counts),
                        **{f"bin_{index}": count for index, count in enumerate(counts)},
                    }
                )
        figure.suptitle(f"{network} without BN")
        pictures.save(figure, lab.out, f"figure-{number}")
        title = f"Figure {number}: {network}, the spread of update magnitudes"
        _finish(lab, f"figure-{number}", title, rows, shown=6)

    figure.__doc__ = "The histograms of update magnitudes over the training of a network."
    return figure


def section_3(lab: Lab) -> None:
    """Which updates are scale-free, Theorem 1 beyond quadratics, and what limits a step size."""
    tables: dict[str, tuple[str, Sequence[NamedTuple]]] = {
        "scale-freeness": (
            "Section 3: each coordinate's gradients scaled",
            theory.scale_freeness(),
        ),
        "theorem-1": ("Theorem 1: a function that is not quadratic", theory.theorem_1()),
        "stability": ("Section 3: the largest eta that converges", theory.stability()),
        "rotation": ("AdaGrad on diagonal and rotated Hessians", theory.rotation()),
    }
    for name, (title, rows) in tables.items():
        _finish(lab, name, title, [row._asdict() for row in rows])


def appendix(lab: Lab) -> None:
    """Algorithms 2 and 3 with their theorems' bounds; SGD without BN."""
    rounds = lab.settings.rounds
    rows: list[Row] = []
    total = rounds * len(adagrad.DIMENSIONS)
    with tqdm(total=total, desc="Theorem 3", unit="round", disable=None, leave=False) as progress:
        for number in adagrad.DIMENSIONS:
            for each in adagrad.adagrad_with_restarts(number, rounds, progress.update):
                rows.append({**each._asdict(), "holds": each.distance <= each.bound})
    _finish(lab, "theorem-3", "Theorems 2 and 3: AdaGrad with restarts", rows)
    settings = lab.settings
    cells = []
    for batch_norm in (False, True):
        base = settings.cell(settings.sgd_network, "SGD", batch_norm)
        base = dataclasses.replace(base, epochs=settings.sgd_epochs, weight_decay=SGD_WEIGHT_DECAY)
        cells += [dataclasses.replace(base, lr=lr) for lr in SGD_LEARNING_RATES]
    lab.store.fill(cells, lab.machine, "SGD without BN")
    rows = []
    for cell in cells:
        result = lab.store[cell]
        rows.append(
            {
                "network": cell.network,
                "batch_norm": cell.batch_norm,
                "lr": cell.lr,
                "first_loss": result.train_losses[0],
                "last_loss": result.train_loss,
                "test_error": result.test_error,
            }
        )
    _finish(lab, "sgd", "Section 4.1: SGD with momentum", rows)


FIGURES: dict[str, Callable[[Lab], None]] = {
    "1": figure_1,
    "2": figure_2,
    "3": figure_3,
    "4": figure_4,
    "5": figure_5,
    "6": figure_6,
    **{str(number): _histograms(number) for number in range(7, 13)},
    "mechanism": mechanism,
    "section-3": section_3,
    "appendix": appendix,
}


def _rows(
    settings: Settings,
    networks: Iterable[str],
    optimizers: Iterable[str],
    widths: Sequence[int],
    batch_norm: bool = False,
) -> dict[str, list[Grid]]:
    """A grid for each optimizer, by the name of the network."""
    return {
        network if len(widths) == 1 else f"{network}, width {width}": [
            Grid(
                settings.cell(network, name, batch_norm, width),
                list(settings.lrs),
                list(settings.decays_of(name)),
            )
            for name in optimizers
        ]
        for network in networks
        for width in widths
    }


def _pairs(
    settings: Settings, networks: Iterable[str], batch_norm: bool = False
) -> dict[str, list[Grid]]:
    return _rows(settings, networks, PAIR, settings.widths[:1], batch_norm)


def _search(lab: Lab, grids: Sequence[Grid], title: str) -> None:
    search(grids, lab.store, lab.machine, title, lab.settings.extensions)


def _bests(
    lab: Lab, grids: dict[str, list[Grid]], title: str
) -> dict[tuple[str, str], list[Result]]:
    """Searches, then trains the best settings with every seed; the results of each."""
    every = [grid for row in grids.values() for grid in row]
    _search(lab, every, title)
    lab.store.fill(
        [cell for grid in every for cell in _seeds(lab, grid)], lab.machine, f"{title}, seeds"
    )
    return {
        (network, grid.base.optimizer): [lab.store[cell] for cell in _seeds(lab, grid)]
        for network, row in grids.items()
        for grid in row
    }


def _seeds(lab: Lab, grid: Grid) -> list[Cell]:
    best = grid.best(lab.store)
    return [grid.cell(best.lr, best.weight_decay, seed) for seed in lab.settings.reported]


def _heatmaps(lab: Lab, name: str, grids: dict[str, list[Grid]]) -> None:
    figure, axes = plots.panels(len(grids), max(map(len, grids.values())), 3.4)
    for row, (title, pair) in zip(axes, grids.items(), strict=True):
        pictures.heatmaps(row, pair, lab.store, title)
    pictures.save(figure, lab.out, name)


def _best_rows(lab: Lab, grids: dict[str, list[Grid]], seeds: bool = True) -> list[Row]:
    """The best setting of each grid; over the seeds trained, means and spreads."""
    rows = []
    for title, pair in grids.items():
        for grid in pair:
            best = grid.best(lab.store)
            cells = _seeds(lab, grid) if seeds else [best]
            results = [lab.store[cell] for cell in cells if cell in lab.store]
            rows.append(
                {
                    "network": title,
                    "optimizer": pictures.name_of(grid.base.optimizer),
                    "lr": best.lr,
                    "lambda": best.weight_decay,
                    "seeds": len(results),
                    **_spread("test_error", [result.test_error for result in results]),
                    **_spread("train_loss", [result.train_loss for result in results]),
                    **_spread("iqr_octaves", [result.iqr for result in results]),
                    **_spread("iqr_of_moving", [_iqr_of_moving(result) for result in results]),
                    "zeros": statistics.mean(result.zeros for result in results),
                    "on_border": "; ".join(grid.on_border(lab.store)),
                }
            )
    return rows


def _iqr_of_moving(result: Result) -> float:
    """Without the leftmost bin, that of weights which a dead rectifier left no gradients."""
    return interquartile_range([0, *result.histograms[-1][1:]]) if result.histograms else math.nan


def _spread(name: str, values: Sequence[float]) -> Row:
    return {name: statistics.mean(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def _finish(lab: Lab, name: str, title: str, rows: Sequence[Row], shown: int | None = None) -> None:
    """Writes the CSV and prints the table; of wide rows the first columns."""
    from .tables import print_table

    with (lab.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print_table(title, rows, shown)
