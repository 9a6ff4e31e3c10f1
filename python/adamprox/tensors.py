"""What ``csrc/host`` asks of Python about tensors. The C++ module imports this one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sharding import is_distributed, placed_alike, rows_of_cuts


class Row(NamedTuple):
    """A row of a table: what a step works on of one param."""

    owner: Tensor
    """The param itself; of the tensors, those below are local tensors or stand-ins."""
    param: Tensor
    grad: Tensor
    states: dict[str, Tensor]
    group: int
    position: int
    """Its index in the group."""
    step: float
    deferred: bool
    """Whether other ranks have parts of its norm: the step leaves z, which is then shrunk."""
    first_chunk: int
    numel: int
    """Of its reals: a complex number counts twice."""
    block: int
    """Of the reals of a block of ``AdamProxL2``, or of all."""


def dispatches(tensor: Tensor) -> bool:
    """Whether its class has code of its own for torch's operations."""
    return type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def is_transformed(tensor: Tensor) -> bool:
    """Whether it belongs to a transformation of torch.func."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(
        tensor
    )


def is_ordinary(tensor: Any) -> bool:
    """Whether its numbers lie in memory of its own, as they are: so that C++ may work on them."""
    return (
        isinstance(tensor, Tensor)
        and not dispatches(tensor)
        and not is_transformed(tensor)
        and tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not (tensor.is_nested or tensor.is_inference() or tensor.is_conj() or tensor.is_neg())
        and not torch._is_zerotensor(tensor)
    )


def local(param: Any, tensor: Any) -> tuple[Any, int | None] | None:
    """A DTensor's local tensor, and its :func:`rows_of_cuts`; any other tensor as it is, and None.

    None for one that is placed otherwise than ``param``, or whose ranks have parts of a sum.
    """
    if not is_distributed(tensor):
        return tensor, None
    alike = tensor is param or (is_distributed(param) and placed_alike(tensor, param))
    if not alike:
        return None
    sharded = False
    for placement in tensor.placements:
        if not placement.is_replicate():
            # FSDP2's shards over tensor parallel have a split_factor.
            if not placement.is_shard() and not hasattr(placement, "split_factor"):
                return None
            sharded = True
    return tensor._local_tensor, rows_of_cuts(tensor) if sharded else None


def trials() -> dict[str, Any]:
    """Tensors to try assumptions on: ``plain`` ones are ordinary, ``others`` are not.

    ``words``: how many an implementation has. Until torch 2.12 it kept an interpreter in one more.
    """
    with torch.inference_mode(False):
        first, grad = _new(3), _new(3)
        param, with_grad = torch.nn.Parameter(_new(3)), torch.nn.Parameter(_new(3))
        with_grad.grad = grad
        numbers = _new(3, dtype=torch.complex64)
        wide = _new(3, dtype=torch.float64)
        plain = [first, _new(2, 3, 4), wide, param, with_grad, numbers, _new(4)[1:]]
        others = [torch._neg_view(first), numbers.conj(), _new(3, device="meta")]
        others.append(torch._efficientzerotensor(3))
    with torch.inference_mode():
        others.append(_new(3))
    major, minor = map(int, torch.__version__.split(".")[:2])
    words = 23 if (major, minor) < (2, 13) else 22
    tensors = {"param": param, "grad": grad, "with_grad": with_grad}
    return {"words": words, "plain": plain, "others": others, **tensors}


def _new(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
