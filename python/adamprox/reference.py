"""The specification: one step in eager PyTorch, made of single IEEE operations.

The other backends give the same bits (``torch.equal``) as :func:`step`. float32, bfloat16 and
float16 tensors compute in float32, float64 ones in float64; complex numbers are pairs of reals.
Every operation rounds once. Scalars are computed in double and rounded once to the compute type.
It is one file, however long, so that the whole specification is read in one place.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

TILE_SIZE = 2048
CHUNK_SIZE = 8 * TILE_SIZE

BLOCK_SIZE = 256  # of what telemetry sums at a time
BINS = 29  # of telemetry's histograms

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

    For prox_l2 ``(s, by_size)``: 1 if ``s`` grows with the root of a block's size, or 0.
    For the elementwise proximal rules ``(k0, k1, low, high)``: ``s / (1 + s)`` (prox_sq_l2) or
    ``s`` (prox_l1), ``s2 / (1 + s2)``, and the bounds; in Adam's metric ``s * root`` and
    ``s2 * root``.
    """
    if rule == "coupled":
        return (float(group["weight_decay"]),)
    s = decay_strength(group)
    if rule == "prox_l2":
        return (s, float(group.get("block_scaling") == "sqrt"))
    if group["decay"] not in ELEMENTWISE_PROX:
        return (s,)
    s2 = decay_rate(group) * float(group.get("l2") or 0.0)
    low, high = group.get("bounds") or (None, None)
    bounds = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
    if rule.endswith("_metric"):
        return (s * root, s2 * root, *bounds)
    return (s / (1 + s) if rule == "prox_sq_l2" else s, s2 / (1 + s2), *bounds)


def round_up(x: float, dtype: torch.dtype) -> float:
    """The least number of that dtype that is not below ``x``; infinity is one."""
    if dtype == torch.float64 or not math.isfinite(x) or x == 0:
        return x
    digits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[dtype]
    least_exponent = -14 if dtype == torch.float16 else -126
    exponent = max(math.frexp(x)[1] - 1, least_exponent)
    unit = 2.0 ** (exponent - (digits - 1))
    up, largest = math.copysign(math.ceil(x / unit) * unit, x), torch.finfo(dtype).max
    return math.inf if up > largest else max(up, -largest)


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
    """The prox of the box's indicator, its projection; a NaN stays a NaN. Of no box, ``high``."""
    x = torch.where(x < low, low, x)
    return torch.where(x > high, high, x)


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


# prox_l2's blocks. Their tensors are dense and of reals: a complex number is two of them.


def block_numel(param: Tensor, block: str | int) -> int:
    """The reals of each of the param's blocks, of which the last one may be smaller.

    ``block``: ``"tensor"``, ``"row"`` (each index of dim 0), a number of rows, or ``"group"``, of
    which the whole param is a part.
    """
    reals = param.numel() * (2 if param.is_complex() else 1)
    rows = (block == "row") if isinstance(block, str) else operator.index(block)
    if param.dim() == 0 or not 0 < rows < param.shape[0]:
        return reals
    return rows * (reals // param.shape[0])


def in_block_order(z: Tensor, size: int) -> Tensor:
    """The elements in one row, block after block of ``size`` of them.

    A view, as they lie in memory, if each block is a range of it; else a copy, in logical order.
    """
    ranges = size >= z.numel() or z.stride(0) * z.shape[0] == z.numel()
    return in_memory_order(z) if ranges else z.reshape(-1)


def sums_of_squares(z: Tensor, size: int) -> Tensor:
    """Of each block the sum of squares in double, by :func:`tree_sum`."""
    values = in_block_order(z, size).to(torch.float64)
    count = -(-len(values) // size) if size else 0
    blocks = values.new_zeros(count, size)
    blocks.view(-1)[: len(values)] = values
    return tree_sum(blocks * blocks)


def shrinkages(sums: Tensor, numels: Tensor, strength: float, by_size: bool) -> Tensor:
    """The fraction of each block that is taken away: ``min(s / norm, 1)``, and 1 of a norm of 0.

    Args:
        sums, numels: of each block: the sum of squares, and the number of reals; float64.
        strength: ``s``; if ``by_size``, times the root of the block's number of reals.
    """
    norms = sqrt(sums)
    strengths = strength * sqrt(numels) if by_size else torch.full_like(norms, strength)
    return torch.where(norms <= strengths, torch.ones_like(norms), strengths / norms)


def shrink(z: Tensor, size: int, shrinkage: Tensor) -> None:
    """``z <- (1 - shrinkage) * z``, in place; of each block, or of all, in double."""
    values = in_block_order(z, size)
    k = shrinkage.expand(-(-len(values) // size)).repeat_interleave(size)[: len(values)]
    shrink_values(values, k)
    if values.data_ptr() != z.data_ptr():
        z.copy_(values.view(z.shape))


def shrink_values(z: Tensor, shrinkage: Tensor) -> None:
    """``z <- (1 - shrinkage) * z``, in place, of one row of elements."""
    compute = z.to(_compute_dtype(z))
    z.copy_(compute - shrinkage.to(compute.dtype) * compute)


def prox_l2(
    tensors: Sequence[Tensor], sizes: Sequence[int], strength: float, by_size: bool, together: bool
) -> list[Tensor]:
    """``argmin_x 0.5 * norm(x - z)**2 + s * norm(x)`` of each block: ``max(1 - s/norm(z), 0) * z``.

    Args:
        tensors: those of a param group, with elements.
        sizes: of each tensor, the :func:`block_numel`.
        strength, by_size: as of :func:`shrinkages`.
        together: whether all of them are one block.
    """
    results = [torch.empty_like(z).copy_(z) for z in tensors]
    sums = [sums_of_squares(z, size) for z, size in zip(tensors, sizes, strict=True)]
    numels = [_numels_of_blocks(z, size) for z, size in zip(tensors, sizes, strict=True)]
    if together and tensors:
        sums = [tree_sum(torch.cat(sums))[None]] * len(sums)
        numels = [torch.cat(numels).sum()[None]] * len(numels)
    for z, size, squares, numel in zip(results, sizes, sums, numels, strict=True):
        shrink(z, size, shrinkages(squares, numel, strength, by_size))
    return results


def _numels_of_blocks(z: Tensor, size: int) -> Tensor:
    ends = torch.arange(0, z.numel(), size, device=z.device) + size
    return (size - (ends - z.numel()).clamp(min=0)).to(torch.float64)


def tree_sum(values: Tensor) -> Tensor:
    """Sums of float64 values over the last dim, in a fixed order that threads and ranks can follow.

    Each value is added to its neighbour, then each of these sums to its neighbour, until one is
    left; the last one of an odd number stays as it is. So whoever has the values from ``k * 2**n``
    to ``(k + 1) * 2**n`` knows one of the sums.
    """
    while values.shape[-1] > 1:
        values = torch.nn.functional.pad(values, (0, values.shape[-1] % 2))
        values = values[..., ::2] + values[..., 1::2]
    return values[..., 0]


Writes = list[tuple[Tensor, Tensor]]
"""Tensors and their new values."""


class Member(NamedTuple):
    """One tensor of a param group in a step. All have the param's shape."""

    param: Tensor
    grad: Tensor
    states: Mapping[str, Tensor]
    """By the keys of :data:`adamprox.hyperparameters.STATES`, those that there are."""
    scalars: Scalars
    """From :func:`step_scalars`."""


@torch.no_grad()
def step(group: Mapping[str, Any], members: Sequence[Member]) -> Writes:
    """One step of the params of a group: what is to be written, so that an error changes nothing.

    ``group`` has the values of the param group. Complex numbers are pairs of reals.
    """
    writes: Writes = []
    stepped = []
    for member in members:
        moments, new = _adam(group, member)
        writes += moments
        stepped.append(new)
    if rule_of(group) == "prox_l2":
        stepped = _prox_l2(group, members, stepped)
    for member, new in zip(members, stepped, strict=True):
        writes += [(_reals(member.param), new), *follow(new, member.states, group)]
    return writes


def _adam(group: Mapping[str, Any], member: Member) -> tuple[Writes, Tensor]:
    """The new moments, and the new param; of prox_l2, before its blocks shrink."""
    rule, scalars = rule_of(group), member.scalars
    param, grad = _reals(member.param), _reals(member.grad)
    own = {key: _reals(state) for key, state in member.states.items()}
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
    return writes, apply_decay(rule, p, update, denominator, k).to(param.dtype)


def _prox_l2(
    group: Mapping[str, Any], members: Sequence[Member], stepped: Sequence[Tensor]
) -> list[Tensor]:
    """Of what is stored, as the params lie; those without elements are no part of a block."""
    block = group.get("block", "tensor")
    result = [
        torch.empty_like(_reals(member.param)).copy_(z)
        for member, z in zip(members, stepped, strict=True)
    ]
    some = [i for i, z in enumerate(result) if z.numel() > 0]
    if some:
        strength, by_size = members[0].scalars.decay
        sizes = [block_numel(members[i].param, block) for i in some]
        tensors = [result[i] for i in some]
        shrunk = prox_l2(tensors, sizes, strength, bool(by_size), together=block == "group")
        for i, z in zip(some, shrunk, strict=True):
            result[i] = z
    return result


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


def chunk_sizes(numel: int, block: int) -> list[int]:
    """How many elements each of a tensor's chunks has, as csrc/table.h lays them out.

    A chunk has some whole blocks of ``block`` elements, or a part of one that is longer.
    """
    if numel == 0:
        return []
    if block > CHUNK_SIZE:
        blocks = [min(block, numel - begin) for begin in range(0, numel, block)]
        return [min(CHUNK_SIZE, n - at) for n in blocks for at in range(0, n, CHUNK_SIZE)]
    fit = CHUNK_SIZE // block
    size = (fit if fit < 8 else fit // 8 * 8) * block
    return [min(size, numel - begin) for begin in range(0, numel, size)]


def sum_by_halves(values: Tensor, block: int | None = None) -> float:
    """Telemetry's sum of squares, elements taken as they lie in memory; 0 of none.

    In the compute type the halves of each 256 of a chunk's elements (:data:`BLOCK_SIZE`) are added
    until one number is left, so that vectors and warps can. The last ones are filled up with zeros.
    Then a chunk's sums are added in double by :func:`tree_sum`, and so are the chunks'.
    """
    row = in_memory_order(values).to(_compute_dtype(values))
    of_chunks = [torch.zeros((), dtype=torch.float64)]
    for chunk in row.split(chunk_sizes(len(row), block or len(row))):
        parts = torch.nn.functional.pad(chunk, (0, -len(chunk) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
        sums = parts * parts
        while sums.size(1) > 1:
            first, second = sums.chunk(2, dim=1)
            sums = first + second
        of_chunks.append(tree_sum(sums[:, 0].to(torch.float64)).cpu())
    return tree_sum(torch.stack(of_chunks[1:] or of_chunks)).item()


def note_update(update: Tensor, alpha: float, block: int | None = None) -> UpdateNotes:
    """Of :func:`noted_update`; ``block`` as of :func:`chunk_sizes`, or None for the whole."""
    return UpdateNotes(sum_by_halves(update, block), magnitude_bins(update, alpha).tolist())


def note_param(param: Tensor, block: int | None = None) -> ParamNotes:
    """Of a step's new param."""
    param = _reals(param)
    return ParamNotes(
        squares=sum_by_halves(param, block),
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
