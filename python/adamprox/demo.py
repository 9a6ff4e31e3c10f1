"""``adamprox demo``: a small residual network without batch normalization, on handwritten digits.

Every optimizer starts from the same weights and sees the same images in the same order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from . import backends, optimizers
from .command_line import (
    check_folder,
    fail,
    is_stream,
    need,
    positive,
    progress_bar,
    usable_device,
    write_whole,
)
from .grouping import param_groups
from .resnet import ResNet
from .sparsity_target import SparsityTarget
from .tables import table
from .zeros import sparsity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer

LAYERS = 20  # the paper's smallest
BATCH_SIZE = 64
LEARNING_RATE = 3e-3

# They differ in kind: Adam's goes into the gradient, AdamW's and AdamProx's is a share of a weight,
# AdamProxL1's a length off each weight, AdamProxL2's a length off a whole tensor's, about 10 here.
WEIGHT_DECAYS = {"Adam": 1e-4, "AdamW": 0.1, "AdamProx": 0.1, "AdamProxL1": 0.18, "AdamProxL2": 1.0}

Row = dict[str, Any]


class Wish(NamedTuple):
    """A share of zeros that a SparsityTarget leads an optimizer to: of weights, or of rows."""

    optimizer: str
    weight_decay: float
    sparsity: float
    options: dict[str, Any]


WISHES = {
    "AdamProxL1 at 80 %": Wish("AdamProxL1", 0.18, 0.8, {}),
    "AdamProxL2 by rows": Wish("AdamProxL2", 0.1, 0.3, {"block": "row", "block_scaling": "sqrt"}),
}


class Contender(NamedTuple):
    """An optimizer, as its row names it."""

    name: str
    backend: str
    weight_decay: float
    make: Callable[[torch.nn.Module], Optimizer]
    sparsity: float | None = None
    """The share of zeros that a SparsityTarget leads it to."""


class Images(NamedTuple):
    """Pixels of mean 0 and variance 1 over the training images, and their digits."""

    train: Tensor
    train_digits: Tensor
    test: Tensor
    test_digits: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    add = parser.add_argument
    add("--epochs", type=positive(int), default=10, help="of training (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    add(
        "--backend",
        choices=list(backends.BACKENDS),
        help="what runs adamprox's steps (default: ADAMPROX_BACKEND, or the best that can run)",
    )
    add(
        "--device",
        type=usable_device,
        default="cpu",
        help="of the network: cpu or cuda (default: %(default)s)",
    )
    add(
        "--threads",
        type=positive(int),
        default=1,
        help="of PyTorch on the CPU: the network is too small for more (default: %(default)s)",
    )
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the rows as JSON to FILE too, or without FILE print them instead of the table "
        "(default: the table only)",
    )


def run(args: argparse.Namespace) -> int:
    """Trains and prints; ends with an error's message if something is missing."""
    need("demo", ("sklearn", "tqdm"))
    try:
        selected = backends.select(backends.requested(args.backend), args.device.type)
    except (RuntimeError, ValueError) as error:
        fail("demo", str(error))
    file = Path(args.json) if args.json not in (None, "-") else None
    if file is not None and not is_stream(file):
        if not file.absolute().parent.is_dir():
            fail("demo", f"argument --json: no such directory: {file.absolute().parent}")
        check_folder("demo", "--json", file.absolute().parent)
    backend = next(name for name, b in backends.BACKENDS.items() if b is selected)
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    try:
        for row in compare(args.epochs, args.seed, args.device, backend):
            rows.append(row)
            if file is not None and not is_stream(file):
                write_whole(file, json.dumps(rows, indent=2) + "\n")
    except (KeyboardInterrupt, OSError) as error:
        _print(rows, as_json=args.json == "-")
        fail("demo", f"{str(error) or 'interrupted'}; {len(rows)} optimizers had finished")
    if file is not None and is_stream(file):
        write_whole(file, json.dumps(rows, indent=2) + "\n")
    _print(rows, as_json=args.json == "-")
    return 0


def compare(epochs: int, seed: int, device: torch.device, backend: str) -> Iterator[Row]:
    """Trains with each optimizer; a row of results for each, torch's AdamW first."""
    images = load_images(device)
    contenders = _contenders(backend)
    total = len(contenders) * epochs * steps_per_epoch(images)
    first: Row = {}
    with progress_bar(total, unit="step") as progress:
        for contender in contenders:
            progress.set_description(contender.name, refresh=False)
            torch.manual_seed(seed)
            model = ResNet(LAYERS, channels_in=1).to(device)
            optimizer = contender.make(model)
            if contender.sparsity is not None:
                steps = max(1, epochs * steps_per_epoch(images) // 2)
                SparsityTarget(optimizer, contender.sparsity, steps)
            result = train(model, optimizer, images, epochs, seed, progress.update)
            about: Row = {
                "optimizer": contender.name,
                "backend": contender.backend,
                "weight_decay": contender.weight_decay,
            }
            first = first or result
            yield {
                **about,
                **result,
                "speedup": first["step_ms"] / result["step_ms"],
                "epochs": epochs,
                "seed": seed,
                "device": str(device),
                "threads": torch.get_num_threads(),
            }


def _contenders(backend: str) -> list[Contender]:
    weight_decay = WEIGHT_DECAYS["AdamW"]
    baseline = partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=weight_decay)

    contenders = [
        Contender("torch AdamW", "torch", weight_decay, _of_all_params(baseline)),
        Contender(
            *("torch AdamW, fused", "torch", weight_decay),
            _of_all_params(partial(baseline, fused=True)),
        ),
    ]
    for name, weight_decay in WEIGHT_DECAYS.items():
        make = partial(
            getattr(optimizers, name), lr=LEARNING_RATE, weight_decay=weight_decay, backend=backend
        )
        contenders.append(Contender(name, backend, weight_decay, _of_all_params(make)))
    for name, wish in WISHES.items():
        make = partial(
            getattr(optimizers, wish.optimizer), lr=LEARNING_RATE, backend=backend, **wish.options
        )
        contenders.append(
            Contender(
                *(name, backend, wish.weight_decay),
                _of_weights(make, wish.weight_decay),
                wish.sparsity,
            )
        )
    return contenders


def _of_all_params(make: Callable[..., Optimizer]) -> Callable[[torch.nn.Module], Optimizer]:
    return lambda model: make(model.parameters())


def _of_weights(
    make: Callable[..., Optimizer], weight_decay: float
) -> Callable[[torch.nn.Module], Optimizer]:
    """Biases have no decay."""
    return lambda model: make(param_groups(model, weight_decay))


def load_images(device: torch.device) -> Images:
    """A quarter of the images is for the test: the same ones whatever the seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, digits = load_digits(return_X_y=True)
    parts = train_test_split(pixels, digits, test_size=0.25, stratify=digits, random_state=0)
    train, test = (torch.as_tensor(p, dtype=torch.float32).view(-1, 1, 8, 8) for p in parts[:2])
    mean, std = train.mean(), train.std()
    train_digits, test_digits = (torch.as_tensor(p, dtype=torch.int64) for p in parts[2:])
    images = ((train - mean) / std, train_digits, (test - mean) / std, test_digits)
    return Images(*(t.to(device) for t in images))


def train(
    model: torch.nn.Module,
    optimizer: Optimizer,
    images: Images,
    epochs: int,
    seed: int,
    after_step: Callable[[], object],
) -> Row:
    """Trains on a cosine schedule; accuracy, loss, zeros, and milliseconds in ``step()``."""
    device = images.train.device

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    order = torch.Generator().manual_seed(seed)
    schedule = CosineAnnealingLR(optimizer, epochs * steps_per_epoch(images))
    count = len(images.train)
    times = []
    for _ in range(epochs):
        loss_sum = 0.0
        shuffled = torch.randperm(count, generator=order).to(device)
        for batch in shuffled.split(BATCH_SIZE):
            loss = F.cross_entropy(model(images.train[batch]), images.train_digits[batch])
            optimizer.zero_grad()
            loss.backward()
            wait()
            start = time.perf_counter()
            optimizer.step()
            wait()
            times.append(time.perf_counter() - start)
            schedule.step()
            loss_sum += loss.item() * len(batch)
            after_step()
    with torch.no_grad():
        correct = model(images.test).argmax(dim=1) == images.test_digits
    zeros = sparsity(model)
    rows = sum(tensor.rows for tensor in zeros.tensors)
    return {
        "accuracy": correct.double().mean().item(),
        "training_loss": loss_sum / count,  # of the last epoch
        "zeros": zeros.share,
        "zero_rows": sum(tensor.zero_rows for tensor in zeros.tensors) / rows,
        "step_ms": 1e3 * statistics.median(times),
        "total_ms": 1e3 * sum(times),
    }


def steps_per_epoch(images: Images) -> int:
    """The last batch is smaller."""
    return -(-len(images.train) // BATCH_SIZE)


def _print(rows: list[Row], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
    if as_json or not rows:
        return
    header = ("optimizer", "decay", "right", "loss", "zeros", "rows", "ms", "speed")
    cells = [
        (
            row["optimizer"],
            f"{row['weight_decay']:.4g}",
            f"{row['accuracy']:.1%}",
            f"{row['training_loss']:.3f}",
            f"{row['zeros']:.1%}",
            f"{row['zero_rows']:.1%}",
            f"{row['step_ms']:.3f}",
            f"{row['speedup']:.1f}x",
        )
        for row in rows
    ]
    title = (
        f"ResNet-{LAYERS} without batch normalization, on 8x8 digits: "
        "epochs {epochs}, seed {seed}, device {device}, backend {backend}".format(**rows[-1])
    )
    caption = (
        "right: of the test images; loss: training, last epoch; rows: filters that are zero; "
        "ms: median step(); speed: times as fast as the first row."
    )
    if any(row["optimizer"] in WISHES for row in rows):
        caption += (
            f" {' and '.join(WISHES)} only start from their decay: SparsityTarget leads them to a "
            "share of zeros, and then holds these, which takes time in each step."
        )
    print(table(cells, header, texts=1, title=title, caption=caption))
