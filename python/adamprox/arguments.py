"""The constructors' arguments: what they mean, and which values are refused."""

from __future__ import annotations

from collections.abc import Callable, Collection
from numbers import Real
from typing import Any

from torch import Tensor

ARGUMENTS = """
    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts that define param groups.
        lr: learning rate; a float or a tensor of one element, as ``betas`` and ``weight_decay`` may
            be (default: 1e-3).
        betas: the decay rates of the first and the second moment, in [0, 1)
            (default: (0.9, 0.999)).
        eps: added to the denominator (default: 1e-8).
        weight_decay: lambda in the paper (default: {weight_decay}).
        amsgrad: divide by the largest second moment so far (default: False).
        maximize: ascend (default: False).
        foreach, fused: accepted for torch.optim.AdamW's sake; every step is fused. With
            ``fused=True`` a GradScaler leaves unscaling and skipping to the step, as torch's does,
            which saves a pass over the grads and the wait for a GPU.
        capturable: step counts, and hyper-parameters that are tensors on a GPU, are read there, so
            that a step can be captured into a CUDA graph, and its replays follow what is written
            into them; with the bits of the host. Step once before the capture (default: False).
        differentiable: refused if True.
        decay_by: what the decay strength ``s`` follows. ``"lr"``: ``s = lr * weight_decay``, as in
            torch (default). ``"schedule"``: ``s = lr / initial_lr * weight_decay``, the paper's
            ``eta_t * lambda``; ``initial_lr`` is the param group's, which torch's schedulers write,
            or else the lr at construction. The same decay needs ``initial_lr`` times the
            ``weight_decay`` that it takes by ``"lr"``.{decay_by}
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; None, the default, takes
            the environment's ``ADAMPROX_BACKEND`` or the best that can run. All give the same bits.

    Raises:
        ValueError, TypeError: an argument is out of its range or of a wrong type; the message names
            it and its value.
        RuntimeError: ``differentiable=True``, or the backend asked for cannot run here.
"""


def document(weight_decay: str = "1e-2", decay_by: str = "") -> Callable[[type], type]:
    """Adds the arguments to the docstring of a class."""

    def add(cls: type) -> type:
        if cls.__doc__ is not None:  # python -OO has none
            cls.__doc__ += ARGUMENTS.format(weight_decay=weight_decay, decay_by=decay_by)
        return cls

    return add


def validate(group: dict[str, Any]) -> None:
    """Refuses what torch.optim.AdamW refuses, in its words, and what cannot be done here."""
    lr, betas, eps, weight_decay = (group[k] for k in ("lr", "betas", "eps", "weight_decay"))
    for name in ("lr", "eps", "weight_decay"):
        if not isinstance(group[name], Real | Tensor):
            raise TypeError(f"Invalid {name}: {group[name]!r}, expected a number")
    two = isinstance(betas, Collection) and len(betas) == 2
    if not two or not all(isinstance(beta, Real | Tensor) for beta in betas):
        raise TypeError(f"Invalid betas: {betas!r}, expected two numbers")
    host_only = group["foreach"] and not group["capturable"]
    if isinstance(lr, Tensor) and host_only:
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
    for name in ("lr", "eps", "weight_decay"):
        if isinstance(group[name], Tensor) and group[name].numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= eps:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not 0.0 <= weight_decay:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    if len({isinstance(beta, Tensor) for beta in betas}) != 1 or not all(
        isinstance(beta, float | Tensor) for beta in betas
    ):
        raise ValueError("betas must be either both floats or both Tensors")
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            if host_only:
                raise ValueError(
                    f"betas[{index}] as a Tensor is not supported for capturable=False "
                    "and foreach=True"
                )
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{index}] must be 1-element")
    if group["decay_by"] not in ("lr", "schedule"):
        raise ValueError(f"Invalid decay_by: {group['decay_by']!r}, expected 'lr' or 'schedule'")
    if group["decay_by"] == "schedule" and not group.get("initial_lr", lr) > 0.0:
        raise ValueError(
            f"Invalid initial learning rate for decay_by='schedule': {group.get('initial_lr', lr)}"
        )
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if group["differentiable"]:
        raise RuntimeError(
            "differentiable=True is not supported: the step writes in place, outside of autograd"
        )
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
