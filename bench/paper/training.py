"""A cell of an experiment: one network trained once, with one setting of one optimizer."""

from __future__ import annotations

import dataclasses
import math
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import adamprox
from adamprox.optimizers import _FusedAdam

from . import data, networks
from .histograms import interquartile_range, update_histogram

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch.optim import Optimizer

HISTOGRAMS = 6  # over the training, the last one at its end
SGD_MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a training depends on; the same cell gives the same result on the same machine.

    The weights and the order and augmentation of the images are the seed's, whatever the optimizer.
    The learning rate is constant, as in the authors' code: ``eta_t = 1``, and a decay has the
    paper's strength ``eta_t * weight_decay``.
    """

    data: str
    size: int
    network: str
    width: int
    batch_norm: bool
    optimizer: str
    lr: float
    weight_decay: float
    epochs: int
    batch: int = 128
    loss_factor: float = 1.0
    eps: float = 1e-8
    seed: int = 0


@dataclasses.dataclass
class Result:
    """What came of a training.

    Attributes:
        train_loss: mean over the last epoch's batches; NaN where it diverged. Without the factor.
        test_error: share of test images that are misclassified at the end.
        iqr: interquartile range of the last histogram, in octaves.
        zeros: share of weights that are exactly zero.
        seconds: of the CPU's time (of the clock on a GPU).
        train_losses, test_errors: of each epoch.
        histograms: of update magnitudes, at the last steps of the epochs ``histogram_epochs``.
    """

    train_loss: float
    test_error: float
    iqr: float
    zeros: float
    seconds: float
    train_losses: list[float]
    test_errors: list[float]
    histogram_epochs: list[int]
    histograms: list[list[int]]


def train(
    cell: Cell,
    device: torch.device,
    path: Path | None = None,
    after_epoch: Callable[[], object] | None = None,
) -> Result:
    """Trains; ends early where the loss is not finite any more.

    Args:
        path: of CIFAR's archives.

    Raises:
        FileNotFoundError, ValueError: as :func:`.data.load` and :func:`.networks.make`.
    """
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    start = clock()
    images = _load(cell.data, cell.size, path, device)
    model, optimizer = _make(cell, images, device)
    if isinstance(optimizer, _FusedAdam):  # the last step of each epoch
        optimizer.track_updates(every=math.ceil(len(images.train) / cell.batch))
    random = torch.Generator().manual_seed(cell.seed)
    tracked = [math.ceil(k * cell.epochs / HISTOGRAMS) for k in range(1, HISTOGRAMS + 1)]
    result = Result(math.nan, math.nan, math.nan, 0.0, 0.0, [], [], [], [])
    for epoch in range(1, cell.epochs + 1):
        loss = _train_epoch(cell, model, optimizer, images, random)
        result.train_losses.append(loss)
        result.test_errors.append(_test_error(model, images))
        if not math.isfinite(loss):
            break
        if epoch in tracked and isinstance(optimizer, _FusedAdam):
            result.histogram_epochs.append(epoch)
            result.histograms.append(update_histogram(optimizer).tolist())
        if after_epoch is not None:
            after_epoch()
    result.train_loss, result.test_error = result.train_losses[-1], result.test_errors[-1]
    if result.histograms:
        result.iqr = interquartile_range(result.histograms[-1])
    weights = list(model.parameters())
    result.zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    result.seconds = clock() - start
    return result


def estimate(cell: Cell, device: torch.device, path: Path | None = None) -> float:
    """About how many seconds :func:`train` takes, from one of its steps.

    Raises:
        FileNotFoundError, ValueError: as :func:`train`.
    """
    images = _load(cell.data, cell.size, path, device)
    model, optimizer = _make(cell, images, device)
    random = torch.Generator().manual_seed(cell.seed)
    for count in (8, cell.batch):  # the first step makes the states
        some = {name: getattr(images, name)[:count] for name in ("train", "train_labels")}
        start = time.perf_counter()
        _train_epoch(cell, model, optimizer, images._replace(**some), random)
        seconds = time.perf_counter() - start
    return seconds * len(images.train) / cell.batch * cell.epochs


def _make(cell: Cell, images: data.Images, device: torch.device) -> tuple[nn.Module, Optimizer]:
    # On the CPU this layout is the faster one.
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    torch.manual_seed(cell.seed)
    channels = images.train.shape[1] if images.train.dim() > 1 else 1
    model = networks.make(cell.network, images.classes, channels, cell.batch_norm, cell.width)
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    return model, make_optimizer(cell, model)


def make_optimizer(cell: Cell, model: nn.Module) -> Optimizer:
    """One of adamprox's, or torch's SGD with momentum."""
    settings: dict[str, Any] = {"lr": cell.lr, "weight_decay": cell.weight_decay}
    if cell.optimizer == "SGD":
        return torch.optim.SGD(model.parameters(), momentum=SGD_MOMENTUM, **settings)
    made: Optimizer = getattr(adamprox, cell.optimizer)(
        model.parameters(), betas=(0.9, 0.999), eps=cell.eps, decay_by="schedule", **settings
    )
    return made


def _train_epoch(
    cell: Cell,
    model: nn.Module,
    optimizer: Optimizer,
    images: data.Images,
    random: torch.Generator,
) -> float:
    """The mean loss."""
    model.train()
    count = len(images.train)
    loss_sum = torch.zeros((), dtype=torch.float64, device=images.train.device)
    for batch in torch.randperm(count, generator=random).split(cell.batch):
        batch = batch.to(images.train.device)
        inputs = images.train[batch]
        if images.augmented:
            inputs = data.augment(inputs, images.padding, images.mirrored, random)
        loss = F.cross_entropy(model(inputs), images.train_labels[batch])
        optimizer.zero_grad()
        (cell.loss_factor * loss).backward()
        optimizer.step()
        loss_sum += loss.detach() * len(batch)
    return loss_sum.item() / count


@torch.no_grad()
def _test_error(model: nn.Module, images: data.Images) -> float:
    model.eval()
    wrong = torch.zeros((), dtype=torch.int64, device=images.test.device)
    batches = zip(images.test.split(512), images.test_labels.split(512), strict=True)
    for inputs, labels in batches:
        wrong += (model(inputs).argmax(dim=1) != labels).sum()
    return wrong.item() / len(images.test)


@lru_cache(maxsize=2)
def _load(name: str, size: int, path: Path | None, device: torch.device) -> data.Images:
    images = data.load(name, size, path)
    return images._replace(
        **{name: getattr(images, name).to(device) for name in data.Images._fields[:5]}
    )
