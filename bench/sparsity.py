"""``python -m bench.sparsity``: accuracy at a share of zeros that is asked for, on small networks.

``SparsityTarget`` beside magnitude pruning, of the same number of epochs, from the same weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils import prune
from torch.optim.lr_scheduler import LambdaLR

import adamprox
from adamprox.command_line import check_folder, fail, need, positive
from adamprox.demo import BATCH_SIZE, LEARNING_RATE, Images, load_images, steps_per_epoch
from adamprox.sparsity_target import cubic_ramp

from . import records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch.optim import Optimizer

ASKED = (0.5, 0.8, 0.95)
PRUNING = 0.6  # of the epochs; the others fine-tune what is left
RAMP = 0.8  # of the pruning: after that many of its steps, the share is to be reached
NUMBERS = ("asked", "accuracy", "sparsity")
WEIGHT_DECAY = 0.1  # of AdamW, and what AdamProxL1 starts from


def mlp() -> nn.Module:
    """64-128-64-10."""
    layers = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def cnn() -> nn.Module:
    """Two convolutions and a linear layer."""
    convolutions = (
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
    )  # fmt: skip
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10))


NETWORKS = {"MLP": mlp, "CNN": cnn}


class Training:
    """One network's training; ``fit`` may be called several times."""

    def __init__(
        self, network: str, seed: int, epochs: int, images: Images, tick: Callable[[], object]
    ) -> None:
        torch.manual_seed(seed)
        self.model = NETWORKS[network]()
        self.epochs, self.pruning = epochs, round(PRUNING * epochs)
        self.fine_tuning = epochs - self.pruning
        self.steps_per_epoch = steps_per_epoch(images)
        self._images, self._tick = images, tick

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Weights with decay, biases without."""
        return adamprox.param_groups(self.model, weight_decay)

    def adamw(self) -> Optimizer:
        """With decay, which moves no zero."""
        return adamprox.AdamW(self.groups(WEIGHT_DECAY), lr=LEARNING_RATE)

    def fit(
        self,
        optimizer: Optimizer,
        epochs: int,
        constant: bool = False,
        after_step: Callable[[], object] = lambda: None,
    ) -> None:
        """The learning rate is constant, or ends at zero, by half a cosine."""
        total = max(1, epochs * self.steps_per_epoch)
        schedule = LambdaLR(
            optimizer, lambda step: 1.0 if constant else (1 + math.cos(math.pi * step / total)) / 2
        )
        for _ in range(epochs):
            for batch in torch.randperm(len(self._images.train)).split(BATCH_SIZE):
                logits = self.model(self._images.train[batch])
                optimizer.zero_grad()
                F.cross_entropy(logits, self._images.train_digits[batch]).backward()
                optimizer.step()
                schedule.step()
                after_step()
                self._tick()

    @torch.no_grad()
    def accuracy(self) -> float:
        """On the images for the test."""
        digits = self.model(self._images.test).argmax(1)
        return float((digits == self._images.test_digits).double().mean())

    def sparsity(self) -> float:
        """Of the weights, without the biases."""
        weights = [param for param in self.model.parameters() if param.dim() > 1]
        return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def dense(training: Training, asked: float) -> None:
    """AdamW, nothing pruned."""
    training.fit(training.adamw(), training.epochs)


def target(training: Training, asked: float, **arguments: Any) -> None:
    """AdamProxL1 with a target, at a constant rate, then AdamW on what is left."""
    groups = training.groups(arguments.pop("weight_decay", WEIGHT_DECAY))
    optimizer = adamprox.AdamProxL1(groups, lr=LEARNING_RATE, **arguments)
    steps = int(RAMP * training.pruning * training.steps_per_epoch)
    with adamprox.SparsityTarget(optimizer, asked, steps):
        training.fit(optimizer, training.pruning, constant=True)
    fine_tuner = training.adamw()
    with adamprox.freeze_zeros(fine_tuner):
        training.fit(fine_tuner, training.fine_tuning)


def target_in_adams_metric(training: Training, asked: float) -> None:
    """The same with ``metric="adam"``, where a strength has another unit."""
    target(training, asked, metric="adam", weight_decay=WEIGHT_DECAY / 100)


def target_in_one_run(training: Training, asked: float) -> None:
    """AdamProxL1 alone, whose target holds the zeros in the second half."""
    optimizer = adamprox.AdamProxL1(training.groups(WEIGHT_DECAY), lr=LEARNING_RATE)
    half = training.epochs * training.steps_per_epoch // 2
    with adamprox.SparsityTarget(optimizer, asked, half):
        training.fit(optimizer, training.epochs)


def magnitude_at_once(training: Training, asked: float) -> None:
    """AdamW; the smallest weights are pruned; AdamW on what is left."""
    training.fit(training.adamw(), training.pruning)
    layers = _prunable(training.model)
    _prune_to(layers, asked)
    training.fit(training.adamw(), training.fine_tuning)
    _make_permanent(layers)


def magnitude_by_and_by(training: Training, asked: float) -> None:
    """The same, at a constant rate and pruned each epoch, on the ramp that a target follows."""
    layers = _prunable(training.model)
    ramp = int(RAMP * training.pruning * training.steps_per_epoch)
    steps = itertools.count(1)

    def after_step() -> None:
        step = next(steps)
        if step % training.steps_per_epoch == 0:
            _prune_to(layers, asked * cubic_ramp(step, ramp))

    training.fit(training.adamw(), training.pruning, constant=True, after_step=after_step)
    training.fit(training.adamw(), training.fine_tuning)
    _make_permanent(layers)


Layers = list[tuple[nn.Module, str]]


def _prunable(model: nn.Module) -> Layers:
    """Its layers with weights, which get masks that prune nothing yet."""
    layers: Layers = [
        (m, "weight") for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    for module, name in layers:
        prune.identity(module, name)
    return layers


def _prune_to(layers: Layers, share: float) -> None:
    """Prunes the smallest weights that are left, until that share is pruned."""
    masks = [module.get_buffer(f"{name}_mask") for module, name in layers]
    pruned = sum(int((mask == 0).sum()) for mask in masks)
    more = round(share * sum(mask.numel() for mask in masks)) - pruned
    if more > 0:
        prune.global_unstructured(layers, prune.L1Unstructured, amount=more)


def _make_permanent(layers: Layers) -> None:
    for module, name in layers:
        prune.remove(module, name)


METHODS: dict[str, Callable[[Training, float], None]] = {
    "AdamW, dense": dense,
    "`SparsityTarget`, then AdamW": target,
    '`SparsityTarget`, `metric="adam"`, then AdamW': target_in_adams_metric,
    "`SparsityTarget` in one run": target_in_one_run,
    "magnitude, at once": magnitude_at_once,
    "magnitude, by and by": magnitude_by_and_by,
}


def measure(seeds: Sequence[int], epochs: int) -> Iterator[records.Row]:
    """A row for each network, method, share and seed, as soon as it is there."""
    from tqdm import tqdm

    images = load_images(torch.device("cpu"))
    about = records.provenance(torch.device("cpu"))
    cells = [
        (network, method, asked, seed)
        for network in NETWORKS
        for method in METHODS
        for asked in ((0.0,) if METHODS[method] is dense else ASKED)
        for seed in seeds
    ]
    total = len(cells) * epochs * steps_per_epoch(images)
    with tqdm(total=total, unit="step", disable=None, leave=False) as progress:
        for network, method, asked, seed in cells:
            progress.set_description(f"{network}, {method}, {asked:.0%}")
            start = time.process_time()
            training = Training(network, seed, epochs, images, progress.update)
            METHODS[method](training, asked)
            yield {
                "network": network,
                "method": method,
                "asked": asked,
                "seed": seed,
                "epochs": epochs,
                "accuracy": round(training.accuracy(), 4),
                "sparsity": round(training.sparsity(), 5),
                "cpu_seconds": round(time.process_time() - start, 2),
                **about,
            }


def markdown(rows: Iterable[records.Row]) -> str:
    """The page's table of accuracies: means over the seeds, with the least and the most.

    Of rows as they are measured, or as a file has them.
    """
    rows = [{**row, **{key: float(row[key]) for key in NUMBERS}} for row in rows]
    lines = [
        " | ".join(("| network", "method", *(f"{asked:.0%} zeros" for asked in ASKED))) + " |",
        "|---" * (2 + len(ASKED)) + "|",
    ]
    for network, method in dict.fromkeys((row["network"], row["method"]) for row in rows):
        own = [row for row in rows if (row["network"], row["method"]) == (network, method)]
        cells = [
            _span([row["accuracy"] for row in own if row["asked"] in (0.0, asked)])
            for asked in ASKED
        ]
        lines.append(" | ".join((f"| {network}", method, *cells)) + " |")
    farthest = max(abs(row["sparsity"] - row["asked"]) for row in rows)
    return "\n".join([*lines, "", f"No share is more than {100 * farthest:.2f} points off."])


def _span(shares: Sequence[float]) -> str:
    return f"{100 * mean(shares):.1f} ({100 * min(shares):.1f} to {100 * max(shares):.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and appends the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.sparsity", description=__doc__)
    add = parser.add_argument
    add("--seeds", type=positive(int), default=3, help="how many (default: %(default)s)")
    add("--epochs", type=positive(int), default=40, help="of each training (default: %(default)s)")
    add("--out", type=Path, default=Path("adamprox-bench"), metavar="DIR",
        help="where to append the rows, to sparsity.csv (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(arguments)
    need("demo", ("sklearn", "tqdm"))
    torch.set_num_threads(1)
    rows: list[records.Row] = []
    check_folder("bench", "--out", args.out)
    try:
        for row in measure(range(args.seeds), args.epochs):
            records.append(args.out / "sparsity.csv", [row])
            rows.append(row)
    except KeyboardInterrupt:
        fail("bench", f"interrupted; {len(rows)} trainings are in {args.out / 'sparsity.csv'}")
    except (OSError, records.OtherColumnsError) as error:
        fail("bench", f"argument --out: {error}")
    print(markdown(rows))


if __name__ == "__main__":
    main()
