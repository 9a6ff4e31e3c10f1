"""``adamprox paper``: the experiments of the paper, each a picture, a table and its CSV."""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adamprox import plots
from adamprox.command_line import (
    check_folder,
    fail,
    need,
    positive,
    usable_device,
    write_whole,
)

from . import data, networks, page, settings
from .figures import FIGURES
from .lab import Lab
from .pictures import SERIES
from .store import Machine, Store

if TYPE_CHECKING:
    from .settings import Settings

EPILOG = """\
figures:
  1         gradient descent and AdamW on quadratics; Corollary 1
  2         Adam-l2 and AdamW with batch normalization (BN): test errors over alpha and lambda
  3         the same without BN, with curves and magnitudes of updates
  4         the loss times 10 and 100, without BN
  5         AdamW and AdamProx, without BN; the remainder of the Taylor expansion
  6         section 5's rules beside AdamW; zeros against accuracy
  7 to 12   magnitudes of updates over the training: ResNet-20, 44, 56, 110, 218, DenseNet-BC-100
  mechanism what carries AdamW's advantage: controls of figure 3, and the pace of each layer
  sparsity  accuracy at a share of zeros: proximal rules, magnitude pruning, l1 in the loss
  distributed small local batches on 1, 2 and 4 ranks, with and without BN
  section-3 which updates are scale-free, Theorem 1 beyond quadratics, what limits a step size
  appendix  Algorithms 2 and 3 with their bounds; SGD without BN
  claims    what the tables in DIR say of each of the paper's claims

Trained on CIFAR or on images in MNIST's format where --data has them, else on scikit-learn's
digits. Nothing is downloaded. The default settings are the paper's own and meant for a GPU; --quick
is for two cores and some minutes, on digits of 8 x 8 pixels. Finished trainings are in
DIR/cells.csv: a run that was ended goes on where it stopped, and figures share them.

Figure 3 takes a model and data of yours: --model mypackage.models:factory, which returns a
torch.nn.Module of logits, and --dataset mypackage.data:loader, which returns four tensors: inputs
and labels (int64) to train on, then those to test on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add("figures", nargs="*", type=_figure, metavar="FIGURE",
        help="which, see below, or all")  # fmt: skip
    add("--quick", action="store_true", help="small networks, short trainings, coarse grids")
    add("--study", choices=("cpu",),
        help="settings for two cores and some hours, on --data in MNIST's format: images are held "
        "out to choose the best settings, and five other seeds are told")  # fmt: skip
    add("--published", action="store_true",
        help="figures 3 and 4 with the best settings alone that the paper's authors published, of "
        "ResNet-110 on --data's CIFAR-10")  # fmt: skip
    add("--out", type=Path, default=Path("adamprox-paper"), metavar="DIR",
        help="for pictures, tables and finished trainings (default: %(default)s)")  # fmt: skip
    add("--data", type=Path, metavar="PATH",
        help="the folder of CIFAR's archives, or of MNIST's files (default: digits)")  # fmt: skip
    add("--size", type=positive(int), metavar="PIXELS",
        help="height and width that digits, or images in MNIST's format, are scaled to "
        "(default: 32 or 28; 8 with --quick)")  # fmt: skip
    add("--seeds", type=int, nargs="+", metavar="SEED",
        help="of weights and order; the first one's for grids, all for the best settings "
        "(default: 0 1 2; 0 to 5 with --study, 1 to 20 where rules may be on a par)")  # fmt: skip
    add("--epochs", type=positive(int), help="of the grids' trainings (default: the settings')")
    add("--lrs", type=positive(float), nargs="+", metavar="ALPHA",
        help="the grids' (default: where the settings' start)")  # fmt: skip
    add("--weight-decays", type=_not_negative, nargs="+", metavar="LAMBDA",
        help="the grids', of all optimizers (default: where the settings' start)")  # fmt: skip
    add("--optimizers", nargs="+", choices=SERIES, metavar="NAME",
        help=f"that figure 3 compares: {', '.join(SERIES)} (default: Adam AdamW)")  # fmt: skip
    add("--widths", type=positive(int), nargs="+", metavar="CHANNELS",
        help="of figure 3's networks; a --model gets them as its argument width, if it has one "
        "(default: the settings')")  # fmt: skip
    add("--model", metavar="MODULE:FUNCTION", help="in place of figure 3's networks, see below")
    add("--dataset", metavar="MODULE:FUNCTION", help="in place of figure 3's images, see below")
    add("--page", type=Path, metavar="FILE",
        help="put the tables of DIR into this page of results; see bench/paper")  # fmt: skip
    add("--device", type=usable_device, default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--jobs", type=positive(int),
        help="trainings at a time (default: on a CPU as many as cores, on a GPU 1)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the figures in order; ends with an error's message if something is missing."""
    need("paper", ("sklearn", "tqdm", "matplotlib"))
    if not args.figures and args.page is None:
        fail("paper", "argument FIGURE: none is given")
    if args.quick and args.data is not None:
        fail("paper", "argument --data: --quick trains on digits of 8 x 8 pixels, not on CIFAR")
    if args.study and (args.quick or args.data is None):
        fail("paper", "argument --study: it needs --data, and excludes --quick")
    if args.study and args.seeds is not None and len(set(args.seeds)) < 2:
        fail("paper", f"argument --seeds: {args.seeds[0]}: a study needs another one to report")
    if args.published:
        if not set(args.figures) <= {"3", "4"}:
            fail("paper", "argument --published: only figures 3 and 4 take it")
        if args.study or args.data is None or data.name_of(args.data) != "cifar":
            fail("paper", "argument --published: it needs --data with CIFAR's archives")
    of_figure_3 = ("model", "dataset", "optimizers", "widths")
    given = [name for name in of_figure_3 if getattr(args, name) is not None]
    if given and set(args.figures) != {"3"}:
        fail("paper", f"argument --{given[0]}: only figure 3 takes it")
    check_folder("paper", "--out", args.out)
    if args.page is not None:
        if not args.page.is_file():
            fail("paper", f"argument --page: no such file: {args.page}")
        check_folder("paper", "--page", args.page.absolute().parent)
    try:
        chosen = _settings(args)
        store = Store(args.out)
    except (OSError, RuntimeError, ValueError) as error:
        fail("paper", str(error))
    jobs = args.jobs or (1 if args.device.type == "cuda" else torch.get_num_threads())
    machine = Machine(args.device, jobs, args.data)
    torch.set_num_threads(1 if args.device.type == "cpu" else torch.get_num_threads())
    start, before = time.perf_counter(), len(store)
    try:
        with plots.style():
            for name in FIGURES if "all" in args.figures else dict.fromkeys(args.figures):
                FIGURES[name](Lab(chosen, store, machine, args.out))
    except (KeyboardInterrupt, OSError) as error:
        fail(
            "paper",
            f"{str(error) or 'interrupted'}; "
            f"the same command goes on after the {len(store)} trainings in {store.file}",
        )
    finally:
        store.close()
    seconds = time.perf_counter() - start
    if args.page is not None:
        write_whole(args.page, page.refresh(args.page.read_text(), args.out))
    print(
        f"{len(store) - before} trainings in {seconds:.0f} s, {before} were there before; "
        f"see {args.out}"
    )
    return 0


def _figure(text: str) -> str:
    name = re.sub("^fig(ure)?[-_. ]*", "", text.lower())
    if name not in (*FIGURES, "all"):
        choices = ", ".join((*FIGURES, "all"))
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {choices})")
    return name


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def _settings(args: argparse.Namespace) -> Settings:
    if args.study:
        chosen = settings.study(args.data)
    else:
        chosen = settings.QUICK if args.quick else settings.paper(args.data)
    changes: dict[str, Any] = {}
    if args.published:
        networks_named = tuple(dict.fromkeys(network for network, _, _ in settings.PUBLISHED))
        changes.update(published=True, networks=networks_named, extensions=0)
    for name in ("epochs", "size"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    for name in ("lrs", "widths", "optimizers", "seeds"):
        if getattr(args, name) is not None:
            values = dict.fromkeys(getattr(args, name))
            changes[name] = tuple(sorted(values) if name in ("lrs", "widths") else values)
    if args.seeds is not None:
        changes["par_seeds"] = ()
    if args.lrs is not None or args.weight_decays is not None:
        changes["extensions"] = 0
    if args.weight_decays is not None:
        decays = tuple(sorted(set(args.weight_decays)))
        for rule in ("", "coupled_", "l1_", "l2_"):
            changes[f"{rule}weight_decays"] = decays
    if args.model is not None:
        changes["networks"] = (args.model,)
    if args.dataset is not None:
        changes["images"] = args.dataset
    chosen = dataclasses.replace(chosen, **changes)
    # What is missing is found out now rather than hours later.
    archives = ["cifar10"] if chosen.published else list(data.ARCHIVES)
    for name in archives if chosen.images == "cifar" else [chosen.images]:
        classes = data.load(name, chosen.size, args.data).classes
    if args.model is not None:
        networks.make(args.model, classes, 1, batch_norm=False, width=chosen.widths[0])
    return chosen
