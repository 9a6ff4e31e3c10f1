"""What each figure of the paper needs, and how it is made: cells, a picture, a table, its CSV.

The experiments that the paper has no figure of are in ``further``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from adamprox import plots

from . import adagrad, further, over_lambda, pairs, pictures, quadratics, scaling, taylor
from .grids import best
from .histograms import interquartile_range
from .intervals import difference
from .lab import Row
from .settings import PAIR

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .grids import Grid
    from .lab import Grids, Lab
    from .training import Cell

SGD_LEARNING_RATES = (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1e-1)  # 0 has the start's loss
SGD_WEIGHT_DECAY = 1e-4
FACTORS = (1.0, 10.0, 100.0)
SECTION_5 = (
    *("AdamW", "AdamProxL2", "AdamProxL2, block=group"),
    *("AdamProxL1", "AdamProxL1, metric=adam", "AdamProx, metric=adam"),
)


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
    lab.finish("figure-1", "Figure 1: the best learning rate of each", rows)
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
    lab.finish("corollary-1", title, rows)


def figure_2(lab: Lab) -> None:
    """Adam-l2 and AdamW with BN: the test error over alpha and lambda; is lambda free of alpha?"""
    grids = lab.grids(lab.settings.batch_norm_networks, batch_norm=True)
    bests = lab.bests(grids, "figure 2")
    lab.heatmaps("figure-2", grids)
    lab.finish("figure-2", "Figure 2: with BN", lab.best_rows(grids))
    pairs.advantage(lab, "advantage-bn", grids, bests)
    pairs.without_decay(lab, grids, bests)
    rows = [
        pairs.decoupling(lab, network, grid) for network, pair in grids.items() for grid in pair
    ]
    lab.finish("decoupling", "Section 4.1, with BN: the best lambda of each alpha", rows)


def figure_3(lab: Lab) -> None:
    """Adam-l2 and AdamW without BN: test errors, curves, and magnitudes of updates."""
    names = lab.settings.optimizers
    grids = lab.grids(lab.settings.networks, names, lab.settings.widths)
    bests = lab.bests(grids, "figure 3")
    figure, axes = plots.panels(2 * len(grids), len(names) + 1, 2.6)
    wide = None
    for index, (network, row) in enumerate(grids.items()):
        above, below = axes[2 * index : 2 * index + 2]
        pictures.heatmaps(above[:-1], row, lab.store, network, lab.scale(grids))
        results = {name: bests[network, name] for name in names}
        pictures.curves(above[-1], below[-1], results, network)
        for place in below[:-1]:
            place.remove()
        spec = axes[0, 0].get_gridspec()[2 * index + 1, : len(names)]
        wide = figure.add_subplot(spec, sharey=wide)
        pictures.histograms(wide, {name: runs[0] for name, runs in results.items()}, -1, network)
    pictures.save(figure, lab.out, "figure-3")
    lab.finish("figure-3", "Figure 3: networks without BN", lab.best_rows(grids))
    if set(PAIR) <= set(names):
        pairs.advantage(lab, "advantage", grids, bests)
        pairs.by_depth(lab, grids, bests)
        pairs.concentration(lab, grids, bests)


def figure_4(lab: Lab) -> None:
    """The loss times 10 and 100, without BN, also over lambda / c; with eps = 0, step for step."""
    settings = lab.settings
    decays = list(settings.scaled_weight_decays)
    grids = {}
    for factor in FACTORS:
        [pair] = lab.grids([settings.scaled_network], loss_factor=factor).values()
        for grid in pair if not settings.published else ():
            grid.weight_decays = decays
        grids[f"{settings.scaled_network}, loss x {factor:g}"] = pair
    lab.search(grids, "figure 4", extensions=0)
    lab.heatmaps("figure-4", grids)
    lab.finish("figure-4", "Figure 4: without BN", lab.best_rows(grids, seeds=False))
    if not settings.published:
        over_lambda.errors(lab, dict(zip(FACTORS, grids.values(), strict=True)))
    _step_for_step(lab)


def _step_for_step(lab: Lab) -> None:
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
    lab.finish("loss-factor", title, rows)


def figure_5(lab: Lab) -> None:
    """AdamW and AdamProx at ``eta_t = 1``, and the remainder of the Taylor expansion."""
    settings = lab.settings
    grids: Grids = {}
    for network in settings.taylor_networks:
        shorter: Row = {}
        if network.startswith("DenseNet") and settings.densenet_epochs:
            shorter["epochs"] = settings.densenet_epochs
        grids.update(lab.grids([network], ("AdamW", "AdamProx"), **shorter))
    lab.search(grids, "figure 5")
    lab.heatmaps("figure-5", grids)
    lab.finish("figure-5", "Figure 5: without BN", lab.best_rows(grids, seeds=False))
    _same_settings(lab, grids)
    _same_seeds(lab, grids)
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
    lab.finish("taylor", "Section 3: the remainder of the Taylor expansion", rows)


def _same_settings(lab: Lab, grids: Grids) -> None:
    """AdamProx's error beside AdamW's, setting by setting."""
    rows = []
    for network, (adamw, adamprox) in grids.items():
        for lr in adamw.lrs:
            for decay in adamw.weight_decays:
                cells = adamw.cell(lr, decay), adamprox.cell(lr, decay)
                if decay == 0 or any(cell not in lab.store for cell in cells):
                    continue
                first, second = (lab.store[cell].test_error for cell in cells)
                row = {"network": network, "lr": lr, "lambda": decay}
                rows.append(
                    {**row, "AdamW": first, "AdamProx": second, "difference": first - second}
                )
    figure, axes = plots.panels(1, 1, 3.4)
    pictures.beside(axes[0, 0], rows)
    pictures.save(figure, lab.out, "figure-5-beside")
    lab.finish("figure-5-beside", "Figure 5: test errors of the same settings", rows)


def _decaying(grid: Grid) -> list[Cell]:
    return [cell for cell in grid.cells() if cell.weight_decay > 0]


def _same_seeds(lab: Lab, grids: Grids) -> None:
    """AdamProx with AdamW's best setting that decays, paired by seed."""
    cells = {}
    for network, (adamw, adamprox) in grids.items():
        if not (decaying := _decaying(adamw)):
            continue
        setting = best(decaying, lab.store)
        cells[network] = [
            [grid.cell(setting.lr, setting.weight_decay, seed) for seed in lab.settings.paired]
            for grid in (adamw, adamprox)
        ]
    every = (cell for pair in cells.values() for some in pair for cell in some)
    lab.fill(every, "figure 5, seeds")
    rows = []
    for network, pair in cells.items():
        first, second = ([lab.store[cell] for cell in some] for some in pair)
        cell = pair[0][0]
        row = {"network": network, "lr": cell.lr, "lambda": cell.weight_decay, "seeds": len(first)}
        rows.append({**row, **difference(first, second)._asdict()})
    lab.finish("figure-5-seeds", "Figure 5: AdamW's test error minus AdamProx's, by seed", rows)


def figure_6(lab: Lab) -> None:
    """Section 5's rules beside AdamW; for AdamProxL1, zeros and accuracy over lambda."""
    network = lab.settings.section5_network
    grids = lab.grids([network], SECTION_5)
    bests = lab.bests(grids, "figure 6")
    figure, axes = plots.panels(2, 3, 2.8)
    for row, some in zip(axes, (grids[network][:3], grids[network][3:]), strict=False):
        pictures.heatmaps(row, some, lab.store, network, lab.scale(grids))
    pictures.save(figure, lab.out, "figure-6")
    of_best = {name: bests[network, name] for name in SECTION_5}
    figure, axes = plots.panels(1, 2, 3.6)
    pictures.curves(axes[0, 0], axes[0, 1], of_best, "best settings", columns=1)
    pictures.save(figure, lab.out, "figure-6-curves")
    lab.finish("figure-6", "Figure 6: without BN", lab.best_rows(grids))
    settings = [(grid, grid.best(lab.store)) for grid in grids[network] if grid.name != "AdamW"]
    # Without decay a rule is AdamW without decay: beside that, its best setting that decays.
    settings += [
        (grid, best(decaying, lab.store))
        for grid, setting in settings
        if setting.weight_decay == 0 and (decaying := _decaying(grid))
    ]
    [adamw] = [grid.best(lab.store) for grid in grids[network] if grid.name == "AdamW"]
    seeds = lab.settings.paired
    of_adamw = [dataclasses.replace(adamw, seed=seed) for seed in seeds]
    trained = [
        (grid, [dataclasses.replace(cell, seed=seed) for seed in seeds]) for grid, cell in settings
    ]
    lab.fill([*of_adamw, *(cell for _, cells in trained for cell in cells)], "figure 6, seeds")
    rows = []
    for grid, cells in trained:
        results, theirs = ([lab.store[cell] for cell in each] for each in (cells, of_adamw))
        row = {"optimizer": grid.name, "lr": cells[0].lr, "lambda": cells[0].weight_decay}
        rows.append({**row, "seeds": len(seeds), **difference(results, theirs)._asdict()})
    lab.finish("section-5", "Each rule's test error minus AdamW's, by seed", rows)
    _l1_path(lab, [grid for grid in grids[network] if grid.base.optimizer == "AdamProxL1"])


def _l1_path(lab: Lab, grids: Sequence[Grid]) -> None:
    """Zeros and accuracy over lambda."""
    figure, axes = plots.panels(1, 1, 3.2)
    path: list[Row] = []
    index = 0
    for grid in grids:
        for lr in grid.lrs:
            of_lr: list[Row] = []
            for decay in grid.weight_decays:
                result = lab.store[grid.cell(lr, decay)]
                row: Row = {"optimizer": grid.name, "lr": lr, "lambda": decay}
                row.update(
                    zeros=result.zeros, accuracy=1 - result.test_error, train_loss=result.train_loss
                )
                of_lr.append(row)
            zeros = [100 * row["zeros"] for row in of_lr]
            accuracies = [100 * row["accuracy"] for row in of_lr]
            options = f", {grid.base.options}" if grid.base.options else ""
            label = rf"$\alpha$ = {lr:g}{options}"
            axes[0, 0].plot(zeros, accuracies, label=label, **plots.series(index))
            path += of_lr
            index += 1
    axes[0, 0].set_xlabel("zero weights, %")
    axes[0, 0].set_ylabel("test accuracy, %")
    plots.legend(axes[0, 0], r"AdamProxL1, a point for each $\lambda$", 4)
    pictures.save(figure, lab.out, "l1-path")
    lab.finish("l1-path", "Section 5: AdamProxL1's zeros over lambda", path)


def _histograms(number: int) -> Callable[[Lab], None]:
    def figure(lab: Lab) -> None:
        settings = lab.settings
        network = settings.histogram_networks[number]
        # A network without a grid of its own has the best settings of one that has.
        has_grid = network in settings.networks
        source = network if has_grid else settings.networks[-1]
        shorter: Row = {} if has_grid else {"epochs": settings.histogram_epochs}
        grids = lab.grids([source])
        lab.search(grids, f"figure {number}, settings")
        cells = {
            grid.name: dataclasses.replace(grid.best(lab.store), network=network, **shorter)
            for grid in grids[source]
        }
        lab.fill(cells.values(), f"figure {number}")
        results = {name: lab.store[cell] for name, cell in cells.items()}
        rows = [
            {
                "network": network,
                "optimizer": pictures.name_of(name),
                "lr": cells[name].lr,
                "lambda": cells[name].weight_decay,
                "epoch": epoch,
                "iqr_octaves": interquartile_range(counts),
                **{f"bin_{index}": count for index, count in enumerate(counts)},
            }
            for name, result in results.items()
            for epoch, counts in zip(result.histogram_epochs, result.histograms, strict=True)
        ]
        epochs = max(len(result.histograms) for result in results.values())
        figure, axes = plots.panels(max(1, math.ceil(epochs / 2)), 2, 2.4, sharey=True)
        for index, place in enumerate(axes.flat):
            some = {name: r for name, r in results.items() if index < len(r.histograms)}
            if some:
                pictures.histograms(place, some, index, network)
            else:
                place.set_axis_off()
        pictures.save(figure, lab.out, f"figure-{number}")
        title = f"Figure {number}: {network}, the spread of update magnitudes"
        lab.finish(f"figure-{number}", title, rows, shown=6)

    figure.__doc__ = "The histograms of update magnitudes over the training of a network."
    return figure


def appendix(lab: Lab) -> None:
    """Algorithms 2 and 3 with their theorems' bounds; SGD without BN."""
    rounds = lab.settings.rounds
    rows: list[Row] = []
    total = rounds * len(adagrad.DIMENSIONS)
    with tqdm(total=total, desc="Theorem 3", unit="round", disable=None, leave=False) as progress:
        for number in adagrad.DIMENSIONS:
            for each in adagrad.adagrad_with_restarts(number, rounds, progress.update):
                rows.append({**each._asdict(), "holds": each.distance <= each.bound})
    lab.finish("theorem-3", "Theorems 2 and 3: AdaGrad with restarts", rows)
    settings = lab.settings
    cells = []
    for batch_norm in (False, True):
        base = settings.cell(
            settings.sgd_network,
            "SGD",
            batch_norm=batch_norm,
            epochs=settings.sgd_epochs,
            weight_decay=SGD_WEIGHT_DECAY,
        )
        cells += [dataclasses.replace(base, lr=lr) for lr in SGD_LEARNING_RATES]
    lab.fill(cells, "SGD without BN")
    rows = []
    for cell in cells:
        result = lab.store[cell]
        rows.append(
            {
                "network": cell.network,
                "batch_norm": cell.batch_norm,
                "lr": cell.lr,
                "loss": result.train_loss,
                "test_error": result.test_error,
            }
        )
    lab.finish("sgd", "Section 4.1: SGD with momentum", rows)


FIGURES: dict[str, Callable[[Lab], None]] = {
    "1": figure_1,
    "2": figure_2,
    "3": figure_3,
    "4": figure_4,
    "5": figure_5,
    "6": figure_6,
    **{str(number): _histograms(number) for number in range(7, 13)},
    "mechanism": further.mechanism,
    "sparsity": further.sparsity,
    "distributed": further.distributed,
    "section-3": further.section_3,
    "appendix": appendix,
    "claims": further.claims,  # the last one, since it reads the tables of the others
}
