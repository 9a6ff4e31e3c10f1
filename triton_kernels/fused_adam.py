"""One step over every tensor of a table in one launch, and one more that shrinks what has blocks.

    program -> chunk of a tensor -> tile -> element: update.py's

Reads the bytes of csrc/table.h, and does what csrc/cpu/step.cpp does. The kernels share its
functions, so it is one file, however long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from .recipes import VECTOR, prepare_kernel
from .table import (
    CHUNK,
    CHUNK_SIZE,
    COMPUTE,
    FOLLOWERS,
    LARGE,
    MOMENTS,
    ROW,
    ROW_BLOCK,
    ROW_NUMEL,
    ROW_PARAM,
    ROW_SCALARS,
    ROW_SLOTS,
    ROW_TYPES,
    RULES,
    SCALARS,
    SCALARS_ALPHA,
    SCALARS_DECAY,
    SCALARS_STEP,
    SECOND_SWEEP,
    STORAGE,
    TILE_SIZE,
    TILES,
    is_aligned,
    load_scalars,
    pointer,
    pointers,
    scalars_of,
    size_class,
    variant_of,
)
from .telemetry import (
    BINS,
    COUNTS,
    PARAM_SQUARES,
    RECORD,
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
    INTERPRETED,
    SCALAR_OFFSETS,
    finish,
    has_blocks,
    narrow,
    noted_update,
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

# Threads of 8 elements, 128 bits of 16-bit numbers; of a warp's 64 threads on AMD and 32 on NVIDIA.
# No contraction.
OPTIONS = {"num_warps": 4 if torch.version.hip else 8, "enable_fp_fusion": False}


@triton.jit
def read_chunk(metadata, prepared, num_rows, chunk):
    """A Chunk: its row's index and address, its first element and their count.

    In a step that is to be skipped, a chunk has no elements.
    """
    words = metadata + num_rows * ROW + chunk * CHUNK
    begin, row_and_count = tl.load(words), tl.load(words + 1)
    index = row_and_count & 0xFFFFFFFF
    row = metadata + index * ROW
    count = (row_and_count >> 32).to(tl.int32)
    if prepared is not None:
        count = tl.where(tl.load(prepared) != 0, 0, count)
    return index, row, begin, count


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
    return widen(value)


@triton.jit
def load_states(states, first, mask):
    values = ()
    for i in tl.static_range(len(states)):
        values += (load(states[i], first, mask),)
    return values


@triton.jit
def store_states(states, first, mask, values):
    stored = ()
    for i in tl.static_range(len(states)):
        stored += (store(states[i], first, mask, values[i]),)
    return stored


@triton.jit
def finish_tile(followers, first, mask, param, scalars):
    if len(followers) > 0:
        values = finish(param, load_states(followers, first, mask), scalars)
        store_states(followers, first, mask, values)


@triton.jit
def update_tile(tensors, args, first, mask, sums):
    param, grad, moments, followers = tensors
    scalars, least = args[0], args[1]
    RULE: tl.constexpr = args[2]
    p, m = update(
        load(param, first, mask),
        load(grad, first, mask),
        load_states(moments, first, mask),
        scalars,
        RULE,
    )
    m = store_states(moments, first, mask, m)
    p = store(param, first, mask, p)
    if not has_blocks(RULE):
        finish_tile(followers, first, mask, p, scalars)
    if least is None:
        return put(tree_sum(square(within(p, mask))), first, sums) if has_blocks(RULE) else sums
    else:
        sums, updates, params = sums
        step = noted_update(m, scalars)
        updates = note(step, magnitude_class(step, least), first, mask, updates)
        if has_blocks(RULE):
            sums = put(tree_sum(square(within(p, mask))), first, sums)
        else:
            params = note(p, special_class(p), first, mask, params)
        return sums, updates, params


@triton.jit
def square_tile(tensors, args, first, mask, sums):
    (param,) = tensors
    return put(tree_sum(square(within(load(param, first, mask), mask))), first, sums)


@triton.jit
def shrink_tile(tensors, args, first, mask, params):
    """And what follows; without a factor it has been shrunk."""
    param, followers = tensors
    factor, scalars, records = args
    p = load(param, first, mask)
    if factor is not None:
        p = store(param, first, mask, shrink(p, factor))
    finish_tile(followers, first, mask, p, scalars)
    if records is None:
        return params
    else:
        return note(p, special_class(p), first, mask, params)


@triton.jit
def for_each_tile(f: tl.constexpr, tensors, args, aligned, count, sums):
    """Calls f on the tiles of a chunk; returns the sums, which f fills in."""
    # Two loops, since one with both kinds of access takes all registers that there are.
    full = (count // TILE_SIZE * TILE_SIZE) * aligned
    first = 0
    while first < full:
        sums = f(tensors, args, first, None, sums)
        first += TILE_SIZE
    while first < count:
        sums = f(tensors, args, first, first + tl.arange(0, TILE_SIZE) < count, sums)
        first += TILE_SIZE
    return sums


@triton.jit
def update_chunk(row, grad, begin, count, scalars, sum_out, record, VARIANT: tl.constexpr):
    PARAM: tl.constexpr = STORAGE[VARIANT & 0xFF]
    STATE: tl.constexpr = STORAGE[VARIANT >> 8 & 0xFF]
    RULE: tl.constexpr = RULES[VARIANT >> 16 & 0xFF]
    dtype: tl.constexpr = COMPUTE[VARIANT & 0xFF]
    tensors = (
        pointer(tl.load(row + ROW_PARAM), begin, PARAM),
        pointer(grad, begin, PARAM),
        pointers(row, begin, MOMENTS, STATE, VARIANT),
        pointers(row, begin, FOLLOWERS, dtype, VARIANT),
    )
    rounded = load_scalars(scalars, SCALAR_OFFSETS, dtype)
    sums = tl.zeros([TILES], tl.float64)
    aligned = is_aligned(row, begin)
    if record is None:
        sums = for_each_tile(update_tile, tensors, (rounded, None, RULE), aligned, count, sums)
    else:
        least = lowest(tl.load(scalars + SCALARS_ALPHA).to(dtype))
        notes = (sums, no_notes(), no_notes())
        sums, updates, params = for_each_tile(
            update_tile, tensors, (rounded, least, RULE), aligned, count, notes
        )
        if count > 0:  # it may be a step that is to be skipped
            write_step(record, tl.load(scalars + SCALARS_STEP))
            write(record, updates, UPDATE_SQUARES, 0, BINS)
            if not has_blocks(RULE):
                write(record, params, PARAM_SQUARES, BINS, COUNTS)
    if has_blocks(RULE):
        tl.store(sum_out, tree_sum(sums))


# Where the sums begin depends on how many chunks there are.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["sums"])
def update_kernel(metadata, payload, prepared, sums, records, num_rows, VARIANTS: tl.constexpr):
    chunk = tl.program_id(0)
    index, row, begin, count = read_chunk(metadata, prepared, num_rows, chunk)
    grad = tl.load(payload + index)
    scalars = scalars_of(row, payload, prepared, num_rows)
    sum_out = None if sums is None else sums + chunk
    record = None if records is None else records + chunk * RECORD
    variant = variant_of(row)
    for i in tl.static_range(len(VARIANTS)):
        if variant == VARIANTS[i]:
            update_chunk(row, grad, begin, count, scalars, sum_out, record, VARIANTS[i])


@triton.jit
def sum_of_range(sums, count):
    """Of the first ``count`` sums, by the tree."""
    tops = tl.zeros([TILE_SIZE], tl.float64)  # a sum each of TILE_SIZE of them
    first = 0
    while first < count:
        index = first + tl.arange(0, TILE_SIZE)
        top = tree_sum(tl.load(sums + index, index < count, 0.0))
        tops = tl.where(tl.arange(0, TILE_SIZE) == first // TILE_SIZE, top, tops)
        first += TILE_SIZE
    return tree_sum(tops)


@triton.jit(do_not_specialize=["num_rows", "num_chunks"], do_not_specialize_on_alignment=["sums"])
def slot_kernel(metadata, sums, num_rows, num_chunks):
    """Where tensors are one block together: the sum of each, behind those of chunks."""
    row = metadata + tl.program_id(0) * ROW
    if (tl.load(row + ROW_SLOTS) >> 32) > 0:
        parts = tl.cdiv(tl.load(row + ROW_NUMEL), CHUNK_SIZE).to(tl.int32)
        sum = sum_of_range(sums + (tl.load(row + ROW_SCALARS) >> 32), parts)
        tl.store(sums + num_chunks + (tl.load(row + ROW_TYPES) >> 32), sum)


@triton.jit
def shrink_small_blocks(param, count, block, decay, dtype: tl.constexpr, WIDTH: tl.constexpr):
    """Blocks of up to WIDTH elements, as many at a time as a tile has place for."""
    ROWS: tl.constexpr = TILE_SIZE // WIDTH
    column = tl.arange(0, WIDTH)[None, :]
    first = 0
    while first < count:
        begin = first + tl.arange(0, ROWS) * block
        at = begin[:, None] + column
        mask = (column < block) & (at < count)
        z = widen(tl.load(param + at, mask, 0.0))
        numel = tl.maximum(tl.minimum(count - begin, block), 0)
        k = shrinkage(tree_sum(square(z)), decay, numel)
        tl.store(param + at, narrow(shrink(z, k.to(dtype)[:, None]), param.dtype.element_ty), mask)
        first += ROWS * block


@triton.jit
def shrink_large_blocks(param, count, block, decay, dtype: tl.constexpr):
    """Blocks of some tiles, one after another."""
    first = 0
    while first < count:
        numel = tl.minimum(count - first, block)
        none = tl.zeros([TILES], tl.float64)
        sums = for_each_tile(square_tile, (param + first,), None, 0, numel, none)
        k = shrinkage(tree_sum(sums), decay, numel).to(dtype)
        for_each_tile(shrink_tile, (param + first, ()), (k, None, None), 0, numel, none)
        first += block


@triton.jit
def shrink_chunk(
    row, begin, count, scalars, sums, first, parts, numel, record, VARIANT: tl.constexpr
):
    PARAM: tl.constexpr = STORAGE[VARIANT & 0xFF]
    CLASS: tl.constexpr = VARIANT >> 8 & 0xFF
    dtype: tl.constexpr = COMPUTE[VARIANT & 0xFF]
    param = pointer(tl.load(row + ROW_PARAM), begin, PARAM)
    tensors = (param, pointers(row, begin, FOLLOWERS, dtype, VARIANT))
    decay = (tl.load(scalars + SCALARS_DECAY), tl.load(scalars + SCALARS_DECAY + 1))
    rounded = load_scalars(scalars, SCALAR_OFFSETS, dtype)
    aligned = is_aligned(row, begin)
    block = tl.load(row + ROW_BLOCK)
    if parts > 0:
        k = shrinkage(sum_of_range(sums + first, parts), decay, numel).to(dtype)
        finish_chunk(tensors, (k, rounded, record), aligned, count, record)
    elif CLASS > 0:
        if CLASS == LARGE:
            shrink_large_blocks(param, count, block.to(tl.int32), decay, dtype)
        else:
            shrink_small_blocks(param, count, block.to(tl.int32), decay, dtype, 1 << (CLASS - 1))
        tl.debug_barrier()  # other threads have written what follows
        finish_chunk(tensors, (None, rounded, record), aligned, count, record)


@triton.jit
def finish_chunk(tensors, args, aligned, count, record):
    if record is None:
        for_each_tile(shrink_tile, tensors, args, aligned, count, tl.zeros([TILES], tl.float64))
    else:
        params = for_each_tile(shrink_tile, tensors, args, aligned, count, no_notes())
        if count > 0:
            write(record, params, PARAM_SQUARES, BINS, COUNTS)


@triton.jit(
    do_not_specialize=["num_rows", "num_chunks", "first_chunk"],
    do_not_specialize_on_alignment=["sums"],
)
def shrink_kernel(
    metadata,
    payload,
    prepared,
    sums,
    records,
    num_rows,
    num_chunks,
    first_chunk,
    VARIANTS: tl.constexpr,
):
    """The second sweep: every program takes its block's norm from the sums, or its own blocks'."""
    chunk = first_chunk + tl.program_id(0)
    _, row, begin, count = read_chunk(metadata, prepared, num_rows, chunk)
    block, slots = tl.load(row + ROW_BLOCK), tl.load(row + ROW_SLOTS)
    words = tl.load(metadata + num_rows * ROW + chunk * CHUNK + 2)
    first, parts = (words & 0xFFFFFFFF).to(tl.int32), (words >> 32).to(tl.int32)
    numel = tl.minimum(
        block, tl.load(row + ROW_NUMEL) - begin + (chunk - first).to(tl.int64) * CHUNK_SIZE
    )
    if (slots >> 32) > 0:
        first, parts = num_chunks + slots.to(tl.int32), (slots >> 32).to(tl.int32)
        numel = block
    scalars = scalars_of(row, payload, prepared, num_rows)
    record = None if records is None else records + chunk * RECORD
    variant = (variant_of(row) & SECOND_SWEEP) | (size_class(block, tl.load(row + ROW_NUMEL)) << 8)
    for i in tl.static_range(len(VARIANTS)):
        if variant == VARIANTS[i]:
            shrink_chunk(row, begin, count, scalars, sums, first, parts, numel, record, VARIANTS[i])


class Launch(NamedTuple):
    """A kernel, how many programs of it, and their arguments."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]

    def run(self) -> None:
        """On the current device and stream."""
        self.kernel[self.programs,](*self.args, **OPTIONS)


_ready: set[tuple[Any, ...]] = set()


def ready(launch: Launch) -> None:
    """Compiles a launch's kernel and loads it on the current device, if that was not done before.

    So that the launch itself cannot fail by that, when others may have written already.
    """
    if INTERPRETED.value:
        return
    # What Triton compiles a kernel for: each VARIANTS, and whether an argument is there.
    kind = tuple(arg if isinstance(arg, tuple) else type(arg) for arg in launch.args)
    key = launch.kernel.__name__, torch.cuda.current_device(), kind
    if key not in _ready:
        compiled = launch.kernel.warmup(*launch.args, grid=(launch.programs,), **OPTIONS)
        if compiled is not None:
            _ = compiled[launch.programs, 1, 1]  # which loads it
        _ready.add(key)


def launches_of(
    metadata: Tensor,
    payload: Tensor,
    num_rows: int,
    num_recipes: int,
    num_chunks: int,
    num_of_blocks: int,
    num_slots: int,
    variants: Iterable[tuple[int, int, int, int, int]],
    records: Tensor | None,
) -> list[Launch]:
    """Those of one step, of what ``adamprox._C.Table`` says. Nothing is written yet.

    With recipes, a small launch before it makes the scalars. With ``num_slots`` tensors that are
    a block with others, a small one after it adds up their sums. Only the ``variants`` (of param's
    and state's dtype, rule, states that are there, and size of blocks) are compiled; each row finds
    its own at run time. ``records`` is where a tracked step is noted.
    """
    launches = []
    prepared = sums = None
    if num_recipes > 0:
        prepared = payload.new_empty(1 + num_recipes * SCALARS.value)
        args: tuple[Any, ...] = payload, prepared, num_rows, num_recipes
        launches.append(Launch(prepare_kernel, triton.cdiv(num_recipes, VECTOR.value), args))
    if num_chunks == 0:
        return launches
    if num_of_blocks > 0:  # behind the chunks and the Workspace's ticket
        first = num_rows * ROW.value + num_chunks * CHUNK.value + 1
        sums = metadata[first : first + num_chunks + num_slots].view(torch.float64)
    packed = {v[0] | v[1] << 8 | v[2] << 16 | v[3] << 24 for v in variants}
    args = metadata, payload, prepared, sums, records, num_rows
    launches.append(Launch(update_kernel, num_chunks, (*args, tuple(sorted(packed)))))
    if num_slots > 0:
        launches.append(Launch(slot_kernel, num_rows, (metadata, sums, num_rows, num_chunks)))
    if num_of_blocks > 0:
        shrunk = {
            (v[0] | v[3] << 24) & SECOND_SWEEP.value | v[4] << 8
            for v in variants
            if has_blocks(RULES.value[v[2]])
        }
        of_blocks = num_chunks, num_chunks - num_of_blocks, tuple(sorted(shrunk))
        launches.append(Launch(shrink_kernel, num_of_blocks, (*args, *of_blocks)))
    return launches
