"""One element's update, csrc/math's functions name for name: Adam's direction, then a decay rule.

    exp_avg    <- exp_avg    + (1 - beta1) * (grad        - exp_avg)
    exp_avg_sq <- exp_avg_sq + (1 - beta2) * (grad * grad - exp_avg_sq)
    update      = step_size * exp_avg / (sqrt(exp_avg_sq) + eps)
    param      <- apply(param, update, k)

From adam.h, decay.h, update.h, convert.h and reduction_tree.h, which say more about each.
Launch with ``enable_fp_fusion=False``: every operation rounds once.
"""

import torch
import triton
import triton.language as tl

from .. import _C
from .table import RULES, TILE_SIZE, TILES

# Triton reads the switch where it decorates, so the kernels are one or the other for good.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
HIP = tl.constexpr(torch.version.hip is not None)


# csrc/math/convert.h


@triton.jit
def widen(x):
    if x.dtype == tl.bfloat16:
        # By its bits, since the interpreter's cast (Triton 3.6) gets subnormals wrong.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def narrow(x, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's cast (Triton 3.6) truncates; a GPU's rounds to nearest even, as this.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        # Adding the rounding bias could carry a NaN over into zero or infinity.
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


# Correctly rounded: Triton's / and sqrt are approximate in float32, and exact in float64.


@triton.jit
def divide(x, y):
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def sqrt(x):
    if x.dtype == tl.float32 and HIP:
        # Triton 3.6 flushes subnormals there, and loses bits just above; powers of 4 are exact.
        tiny = x < 2.0**-96
        return tl.sqrt_rn(tl.where(tiny, x * 2.0**32, x)) * tl.where(tiny, 2.0**-16, 1.0)
    elif x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


# csrc/math/adam.h


@triton.jit
def update_moment(moment, value, one_minus_beta):
    return moment + one_minus_beta * (value - moment)


@triton.jit
def running_max(exp_avg_sq, max_exp_avg_sq):
    return tl.where(max_exp_avg_sq > exp_avg_sq, max_exp_avg_sq, exp_avg_sq)


@triton.jit
def adam_denominator(exp_avg_sq, eps):
    return sqrt(exp_avg_sq) + eps


@triton.jit
def adam_update(exp_avg, exp_avg_sq, step_size, eps):
    return divide(step_size * exp_avg, adam_denominator(exp_avg_sq, eps))


# csrc/math/decay.h

assert RULES.value == (
    *("Coupled", "Decoupled", "Cautious", "ProxSqL2", "ProxSqL2Metric", "ProxL1", "ProxL1Metric"),
    "ProxL2",
)


@triton.constexpr_function
def has_blocks(RULE):
    return RULE == "ProxL2"


@triton.jit
def couple(grad, param, k, RULE: tl.constexpr):
    if RULE == "Coupled":
        return grad + k[0] * param
    else:
        return grad


@triton.jit
def clamp(x, k):
    x = tl.where(x < k[2], k[2], x)  # a NaN stays a NaN
    return tl.where(x > k[3], k[3], x)


@triton.jit
def apply(param, update, denominator, k, RULE: tl.constexpr):
    if RULE == "Decoupled":
        return param - (update + k[0] * param)
    elif RULE == "Cautious":
        opposite = ((update > 0) & (param < 0)) | ((update < 0) & (param > 0))
        return param - tl.where(opposite, update, update + k[0] * param)
    elif RULE == "ProxSqL2":
        return clamp(param - (update + k[0] * (param - update)), k)
    elif RULE == "ProxSqL2Metric":
        factor = divide(k[0] + tl.zeros_like(denominator), denominator + k[0])
        return clamp(param - (update + factor * (param - update)), k)
    elif RULE == "ProxL1":
        x = soft_threshold(param - update, k[0])
        return clamp(tl.where(k[1] == 0, x, x - k[1] * x), k)
    elif RULE == "ProxL1Metric":
        threshold = divide(k[0] + tl.zeros_like(denominator), denominator)
        factor = divide(k[1] + tl.zeros_like(denominator), denominator + k[1])
        x = soft_threshold(param - update, threshold)
        return clamp(tl.where(k[1] == 0, x, x - factor * x), k)
    else:  # ProxL2: its blocks shrink later
        tl.static_assert(RULE == "Coupled" or RULE == "ProxL2")
        return param - update


@triton.jit
def soft_threshold(z, threshold):
    magnitude = tl.abs(z)
    return copysign(tl.where(magnitude <= threshold, 0.0, magnitude - threshold), z)


@triton.jit
def copysign(magnitude, sign):
    # By the sign bit, so that a zero has its sign too; magnitude's own sign bit is not set.
    BITS: tl.constexpr = tl.uint64 if sign.dtype == tl.float64 else tl.uint32
    SIGN_BIT: tl.constexpr = 1 << (sign.dtype.primitive_bitwidth - 1)
    bits = magnitude.to(BITS, bitcast=True) | (sign.to(BITS, bitcast=True) & SIGN_BIT)
    return bits.to(sign.dtype, bitcast=True)


@triton.jit
def shrinkage(sum_of_squares, k, numel):
    norm = sqrt(sum_of_squares)
    by_size = k[0] * sqrt(numel.to(tl.float64))
    strength = tl.where(k[1] == 0, k[0] + tl.zeros_like(by_size), by_size)
    return tl.where(norm <= strength, 1.0, divide(strength, norm))


@triton.jit
def shrink(z, shrinkage):
    return z - shrinkage * z


# csrc/math/update.h

# `scalars` are these, and then the tuple k of decay.h, all rounded to the compute type.
SCALARS = ("one_minus_beta1", "one_minus_beta2", "step_size", "eps", "grad_scale", "one_minus_ema")
SCALAR_OFFSETS = tl.constexpr(tuple(_C.layout[f"scalars.{name}"] for name in SCALARS))

assert [key for key, type, _ in _C.states if type == "moment"] == [
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
]


@triton.jit
def update(param, grad, moments, scalars, RULE: tl.constexpr):
    """The new param and moments. There is a third moment with amsgrad."""
    exp_avg, exp_avg_sq = moments[0], moments[1]
    one_minus_beta1, one_minus_beta2, step_size, eps, grad_scale, _, k = scalars
    grad = couple(grad_scale * grad, param, k, RULE)
    exp_avg = update_moment(exp_avg, grad, one_minus_beta1)
    exp_avg_sq = update_moment(exp_avg_sq, grad * grad, one_minus_beta2)
    new = (exp_avg, exp_avg_sq)
    if len(moments) > 2:  # amsgrad
        new += (running_max(exp_avg_sq, moments[2]),)
    denominator = adam_denominator(new[-1], eps)
    return apply(param, divide(step_size * exp_avg, denominator), denominator, k, RULE), new


@triton.jit
def noted_update(moments, scalars):
    """Adam's update again, from the moments as they are stored."""
    return adam_update(moments[0], moments[-1], scalars[2], scalars[3])


@triton.jit
def finish(param, followers, scalars):
    """The new values of the states that follow the final param, which is as it is stored."""
    (ema,) = followers
    return (update_moment(ema, param, scalars[5]),)


# csrc/math/reduction_tree.h


@triton.jit
def square(value):
    value = value.to(tl.float64)
    return value * value


@triton.jit
def tree_sum(sums):
    # Neighbours until one is left. A tl.sum has no fixed order, but a sum of two has only one.
    # Over the last of one or two axes.
    SIZE: tl.constexpr = sums.shape[len(sums.shape) - 1]
    if SIZE == 1:
        return tl.sum(sums, axis=len(sums.shape) - 1)
    elif len(sums.shape) == 2:
        return tree_sum(tl.sum(tl.reshape(sums, (sums.shape[0], SIZE // 2, 2)), axis=2))
    elif SIZE == 2:
        return tl.sum(sums, axis=0)
    else:
        return tree_sum(tl.sum(tl.reshape(sums, (SIZE // 2, 2)), axis=1))


@triton.jit
def within(values, mask):
    """With zeros beyond the end, where a lane may have computed anything."""
    return values if mask is None else tl.where(mask, values, 0.0)


@triton.jit
def put(sum, first, sums):
    """The sums of a chunk's tiles, with that of the tile at ``first``."""
    return tl.where(tl.arange(0, TILES) == first // TILE_SIZE, sum, sums)
