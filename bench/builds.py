"""Compares the cold steps of builds, which take turns in processes of their own.

    python bench/builds.py SITE_A SITE_B --models "400 x 16" 200000 --rounds 10

A site is a folder with an importable ``adamprox``: ``pip install --target SITE .`` makes one, and
``python/`` of an editable install is one. Each process times ``torch.optim.AdamW(fused=True)``
beside the build, a step each in shuffled turns, with cold caches and new grads. Of the build, only
``adamprox`` itself is imported: any two versions can be compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.optim import Optimizer

WARM_UP = 2  # turns that do not count
LR = 1e-3
Medians = dict[str, tuple[float, float]]  # by model, us of torch fused and of the build


def beside_this(name: str) -> Any:
    """A module of this folder, whatever package it belongs to; it must need torch alone."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = beside_this("models")
MODELS = models.MODELS
cold = beside_this("cold")


def median_steps(model: Any, makes: Sequence[Callable[..., Optimizer]], turns: int) -> list[float]:
    """The median cold step of each optimizer in us, over params of its own."""
    buffer = torch.ones(cold.FLUSH_NUMEL)
    optimizers, starts = [], []
    for make in makes:
        params = model.params(torch.device("cpu"), torch.float32)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizers.append(make(model.param_groups(params, LR)))
        optimizers[-1].step()  # makes the states
        starts.append(cold.ColdStart(optimizers[-1], buffer))
    times: list[list[float]] = [[] for _ in makes]
    order = list(range(len(makes)))
    for _ in range(WARM_UP + turns):
        random.shuffle(order)
        for index in order:
            starts[index]()
            start = time.perf_counter()
            optimizers[index].step()
            times[index].append(time.perf_counter() - start)
    return [1e6 * statistics.median(steps[WARM_UP:]) for steps in times]


def model(name: str) -> str:
    """The type of an argument that is a model's name, or a number of elements of one tensor."""
    if name not in MODELS and not (name.isdecimal() and int(name) > 0):
        choices = ", ".join(map(repr, MODELS))
        raise argparse.ArgumentTypeError(f"{name!r} is no number, and none of {choices}")
    return name


def model_of(name: str) -> Any:
    """A model of that name, or one tensor of as many elements."""
    return MODELS.get(name) or models.Model([(int(name),)])


def work(args: argparse.Namespace) -> None:
    """Prints a worker's medians, and where it found the build."""
    sys.path.pop(0)  # this folder, which Python puts before the site
    import adamprox

    torch.set_num_threads(args.threads)

    def torch_fused(groups: Any) -> Optimizer:
        return torch.optim.AdamW(groups, fused=True)

    makes = (torch_fused, getattr(adamprox, args.optimizer))
    medians = {name: median_steps(model_of(name), makes, args.turns) for name in args.models}
    print(json.dumps({"file": adamprox.__file__, "medians": medians}))


def medians_of(folder: Path) -> Medians:
    """What a worker measures of the build at a site.

    Raises:
        RuntimeError: the worker found another build.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    worker = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    result = json.loads(worker.stdout.splitlines()[-1])
    if not Path(result["file"]).resolve().is_relative_to(folder):
        raise RuntimeError(f"not the build at {folder}: {result['file']}")
    medians: Medians = result["medians"]
    return medians


def line(name: str, rounds: Sequence[Sequence[Medians]], other: int) -> str:
    """A model's line of the first build and another one: medians over the rounds."""
    median = statistics.median
    a, b = ([each[side][name] for each in rounds] for side in (0, other))
    ratios = [ours_b / ours_a for (_, ours_a), (_, ours_b) in zip(a, b, strict=True)]
    micros = (median(ours for _, ours in build) for build in (a, b))
    as_fast = (median(fused / ours for fused, ours in build) for build in (a, b))
    return "".join(
        [
            f"{name:24}",
            f"{'ABCDEFGH'[other]:>6}",
            *(f"{value:10,.0f}" for value in micros),
            f"{median(ratios):8.3f} ({min(ratios):.2f} to {max(ratios):.2f})",
            *(f"{value:10.2f}" for value in as_fast),
        ]
    )


def site(path: str) -> Path:
    """The type of an argument that must be a site."""
    if not Path(path, "adamprox", "__init__.py").exists():
        raise argparse.ArgumentTypeError(f"{path} has no adamprox")
    return Path(path).resolve()


def main() -> None:
    """Runs the rounds and prints the table; as a worker, measures one build."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sites", type=site, nargs="+", metavar="SITE", help="two to eight")
    add("--models", nargs="+", type=model, default=["400 x 16", "465 groups"], metavar="MODEL",
        help="or a number of elements (default: %(default)s)")  # fmt: skip
    add("--optimizer", default="AdamW", help="of the builds (default: %(default)s)")
    add("--rounds", type=int, default=10, help="processes of each (default: %(default)s)")
    add("--turns", type=int, default=25, help="steps in each process (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 2 <= len(args.sites) <= 8:
        parser.error(f"argument SITE: {len(args.sites)} is not from 2 to 8")
    for name in ("rounds", "turns", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: {getattr(args, name)} is not 1 or more")
    if args.worker:
        work(args)
        return
    rounds: list[list[Medians]] = []
    try:
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
            rounds.append([medians_of(folder) for folder in args.sites])
    except (KeyboardInterrupt, subprocess.CalledProcessError) as error:
        print(f"ended after {len(rounds)} rounds: {error!r}", file=sys.stderr)
        if not rounds:
            sys.exit(1)
    print(f"{'cold step':24}{'build':>6}{'A us':>10}{'us':>10}{'to A, least to most':>23}", end="")
    print(f"{'A fused':>10}{'fused':>10}   (fused: times as fast as torch fused)")
    for name in args.models:
        for other in range(1, len(args.sites)):
            print(line(name, rounds, other))


if __name__ == "__main__":
    main()
