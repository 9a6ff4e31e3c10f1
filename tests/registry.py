"""What is tested, as tables: optimizers, backends, dtypes, options. A new one costs a line here."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import adamprox
from adamprox.hyperparameters import COUNT, states_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Penalty(NamedTuple):
    """h of ``argmin_x 1/2 |x - z|^2 + s h(x)``, over the last dim."""

    value: Callable[[Tensor], Tensor]
    conjugate_prox: Callable[[Tensor, float], Tensor]
    """The prox of the Fenchel conjugate of ``s h``; for a norm, the projection on its dual ball."""


SQ_L2 = Penalty(lambda x: x.square().sum(-1) / 2, lambda z, s: z * s / (1 + s))
L1 = Penalty(lambda x: x.abs().sum(-1), lambda z, s: z.clamp(-s, s))
L2 = Penalty(lambda x: x.norm(dim=-1), lambda z, s: z * min(1.0, s / z.norm().item()))


class Spec(NamedTuple):
    """An optimizer under test."""

    cls: Callable[..., torch.optim.Optimizer]
    rule: Callable[[Tensor, Tensor, float], Tensor]  # of x, Adam's update u, s: as in the paper
    weight_decay: float = 0.3  # at lr=1e-2, strong enough that a wrong formula cannot hide
    coupled: bool = False
    penalty: Penalty | None = None  # the decay is its proximal operator
    twin: Callable[..., torch.optim.Optimizer] | None = None  # the same in torch.optim


OPTIMIZERS: Mapping[str, Spec] = MappingProxyType(
    {
        "Adam": Spec(adamprox.Adam, lambda x, u, s: x - u, coupled=True, twin=torch.optim.Adam),
        "AdamW": Spec(adamprox.AdamW, lambda x, u, s: (1 - s) * x - u, twin=torch.optim.AdamW),
        "AdamProx": Spec(adamprox.AdamProx, lambda x, u, s: (x - u) / (1 + s), penalty=SQ_L2),
        "AdamProxL1": Spec(
            adamprox.AdamProxL1,
            lambda x, u, s: (x - u).sign() * ((x - u).abs() - s).clamp(min=0),
            penalty=L1,
        ),
        "AdamProxL2": Spec(
            adamprox.AdamProxL2,
            lambda x, u, s: max(1 - s / (x - u).norm().item(), 0) * (x - u),
            weight_decay=10.0,  # a norm grows with the number of elements, so s must, too
            penalty=L2,
        ),
    }
)
PROXIMAL = tuple(name for name, spec in OPTIMIZERS.items() if spec.penalty)

# Each must give the bits of the backend "reference".
BACKENDS = ("cpu", "triton", "cuda_on_host")  # the last one is built by conftest.py


class DType(NamedTuple):
    param: torch.dtype
    state: torch.dtype | None = None  # None: the param's


DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        "float32": DType(torch.float32),
        "float64": DType(torch.float64),
        "bfloat16": DType(torch.bfloat16),
        "float16": DType(torch.float16),
        "complex64": DType(torch.complex64),
        "bfloat16_float32": DType(torch.bfloat16, torch.float32),
        "float16_float32": DType(torch.float16, torch.float32),
    }
)


# Layouts: the same values, lying in memory in another way.


def _contiguous(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.contiguous_format)


def _transposed(values: Tensor) -> Tensor:
    reverse = tuple(reversed(range(values.dim())))
    return _contiguous(values.permute(reverse)).permute(reverse)


def _sliced(values: Tensor) -> Tensor:
    buffer = values.new_zeros(*values.shape, 3)
    return buffer[..., 1].copy_(values)


def _misaligned(values: Tensor) -> Tensor:
    buffer = values.new_zeros(values.numel() + 1)
    return buffer[1:].view(values.shape).copy_(values)


LAYOUTS = (_contiguous, _transposed, _sliced, _misaligned)


class Option(NamedTuple):
    """A way to use an optimizer; params are dealt out to the groups in turns."""

    arguments: Mapping[str, Any] = MappingProxyType({})
    groups: tuple[Mapping[str, Any], ...] = (MappingProxyType({}),)
    lr_factor: Callable[[int], float] = lambda step: 1.0
    has_grad: Callable[[int, int], bool] = lambda step, index: True
    param_layout: Callable[[int, int], Callable[[Tensor], Tensor]] = lambda s, i: _contiguous
    grad_layout: Callable[[int, int], Callable[[Tensor], Tensor]] = lambda s, i: _contiguous
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    """Those that have it, or that are not all the same with it."""


OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        "plain": Option(),
        "amsgrad": Option({"amsgrad": True}),
        "maximize": Option({"maximize": True}),
        "schedule": Option({"decay_by": "schedule"}, lr_factor=lambda step: 1 / (1 + step % 7)),
        "groups": Option(
            groups=(
                {"lr": 3e-2, "betas": (0.8, 0.95)},
                {"eps": 1e-3, "weight_decay": 0.0, "ema_decay": 0.9},
                {"betas": (0.0, 0.5), "amsgrad": True, "maximize": True},
                {"decay_by": "schedule", "initial_lr": 0.25, "betas": (0.95, 0.9999)},
            )
        ),
        "ema": Option({"ema_decay": 0.75}, optimizers=("AdamProx", "AdamProxL2")),
        "cautious": Option({"cautious": True}, optimizers=("AdamW",)),
        "metric": Option(
            {"metric": "adam"},
            groups=({}, {"amsgrad": True}, {"bounds": (-0.5, 0.25), "decay_by": "schedule"}),
            lr_factor=lambda step: 1 / (1 + step % 3),
            optimizers=("AdamProx", "AdamProxL1"),
        ),
        "bounds": Option(
            groups=({"bounds": (0, None)}, {"bounds": (-0.3, 0.35)}, {"bounds": (None, 0.1)}),
            optimizers=("AdamProx", "AdamProxL1"),
        ),
        "elastic_net": Option(
            {"l2": 5.0},
            groups=({}, {"metric": "adam"}, {"bounds": (-1.0, 0.5), "l2": 20.0}),
            optimizers=("AdamProxL1",),
        ),
        "blocks": Option(
            groups=(
                *({"block": "row", "weight_decay": 3.0}, {"block": 2}),
                *({"block": "group", "weight_decay": 60.0}, {"block": 3, "block_scaling": "sqrt"}),
                {"block": "row", "block_scaling": "sqrt", "weight_decay": 1.0, "ema_decay": 0.9},
                {"block": "group", "block_scaling": "sqrt", "weight_decay": 2.0},
            ),
            optimizers=("AdamProxL2",),
        ),
        "strided_blocks": Option(
            groups=({"block": "row", "weight_decay": 3.0}, {"block": 2}, {"block": "group"}),
            param_layout=lambda step, index: LAYOUTS[(step // 10 + index) % 4],
            grad_layout=lambda step, index: LAYOUTS[(step + index // 2) % 4],
            optimizers=("AdamProxL2",),
        ),
        # A group a rule, whatever the class is.
        "rules": Option(
            groups=(
                *(
                    {"decay": spec.cls.decay, "weight_decay": spec.weight_decay}
                    for spec in OPTIMIZERS.values()
                ),
                {"decay": "decoupled", "weight_decay": 0.5, "cautious": True},
                {"decay": "prox_l1", "weight_decay": 0.3, "metric": "adam", "l2": 2.0},
                {
                    "decay": "prox_sq_l2",
                    "weight_decay": 0.3,
                    "metric": "adam",
                    "bounds": (-0.6, 0.6),
                },
                {"decay": "prox_l2", "weight_decay": 3.0, "block": "row"},
                {"decay": "prox_l2", "weight_decay": 30.0, "block": "group"},
            ),
            optimizers=("AdamProx",),
        ),
        "skipped": Option(has_grad=lambda step, index: (step + index) % 3 != 0),
        "strided": Option(
            param_layout=lambda step, index: LAYOUTS[(step // 10 + index) % 4],
            grad_layout=lambda step, index: LAYOUTS[(step + index // 2) % 4],
        ),
        "misaligned": Option(
            param_layout=lambda step, index: _misaligned,
            grad_layout=lambda step, index: LAYOUTS[3 * (step % 2)],
        ),
    }
)


CELLS = tuple(
    (optimizer, option)
    for optimizer in OPTIMIZERS
    for option in OPTIONS
    if optimizer in OPTIONS[option].optimizers
)


def build(
    optimizer: str, values: list[Tensor], option: Option, backend: str, state: torch.dtype | None
) -> torch.optim.Optimizer:
    """An optimizer over new params of these values, with states of dtype ``state``."""
    spec = OPTIMIZERS[optimizer]
    params = [
        torch.nn.Parameter(option.param_layout(0, i)(value)) for i, value in enumerate(values)
    ]
    groups = [
        {"params": params[first :: len(option.groups)], **group}
        for first, group in enumerate(option.groups)
    ]
    result = spec.cls(
        groups,
        backend=backend,
        **{"lr": 1e-2, "weight_decay": spec.weight_decay, **option.arguments},
    )
    if state is not None:
        for group in result.param_groups:
            for param in group["params"]:
                starts = {"zeros": torch.zeros_like(param), "param": param.detach()}
                result.state[param] = {
                    COUNT: torch.tensor(0.0),
                    **{s.key: starts[s.starts].to(state, copy=True) for s in states_of(group)},
                }
    return result


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order in which :func:`build` was given their values."""
    groups = [group["params"] for group in optimizer.param_groups]
    count = sum(map(len, groups))
    return [groups[i % len(groups)][i // len(groups)] for i in range(count)]


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers; all NaNs have the same."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return torch.where(tensor.isnan(), torch.nan, tensor).view(integer)


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """``torch.equal``, telling zeros of different sign apart, and with NaNs equal."""
    return ours.dtype == theirs.dtype and torch.equal(bits(ours), bits(theirs))


def assert_same_bits(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Every param, every state."""
    for index, (p, q) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
        assert same_bits(p.detach(), q.detach()), f"param {index}"
        state = theirs.state.get(q, {})
        assert ours.state.get(p, {}).keys() == state.keys()
        for key, value in state.items():
            assert same_bits(ours.state[p][key], value), f"{key} of param {index}"


def rounding_bound(steps: int, scale: float, lr: float, dtype: torch.dtype) -> float:
    """How far two roundings of the same iteration can be apart after so many steps.

    A step rounds the param (of size ``scale``) at most 4 times, and Adam's update about 16 times;
    that is ``lr * mhat / sqrt(vhat)``, and ``|mhat| / sqrt(vhat) <= sqrt(steps)``, since
    ``vhat >= g**2 / steps`` for each grad so far. Both iterations round: twice. The coupled
    decay feeds errors back into the gradient, damped by lr: a factor of 2 at most here.
    """
    unit = torch.finfo(dtype).eps / 2
    return 2 * 2 * steps * unit * (4 * scale + 16 * lr * math.sqrt(steps))
