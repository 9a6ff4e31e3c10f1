"""The scalars of a step made where the tensors are: csrc/recipes.h, name for name.

Reads the bytes of csrc/tensor_table.h; a vector of recipes at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .update import divide, sqrt, widen

# By DType's numbers.
STORAGE = tl.constexpr((tl.float32, tl.float64, tl.bfloat16, tl.float16))
COMPUTE = tl.constexpr((tl.float32, tl.float64, tl.float32, tl.float32))
SCALARS_WORDS = tl.constexpr(8)  # sizeof(Scalars) / 8
NUMBER_WORDS = tl.constexpr(3)  # sizeof(Number) / 8
RECIPE_WORDS = tl.constexpr(30)  # sizeof(Recipe) / 8
HEAD_WORDS = tl.constexpr(7)  # sizeof(RecipesHead) / 8
STEP, GIVEN, FLAGS = tl.constexpr(18), tl.constexpr(21), tl.constexpr(29)  # words of a Recipe
VECTOR = tl.constexpr(256)


@triton.jit
def read(number, mask):
    result = tl.load(number.to(tl.pointer_type(tl.float64)), mask, 0.0)
    at = tl.load(number + 1, mask, 0)
    dtype = tl.load(number + 2, mask, 0)
    for i in tl.static_range(4):
        there = (at != 0) & (dtype == i)
        value = tl.load(at.to(tl.pointer_type(STORAGE[i])), there, 0.0)
        result = tl.where(there, widen(value).to(tl.float64), result)
    return result


# csrc/step_scalars.h


@triton.jit
def power(base, exponent):
    result = base * 0.0 + 1.0
    n = exponent.to(tl.int64)
    while tl.max(n, axis=0) > 0:
        result = tl.where(n % 2 != 0, result * base, result)
        base = base * base
        n = n // 2
    return result


@triton.jit
def decay_constant(lr, weight_decay, initial_lr, by_schedule, DECAY: tl.constexpr):
    if DECAY == "coupled":
        return weight_decay
    else:
        eta = tl.where(by_schedule, divide(lr, initial_lr), lr)
        strength = eta * weight_decay
        if DECAY == "prox_sq_l2":
            return divide(strength, 1.0 + strength)
        else:
            return strength


@triton.jit
def alpha(initial_lr):
    least = tl.where(initial_lr > 2.0**-99, initial_lr, 2.0**-99)
    return tl.where(least < 2.0**99, least, 2.0**99)


@triton.jit
def make_scalars(recipe, mask, loss_scale, DECAY: tl.constexpr):
    lr = read(recipe, mask)
    beta1 = read(recipe + NUMBER_WORDS, mask)
    beta2 = read(recipe + 2 * NUMBER_WORDS, mask)
    eps = read(recipe + 3 * NUMBER_WORDS, mask)
    weight_decay = read(recipe + 4 * NUMBER_WORDS, mask)
    initial_lr = read(recipe + 5 * NUMBER_WORDS, mask)
    step = read(recipe + STEP, mask) + 1.0
    flags = tl.load(recipe + FLAGS, mask, 0)
    correction1 = 1.0 - power(beta1, step)
    correction2_sqrt = sqrt(1.0 - power(beta2, step))
    by_schedule = flags % 2 != 0
    sign = tl.where((flags >> 8) % 2 != 0, -1.0, 1.0).to(tl.float64)
    return (
        1.0 - beta1,
        1.0 - beta2,
        divide(lr * correction2_sqrt, correction1),
        eps * correction2_sqrt,
        decay_constant(lr, weight_decay, initial_lr, by_schedule, DECAY),
        divide(sign, loss_scale),
        alpha(initial_lr),
        step,
    )


@triton.jit
def count_step(recipe, mask):
    step = read(recipe + STEP, mask) + 1.0
    at = tl.load(recipe + STEP + 1, mask, 0)
    dtype = tl.load(recipe + STEP + 2, mask, 0)
    counts = mask & (at != 0) & ((tl.load(recipe + FLAGS, mask, 0) >> 16) % 2 != 0)
    for i in tl.static_range(2):  # float32, float64
        counter = at.to(tl.pointer_type(STORAGE[i]))
        tl.store(counter, step.to(STORAGE[i]), counts & (dtype == i))


@triton.jit(do_not_specialize=["num_rows", "count"])
def prepare_kernel(payload, prepared, num_rows, count, DECAY: tl.constexpr):
    """One program, before the update: follows all recipes and counts the step."""
    head = payload + num_rows
    loss_scale = tl.max(read(head + tl.zeros([1], tl.int64), True), axis=0)
    found_inf = tl.max(read(head + NUMBER_WORDS + tl.zeros([1], tl.int64), True), axis=0)
    skip = found_inf != 0
    tl.store(prepared, skip.to(tl.int64))
    scalars = (prepared + 1).to(tl.pointer_type(tl.float64))
    for first in range(0, count, VECTOR):
        index = first + tl.arange(0, VECTOR)
        mask = index < count
        recipe = head + HEAD_WORDS + index * RECIPE_WORDS
        is_given = tl.load(recipe + STEP + 1, mask, 0) == 0
        made = make_scalars(recipe, mask, loss_scale, DECAY)
        for i in tl.static_range(SCALARS_WORDS):
            given = tl.load((recipe + GIVEN + i).to(tl.pointer_type(tl.float64)), mask, 0.0)
            value = tl.where(is_given, given, made[i])
            tl.store(scalars + index * SCALARS_WORDS + i, value, mask)
    tl.debug_barrier()  # every count has been read
    for first in range(0, count, VECTOR):
        index = first + tl.arange(0, VECTOR)
        recipe = head + HEAD_WORDS + index * RECIPE_WORDS
        count_step(recipe, (index < count) & (skip == 0))
