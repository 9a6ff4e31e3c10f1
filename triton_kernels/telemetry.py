"""What a tracked step notes of each tile: csrc/math/telemetry.h's functions name for name.

Counts are a histogram of 64: the 29 bins, then zeros, NaNs and infinities of the new params, then
what is not counted.
"""

import triton
import triton.language as tl

from .. import _C, reference
from .table import TILE_SIZE, TILES
from .update import put, tree_sum, within

BINS = tl.constexpr(reference.BINS)
ZEROS, NANS, INFINITIES = (tl.constexpr(reference.BINS + i) for i in range(3))
COUNTS = tl.constexpr(reference.BINS + 3)
UNCOUNTED = COUNTS
# A Record: the step, two sums of squares, the counts.
RECORD = tl.constexpr(_C.layout["record"])
PARAM_SQUARES, UPDATE_SQUARES, RECORD_COUNTS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
BLOCKS = tl.constexpr(TILE_SIZE.value // reference.BLOCK_SIZE)  # of a tile


@triton.jit
def magnitude(x):
    """The bits of an absolute value."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def lowest(alpha):
    """The bits of alpha * 2**-28, for alpha in the compute type."""
    return magnitude(alpha) - ((BINS - 1) << (52 if alpha.dtype == tl.float64 else 23))


@triton.jit
def magnitude_class(update, lowest):
    octave = (magnitude(update) - lowest) >> (52 if update.dtype == tl.float64 else 23)
    bin = tl.maximum(tl.minimum(octave, BINS - 1), 0)
    return tl.where(update == update, bin, UNCOUNTED).to(tl.int32)


@triton.jit
def special_class(param):
    size = tl.abs(param)
    special = tl.where(size == float("inf"), INFINITIES, UNCOUNTED)
    special = tl.where(size == 0.0, ZEROS, special)
    return tl.where(param == param, special, NANS)


@triton.jit
def no_notes():
    """The sums of squares of a chunk's tiles, and the counts."""
    return tl.zeros([TILES], tl.float64), tl.zeros([64], tl.int32)


@triton.jit
def sum_by_halves(sums):
    """Of a tile's blocks, or what is left of them, one after another; of the blocks in double."""
    SIZE: tl.constexpr = sums.shape[0] // BLOCKS
    if SIZE == 1:
        return tree_sum(sums.to(tl.float64))
    else:
        halves = tl.reshape(sums, (BLOCKS, 2, SIZE // 2))
        return sum_by_halves(tl.reshape(tl.sum(halves, axis=1), (BLOCKS * SIZE // 2,)))


@triton.jit
def note(values, classes, first, mask, notes):
    sums, counts = notes
    if mask is not None:
        classes = tl.where(mask, classes, UNCOUNTED)
    values = within(values, mask)
    sum = sum_by_halves(values * values)
    return put(sum, first, sums), counts + tl.histogram(classes, 64)


@triton.jit
def write_step(record, step):
    tl.store(record.to(tl.pointer_type(tl.float64)), step)


@triton.jit
def write(record, notes, WORD: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr):
    """The sum of squares to the record's word, and the counts from FIRST to END - 1."""
    sums, counts = notes
    tl.store(record.to(tl.pointer_type(tl.float64)) + WORD, tree_sum(sums))
    c = tl.arange(0, 64)
    to = (record + RECORD_COUNTS).to(tl.pointer_type(tl.int32)) + c
    tl.store(to, counts, (c >= FIRST) & (c < END))
