"""Where things lie in the bytes of csrc/table.h and csrc/math/recipes.h, and what they are called.

Offsets are in words of 8 bytes, unless it says otherwise.
"""

import triton
import triton.language as tl

from .. import _C


def _at(key: str) -> tl.constexpr:
    return tl.constexpr(_C.layout[key])


CHUNK_SIZE, TILE_SIZE = _at("chunk_size"), _at("tile_size")  # elements
TILES = tl.constexpr(CHUNK_SIZE.value // TILE_SIZE.value)  # of a chunk

# By the numbers of DType, and of Decay.
STORAGE = tl.constexpr((tl.float32, tl.float64, tl.bfloat16, tl.float16))
COMPUTE = tl.constexpr((tl.float32, tl.float64, tl.float32, tl.float32))
RULES = tl.constexpr(tuple(name for name, _, _ in _C.rules))

# States by number: moments have the row's state type, followers the compute type of its param.
MOMENTS, FOLLOWERS = (
    tl.constexpr(tuple(i for i, (_, type, _) in enumerate(_C.states) if type == wanted))
    for wanted in ("moment", "compute")
)

ROW, ROW_PARAM, ROW_STATES = _at("row"), _at("row.param"), _at("row.states")
ROW_NUMEL, ROW_BLOCK = _at("row.numel"), _at("row.block")
ROW_SCALARS, ROW_TYPES, ROW_SLOTS = _at("row.scalars"), _at("row.types"), _at("row.slots")
CHUNK = _at("chunk")  # its begin; its row and count; the first of its block's chunks, and how many
SCALARS, SCALARS_DECAY = _at("scalars"), _at("scalars.decay")
SCALARS_ALPHA, SCALARS_STEP = _at("scalars.alpha"), _at("scalars.step")
DECAY_CONSTANTS = _at("decay_constants")  # a number

# A variant is what a row's loops are compiled for, from the lowest byte on: its param's dtype, its
# state's, its rule, and which states it has, a bit each. The second sweep's loops depend on less,
# but on the size of blocks: a byte of it is in the place of the state's dtype.
SECOND_SWEEP = tl.constexpr(0xFF | sum(1 << (24 + i) for i in FOLLOWERS.value))
LARGE = tl.constexpr(TILE_SIZE.value.bit_length() + 1)  # the byte of blocks that are above a tile


@triton.constexpr_function
def size(values):  # len() of a constant, which the interpreter refuses
    return len(values)


@triton.jit
def variant_of(row):
    variant = tl.load(row + ROW_TYPES) & 0xFFFFFF
    for i in tl.static_range(size(MOMENTS) + size(FOLLOWERS)):
        variant |= (tl.load(row + ROW_STATES + i) != 0).to(tl.int64) << (24 + i)
    return variant


@triton.jit
def size_class(block, numel):
    """0 of the only block; else 1 plus log2 of the next power of two, up to LARGE."""
    result = (block < numel).to(tl.int64)
    for i in tl.static_range(LARGE - 1):
        result += ((block < numel) & (block > (1 << i))).to(tl.int64)
    return result


@triton.jit
def is_aligned(row, begin):
    aligned = ((tl.load(row + ROW_TYPES) >> 24) & 1) != 0
    return (aligned & (begin % 8 == 0)).to(tl.int32)


@triton.jit
def pointer(address, index, DTYPE: tl.constexpr):
    return address.to(tl.pointer_type(DTYPE)) + index


@triton.jit
def pointers(row, index, STATES: tl.constexpr, DTYPE: tl.constexpr, VARIANT: tl.constexpr):
    """To the element ``index`` of those of STATES that the row has."""
    result = ()
    for i in tl.static_range(size(STATES)):
        if (VARIANT >> (24 + STATES[i])) & 1:
            result += (pointer(tl.load(row + ROW_STATES + STATES[i]), index, DTYPE),)
    return result


@triton.jit
def scalars_of(row, payload, prepared, num_rows):
    """The address of the row's Scalars; ``prepared`` is what recipes have become, or None."""
    first = payload + num_rows if prepared is None else prepared + 1
    index = tl.load(row + ROW_SCALARS) & 0xFFFFFFFF
    return (first + index * SCALARS).to(tl.pointer_type(tl.float64))


@triton.jit
def load_scalars(scalars, OFFSETS: tl.constexpr, dtype: tl.constexpr):
    """Those at OFFSETS, and then the decay's constants as a tuple, all rounded."""
    result, decay = (), ()
    for i in tl.static_range(size(OFFSETS)):
        result += (tl.load(scalars + OFFSETS[i]).to(dtype),)
    for i in tl.static_range(DECAY_CONSTANTS):
        decay += (tl.load(scalars + SCALARS_DECAY + i).to(dtype),)
    result += (decay,)
    return result
