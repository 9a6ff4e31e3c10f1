"""``adamprox bench``: how fast the optimizers are here, beside torch's and other peers'."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adamprox import backends
from adamprox.command_line import check_folder, fail, need, positive, usable_device

from . import models, providers, records, suite, tables
from .contenders import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--models", nargs="+", choices=models.MODELS, default=list(models.SHORT), metavar="MODEL",
        help="whose steps to time (default: a short selection; see --list)")  # fmt: skip
    add("--optimizers", nargs="+", choices=[*providers.NAMES, "all"], metavar="OPTIMIZER",
        default=list(providers.SHORT),
        help="which to time, or all (default: a short selection; see --list)")  # fmt: skip
    add("--backends", nargs="+", choices=list(backends.BACKENDS), default=[], metavar="BACKEND",
        help="what runs ours in steps and sizes (default: ADAMPROX_BACKEND, or the best that can "
        "run)")  # fmt: skip
    add("--parts", nargs="+", choices=suite.PARTS, default=list(suite.PARTS), metavar="PART",
        help="what to do, see below (default: everything)")  # fmt: skip
    add("--device", type=usable_device, default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32",
        help="of params, grads and states of steps and sizes, or params_states (default: "
        "%(default)s)")  # fmt: skip
    add("--threads", type=positive(int), default=torch.get_num_threads(),
        help="of the CPU (default: PyTorch's, here %(default)s)")  # fmt: skip
    add("--seconds", type=positive(float), default=5.0,
        help="to spend on each model, and again with warm caches where it fits into them; a slow"
        " one takes more (default: %(default)s)")  # fmt: skip
    add("--out", type=Path, default=Path("adamprox-bench"), metavar="DIR",
        help="where to append the rows and draw the picture (default: %(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print the rows as JSON instead of tables")
    add("--list", action="store_true", help="print the names to choose from, and measure nothing")
    add("--markdown", action="store_true",
        help="print README's table of the newest rows in DIR that are not of warm caches, and"
        " measure nothing")  # fmt: skip


EPILOG = """\
parts:
  steps        each optimizer's step on each model, timed in turns: with cold caches and new
               grads, as in training, and where the model fits into a cache, with warm ones too;
               a model much larger than a cache as it comes
  sizes        the same on one tensor of 2^10 to 2^24 elements, on a GPU to 2^28
  memory       what those steps take beyond params, grads and states (for 2^26 elements and more);
               and what a training step takes with adamprox.step_in_backward and without
  end-to-end   the share of a training step that the optimizer takes, before and after
  picture      of the rows of sizes, and of steps on many small tensors

Rows of steps and sizes go to DIR/DEVICE.csv, of training to DIR/DEVICE-memory.csv and
DIR/DEVICE-end-to-end.csv, the picture to DIR/DEVICE.png. Each row of a step has the bandwidth that
it achieves and its share of a copy's, timed between the steps. On a shared machine a time means
little, and its ratio to its neighbour's in the same run a lot.
"""


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes; ends with an error's message if something is missing."""
    if not args.list and not args.markdown:
        need("bench", ("tqdm", "matplotlib") if "picture" in args.parts else ("tqdm",))
    device: torch.device = args.device
    csv = args.out / f"{device.type}.csv"
    if args.markdown:
        try:
            print(tables.markdown(records.newest(csv, "float32")))
        except (OSError, KeyError) as error:
            fail("bench", f"argument --out: {csv} has no rows of the short selection: {error!r}")
        return 0
    try:
        backends.requested(None)
        providers.default_backend(device)
    except (RuntimeError, ValueError) as error:
        fail("bench", str(error))
    if args.list:
        _list(device, args.backends)
        return 0
    names = providers.NAMES if "all" in args.optimizers else args.optimizers
    chosen, skipped = providers.providers(names, device, args.backends)
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        fail("bench", f"argument --optimizers: none can run: {reasons}")
    if "picture" in args.parts and not {"steps", "sizes"} & set(args.parts):
        fail("bench", "argument --parts: picture draws this run's rows of steps or sizes; name one")
    check_folder("bench", "--out", args.out)
    torch.set_num_threads(args.threads)
    results = suite.Results([], [], [], [], dict(skipped))

    def keep(to: list[suite.Row], rows: list[suite.Row]) -> None:
        kind = "-memory" if to is results.memory else "-end-to-end" * (to is results.end_to_end)
        records.append(args.out / f"{device.type}{kind}.csv", rows)

    problem = None
    try:
        suite.measure(
            *(args.parts, args.models, chosen, device, args.dtype, args.seconds, results, keep)
        )
        if "picture" in args.parts:
            from .picture import draw

            draw(args.out / f"{device.type}.png", results.sizes, results.steps)
    except KeyboardInterrupt:
        problem = f"interrupted; what was finished is in {args.out}"
    except (OSError, records.OtherColumnsError) as error:
        problem = f"argument --out: {error}"
    if args.json:
        print(json.dumps(results._asdict(), indent=2))
    else:
        _print(results)
    if problem is not None:  # once the results have been printed
        fail("bench", problem)
    return 0


def _print(results: suite.Results) -> None:
    if results.steps:
        tables.print_steps(results.steps)
    if results.sizes:
        tables.print_sizes(results.sizes)
    if results.end_to_end:
        tables.print_end_to_end(results.end_to_end)
    if results.memory:
        tables.print_memory(results.memory)
    for name, reason in results.skipped.items():
        print(f"skipped {name}: {reason}")


def _list(device: torch.device, our_backends: Sequence[str]) -> None:
    here = {}
    for name in providers.NAMES:
        found, skipped = providers.providers([name], device, our_backends)
        here[name] = "can run" if found else "; ".join(skipped.values())
    tables.print_names(
        [(name, len(model.shapes), model.numel) for name, model in models.MODELS.items()], here
    )
