"""The specification: one step in eager PyTorch, made of single IEEE operations.

The other backends give the same bits (``torch.equal``) as :func:`step`. float32, bfloat16 and
float16 tensors compute in float32, float64 ones in float64; complex numbers are pairs of reals.
Every operation rounds once. Scalars are computed in double and rounded once to the compute type.
It is one file, however long, so that the whole specification is read in one place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .hyperparameters import RULES

TILE_SIZE = 2048
CHUNK_SIZE = 8 * TILE_SIZE

BLOCK_SIZE = 256  # of what telemetry sums at a time
BINS = 29  # of telemetry's histograms

DECAYS = tuple(RULES)
ELEMENTWISE_PROX = ("prox_sq_l2", "prox_l1")


class Scalars(NamedTuple):
    """The numbers of one step that are the same for every element, in double."""

    one_minus_beta1: float
    one_minus_beta2: float
    step_size: float
    """``lr * sqrt(1 - beta2**t) / (1 - beta1**t)``"""
    eps: float
    """``eps * sqrt(1 - beta2**t)``"""
    grad_scale: float
    """multiplies the grads: 1, or -1 to maximize, divided by the loss scale"""
    decay: tuple[float, ...]
    """the constants of the rule: see :func:`decay_constants`"""


def decay_rate(group: Mapping[str, Any]) -> float:
    """``eta``: the lr or, by schedule, ``lr / initial_lr``."""
    eta = float(group["lr"])
    if group["decay_by"] == "schedule":
        eta = eta / float(group["initial_lr"])
    return eta


def decay_strength(group: Mapping[str, Any]) -> float:
    """``s = eta * weight_decay``."""
    return decay_rate(group) * float(group["weight_decay"])


def rule_of(group: Mapping[str, Any]) -> str:
    """The rule that a group's values choose: its ``decay``, or a variant of it.

    ``"cautious"``; with ``metric="adam"``, ``"prox_sq_l2_metric"`` and ``"prox_l1_metric"``.
    """
    if group["decay"] == "decoupled" and group.get("cautious"):
        return "cautious"
    if group["decay"] in ELEMENTWISE_PROX and group.get("metric") == "adam":
        return f"{group['decay']}_metric"
    return str(group["decay"])


def decay_constants(rule: str, group: Mapping[str, Any], root: float) -> tuple[float, ...]:
    """``(weight_decay,)`` for coupled decay, else ``(s, ...)``; ``root = sqrt(1 - beta2**t)``.

    For the elementwise proximal rules ``(k0, k1, low, high)``: ``s / (1 + s)`` (prox_sq_l2) or
    ``s`` (prox_l1), ``s2 / (1 + s2)``, and the bounds; in Adam's metric ``s * root`` and
    ``s2 * root``.
    """
    if rule == "coupled":
        return (float(group["weight_decay"]),)
    s = decay_strength(group)
    if group["decay"] not in ELEMENTWISE_PROX:
        return (s,)
    s2 = decay_rate(group) * float(group.get("l2") or 0.0)
    low, high = group.get("bounds") or (None, None)
    bounds = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
    if rule.endswith("_metric"):
        return (s * root, s2 * root, *bounds)
    return (s / (1 + s) if rule == "prox_sq_l2" else s, s2 / (1 + s2), *bounds)


def round_up(x: float, dtype: torch.dtype) -> float:
    """The least number of that dtype that is not below ``x``."""
    if dtype == torch.float64 or not math.isfinite(x) or x == 0:
        return x
    digits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[dtype]
    least_exponent = -14 if dtype == torch.float16 else -126
    exponent = max(math.frexp(x)[1] - 1, least_exponent)
    unit = 2.0 ** (exponent - (digits - 1))
    return math.ceil(x / unit) * unit


def round_inwards(bounds: Sequence[float], dtype: torch.dtype) -> tuple[float, float]:
    """Each end of the box as the nearest number of that dtype within."""
    low, high = bounds
    return round_up(low, dtype), -round_up(-high, dtype)


def alpha(group: Mapping[str, Any]) -> float:
    """The paper's ``alpha``: the lr without its schedule, what telemetry measures updates by.

    From 2**-99 to 2**99, so that alpha * 2**-27 is a normal number in every compute type.
    """
    return min(max(2.0**-99, float(group.get("initial_lr", group["lr"]))), 2.0**99)


def power(base: float, exponent: float) -> float:
    """``base**exponent`` for a base in [0, 1), rounded alike everywhere.

    The whole part is made by squaring, the fraction by square roots. NaN for a negative exponent.
    """
    if not exponent >= 0:
        return math.nan
    if exponent >= 2.0**63:
        return 0.0
    n = int(exponent)
    fraction = exponent - n
    result, square, root = 1.0, base, base
    while n > 0:
        if n % 2:
            result *= square
        square *= square
        n //= 2
    while fraction != 0:
        root = math.sqrt(root)
        fraction *= 2
        if fraction >= 1:
            result *= root
            fraction -= 1
    return result


def step_scalars(group: Mapping[str, Any], step: float, loss_scale: float = 1.0) -> Scalars:
    """The scalars of step number ``step`` (the first is 1) for one param group.

    The grads are those of ``loss_scale`` times the loss.
    """
    beta1, beta2 = map(float, group["betas"])
    bias_correction1 = 1 - power(beta1, step)
    bias_correction2_sqrt = math.sqrt(1 - power(beta2, step))
    return Scalars(
        one_minus_beta1=1 - beta1,
        one_minus_beta2=1 - beta2,
        step_size=float(group["lr"]) * bias_correction2_sqrt / bias_correction1,
        eps=float(group["eps"]) * bias_correction2_sqrt,
        grad_scale=(-1.0 if group["maximize"] else 1.0) / loss_scale,
        decay=decay_constants(rule_of(group), group, bias_correction2_sqrt),
    )


def update_moment(moment: Tensor, value: Tensor, one_minus_beta: Tensor) -> Tensor:
    """``beta * moment + (1 - beta) * value``."""
    return moment + one_minus_beta * (value - moment)


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root of a float32 or float64 tensor.

    ``torch.sqrt`` on CPU may call MKL's, which is off by one unit in the last place for a float32
    number out of five. In double it is near enough for a float32 result to round correctly: no root
    of a 24-bit number is within 2**-50 of the middle between two such numbers, relatively.
    """
    if x.dtype == torch.float32:
        return torch.sqrt(x.to(torch.float64)).to(torch.float32)
    return torch.sqrt(x) if x.is_cuda else x.clone().apply_(math.sqrt)


def adam_denominator(exp_avg_sq: Tensor, eps: Tensor) -> Tensor:
    """``D``: ``sqrt(vhat) + eps``, times ``sqrt(1 - beta2**t)``."""
    return sqrt(exp_avg_sq) + eps


def adam_update(exp_avg: Tensor, exp_avg_sq: Tensor, step_size: Tensor, eps: Tensor) -> Tensor:
    """``eta_t * alpha * mhat / (sqrt(vhat) + eps)`` of the paper's Algorithm 1, line 8."""
    return (step_size * exp_avg) / adam_denominator(exp_avg_sq, eps)


def soft_threshold(z: Tensor, threshold: Tensor) -> Tensor:
    """``argmin_x 0.5 * (x - z)**2 + threshold * abs(x)``, elementwise: exact zeros, NaN kept."""
    magnitude = torch.abs(z)
    shrunk = torch.where(magnitude <= threshold, torch.zeros_like(z), magnitude - threshold)
    return torch.copysign(shrunk, z)


def clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The prox of the box's indicator, its projection; a NaN stays a NaN."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def apply_decay(
    rule: str, param: Tensor, update: Tensor, denominator: Tensor, k: Sequence[Tensor]
) -> Tensor:
    """The new param from Adam's update, its :func:`adam_denominator` and the constants ``k``.

    A factor close to 1 is applied as a subtraction, so that param is rounded once.
    """
    if rule == "decoupled":  # (1 - s) * param - update: (4)
        return param - (update + k[0] * param)
    if rule == "cautious":  # not where decay would undo what the update does
        opposite = ((update > 0) & (param < 0)) | ((update < 0) & (param > 0))
        return param - torch.where(opposite, update, update + k[0] * param)
    if rule in ("prox_sq_l2", "prox_sq_l2_metric"):  # (param - update) / (1 + s): (5)
        factor = k[0] / (denominator + k[0]) if rule == "prox_sq_l2_metric" else k[0]
        return clamp(param - (update + factor * (param - update)), k[2], k[3])
    if rule in ("prox_l1", "prox_l1_metric"):
        metric = rule == "prox_l1_metric"
        x = soft_threshold(param - update, k[0] / denominator if metric else k[0])
        if k[1] != 0:
            x = x - (k[1] / (denominator + k[1]) if metric else k[1]) * x
        return clamp(x, k[2], k[3])
    return param - update  # coupled; prox_l2 before its blocks shrink


def prox_l2(z: Tensor, strength: float) -> Tensor:
    """``argmin_x 0.5 * norm(x - z)**2 + strength * norm(x)``: ``max(1 - strength/norm(z), 0) * z``.

    The block is the whole tensor; a block of norm 0 stays 0.
    """
    norm = math.sqrt(sum_of_squares(z))
    shrinkage = 1.0 if norm <= strength else strength / norm
    result = z.clone()
    shrink(result, torch.tensor(shrinkage, dtype=torch.float64, device=z.device))
    return result


def shrink(z: Tensor, shrinkage: Tensor) -> None:
    """``z <- (1 - shrinkage) * z``, in place; the shrinkage is a float64 number."""
    z = _reals(z)
    compute = z.to(_compute_dtype(z))
    z.copy_(compute - shrinkage.to(compute.dtype) * compute)


def sum_of_squares(values: Tensor) -> float:
    """The sum of squares in double, by one fixed tree, elements taken as they lie in memory."""
    squares = in_memory_order(values).to(torch.float64)
    squares = squares * squares
    return tree_sum(squares).item()


def tree_sum(values: Tensor) -> Tensor:
    """A sum of float64 values in a fixed order that threads, vectors and ranks can follow.

    Each value is added to its neighbour, then each of these sums to its neighbour, until one is
    left; the last one of an odd number stays as it is. So whoever has the values from ``k * 2**n``
    to ``(k + 1) * 2**n`` knows one of the sums.
    """
    while len(values) > 1:
        pairs = values.new_zeros((len(values) + 1) // 2, 2)
        pairs.view(-1)[: len(values)] = values
        values = pairs[:, 0] + pairs[:, 1]
    return values[0]


Writes = list[tuple[Tensor, Tensor]]
"""Tensors and their new values."""


@torch.no_grad()
def step(
    group: Mapping[str, Any],
    param: Tensor,
    grad: Tensor,
    states: Mapping[str, Tensor],
    scalars: Scalars,
) -> Writes:
    """One step of one tensor: what is to be written, so that an error leaves everything as it is.

    Every tensor has the param's shape; complex numbers are pairs of reals.

    Args:
        group: the values of the param group.
        param, grad: of the same dtype.
        states: by the keys of :data:`adamprox.hyperparameters.STATES`, those that there are.
        scalars: from :func:`step_scalars`.
    """
    rule = rule_of(group)
    param, grad = _reals(param), _reals(grad)
    own = {key: _reals(state) for key, state in states.items()}
    dtype = _compute_dtype(param)

    def rounded(scalar: float) -> Tensor:
        return torch.tensor(scalar, dtype=dtype, device=param.device)

    p, g = param.to(dtype), rounded(scalars.grad_scale) * grad.to(dtype)
    constants = scalars.decay
    if len(constants) > 2:
        constants = (*constants[:2], *round_inwards(constants[2:], param.dtype))
    k = [rounded(constant) for constant in constants]
    if rule == "coupled":  # Algorithm 1, line 5
        g = g + k[0] * p
    m = update_moment(own["exp_avg"].to(dtype), g, rounded(scalars.one_minus_beta1))
    v = update_moment(own["exp_avg_sq"].to(dtype), g * g, rounded(scalars.one_minus_beta2))
    writes = [(own["exp_avg"], m), (own["exp_avg_sq"], v)]
    if "max_exp_avg_sq" in own:
        largest = own["max_exp_avg_sq"].to(dtype)
        v = torch.where(largest > v, largest, v)
        writes.append((own["max_exp_avg_sq"], v))
    denominator = adam_denominator(v, rounded(scalars.eps))
    update = rounded(scalars.step_size) * m / denominator
    new = apply_decay(rule, p, update, denominator, k).to(param.dtype)
    if rule == "prox_l2" and param.numel() > 0:  # of what is stored
        new = prox_l2(torch.empty_like(param).copy_(new), scalars.decay[0])
    return [*writes, (param, new), *follow(new, own, group)]


def follow(param: Tensor, states: Mapping[str, Tensor], group: Mapping[str, Any]) -> Writes:
    """What becomes of the states that follow from the final param.

    ``ema <- ema + (1 - ema_decay) * (param - ema)``, in the param's compute type.
    """
    if "ema" not in states:
        return []
    ema, param = _reals(states["ema"]), _reals(param)
    k = torch.tensor(1 - float(group["ema_decay"]), dtype=ema.dtype, device=ema.device)
    return [(ema, update_moment(ema, param.to(ema.dtype), k))]


@torch.no_grad()
def write(writes: Writes) -> None:
    """Writes the new values."""
    for tensor, value in writes:
        tensor.copy_(value)


def _reals(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def noted_update(exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Scalars) -> Tensor:
    """The update that telemetry notes of a step: Adam's, from the moments that the step has stored.

    It is the one that the step has applied, unless the moments have been rounded to 16 bits.
    ``exp_avg_sq`` is with amsgrad ``max_exp_avg_sq``. In the compute type.
    """
    exp_avg, exp_avg_sq = _reals(exp_avg), _reals(exp_avg_sq)
    dtype = _compute_dtype(exp_avg)
    step_size, eps = (
        torch.tensor(scalar, dtype=dtype, device=exp_avg.device)
        for scalar in (scalars.step_size, scalars.eps)
    )
    return adam_update(exp_avg.to(dtype), exp_avg_sq.to(dtype), step_size, eps)


class UpdateNotes(NamedTuple):
    """What telemetry notes of one tensor's update."""

    squares: float
    """The :func:`sum_by_halves`."""
    bins: list[int]
    """How many updates are of which magnitude, by :func:`magnitude_bins`."""


class ParamNotes(NamedTuple):
    """What telemetry notes of one tensor's new param."""

    squares: float
    """The :func:`sum_by_halves`."""
    zeros: int
    nans: int
    infs: int


def magnitude_bins(update: Tensor, alpha: float) -> Tensor:
    """How often ``x = abs(update) / alpha``, compared without rounding, is in each of 29 bins.

    ``x < 2**-27``; ``2**(b - 28) <= x < 2**(b - 27)`` for b = 1 ... 27; ``x >= 1``. NaN is in none.
    ``alpha``, from :func:`alpha`, is rounded to the compute type; its product with a power of two
    is then exact.
    """
    magnitude = update.abs()
    rounded = torch.tensor(alpha, dtype=update.dtype, device=update.device)
    at_least = [(magnitude >= rounded * 2.0**k).sum() for k in range(2 - BINS, 1)]
    above = torch.stack([(magnitude >= 0).sum(), *at_least, torch.zeros_like(at_least[0])])
    return above[:-1] - above[1:]


def sum_by_halves(values: Tensor) -> float:
    """Telemetry's sum of squares, elements taken as they lie in memory; 0 of none.

    In the compute type the halves of each block of :data:`BLOCK_SIZE` are added until one number is
    left, so that vectors and warps can; then blocks are in double, by :func:`tree_sum`. The last
    block is filled up with zeros.
    """
    row = in_memory_order(values)
    count = max(1, -(-len(row) // BLOCK_SIZE))
    blocks = row.new_zeros(count, BLOCK_SIZE, dtype=_compute_dtype(values))
    blocks.view(-1)[: len(row)] = row
    sums = blocks * blocks
    while sums.size(1) > 1:
        first, second = sums.chunk(2, dim=1)
        sums = first + second
    return tree_sum(sums[:, 0].to(torch.float64)).item()


def note_update(update: Tensor, alpha: float) -> UpdateNotes:
    """Of :func:`noted_update`."""
    return UpdateNotes(sum_by_halves(update), magnitude_bins(update, alpha).tolist())


def note_param(param: Tensor) -> ParamNotes:
    """Of a step's new param."""
    param = _reals(param)
    return ParamNotes(
        squares=sum_by_halves(param),
        zeros=int((param == 0).sum()),
        nans=int(param.isnan().sum()),
        infs=int(param.isinf().sum()),
    )


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements in one row, as they lie; a view of a dense tensor."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)
