"""Params that several ranks share: DTensors, of FSDP2 or tensor parallelism."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_distributed(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether it is a DTensor; does not import torch.distributed to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, getattr(module, "DTensor", ()))


def placed_alike(tensor: DTensor, param: DTensor) -> bool:
    """Whether each rank has the same part of both."""
    return tensor.device_mesh == param.device_mesh and tensor.placements == param.placements


def why_not(tensor: DTensor, param: Tensor, may_move: bool) -> str | None:
    """What keeps a step from using it, or None: it must be dealt out to the ranks as ``param`` is.

    Args:
        may_move: whether it may be dealt out otherwise, on the same mesh.
    """
    if not is_distributed(param):
        return "is a DTensor, and the param is not"
    if tensor.device_mesh != param.device_mesh:
        return f"is on {tensor.device_mesh}, and the param on {param.device_mesh}"
    if tensor is param and any(placement.is_partial() for placement in param.placements):
        return f"has placements={tensor.placements}: ranks with parts of a sum"
    if not may_move and tensor.placements != param.placements:
        return f"has placements={tensor.placements}, and the param {param.placements}"
    return None


def local_of(tensor: Tensor, param: Tensor | None = None) -> Tensor:
    """The local tensor on this rank; placed as of ``param``, which may take communication.

    A plain tensor is returned as it is. Not recorded by autograd: call it under ``no_grad``.
    """
    if not is_distributed(tensor):
        return tensor
    if param is not None and is_distributed(param) and not placed_alike(tensor, param):
        tensor = tensor.redistribute(placements=param.placements)
    share = tensor.to_local()
    return share.wait() if hasattr(share, "wait") else share  # it may still be under way


def whole_of(tensor: Tensor) -> Tensor:
    """A DTensor with what all ranks have, plain; every rank of its mesh calls it.

    Where params are offloaded, the ranks' groups are of another device than the tensor.
    """
    if not is_distributed(tensor):
        return tensor
    own, mesh = local_of(tensor), tensor.device_mesh
    moved = type(tensor).from_local(
        own.to(mesh.device_type),
        mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return moved.full_tensor().to(own.device)


def summed(counts: Sequence[int], params: Sequence[Tensor]) -> list[int]:
    """Each count over the ranks that have parts of its param.

    Every rank calls it with the same params. Those that are dealt out alike take one all-reduce.
    """
    result = list(counts)
    alike: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        if is_distributed(param) and is_here(param):
            alike.setdefault((param.device_mesh, param.placements), []).append(i)
    for (mesh, placements), members in alike.items():
        from torch.distributed.tensor import DTensor, Partial, Replicate

        terms = [Replicate() if p.is_replicate() else Partial() for p in placements]
        own = torch.tensor([counts[i] for i in members], device=mesh.device_type)
        whole = DTensor.from_local(own, mesh, terms, run_check=False).full_tensor()
        for i, count in zip(members, whole.tolist(), strict=True):
            result[i] = count
    return result


def is_here(param: Tensor) -> bool:
    """Whether this rank is in the param's mesh, if it has one: others have nothing of it."""
    return not is_distributed(param) or param.device_mesh.get_coordinate() is not None


def shards_of(param: Tensor) -> list[int]:
    """The dims of the mesh over which a param is dealt out, rather than repeated."""
    if not is_distributed(param):
        return []
    return [d for d, placement in enumerate(param.placements) if not placement.is_replicate()]


def row_ranges(param: DTensor) -> list[tuple[int, int]] | None:
    """The rows, indices of dim 0, of each rank with another part, by its coordinate in the mesh.

    None if ranks have anything but ranges of rows.
    """
    from torch.distributed.tensor import Shard

    dims = shards_of(param)
    if param.dim() == 0 or not all(
        type(param.placements[d]) is Shard and param.placements[d].is_shard(0) for d in dims
    ):
        return None
    return split_rows(param.shape[0], tuple(param.device_mesh.size(d) for d in dims))


@lru_cache(maxsize=1024)
def split_rows(rows: int, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Split and split again, as torch.chunk does."""
    ranges = [(0, rows)]
    for size in sizes:
        divided = []
        for first, last in ranges:
            most = -(-(last - first) // size)
            cuts = [min(first + i * most, last) for i in range(size + 1)]
            divided += list(pairwise(cuts))
        ranges = divided
    return ranges


@lru_cache(maxsize=1024)
def _common_divisor(rows: int, sizes: tuple[int, ...]) -> int:
    """Of the rows at which ranges begin. Kept, as each step asks for each tensor."""
    return math.gcd(*(first for first, last in split_rows(rows, sizes) if first < last))


def rows_of_cuts(param: DTensor) -> int:
    """Blocks of n rows are all whole on one rank if n divides this; -1 if no blocks are."""
    if row_ranges(param) is not None:
        sizes = tuple(param.device_mesh.size(d) for d in shards_of(param))
        return _common_divisor(param.shape[0], sizes)
    of_rows = all(getattr(param.placements[d], "dim", None) == 0 for d in shards_of(param))
    return 1 if of_rows and param.dim() > 0 else -1
