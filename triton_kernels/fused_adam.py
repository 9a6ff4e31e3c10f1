"""One step over every tensor of a table in one launch; prox_l2 takes a second one to shrink.

    program -> chunk of a tensor -> tile -> element: update.py's

Reads the bytes of csrc/tensor_table.h, and does what csrc/fused_adam_cpu.cpp does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .. import reference
from .recipes import COMPUTE, SCALARS_WORDS, STORAGE, prepare_kernel
from .telemetry import (
    BINS,
    COUNTS,
    PARAM_SQUARES,
    RECORD_WORDS,
    UPDATE_SQUARES,
    lowest,
    magnitude_class,
    no_notes,
    note,
    special_class,
    write,
    write_step,
)
from .update import (
    TILE_SIZE,
    TILES,
    adam_update,
    narrow,
    put,
    shrink,
    shrinkage,
    square,
    tree_sum,
    update,
    widen,
    within,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

CHUNK_SIZE = tl.constexpr(reference.CHUNK_SIZE)
ROW_WORDS = tl.constexpr(7)  # sizeof(TensorRow) / 8

# Threads of 8 elements, 128 bits of 16-bit numbers; of a warp's 64 threads on AMD and 32 on NVIDIA.
# No contraction.
OPTIONS = {"num_warps": 4 if torch.version.hip else 8, "enable_fp_fusion": False}


@triton.jit
def read_chunk(metadata, prepared, num_rows):
    """This program's Chunk: its row's index and address, its first element and their count.

    In a step that is to be skipped, a chunk has no elements.
    """
    chunk = tl.load(metadata + num_rows * ROW_WORDS + tl.program_id(0))
    index = chunk & 0xFFFFFFFF
    row = metadata + index * ROW_WORDS
    begin = (chunk >> 32) * CHUNK_SIZE
    count = tl.minimum(tl.load(row + 4) - begin, CHUNK_SIZE).to(tl.int32)
    if prepared is not None:
        count = tl.where(tl.load(prepared) != 0, 0, count)
    return index, row, begin, count


@triton.jit
def find_scalars(row, payload, prepared, num_rows):
    """The address of the row's Scalars; ``prepared`` is what recipes have become, or None."""
    first = payload + num_rows if prepared is None else prepared + 1
    scalars = first + (tl.load(row + 5) & 0xFFFFFFFF) * SCALARS_WORDS
    return scalars.to(tl.pointer_type(tl.float64))


@triton.jit
def at(pointer, first, mask):
    pointer += first
    if mask is None:  # full and aligned: the hint is what makes the access 128-bit
        pointer = tl.multiple_of(pointer, 16)
    return pointer + tl.arange(0, TILE_SIZE)


@triton.jit
def load(pointer, first, mask):
    return widen(tl.load(at(pointer, first, mask), mask))


@triton.jit
def store(pointer, first, mask, value):
    """Returns the value as it was stored."""
    value = narrow(value, pointer.dtype.element_ty)
    tl.store(at(pointer, first, mask), value, mask)
    return value


@triton.jit
def update_tile(tensors, args, first, mask, sums):
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq = tensors
    scalars = args[0]
    DECAY: tl.constexpr = args[1]
    TRACKED: tl.constexpr = args[2] is not None
    p, m, v, largest = update(
        load(param, first, mask),
        load(grad, first, mask),
        load(exp_avg, first, mask),
        load(exp_avg_sq, first, mask),
        None if max_exp_avg_sq is None else load(max_exp_avg_sq, first, mask),
        scalars,
        DECAY,
    )
    m = widen(store(exp_avg, first, mask, m))
    v = widen(store(exp_avg_sq, first, mask, v))
    if max_exp_avg_sq is not None:
        v = widen(store(max_exp_avg_sq, first, mask, largest))
    stored = widen(store(param, first, mask, p))
    if TRACKED:
        sums, updates, params = sums
        step = adam_update(m, v, scalars[2], scalars[3])
        updates = note(step, magnitude_class(step, args[2]), first, mask, updates)
        if DECAY != "prox_l2":
            params = note(stored, special_class(stored), first, mask, params)
    if DECAY == "prox_l2":
        sums = put(tree_sum(square(within(stored, mask))), first, sums)
    if TRACKED:
        return sums, updates, params
    else:
        return sums


@triton.jit
def shrink_tile(param, args, first, mask, params):
    stored = widen(store(param, first, mask, shrink(load(param, first, mask), args[0])))
    if args[1] is not None:
        return note(stored, special_class(stored), first, mask, params)
    else:
        return params


@triton.jit
def for_each_tile(f: tl.constexpr, tensors, args, row, count, sums):
    """Calls f on the tiles of a chunk; returns the sums, which f fills in."""
    # Two loops, since one with both kinds of access takes all registers that there are.
    aligned = (tl.load(row + 6) >> 16) & 1
    full = (count // TILE_SIZE * TILE_SIZE) * aligned.to(tl.int32)
    first = 0
    while first < full:
        sums = f(tensors, args, first, None, sums)
        first += TILE_SIZE
    while first < count:
        sums = f(tensors, args, first, first + tl.arange(0, TILE_SIZE) < count, sums)
        first += TILE_SIZE
    return sums


@triton.jit
def at_element(address, index, DTYPE: tl.constexpr):
    return address.to(tl.pointer_type(DTYPE)) + index


@triton.jit
def update_chunk(row, grad, begin, count, scalars, sum_out, record, DECAY, VARIANT: tl.constexpr):
    PARAM: tl.constexpr = STORAGE[VARIANT & 0xFF]
    STATE: tl.constexpr = STORAGE[(VARIANT >> 8) & 0xFF]
    dtype: tl.constexpr = COMPUTE[VARIANT & 0xFF]
    tensors = (
        at_element(tl.load(row), begin, PARAM),
        at_element(grad, begin, PARAM),
        at_element(tl.load(row + 1), begin, STATE),
        at_element(tl.load(row + 2), begin, STATE),
        at_element(tl.load(row + 3), begin, STATE) if VARIANT >> 16 else None,
    )
    rounded = (
        tl.load(scalars).to(dtype),
        tl.load(scalars + 1).to(dtype),
        tl.load(scalars + 2).to(dtype),
        tl.load(scalars + 3).to(dtype),
        tl.load(scalars + 4).to(dtype),
        tl.load(scalars + 5).to(dtype),
    )
    sums = tl.zeros([TILES], tl.float64)
    if record is None:
        sums = for_each_tile(update_tile, tensors, (rounded, DECAY, None), row, count, sums)
    else:
        least = lowest(tl.load(scalars + 6).to(dtype))
        notes = (sums, no_notes(), no_notes())
        sums, updates, params = for_each_tile(
            update_tile, tensors, (rounded, DECAY, least), row, count, notes
        )
        if count > 0:  # it may be a step that is to be skipped
            write_step(record, tl.load(scalars + 7))
            write(record, updates, UPDATE_SQUARES, 0, BINS)
            if DECAY != "prox_l2":
                write(record, params, PARAM_SQUARES, BINS, COUNTS)
    if DECAY == "prox_l2":
        tl.store(sum_out, tree_sum(sums))


@triton.jit(do_not_specialize=["num_rows"])
def update_kernel(
    metadata,
    payload,
    prepared,
    sums,
    records,
    num_rows,
    DECAY: tl.constexpr,
    VARIANTS: tl.constexpr,
):
    index, row, begin, count = read_chunk(metadata, prepared, num_rows)
    grad = tl.load(payload + index)
    scalars = find_scalars(row, payload, prepared, num_rows)
    sum_out = sums + tl.program_id(0) if DECAY == "prox_l2" else None
    record = None if records is None else records + tl.program_id(0) * RECORD_WORDS
    amsgrad = (tl.load(row + 3) != 0).to(tl.int64)
    variant = (tl.load(row + 6) & 0xFFFF) | (amsgrad << 16)
    for i in tl.static_range(len(VARIANTS)):
        if variant == VARIANTS[i]:
            update_chunk(row, grad, begin, count, scalars, sum_out, record, DECAY, VARIANTS[i])


@triton.jit(do_not_specialize=["num_rows"])
def shrink_kernel(metadata, payload, prepared, sums, records, num_rows, DTYPES: tl.constexpr):
    """prox_l2's second sweep: every program first takes its tensor's norm from the sums."""
    _, row, begin, count = read_chunk(metadata, prepared, num_rows)
    sums += tl.load(row + 5) >> 32
    num_chunks = tl.cdiv(tl.load(row + 4), CHUNK_SIZE).to(tl.int32)
    tops = tl.zeros([TILE_SIZE], tl.float64)  # a sum each of TILE_SIZE chunks
    first = 0
    while first < num_chunks:
        chunk = first + tl.arange(0, TILE_SIZE)
        top = tree_sum(tl.load(sums + chunk, chunk < num_chunks, 0.0))
        tops = tl.where(tl.arange(0, TILE_SIZE) == first // TILE_SIZE, top, tops)
        first += TILE_SIZE
    scalars = find_scalars(row, payload, prepared, num_rows)
    k = shrinkage(tree_sum(tops), tl.load(scalars + 4))
    dtype = tl.load(row + 6) & 0xFF
    for i in tl.static_range(len(DTYPES)):
        if dtype == DTYPES[i]:
            param = at_element(tl.load(row), begin, STORAGE[DTYPES[i]])
            factor = k.to(COMPUTE[DTYPES[i]])
            if records is None:
                nothing = tl.zeros([TILES], tl.float64)
                for_each_tile(shrink_tile, param, (factor, None), row, count, nothing)
            else:
                params = for_each_tile(
                    shrink_tile, param, (factor, records), row, count, no_notes()
                )
                if count > 0:
                    record = records + tl.program_id(0) * RECORD_WORDS
                    write(record, params, PARAM_SQUARES, BINS, COUNTS)


def fused_adam(
    metadata: Tensor,
    payload: Tensor,
    num_rows: int,
    num_recipes: int,
    num_chunks: int,
    decay: str,
    dtypes: Iterable[tuple[int, int]],
    amsgrad: bool,
    records: Tensor | None,
) -> None:
    """One step on the current device and stream, of what ``adamprox._C.Table`` says.

    With recipes, a small launch before it makes the scalars. Only the combinations of (param,
    state) in ``dtypes`` are compiled, twice if some rows have a max_exp_avg_sq; each row finds its
    own at run time. ``records`` is where a tracked step is noted.
    """
    dtypes = sorted(dtypes)
    variants = tuple(p | s << 8 | a << 16 for p, s in dtypes for a in range(1 + amsgrad))
    grid = (num_chunks,)
    prepared = sums = None
    if num_recipes > 0:
        prepared = payload.new_empty(1 + num_recipes * SCALARS_WORDS.value)
        prepare_kernel[1,](payload, prepared, num_rows, num_recipes, decay, **OPTIONS)
    if decay == "prox_l2":  # behind the chunks and the Workspace's ticket
        first = num_rows * ROW_WORDS.value + num_chunks + 1
        sums = metadata[first : first + num_chunks].view(torch.float64)
    update_kernel[grid](
        metadata, payload, prepared, sums, records, num_rows, decay, variants, **OPTIONS
    )
    if decay == "prox_l2":
        params = tuple(sorted({p for p, _ in dtypes}))
        shrink_kernel[grid](metadata, payload, prepared, sums, records, num_rows, params, **OPTIONS)
