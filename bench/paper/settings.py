"""What is trained: the paper's settings, and smaller ones for two cores and some minutes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from . import data
from .grids import Grid
from .networks import DENSENET
from .training import Cell

if TYPE_CHECKING:
    from pathlib import Path

PAIR = ("Adam", "AdamW")
RESNETS = tuple(f"ResNet-{layers}" for layers in (20, 44, 56, 110, 218))
HISTOGRAM_NETWORKS = dict(enumerate((*RESNETS, DENSENET), start=7))
PAPER_LRS = (5e-5, 1e-4, 5e-4, 1e-3, 5e-3)
PAPER_WEIGHT_DECAYS = (0.0, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3)
PAPER_DENSENET_EPOCHS = 100  # in figure 5
# What the authors' code names as the best settings: alpha and lambda of a network, an optimizer and
# a factor of the loss.
PUBLISHED = {
    ("ResNet-110", "Adam", 1.0): (1e-3, 5e-4),
    ("ResNet-110", "AdamW", 1.0): (5e-4, 1e-4),
    ("ResNet-110", "Adam", 10.0): (1e-3, 5e-3),
    ("ResNet-110", "AdamW", 10.0): (5e-4, 1e-4),
    ("ResNet-110", "Adam", 100.0): (1e-4, 0.1),
    ("ResNet-110", "AdamW", 100.0): (5e-4, 1e-4),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of all figures; the networks are those of the paper's figure of that name.

    Attributes:
        images: a name that :func:`.data.load` knows; ``cifar`` is CIFAR-10, and CIFAR-100 for the
            DenseNet.
        size: height and width that images are scaled to.
        widths: of the networks, see :func:`.networks.make`; figures but the third take the first.
        optimizers: that figure 3 compares.
        batch_norm_networks, networks: of figures 2 and 3, without the latter's BN.
        mechanism_networks: of the controls.
        histogram_networks: of figures 7 to 12. One that is not in ``networks`` is trained for
            ``histogram_epochs`` with the best settings of the last one there.
        lrs, weight_decays: the grid of AdamW, AdamProx and AdamProxL2 starts as their product.
        coupled_weight_decays: the grid's for Adam-l2.
        scaled_weight_decays: figure 4's, of both optimizers.
        l1_weight_decays, l2_weight_decays: AdamProxL1's thresholds, AdamProxL2's lengths.
        extensions: how often a grid is extended at most.
        seeds: of weights and order. The first one's trainings choose the best setting.
        par_seeds: those of comparisons in which a point is to be told from none: of AdamW with
            other rules, on a network that trains in seconds. Empty: those that are reported.
        train_images: how many are trained on; 0 for all.
        validation: how many others are held out, on which the best setting is chosen; with 0 it is
            chosen on the test images, as in the paper.
        ranks, distributed_batch, distributed_epochs: of the trainings on several ranks.
        densenet_epochs: figure 5's of the DenseNet; 0 for ``epochs``.
        published: whether grids are :data:`PUBLISHED`'s single settings.
    """

    images: str
    size: int
    widths: tuple[int, ...]
    epochs: int
    batch: int
    batch_norm_networks: tuple[str, ...]
    networks: tuple[str, ...]
    scaled_network: str
    taylor_networks: tuple[str, ...]
    section5_network: str
    mechanism_networks: tuple[str, ...]
    histogram_networks: dict[int, str]
    histogram_epochs: int
    sgd_network: str
    sgd_epochs: int
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    coupled_weight_decays: tuple[float, ...]
    scaled_weight_decays: tuple[float, ...]
    l1_weight_decays: tuple[float, ...]
    l2_weight_decays: tuple[float, ...]
    extensions: int
    rounds: int  # of Algorithm 3
    seeds: tuple[int, ...] = (0, 1, 2)
    par_seeds: tuple[int, ...] = ()
    train_images: int = 0
    validation: int = 0
    optimizers: tuple[str, ...] = PAIR
    ranks: tuple[int, ...] = (1, 2, 4)
    distributed_batch: int = 8
    distributed_epochs: int = 3
    densenet_epochs: int = 0
    published: bool = False

    @property
    def reported(self) -> tuple[int, ...]:
        """The seeds whose errors are told: where images are held out, not the one that selects."""
        return self.seeds[1:] if self.validation > 0 else self.seeds

    @property
    def paired(self) -> tuple[int, ...]:
        """The seeds that tell whether rules are on a par."""
        return self.par_seeds or self.reported

    def decays_of(self, name: str) -> tuple[float, ...]:
        """Where the grid of an optimizer starts."""
        optimizer, _, options = name.partition(", ")
        of_others = {
            "Adam": self.coupled_weight_decays,
            "AdamProxL1": self.l1_weight_decays,
            "AdamProxL2": self.l2_weight_decays,
        }
        decays = of_others.get(optimizer, self.weight_decays)
        # In Adam's metric a strength is divided by the root of a gradient's square.
        return tuple(decay / 100 for decay in decays) if "metric=adam" in options else decays

    def grid(self, network: str, name: str, **changes: Any) -> Grid:
        """Of a network and an optimizer.

        Args:
            name: the optimizer's, and after a comma its options: ``"AdamProxL1, metric=adam"``.
            changes: fields of its cells that are other ones.
        """
        cell = self.cell(network, name, **changes)
        lrs, decays = self.lrs, self.decays_of(name)
        if self.published:
            lr, decay = PUBLISHED[network, name, cell.loss_factor]
            lrs, decays = (lr,), (decay,)
        return Grid(cell, list(lrs), list(decays))

    def cell(self, network: str, name: str, **changes: Any) -> Cell:
        """As :meth:`grid`, with the optimizer's settings still to be chosen."""
        optimizer, _, options = name.partition(", ")
        images = self.images
        if images == "cifar":
            images = "cifar100" if network == DENSENET else "cifar10"
        cell = Cell(
            data=images,
            size=self.size,
            network=network,
            width=self.widths[0],
            batch_norm=False,
            optimizer=optimizer,
            lr=0.0,
            weight_decay=0.0,
            epochs=self.epochs,
            batch=self.batch,
            seed=self.seeds[0],
            train_images=self.train_images,
            validation=self.validation,
            options=options,
        )
        return dataclasses.replace(cell, **changes)


def paper(path: Path | None) -> Settings:
    """The paper's own; on digits where there is no path of archives."""
    images = "digits" if path is None else data.name_of(path)
    return Settings(
        images=images,
        size=32 if images in ("digits", "cifar") else 28,
        widths=(16,),
        epochs=300,
        batch=128,
        batch_norm_networks=("ResNet-20", "ResNet-44", "ResNet-56", "ResNet-110", DENSENET),
        networks=(*RESNETS, DENSENET),
        scaled_network="ResNet-110",
        taylor_networks=("ResNet-110", DENSENET),
        section5_network="ResNet-110",
        mechanism_networks=RESNETS,
        histogram_networks=HISTOGRAM_NETWORKS,
        histogram_epochs=300,
        sgd_network="ResNet-110",
        sgd_epochs=5,
        lrs=PAPER_LRS,
        weight_decays=PAPER_WEIGHT_DECAYS,
        coupled_weight_decays=PAPER_WEIGHT_DECAYS,
        scaled_weight_decays=(*PAPER_WEIGHT_DECAYS, 5e-3, 1e-2, 5e-2, 0.1),
        l1_weight_decays=(0.0, 1e-7, 5e-7, 1e-6, 5e-6, 1e-5, 5e-5),
        l2_weight_decays=(0.0, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3),
        extensions=6,
        rounds=6,
        distributed_batch=128,
        distributed_epochs=300,
        densenet_epochs=PAPER_DENSENET_EPOCHS,
    )


QUICK = Settings(
    images="digits",
    size=8,
    widths=(4,),
    epochs=25,
    batch=32,
    batch_norm_networks=("ResNet-8",),
    networks=("ResNet-8", "ResNet-20", "ResNet-56"),
    scaled_network="ResNet-8",
    taylor_networks=("ResNet-8",),
    section5_network="ResNet-8",
    mechanism_networks=("ResNet-20",),
    histogram_networks=HISTOGRAM_NETWORKS,
    histogram_epochs=1,
    sgd_network="ResNet-110",
    sgd_epochs=1,
    lrs=(1e-3, 5e-3),
    weight_decays=(0.0, 1e-4, 1e-3, 1e-2),
    coupled_weight_decays=(0.0, 1e-4, 1e-3, 1e-2),
    scaled_weight_decays=(0.0, 1e-4, 1e-3, 1e-2, 0.1),
    l1_weight_decays=(0.0, 1e-5, 1e-4, 5e-4),
    l2_weight_decays=(0.0, 1e-3, 1e-2),
    extensions=0,
    rounds=2,
    ranks=(1, 2),
)


def study(path: Path) -> Settings:
    """For two cores and some hours: enough images and seeds to tell differences of a point."""
    return Settings(
        images=data.name_of(path),
        size=14,
        widths=(4,),
        epochs=10,
        batch=32,
        batch_norm_networks=("ResNet-20", "ResNet-56"),
        networks=("ResNet-8", "ResNet-20", "ResNet-44", "ResNet-56", "ResNet-110"),
        scaled_network="ResNet-20",
        taylor_networks=("ResNet-20",),
        section5_network="ResNet-20",
        mechanism_networks=("ResNet-56", "ResNet-110"),
        histogram_networks=HISTOGRAM_NETWORKS,
        histogram_epochs=10,
        sgd_network="ResNet-110",
        sgd_epochs=1,
        lrs=(1e-3, 5e-3, 1e-2),
        weight_decays=(0.0, 1e-4, 1e-3, 1e-2),
        coupled_weight_decays=(0.0, 1e-5, 1e-4, 1e-3, 1e-2),
        scaled_weight_decays=(0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1),
        l1_weight_decays=(0.0, 1e-6, 1e-5, 1e-4),
        l2_weight_decays=(0.0, 1e-4, 1e-3, 1e-2),
        extensions=3,
        rounds=3,
        seeds=(0, 1, 2, 3, 4, 5),
        par_seeds=tuple(range(1, 21)),
        train_images=10_000,
        validation=5_000,
    )
