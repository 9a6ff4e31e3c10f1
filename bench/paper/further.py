"""Experiments that the paper has no figure of: controls, sparsity, several ranks, section 3."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from adamprox import plots

from . import pictures, theory
from .claims import judged
from .grids import best
from .intervals import difference
from .lab import Row, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .grids import Grid
    from .lab import Lab
    from .training import Cell

# What sparsifies: an optimizer with what is special in its cells, and the shares asked for.
SHARES = (0.5, 0.8, 0.9, 0.95)
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
    "magnitude": ({}, SHARES),
    "l1 in the loss": ({"optimizer": "Adam", "weight_decay": 0.0}, SHARES),
}
L1_STRENGTHS = (1e-5, 1e-4, 1e-3)  # in the loss; the best one on the images that choose


def mechanism(lab: Lab) -> None:
    """What carries AdamW's advantage: scale-freeness, or the strength of the shrinkage.

    Figure 3's best settings, with one thing changed in each control. Adam-l2 that is shrunk has
    AdamW's learning rate, too, so that its weights shrink as fast.
    """
    settings = lab.settings
    grids = lab.grids(settings.mechanism_networks)
    lab.search(grids, "mechanism, settings")
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
    lab.fill(every, "mechanism")
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
                    **spread("test_error", [result.test_error for result in those]),
                    "AdamW_gains": gain.mean,
                    "AdamW_gains_min": gain.low,
                    "AdamW_gains_max": gain.high,
                }
            )
    pictures.save(figure, lab.out, "pace")
    lab.finish("mechanism", "Controls of AdamW's advantage, without BN", rows)


def sparsity(lab: Lab) -> None:
    """Accuracy over the share of zeros: proximal rules, magnitude pruning, l1 in the loss.

    All train as long, at AdamW's best learning rate: see :mod:`.sparsifying`.
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
    for (name, share), cells in trained.items():
        results = [lab.store[cell] for cell in cells]
        rows.append(
            {
                "training": name,
                "asked": share,
                "strength_of_l1": cells[0].l1,
                "seeds": len(results),
                **spread("zeros", [result.zeros for result in results]),
                **spread("accuracy", [1 - result.test_error for result in results]),
            }
        )
    figure, axes = plots.panels(1, 1, 3.4)
    pictures.sparsity(axes[0, 0], rows)
    pictures.save(figure, lab.out, "sparsity")
    lab.finish("sparsity", "Section 5: accuracy at a share of zeros", rows)


def distributed(lab: Lab) -> None:
    """Section 5's last question: small local batches on several ranks, with and without BN.

    The batch is the same on any number of ranks, which have equal parts of it.
    """
    settings = lab.settings
    grids: dict[bool, list[Grid]] = {}
    for batch_norm in (False, True):
        found = lab.grids([settings.section5_network], batch_norm=batch_norm)
        lab.search(found, "distributed, settings")
        [grids[batch_norm]] = found.values()
    changes: dict[str, Any] = {
        "batch": settings.distributed_batch,
        "epochs": settings.distributed_epochs,
    }
    trained = {
        (batch_norm, grid.name, ranks): [
            dataclasses.replace(grid.best(lab.store), seed=seed, ranks=ranks, **changes)
            for seed in settings.reported[:3]
        ]
        for batch_norm, pair in grids.items()
        for grid in pair
        for ranks in settings.ranks
    }
    lab.fill([cell for cells in trained.values() for cell in cells], "distributed")
    rows: list[Row] = []
    for (batch_norm, name, ranks), cells in trained.items():
        results = [lab.store[cell] for cell in cells]
        rows.append(
            {
                "batch_norm": batch_norm,
                "optimizer": pictures.name_of(name),
                "ranks": ranks,
                "local_batch": settings.distributed_batch // ranks,
                "seeds": len(results),
                **spread("test_error", [result.test_error for result in results]),
            }
        )
    title = f"Section 5: {settings.section5_network} on several ranks, batches of "
    lab.finish("distributed", f"{title}{settings.distributed_batch}", rows)


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
