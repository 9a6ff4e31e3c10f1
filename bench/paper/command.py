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

from . import data, page, settings
from .figures import FIGURES, Lab
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
  6         AdamProxL2 and AdamProxL1 beside AdamW; zeros against accuracy
  7 to 12   magnitudes of updates over the training: ResNet-20, 44, 56, 110, 218, DenseNet-BC-100
  section-3 which updates are scale-free, Theorem 1 beyond quadratics, what limits a step size
  appendix  Algorithms 2 and 3 with their bounds; SGD without BN

Trained on CIFAR where --data has its archives, else on scikit-learn's digits. Nothing is
downloaded. The default settings are the paper's own and meant for a GPU; --quick is for two cores
and some minutes, on digits of 8 x 8 pixels. Finished trainings are in DIR/cells.csv: a run that
was ended goes on where it stopped, and figures share them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add("figures", nargs="*", type=_figure, metavar="FIGURE",
        help="which, see below, or all")  # fmt: skip
    add("--quick", action="store_true", help="small networks, short trainings, coarse grids")
    add("--out", type=Path, default=Path("adamprox-paper"), metavar="DIR",
        help="for pictures, tables and finished trainings (default: %(default)s)")  # fmt: skip
    add("--data", type=Path, metavar="PATH",
        help="the folder of CIFAR's archives (default: none, digits)")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED",
        help="of weights and order; the first one's for grids, all for the best settings "
        "(default: 0 1 2)")  # fmt: skip
    add("--epochs", type=positive(int), help="of the grids' trainings (default: the settings')")
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


def _settings(args: argparse.Namespace) -> Settings:
    chosen = settings.QUICK if args.quick else settings.paper(args.data)
    changes: dict[str, Any] = {"seeds": tuple(dict.fromkeys(args.seeds))}
    if chosen.cifar:  # found out now rather than hours later
        for name in data.ARCHIVES:
            data.load(name, path=args.data)
    if args.epochs is not None:
        changes["epochs"] = args.epochs
    return dataclasses.replace(chosen, **changes)
