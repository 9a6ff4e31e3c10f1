"""One training on several ranks: processes on gloo, each with its part of every batch."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


def start(function: Callable[..., Any], ranks: int, *arguments: Any) -> Any:
    """Calls ``function(*arguments)`` on each rank; returns what the first one's returned.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _rank, (ranks, Path(folder), function, arguments), nprocs=ranks, start_method="spawn"
        )
        return pickle.loads(Path(folder, "result").read_bytes())


def _rank(
    rank: int, ranks: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    result = function(*arguments)
    if rank == 0:
        (folder / "result").write_bytes(pickle.dumps(result))
    dist.barrier()
    # A thread of gloo may still ask for the interpreter while that ends, and abort the process.
    os._exit(0)


def parallel(model: nn.Module) -> nn.Module:
    """Whose backward pass averages grads over the ranks, if there are several."""
    return DistributedDataParallel(model) if dist.is_initialized() else model


def part(batch: Tensor) -> Tensor:
    """This rank's of a batch; equal ones, a few left out. If it is too small, all of it."""
    if not dist.is_initialized() or len(batch) < dist.get_world_size():
        return batch
    size = len(batch) // dist.get_world_size()
    return batch[dist.get_rank() * size :][:size]


def mean(value: Tensor) -> Tensor:
    """Over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value
