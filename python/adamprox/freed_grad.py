"""What a step in backward leaves of a gradient: a tensor without numbers, which says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.clone.default, _aten.detach.default)
_ZEROS = (_aten.zero_.default, _aten._foreach_zero_.default)


class FreedGrad(Tensor):
    """In the place of ``param.grad`` until it is set to None: it has no memory of its own.

    So clipping, and a ``GradScaler``, which come too late, fail instead of finding nothing to do.
    """

    owner: str

    @staticmethod
    def of(param: Tensor, name: str) -> FreedGrad:
        """The one for ``param``."""
        return _make(param.shape, param.dtype, param.device, name)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        grad = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        if func in _ZEROS:  # zero_grad(set_to_none=False)
            return args[0]
        if func in _COPIES:  # as module.to() makes them
            dtype, device = kwargs.get("dtype"), kwargs.get("device")
            return _make(grad.shape, dtype or grad.dtype, device or grad.device, grad.owner)
        raise RuntimeError(
            f"the grad of {grad.owner} is gone: its step was taken during backward "
            f"(adamprox.step_in_backward), and it is too late for {func}. Clipping and "
            "torch.amp.GradScaler need all grads before the first step: use optimizer.step()"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FreedGrad(of {self.owner})"


def _make(shape: torch.Size, dtype: torch.dtype, device: torch.device, name: str) -> FreedGrad:
    grad: FreedGrad = Tensor._make_wrapper_subclass(FreedGrad, shape, dtype=dtype, device=device)
    grad.owner = name
    return grad
