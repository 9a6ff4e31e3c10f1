"""Adam-l2 beside AdamW: what one gains over the other, over networks and settings."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from typing import TYPE_CHECKING

from adamprox import plots

from . import pictures
from .grids import best
from .histograms import inner_range
from .intervals import difference, interval, loss_ratio, slope
from .lab import Row, at_chance
from .settings import PAIR

if TYPE_CHECKING:
    from collections.abc import Callable

    from .grids import Grid
    from .lab import Bests, Grids, Lab
    from .training import Result

SPREADS: dict[str, Callable[[Result], float]] = {
    "": lambda run: run.iqr,
    "_inner": lambda run: inner_range(run.histograms),
}


def without_decay(lab: Lab, grids: Grids, bests: Bests) -> None:
    """What the best decay gains over none, each at its best alpha, paired by seed."""
    every = {(network, grid.name): grid for network, pair in grids.items() for grid in pair}
    without = {
        key: [
            dataclasses.replace(best([grid.cell(lr, 0.0) for lr in grid.lrs], lab.store), seed=seed)
            for seed in lab.settings.reported
        ]
        for key, grid in every.items()
        if 0 in grid.weight_decays
    }
    lab.fill([cell for cells in without.values() for cell in cells], "figure 2, without decay")
    rows = [
        {
            "network": network,
            "optimizer": pictures.name_of(name),
            "lambda": every[network, name].best(lab.store).weight_decay,
            **difference([lab.store[cell] for cell in cells], bests[network, name])._asdict(),
        }
        for (network, name), cells in without.items()
    ]
    lab.finish("without-decay", "Figure 2: the error without decay minus the best one's", rows)


def decoupling(lab: Lab, network: str, grid: Grid) -> Row:
    """What an optimizer loses, if lambda is chosen at another alpha than the one that is used.

    It is chosen on the images that choose, and its error is of the test images.
    """
    lrs = [lr for lr in lab.settings.lrs if lr in grid.lrs]  # the same ones of both optimizers
    chosen = {
        lr: best([grid.cell(lr, decay) for decay in grid.weight_decays], lab.store).weight_decay
        for lr in lrs
    }
    error = {
        (lr, decay): lab.store[grid.cell(lr, decay)].test_error
        for lr in lrs
        for decay in chosen.values()
    }
    losses = [
        error[lr, chosen[other]] - error[lr, chosen[lr]]
        for lr in lrs
        for other in lrs
        if other != lr
    ]
    return {
        "network": network,
        "optimizer": pictures.name_of(grid.name),
        "best_lambdas": ", ".join(f"{chosen[lr]:g} at {lr:g}" for lr in lrs),
        "lost_mean": statistics.mean(losses) if losses else math.nan,
        "lost_most": max(losses, default=math.nan),
    }


def advantage(lab: Lab, name: str, grids: Grids, bests: Bests) -> None:
    """What AdamW gains over Adam-l2, paired by seed, in a table and over the networks."""
    rows = []
    for network, row in grids.items():
        first, second = (bests[network, optimizer] for optimizer in PAIR)
        pair = [grid for grid in row if grid.name in PAIR]
        ratio, low, high = loss_ratio(first, second)
        rows.append(
            {
                "network": network,
                "seeds": len(first),
                **difference(first, second)._asdict(),
                "loss_ratio": ratio,
                "loss_ratio_low": low,
                "loss_ratio_high": high,
                "lambdas": " and ".join(f"{grid.best(lab.store).weight_decay:g}" for grid in pair),
                "at_chance": " and ".join(
                    str(sum(map(at_chance, runs))) for runs in (first, second)
                ),
                "on_border": "; ".join(
                    f"{pictures.name_of(grid.name)}: {side}"
                    for grid in pair
                    for side in grid.on_border(lab.store)
                ),
            }
        )
    figure, axes = plots.panels(1, 1, 3)
    pictures.advantage(axes[0, 0], rows)
    pictures.save(figure, lab.out, name)
    lab.finish(name, "Adam-l2's test error minus AdamW's, by seed", rows, shown=7)


def by_depth(lab: Lab, grids: Grids, bests: Bests) -> None:
    """How much more AdamW gains if the layers are twice as many.

    Also without each network, and without the two deepest ones.
    """
    layers = {}
    for network in grids:
        if found := re.fullmatch(r"ResNet-(\d+)", network):
            layers[network] = math.log2(int(found[1]))
    if len(layers) < 2:
        return
    named = {"of all": layers}
    left_out = [{network} for network in layers] if len(layers) > 2 else []
    if len(layers) > 3:
        left_out.append(set(sorted(layers, key=layers.__getitem__)[-2:]))
    for some in left_out:
        names = " and ".join(network for network in layers if network in some)
        named[f"without {names}"] = {n: d for n, d in layers.items() if n not in some}
    rows = []
    for name, kept in named.items():
        pairs = [[bests[network, optimizer] for network in kept] for optimizer in PAIR]
        mean, low, high = slope(list(kept.values()), *pairs)
        row = {"networks": name, "seeds": len(pairs[0][0])}
        rows.append({**row, "mean": mean, "low": low, "high": high})
    title = "What AdamW gains by twice as many layers, by seed"
    lab.finish("advantage-by-depth", title, rows)


def concentration(lab: Lab, grids: Grids, bests: Bests) -> None:
    """How much wider Adam-l2's updates are spread than AdamW's, paired by seed.

    Trainings that have learnt nothing are left out, and so are their partners. Those without any
    decay have AdamW's alpha; they are there if its grid has 0.
    """
    without = {}
    for network, pair in grids.items():
        [adamw] = [grid for grid in pair if grid.name == "AdamW"]
        lr = adamw.best(lab.store).lr
        seeds = lab.settings.reported if 0 in adamw.weight_decays else ()
        without[network] = [adamw.cell(lr, 0.0, seed) for seed in seeds]
    lab.fill([cell for cells in without.values() for cell in cells], "figure 3, without decay")
    rows = []
    learnt: Bests = {}
    for network in grids:
        both = zip(*(bests[network, name] for name in PAIR), strict=True)
        kept = [runs for runs in both if not any(map(at_chance, runs))]
        row: Row = {"network": network, "seeds": len(kept)}
        neither = [r for r in (lab.store[c] for c in without[network]) if not at_chance(r)]
        for suffix, of in SPREADS.items():
            spreads = [(of(first), of(second)) for first, second in kept]
            gains = [first - second for first, second in spreads]
            low, high = interval(gains)
            for index, name in enumerate(PAIR):
                each = [both[index] for both in spreads]
                row[f"{pictures.name_of(name)}{suffix}"] = statistics.mean(each or [math.nan])
            row[f"no_decay{suffix}"] = statistics.mean([of(run) for run in neither] or [math.nan])
            named = {"mean": statistics.mean(gains or [math.nan]), "low": low, "high": high}
            row.update({f"{key}{suffix}": value for key, value in named.items()})
        gain = difference(*(bests[network, name] for name in PAIR))
        rows.append({**row, "gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high})
        if kept:
            learnt.update(
                {
                    (network, n): list(runs)
                    for n, runs in zip(PAIR, zip(*kept, strict=True), strict=True)
                }
            )
    figure, axes = plots.panels(1, 2, 2.8, sharey=True)
    for place, inner_only in zip(axes[0], (False, True), strict=True):
        pictures.spreads(place, learnt, inner_only)
    pictures.save(figure, lab.out, "concentration")
    title = "Adam-l2's spread of log2 magnitudes minus AdamW's, octaves"
    lab.finish("concentration", title, rows, shown=8)
