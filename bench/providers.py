"""Who is timed: this package on each of its backends, torch, and peers if they are installed.

All do Adam with decoupled weight decay at the same values (AdamProx and its kin with a decay of
their own), so that the work is the same; the peers' defaults differ.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

import adamprox
from adamprox import backends

from .captured import capture_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch.optim import Optimizer

LR = 1e-3
VALUES: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}

OURS = ("AdamW", "AdamProx", "AdamProxL1", "AdamProxL2", "Adam")
BASELINE = "torch fused"  # what "times as fast" refers to
# A name and, behind a comma, how: each step notes its updates, or replays a CUDA graph.
TRACKED = ("AdamW, tracked", "AdamProxL2, tracked")
CAPTURED = (f"{BASELINE}, captured", "AdamW, captured", "AdamProxL2, captured")


class Provider(NamedTuple):
    """An optimizer to be timed, as its row names it."""

    name: str  # in the table
    choice: str  # on the command line
    provider: str
    version: str
    optimizer: str
    backend: str
    make: Callable[[Any], Optimizer]  # imports what it needs


class Peer(NamedTuple):
    """Where a peer's optimizer is, and which devices it runs on."""

    module: str
    optimizer: str
    devices: tuple[str, ...] = ("cuda",)


# Decoupled weight decay is the default of each.
PEERS = {
    "Apex FusedAdam": Peer("apex.optimizers", "FusedAdam"),
    "TransformerEngine FusedAdam": Peer("transformer_engine.pytorch.optimizers", "FusedAdam"),
    "DeepSpeed CPUAdam": Peer("deepspeed.ops.adam", "DeepSpeedCPUAdam", ("cpu",)),
    "DeepSpeed FusedAdam": Peer("deepspeed.ops.adam", "FusedAdam"),
    "bitsandbytes AdamW": Peer("bitsandbytes.optim", "AdamW", ("cpu", "cuda")),
    "torchao AdamW8bit": Peer("torchao.optim", "AdamW8bit", ("cpu", "cuda")),
    "optimi AdamW": Peer("optimi", "AdamW", ("cpu", "cuda")),
    "FlashOptim FlashAdamW": Peer("flashoptim", "FlashAdamW"),
}
TORCH: dict[str, dict[str, Any]] = {
    "torch for-loop": {"foreach": False},
    "torch foreach": {"foreach": True},
    BASELINE: {"fused": True},
}
# Options of a rule, to be timed beside AdamW.
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW, cautious": {"cautious": True},
    "AdamProx, metric": {"metric": "adam"},
    "AdamProx, bounds": {"bounds": (-1.0, 1.0)},
    "AdamProxL1, metric": {"metric": "adam"},
    "AdamProxL1, elastic net": {"l2": 1e-2},
    "AdamProxL1, bounds": {"bounds": (-1.0, 1.0)},
    "AdamProxL2, row": {"block": "row"},
    "AdamProxL2, 64 rows": {"block": 64},
    "AdamProxL2, group": {"block": "group"},
}
NAMES = (*TORCH, *OURS, *OPTIONS, *TRACKED, *CAPTURED, *PEERS)
SHORT = (BASELINE, "AdamW", "AdamProx", "AdamProxL1", "AdamProxL2")


def providers(
    names: Iterable[str], device: torch.device, our_backends: Sequence[str] = ()
) -> tuple[list[Provider], dict[str, str]]:
    """The providers of these names, and why others cannot run.

    Ours are on each of the backends; if none are given, on ``ADAMPROX_BACKEND``'s or the best.
    """
    found, skipped = [], {}
    default = default_backend(device)
    our_backends = our_backends or (backends.requested(None) or default,)
    for name in names:
        rule, _, how = name.partition(", ")
        if how == "captured" and device.type != "cuda":
            skipped[name] = "a CUDA graph takes a GPU"
        elif rule in OURS:
            for backend in our_backends:
                label = name if backend == default else f"{name}, {backend}"
                if reason := backends.BACKENDS[backend].why_not(device.type):
                    skipped[label] = reason
                else:
                    options = {**VALUES, **OPTIONS.get(name, {}), "backend": backend}
                    make = partial(getattr(adamprox, rule), **options)
                    ours = ("adamprox", adamprox.__version__, rule, backend)
                    found.append(Provider(label, name, *ours, _how(make, how)))
        elif rule in TORCH:
            make = partial(torch.optim.AdamW, **VALUES, **TORCH[rule])
            torchs = ("torch", torch.__version__, "AdamW", rule.removeprefix("torch "))
            found.append(Provider(name, name, *torchs, _how(make, how)))
        elif reason := why_not(PEERS[name], device):
            skipped[name] = reason
        else:
            module, optimizer, _ = PEERS[name]
            make = partial(getattr(import_module(module), optimizer), **VALUES)
            theirs = (name.split()[0], _version(module), optimizer, device.type)
            found.append(Provider(name, name, *theirs, make))
    return found, skipped


def _how(make: Callable[..., Any], how: str) -> Callable[[Any], Any]:
    if how == "tracked":
        return partial(_tracked, make)
    if how == "captured":
        return partial(_captured, make)
    return make


def _tracked(make: Callable[[Any], Any], params: Any) -> Optimizer:
    optimizer = make(params)
    optimizer.track_updates()
    return cast("Optimizer", optimizer)


def _captured(make: Callable[..., Any], params: Any) -> Optimizer:
    optimizer = make(params, capturable=True)
    capture_steps(optimizer)
    return cast("Optimizer", optimizer)


def default_backend(device: torch.device) -> str:
    """The best that can run."""
    chosen = backends.select(None, device.type)
    return next(name for name, backend in backends.BACKENDS.items() if backend is chosen)


def why_not(peer: Peer, device: torch.device) -> str | None:
    """Why a peer cannot run, or None if it can."""
    if device.type not in peer.devices:
        return f"it runs on {' and '.join(peer.devices)} tensors only"
    try:
        import_module(peer.module)
    except ImportError as error:
        return f"not installed: {error}"
    except Exception as error:  # of a build for another machine, say
        return f"cannot be imported: {error!r}"
    return None


def _version(module: str) -> str:
    """Of the installed distribution that a module is part of."""
    package = module.partition(".")[0]
    return metadata.version(metadata.packages_distributions()[package][0])
