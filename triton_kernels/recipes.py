"""The scalars of a step made where the tensors are: csrc/math/recipes.h, scalars.h and decay.h.

Functions have the names that they have there, and work on a vector of recipes at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import _C
from .table import COMPUTE, DECAY_CONSTANTS, RULES, SCALARS, SCALARS_DECAY, STORAGE, size
from .update import divide, narrow, sqrt, widen

VECTOR = tl.constexpr(256)  # recipes of a program

VALUE, GROUP, RECIPE, HEAD = (
    tl.constexpr(_C.layout[key]) for key in ("value", "group_recipe", "scalars_recipe", "head")
)
# The head's first members, one after another.
FOUND_INF, NUM_GROUPS = tl.constexpr(VALUE.value), tl.constexpr(2 * VALUE.value)
FLAG_BYTES = tl.constexpr(8 * _C.layout["group_recipe.flags"])
RULE_BYTE = tl.constexpr(_C.layout["group_recipe.rule"])
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, INITIAL_LR = (
    tl.constexpr(_C.numbers.index(key))
    for key in ("lr", "betas[0]", "betas[1]", "eps", "weight_decay", "initial_lr")
)
EMA_DECAY, L2, LOW, HIGH = (
    tl.constexpr(_C.numbers.index(key)) for key in ("ema_decay", "l2", "bounds[0]", "bounds[1]")
)
MAXIMIZE, DECAY_BY_SCHEDULE, BLOCK_SCALING = (
    tl.constexpr(_C.flags.index(key)) for key in ("maximize", "decay_by", "block_scaling")
)

# What make_scalars makes: all of Scalars but the constants of the decay.
_MADE = (
    "one_minus_beta1",
    "one_minus_beta2",
    "step_size",
    "eps",
    "grad_scale",
    "one_minus_ema",
    "alpha",
    "step",
)
MADE = tl.constexpr(tuple(_C.layout[f"scalars.{name}"] for name in _MADE))
assert len(MADE.value) + DECAY_CONSTANTS.value == SCALARS.value


@triton.jit
def read(value, mask):
    result = tl.load(value.to(tl.pointer_type(tl.float64)), mask, 0.0)
    at = tl.load(value + 1, mask, 0)
    return read_at(at, tl.load(value + 2, mask, 0), mask & (at != 0), result)


@triton.jit
def read_at(at, dtype, mask, result):
    for i in tl.static_range(size(STORAGE)):
        there = mask & (dtype == i)
        value = tl.load(at.to(tl.pointer_type(STORAGE[i])), there, 0.0)
        result = tl.where(there, widen(value).to(tl.float64), result)
    return result


@triton.jit
def byte(group, index, mask):
    return tl.load(group.to(tl.pointer_type(tl.int8)) + index, mask, 0)


# csrc/math/scalars.h


@triton.jit
def power(base, exponent):
    usual = (exponent >= 0.0) & (exponent < 2.0**63)
    rest = tl.where(usual, exponent, 0.0)
    n = rest.to(tl.int64)
    fraction = rest - n.to(tl.float64)
    result, square, root = tl.zeros_like(base) + 1.0, base, base
    while tl.max(n, axis=0) > 0:
        result = tl.where(n % 2 != 0, result * square, result)
        square = square * square
        n = n // 2
    while tl.max(fraction, axis=0) > 0.0:
        root = sqrt(root)
        fraction = 2.0 * fraction
        has_digit = fraction >= 1.0
        result = tl.where(has_digit, result * root, result)
        fraction = tl.where(has_digit, fraction - 1.0, fraction)
    result = tl.where(exponent >= 2.0**63, 0.0, result)
    return tl.where(exponent >= 0.0, result, float("nan"))


@triton.jit
def alpha(initial_lr):
    least = tl.where(initial_lr > 2.0**-99, initial_lr, 2.0**-99)
    return tl.where(least < 2.0**99, least, 2.0**99)


# csrc/math/decay.h


@triton.jit
def constants(strengths, bounds, by_size, root, NUMBER: tl.constexpr):
    """``strengths``: the decay's, weight_decay itself, and l2's; ``root`` is sqrt(1 - beta2**t)."""
    strength, weight_decay, strength2 = strengths
    low, high = bounds
    RULE: tl.constexpr = RULES[NUMBER]
    if RULE == "Coupled":
        return (weight_decay,)
    elif RULE == "ProxSqL2Metric" or RULE == "ProxL1Metric":
        return (strength * root, strength2 * root, low, high)
    elif RULE == "ProxSqL2" or RULE == "ProxL1":
        share = divide(strength, 1.0 + strength) if RULE == "ProxSqL2" else strength
        return (share, divide(strength2, 1.0 + strength2), low, high)
    elif RULE == "ProxL2":
        return (strength, by_size)
    else:
        return (strength,)


# csrc/math/dispatch.h


@triton.jit
def round_up(x, dtype):
    digits = tl.where(dtype == 0, 24, tl.where(dtype == 2, 8, 11))
    least_exponent = tl.where(dtype == 3, -14, -126)
    exponent = ((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023
    of_unit = tl.maximum(exponent, least_exponent) - (digits - 1)
    unit = ((of_unit + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    as_it_is = (dtype == 1) | (exponent == 1024)  # float64; infinite, or NaN
    unit = tl.where(as_it_is, 1.0, unit)
    up = tl.ceil(divide(x, unit)) * unit
    largest = tl.where(dtype == 0, 3.4028234663852886e38, 3.3895313892515355e38)
    largest = tl.where(dtype == 3, 65504.0, largest)
    up = tl.where(up > largest, float("inf"), tl.where(up < -largest, -largest, up))
    return tl.where(as_it_is, x, up)


# csrc/math/recipes.h


@triton.jit
def make_scalars(group, step, loss_scale, param_dtype, mask):
    """What MADE names, and then a tuple of the decay's constants."""
    lr = read(group + LR * VALUE, mask)
    beta1 = read(group + BETA1 * VALUE, mask)
    beta2 = read(group + BETA2 * VALUE, mask)
    initial_lr = read(group + INITIAL_LR * VALUE, mask)
    correction1 = 1.0 - power(beta1, step)
    correction2_sqrt = sqrt(1.0 - power(beta2, step))
    sign = tl.where(byte(group, FLAG_BYTES + MAXIMIZE, mask) != 0, -1.0, 1.0).to(tl.float64)
    made = (
        1.0 - beta1,
        1.0 - beta2,
        divide(lr * correction2_sqrt, correction1),
        read(group + EPS * VALUE, mask) * correction2_sqrt,
        divide(sign, loss_scale),
        1.0 - read(group + EMA_DECAY * VALUE, mask),
        alpha(initial_lr),
        step,
    )
    by_schedule = byte(group, FLAG_BYTES + DECAY_BY_SCHEDULE, mask) != 0
    rate = tl.where(by_schedule, divide(lr, initial_lr), lr)
    weight_decay = read(group + WEIGHT_DECAY * VALUE, mask)
    strengths = (rate * weight_decay, weight_decay, rate * read(group + L2 * VALUE, mask))
    low = round_up(read(group + LOW * VALUE, mask), param_dtype)
    # By a product: Triton's own minus is 0 - x, which makes no zero negative.
    high = -1.0 * round_up(-1.0 * read(group + HIGH * VALUE, mask), param_dtype)
    by_size = (byte(group, FLAG_BYTES + BLOCK_SCALING, mask) != 0).to(tl.float64)
    rule = byte(group, RULE_BYTE, mask)
    decay = ()
    for i in tl.static_range(DECAY_CONSTANTS):
        constant = tl.zeros_like(step)
        for r in tl.static_range(size(RULES)):
            k = constants(strengths, (low, high), by_size, correction2_sqrt, r)
            if i < len(k):
                constant = tl.where(rule == r, k[i], constant)
        decay += (constant,)
    return made, decay


@triton.jit(do_not_specialize=["num_rows", "num_recipes"])
def prepare_kernel(payload, prepared, num_rows, num_recipes):
    """Before the update: follows a vector of recipes and counts their steps."""
    head = payload + num_rows
    loss_scale = read(head, True)
    skip = read(head + FOUND_INF, True) != 0
    if tl.program_id(0) == 0:
        tl.store(prepared, skip.to(tl.int64))
    groups = head + HEAD
    index = tl.program_id(0) * VECTOR + tl.arange(0, VECTOR)
    mask = index < num_recipes
    recipe = groups + tl.load(head + NUM_GROUPS) * GROUP + index * RECIPE
    counter = tl.load(recipe, mask, 0)
    group = tl.load(recipe + 1, mask, 0)
    dtype, param_dtype = (group >> 32) & 0xFFFF, (group >> 48) & 0xFFFF
    step = read_at(counter, dtype, mask, tl.zeros([VECTOR], tl.float64)) + 1.0
    group = groups + (group & 0xFFFFFFFF) * GROUP
    made, decay = make_scalars(group, step, loss_scale, param_dtype, mask)
    scalars = (prepared + 1 + index * SCALARS).to(tl.pointer_type(tl.float64))
    for i in tl.static_range(size(MADE)):
        tl.store(scalars + MADE[i], made[i], mask)
    for i in tl.static_range(DECAY_CONSTANTS):
        tl.store(scalars + SCALARS_DECAY + i, decay[i], mask)
    for i in tl.static_range(size(STORAGE)):
        at = counter.to(tl.pointer_type(STORAGE[i]))
        # Not `& (skip == 0)`: Triton 3.9's interpreter makes no mask of a block and a scalar.
        counts = mask & (dtype == tl.where(skip, -1, i))
        tl.store(at, narrow(step.to(COMPUTE[i]), STORAGE[i]), counts)
