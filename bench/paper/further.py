"""Experiments that the paper has no figure of: controls, sparsity, several ranks, section 3."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from adamprox import plots

from . import pictures, theory
from .claims import judged
from .grids import best
from .intervals import difference
from .lab import Row, at_chance, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .lab import Lab
    from .training import Cell

# What sparsifies: an optimizer with what is special in its cells, and the shares asked for.
SHARES = (0.5, 0.8, 0.95)
NEARLY_NOTHING = 0.001
ROW_SHARES = (0.1, 0.25, 0.5)  # whole rows matter more than as many single weights
SPARSIFIERS: dict[str, tuple[Row, tuple[float, ...]]] = {
    "AdamProxL1": ({"optimizer": "AdamProxL1", "weight_decay": 1e-5}, SHARES),
    "AdamProxL1, metric=adam": (
        {"optimizer": "AdamProxL1", "weight_decay": 1e-7, "options": "metric=adam"},
        SHARES,
    ),
    "elastic net": (
        {"optimizer": "AdamProxL1", "weight_decay": 1e-5, "options": "l2=1e-3"},
        SHARES,
    ),
    "rows, AdamProxL2": (
        {"optimizer": "AdamProxL2", "weight_decay": 1e-5, "options": "block=row"},
        ROW_SHARES,
    ),
    "magnitude": ({}, (NEARLY_NOTHING, *SHARES)),
    "l1 in the loss": ({"optimizer": "Adam", "weight_decay": 0.0}, SHARES),
}
L1_STRENGTHS = (1e-5, 1e-4, 1e-3)  # in the loss; the best one on the images that choose


def mechanism(lab: Lab) -> None:
    """What carries AdamW's advantage: scale-freeness, or the strength of the shrinkage.

    Figure 3's best settings, with one thing changed in each control. Adam-l2 that is shrunk has
    AdamW's learning rate, too, so that its weights shrink as fast. With a scaled start both have
    the best settings of that start, and are compared with each other.
    """
    settings = lab.settings
    grids = lab.grids(settings.mechanism_networks)
    lab.search(grids, "mechanism, settings")
    scaled = lab.grids(settings.mechanism_networks, start="scaled")
    lab.search(scaled, "mechanism, settings of a scaled start")
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
        }
        for grid in scaled[network]:
            cells[f"{pictures.name_of(grid.name)}, scaled start"] = grid.best(lab.store)
        trained[network] = {
            control: [dataclasses.replace(cell, seed=seed) for seed in settings.reported]
            for control, cell in cells.items()
        }
    every = [cell for controls in trained.values() for cells in controls.values() for cell in cells]
    lab.fill(every, "mechanism")
    rows: list[Row] = []
    figure, axes = plots.panels(1, len(trained), 2.8, sharey=True)
    for place, (network, controls) in zip(axes[0], trained.items(), strict=True):
        results = {
            control: [lab.store[cell] for cell in cells] for control, cells in controls.items()
        }
        pair = {"Adam": results["Adam-l2"], "AdamW": results["AdamW"]}
        pictures.pace(place, pair, network)
        for control, those in results.items():
            cell = controls[control][0]
            partner = "AdamW, scaled start" if control.endswith("start") else "AdamW"
            gain = difference(those, results[partner])
            rows.append(
                {
                    "network": network,
                    "control": control,
                    "lr": cell.lr,
                    "lambda": cell.weight_decay,
                    "seeds": len(those),
                    **spread("test_error", [result.test_error for result in those]),
                    "at_chance": sum(map(at_chance, those)),
                    **spread("iqr_octaves", [r.iqr for r in those if not at_chance(r)]),
                    "against": partner,
                    "gain": gain.mean,
                    "low": gain.low,
                    "high": gain.high,
                }
            )
    pictures.save(figure, lab.out, "pace")
    lab.finish("mechanism", "Controls of AdamW's advantage, without BN", rows)


def sparsity(lab: Lab) -> None:
    """Accuracy over the share of zeros: proximal rules, magnitude pruning, l1 in the loss.

    All train as long, at AdamW's best learning rate: see :mod:`.sparsifying`. Magnitude pruning
    to nearly nothing is a control of the schedule: its last epochs have no decay, either.
    """
    grids = lab.grids([lab.settings.section5_network], ["AdamW"])
    lab.search(grids, "sparsity, settings")
    [[grid]] = grids.values()
    dense = grid.best(lab.store)
    first: dict[tuple[str, float], list[Cell]] = {}  # to choose the strength of l1 from
    for name, (changes, shares) in SPARSIFIERS.items():
        strengths = L1_STRENGTHS if name == "l1 in the loss" else (0.0,)
        for share in shares:
            first[name, share] = [
                dataclasses.replace(dense, sparsity=share, l1=l1, **changes) for l1 in strengths
            ]
    lab.fill([cell for cells in first.values() for cell in cells], "sparsity, first seed")
    chosen = {("dense", 0.0): dense}
    for key, cells in first.items():
        chosen[key] = best(cells, lab.store)
    seeds = lab.settings.reported
    trained = {
        key: [dataclasses.replace(cell, seed=seed) for seed in seeds]
        for key, cell in chosen.items()
    }
    lab.fill([cell for cells in trained.values() for cell in cells], "sparsity")
    rows: list[Row] = []
    of_dense = [lab.store[cell] for cell in trained["dense", 0.0]]
    for (name, share), cells in trained.items():
        results = [lab.store[cell] for cell in cells]
        gain = difference(of_dense, results)
        rows.append(
            {
                "training": name,
                "asked": share,
                "strength_of_l1": cells[0].l1,
                "seeds": len(results),
                **spread("zeros", [result.zeros for result in results]),
                **spread("accuracy", [1 - result.test_error for result in results]),
                "gain": gain.mean,
                "low": gain.low,
                "high": gain.high,
            }
        )
    figure, axes = plots.panels(1, 1, 3.4)
    pictures.sparsity(axes[0, 0], rows)
    pictures.save(figure, lab.out, "sparsity")
    lab.finish("sparsity", "Section 5: accuracy at a share of zeros", rows)


def distributed(lab: Lab) -> None:
    """Section 5's last question: small local batches on several ranks, with and without BN.

    The batch is the same on any number of ranks, which have equal parts of it. Alpha is chosen for
    these batches, lambda for those of the other experiments. ``cost`` is a row's error minus that
    of a single rank, ``gain`` Adam-l2's minus the row's.
    """
    settings = lab.settings
    changes: dict[str, Any] = {
        "batch": settings.distributed_batch,
        "epochs": settings.distributed_epochs,
    }
    candidates: dict[tuple[bool, str], list[Cell]] = {}
    for batch_norm in (False, True):
        grids = lab.grids([settings.section5_network], batch_norm=batch_norm)
        lab.search(grids, "distributed, settings")
        for grid in grids[settings.section5_network]:
            setting = grid.best(lab.store)
            candidates[batch_norm, grid.name] = [
                dataclasses.replace(setting, lr=lr, **changes) for lr in grid.lrs
            ]
    lab.fill([cell for cells in candidates.values() for cell in cells], "distributed, alpha")
    trained = {
        (*key, ranks): [
            dataclasses.replace(best(cells, lab.store), seed=seed, ranks=ranks)
            for seed in settings.reported
        ]
        for key, cells in candidates.items()
        for ranks in settings.ranks
    }
    lab.fill([cell for cells in trained.values() for cell in cells], "distributed")
    of = {key: [lab.store[cell] for cell in cells] for key, cells in trained.items()}
    rows: list[Row] = []
    for (batch_norm, name, ranks), results in of.items():
        cost = difference(results, of[batch_norm, name, settings.ranks[0]])
        gain = difference(of[batch_norm, "Adam", ranks], results)
        rows.append(
            {
                "batch_norm": batch_norm,
                "optimizer": pictures.name_of(name),
                "ranks": ranks,
                "local_batch": settings.distributed_batch // ranks,
                "lr": trained[batch_norm, name, ranks][0].lr,
                "on_border": trained[batch_norm, name, ranks][0].lr
                in (candidates[batch_norm, name][0].lr, candidates[batch_norm, name][-1].lr),
                "seeds": len(results),
                **spread("test_error", [result.test_error for result in results]),
                **{f"cost_{key}": getattr(cost, key) for key in ("mean", "low", "high")},
                **{f"gain_{key}": getattr(gain, key) for key in ("mean", "low", "high")},
            }
        )
    title = f"Section 5: {settings.section5_network} on several ranks, batches of "
    lab.finish("distributed", f"{title}{settings.distributed_batch}", rows, shown=8)


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
        lab.finish(name, title, [row._asdict() for row in rows])


def claims(lab: Lab) -> None:
    """The table of the paper's claims, from the tables of the others."""
    lab.finish("claims", "The paper's claims", judged(lab.out))
