"""Params that several ranks share: DTensors, of FSDP2 or tensor parallelism."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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


def summed(counts: Sequence[int], params: Sequence[Tensor]) -> list[int]:
    """Each count over the ranks that have parts of its param.

    Every rank calls it with the same params. Those that are dealt out alike take one all-reduce.
    """
    result = list(counts)
    alike: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        if is_distributed(param):
            alike.setdefault((param.device_mesh, param.placements), []).append(i)
    for (mesh, placements), members in alike.items():
        from torch.distributed.tensor import DTensor, Partial, Replicate

        terms = [Replicate() if p.is_replicate() else Partial() for p in placements]
        own = torch.tensor([counts[i] for i in members], device=mesh.device_type)
        whole = DTensor.from_local(own, mesh, terms, run_check=False).full_tensor()
        for i, count in zip(members, whole.tolist(), strict=True):
            result[i] = count
    return result
