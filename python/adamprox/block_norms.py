"""AdamProxL2 where ranks share a block: the norm of the whole, the bits of one process.

    each rank: z, the sums of the tree that it knows -> one small all-reduce -> the rest -> shrink

A rank that has the elements from ``k * 2**n`` to ``(k + 1) * 2**n`` knows one of the tree's sums
(:func:`adamprox.reference.tree_sum`), and a shard's range falls apart into a few of these. Every
sum has a place of its own in the buffer that is reduced: zeros are added to it, in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .sharding import is_distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


class Block(NamedTuple):
    """One param of which a norm is taken."""

    param: Tensor
    z: Tensor
    """This rank's part of it after Adam's step, dense; shrunk in place."""
    group: Mapping[str, Any]


class Node(NamedTuple):
    """The sum of the elements from ``number * 2**level`` to ``(number + 1) * 2**level``."""

    level: int
    number: int


def nodes_of(begin: int, end: int, total: int) -> Iterator[Node]:
    """The fewest nodes that make up a range of ``total`` elements, from left to right."""
    if end == total:
        end = 1 << (total - 1).bit_length()  # as if zeros followed
    while begin < min(end, total):
        level = (end - begin).bit_length() - 1
        if begin:
            level = min(level, (begin & -begin).bit_length() - 1)
        yield Node(level, begin >> level)
        begin += 1 << level


class Shares(NamedTuple):
    """How a block's elements are dealt out."""

    total: int
    ranges: tuple[tuple[int, int], ...]
    mine: int
    """Which of the ranges is this rank's."""
    exact: bool
    """Whether these are ranges of elements; or else each share is a term of one element."""


def shares_of(param: Tensor) -> tuple[Shares, tuple[ProcessGroup, ...]]:
    """And over which groups. Rows (``Shard(0)``) are ranges; other shards are terms."""
    reals = 2 if param.is_complex() else 1
    total = param.numel() * reals
    dims = (
        [d for d, placement in enumerate(param.placements) if not placement.is_replicate()]
        if is_distributed(param)
        else []
    )
    if not dims:
        return Shares(total, ((0, total),), 0, exact=True), ()
    assert is_distributed(param)
    mesh = param.device_mesh
    sizes = [mesh.size(d) for d in dims]
    mine = 0
    for d, size in zip(dims, sizes, strict=True):
        mine = mine * size + mesh.get_local_rank(d)
    if _by_rows(param, dims):
        row = total // param.shape[0]
        ranges = tuple(
            (first * row, last * row)
            for first, last in (
                _rows(param.shape[0], coordinate, sizes)
                for coordinate in product(*(range(size) for size in sizes))
            )
        )
        return Shares(total, ranges, mine, exact=True), _groups(param, dims)
    ranges = tuple((i, i + 1) for i in range(prod(sizes)))
    return Shares(len(ranges), ranges, mine, exact=False), _groups(param, dims)


def _by_rows(param: DTensor, dims: Sequence[int]) -> bool:
    from torch.distributed.tensor import Shard

    rows = all(type(p) is Shard and p.dim == 0 for p in (param.placements[d] for d in dims))
    return rows and param.stride(0) * param.shape[0] == param.numel() > 0


def _rows(rows: int, coordinate: Sequence[int], sizes: Sequence[int]) -> tuple[int, int]:
    """Split and split again, as torch.chunk does."""
    first, last = 0, rows
    for index, size in zip(coordinate, sizes, strict=True):
        most = -(-(last - first) // size)
        first, last = min(first + index * most, last), min(first + (index + 1) * most, last)
    return first, last


def _groups(param: DTensor, dims: Sequence[int]) -> tuple[ProcessGroup, ...]:
    """One for all ranks with shares where there is one, else one a dim of the mesh."""
    import torch.distributed as dist

    mesh = param.device_mesh
    if len(dims) > 1 and prod(mesh.size(d) for d in dims) == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None
        return (world,)
    return tuple(mesh.get_group(d) for d in dims)


class Plan:
    """Where the nodes of several blocks lie in one buffer, and how it becomes their roots."""

    def __init__(self, shares: Sequence[Shares]) -> None:
        self.mine: list[list[Node]] = []  # of each block
        self.places: list[int] = []  # of the nodes above, one after another
        self.roots: list[int] = []
        self._additions: dict[int, list[tuple[int, int, int]]] = {}
        self.size = 0
        waiting: list[dict[Node, int]] = []
        for share in shares:
            known: dict[Node, int] = {}
            for i, (begin, end) in enumerate(share.ranges):
                nodes = list(nodes_of(begin, end, share.total))
                places = range(self.size, self.size + len(nodes))
                known.update(zip(nodes, places, strict=True))
                self.size += len(nodes)
                if i == share.mine:
                    self.mine.append(nodes)
                    self.places.extend(places)
            waiting.append(known)
        self.reduced = self.size
        for known in waiting:
            self.roots.append(self._root(known))

    def _root(self, known: dict[Node, int]) -> int:
        """Adds neighbours until one is left; with zero elements there is none."""
        if not known:
            self.size += 1
            return self.size - 1
        level = min(node.level for node in known)
        while len(known) > 1:
            for node in [n for n in known if n.level == level]:
                if node not in known:
                    continue
                place = known.pop(node)
                other = known.pop(Node(level, node.number ^ 1), None)
                if other is not None:
                    additions = self._additions.setdefault(level, [])
                    additions.append((place, other, self.size))
                    place = self.size
                    self.size += 1
                known[Node(level + 1, node.number >> 1)] = place
            level += 1
        return next(iter(known.values()))

    def complete(self, buffer: Tensor) -> Tensor:
        """The roots: each block's sum."""
        for level in sorted(self._additions):
            left, right, place = torch.tensor(self._additions[level], device=buffer.device).T
            buffer[place] = buffer[left] + buffer[right]
        return buffer[torch.tensor(self.roots, device=buffer.device)]


@lru_cache(maxsize=8)
def plan_of(shares: tuple[Shares, ...]) -> Plan:
    """Made once, as the shares seldom change."""
    return Plan(shares)


def sums_of_nodes(z: Tensor, begin: int, nodes: Sequence[Node]) -> list[Tensor]:
    """The nodes' sums of squares; ``z`` begins at element ``begin`` of its block."""
    values = reference.in_memory_order(torch.view_as_real(z) if z.is_complex() else z)
    result = []
    for level, number in nodes:
        first = (number << level) - begin
        squares = values[first : first + (1 << level)].to(torch.float64)
        result.append(reference.tree_sum(squares * squares))
    return result


@torch.no_grad()
def shrink(blocks: Sequence[Block]) -> None:
    """``z <- max(1 - s / norm(z), 0) * z``, each norm over all of its shares.

    Every rank calls it with the same blocks. One all-reduce of float64 numbers for each mesh: some
    for every share of every block, at most ``2 * log2(numel)``.
    """
    by_groups: dict[tuple[tuple[ProcessGroup, ...], torch.device], list[tuple[Block, Shares]]] = {}
    for block in blocks:
        shares, groups = shares_of(block.param)
        by_groups.setdefault((groups, block.z.device), []).append((block, shares))
    for (groups, device), members in by_groups.items():
        plan = plan_of(tuple(shares for _, shares in members))
        sums = []
        for (block, shares), nodes in zip(members, plan.mine, strict=True):
            if shares.exact:
                sums += sums_of_nodes(block.z, shares.ranges[shares.mine][0], nodes)
            else:
                whole = nodes_of(0, block.z.numel(), block.z.numel())
                sums += sums_of_nodes(block.z, 0, list(whole)) or [torch.zeros((), device=device)]
        buffer = torch.zeros(plan.size, dtype=torch.float64, device=device)
        if sums:
            buffer[torch.tensor(plan.places, device=device)] = torch.stack(sums).double()
        _all_reduce(buffer[: plan.reduced], groups, members[0][0].param)
        norms = reference.sqrt(plan.complete(buffer))
        strengths = torch.tensor(
            [reference.decay_strength(block.group) for block, _ in members],
            dtype=torch.float64,
            device=device,
        )
        shrinkages = torch.where(norms <= strengths, torch.ones_like(norms), strengths / norms)
        for (block, _), shrinkage in zip(members, shrinkages, strict=True):
            reference.shrink(block.z, shrinkage)


def _all_reduce(buffer: Tensor, groups: Sequence[ProcessGroup], param: Tensor) -> None:
    if not groups:
        return
    import torch.distributed as dist

    assert is_distributed(param)
    # Where params are offloaded, the groups' device is another one.
    moved = buffer.to(param.device_mesh.device_type)
    for group in groups:
        dist.all_reduce(moved, group=group)
    if moved is not buffer:
        buffer.copy_(moved)
