"""A cell of an experiment: one network trained once, with one setting of one optimizer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import adamprox
from adamprox.optimizers import _FusedAdam

from . import data, networks, ranks, sparsifying
from .histograms import interquartile_range, update_histogram
from .intervals import packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch.optim import Optimizer

# Over the training, the last one at its end.
HISTOGRAMS = 6
EVALUATIONS = 12
EVALUATED = 2048  # images that a curve's points are evaluated on, at most
SGD_MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a training depends on; the same cell gives the same result on the same machine.

    The weights and the order and augmentation of the images are the seed's, whatever the optimizer.
    The learning rate is constant, as in the authors' code: ``eta_t = 1``, and a decay has the
    paper's strength ``eta_t * weight_decay``. ``train_images`` of the images are trained on, all if
    it is 0, and ``validation`` others are held out, on which the best setting is chosen. Before
    a step, weights are multiplied by ``1 - shrinkage``: what AdamW does, for other optimizers.
    ``options`` are further arguments of the optimizer, ``"metric=adam block=row"``. With a
    ``sparsity`` the training is that of :mod:`.sparsifying`; ``l1`` times the sum of absolute
    weights is added to the loss until then. Each batch is dealt out to ``ranks`` processes.
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
    train_images: int = 0
    validation: int = 0
    shrinkage: float = 0.0
    start: str = "he"
    options: str = ""
    sparsity: float = 0.0
    l1: float = 0.0
    ranks: int = 1


@dataclasses.dataclass
class Result:
    """What came of a training.

    Attributes:
        train_loss: in evaluation mode at the end, without augmentation, of up to 2,048 images; NaN
            where it diverged. Without the factor.
        test_error: share of test images that are misclassified at the end.
        iqr: interquartile range of the last histogram, in octaves.
        zeros: share of weights that are exactly zero.
        seconds: of the CPU's time (of the clock on a GPU).
        train_losses, test_errors: at the ends of ``curve_epochs``, of up to 2,048 images each; but
            the last error is ``test_error``.
        histograms: of update magnitudes, at the last steps of the epochs ``histogram_epochs``.
        validation_error: as ``test_error``, of the images that are held out; NaN if there are none.
        pace: the median of log2 of the update magnitudes, a number a tensor, at the last step.
        correct: the test images that are classified right, where images are held out: as
            :func:`.intervals.unpacked` reads it.
    """

    train_loss: float = math.nan
    test_error: float = math.nan
    iqr: float = math.nan
    zeros: float = 0.0
    seconds: float = 0.0
    train_losses: list[float] = dataclasses.field(default_factory=list)
    test_errors: list[float] = dataclasses.field(default_factory=list)
    histogram_epochs: list[int] = dataclasses.field(default_factory=list)
    histograms: list[list[int]] = dataclasses.field(default_factory=list)
    validation_error: float = math.nan
    curve_epochs: list[int] = dataclasses.field(default_factory=list)
    pace: list[float] = dataclasses.field(default_factory=list)
    correct: str = ""


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
    if cell.ranks == 1:
        return _train(cell, device, path, after_epoch)
    result: Result = ranks.start(_train, cell.ranks, cell, device, path)
    return result


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Strengths are tried that are too large."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is zero as a whole after step")
        yield


@_unwarned()
def _train(
    cell: Cell,
    device: torch.device,
    path: Path | None,
    after_epoch: Callable[[], object] | None = None,
) -> Result:
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    start = clock()
    images = _load(cell, path, device)
    model, optimizer = _make(cell, images, device)
    parallel = ranks.parallel(model)
    steps = math.ceil(len(images.train) / cell.batch)
    _track(optimizer, steps)
    sparsified = sparsifying.epochs_of(cell.sparsity, cell.epochs)
    if sparsified:
        sparsifying.begin(model, optimizer, cell.sparsity, sparsified * steps)
    random = torch.Generator().manual_seed(cell.seed)
    tracked, evaluated = (
        [math.ceil(k * cell.epochs / count) for k in range(1, count + 1)]
        for count in (HISTOGRAMS, EVALUATIONS)
    )
    result = Result()
    for epoch in range(1, cell.epochs + 1):
        if sparsified and epoch == sparsified + 1:
            optimizer = sparsifying.fine_tuner(model, cell.lr)
            _track(optimizer, steps)
        l1 = cell.l1 if epoch <= sparsified else 0.0
        diverged = not math.isfinite(_train_epoch(cell, parallel, optimizer, images, random, l1))
        if epoch in evaluated or diverged:
            logits = _logits(model, images.train[:EVALUATED])
            loss = F.cross_entropy(logits, images.train_labels[:EVALUATED]).item()
            tested = len(images.test) if diverged or epoch == cell.epochs else EVALUATED
            right = _right(model, images.test[:tested], images.test_labels[:tested])
            result.curve_epochs.append(epoch)
            result.train_losses.append(math.nan if diverged else loss)
            result.test_errors.append(_error(right))
        if diverged:
            break
        if epoch in tracked and isinstance(optimizer, _FusedAdam):
            result.histogram_epochs.append(epoch)
            result.histograms.append(update_histogram(optimizer).tolist())
            result.pace = [stats.quantile(0.5) for stats in optimizer.update_stats()]
        if after_epoch is not None:
            after_epoch()
    result.train_loss, result.test_error = result.train_losses[-1], result.test_errors[-1]
    if cell.validation > 0:
        held_out = _right(model, images.validation, images.validation_labels)
        result.validation_error = _error(held_out)
        result.correct = packed(right)
    if result.histograms:
        result.iqr = interquartile_range(result.histograms[-1])
    result.zeros = adamprox.sparsity(model).share
    result.seconds = clock() - start
    return result


def _track(optimizer: Optimizer, steps: int) -> None:
    """The updates of the last of so many steps, an epoch's."""
    if isinstance(optimizer, _FusedAdam):
        optimizer.track_updates(every=steps, per="tensor")


def estimate(cell: Cell, device: torch.device, path: Path | None = None) -> float:
    """About how many seconds :func:`train` takes, from one of its steps.

    Raises:
        FileNotFoundError, ValueError: as :func:`train`.
    """
    images = _load(cell, path, device)
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
    model = networks.make(
        *(cell.network, images.classes, channels, cell.batch_norm, cell.width, cell.start)
    )
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    return model, make_optimizer(cell, model)


def make_optimizer(cell: Cell, model: nn.Module) -> Optimizer:
    """One of adamprox's, or torch's SGD with momentum."""
    settings: dict[str, Any] = {"lr": cell.lr, "weight_decay": cell.weight_decay}
    if cell.optimizer == "SGD":
        return torch.optim.SGD(model.parameters(), momentum=SGD_MOMENTUM, **settings)
    settings.update(betas=(0.9, 0.999), eps=cell.eps, decay_by="schedule", **options(cell.options))
    made: Optimizer = getattr(adamprox, cell.optimizer)(model.parameters(), **settings)
    return made


def options(text: str) -> dict[str, Any]:
    """The arguments in a cell's ``options``; what is a number is one."""
    result: dict[str, Any] = {}
    for each in text.split():
        name, _, value = each.partition("=")
        try:
            result[name] = float(value)
        except ValueError:
            result[name] = value
    return result


def _train_epoch(
    cell: Cell,
    model: nn.Module,
    optimizer: Optimizer,
    images: data.Images,
    random: torch.Generator,
    l1: float = 0.0,
) -> float:
    """The mean loss."""
    model.train()
    weights = list(model.parameters())
    count = len(images.train)
    loss_sum = torch.zeros((), dtype=torch.float64, device=images.train.device)
    for batch in torch.randperm(count, generator=random).split(cell.batch):
        batch = batch.to(images.train.device)
        inputs = images.train[batch]
        if images.augmented:
            inputs = data.augment(inputs, images.padding, images.mirrored, random)
        inputs, labels = ranks.part(inputs), ranks.part(images.train_labels[batch])
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        (cell.loss_factor * loss).backward()
        with torch.no_grad():
            for weight in weights if l1 else ():
                assert weight.grad is not None
                weight.grad.add_(weight.sign(), alpha=l1)
            for weight in weights if cell.shrinkage else ():
                weight.mul_(1 - cell.shrinkage)
        optimizer.step()
        loss_sum += loss.detach() * len(batch)
    return ranks.mean(loss_sum).item() / count


@torch.no_grad()
def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(some) for some in inputs.split(512)])


def _right(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Which inputs are classified right, bool."""
    return _logits(model, inputs).argmax(dim=1) == labels


def _error(right: Tensor) -> float:
    return 1 - right.sum().item() / len(right)


def _load(cell: Cell, path: Path | None, device: torch.device) -> data.Images:
    return _images(cell.data, cell.size, cell.train_images, cell.validation, path, device)


@lru_cache(maxsize=2)
def _images(
    name: str, size: int, train: int, validation: int, path: Path | None, device: torch.device
) -> data.Images:
    images = data.load(name, size, path)
    if train + validation > 0:
        images = data.split(images, train, validation)
    moved: dict[str, Any] = {
        key: value.to(device)
        for key, value in images._asdict().items()
        if isinstance(value, Tensor)
    }
    return images._replace(**moved)
