"""AdamProxL2 where a block is not all in one place: the norm of the whole, the bits of one process.

    each rank: z, the sums of the tree that it knows -> one small all-reduce -> the rest -> shrink

A rank that has the elements from ``k * 2**n`` to ``(k + 1) * 2**n`` of a block knows one of the
tree's sums (:func:`adamprox.reference.tree_sum`), and a shard's range falls apart into a few of
these. Every sum has a place of its own in the buffer that is reduced: zeros are added to it, in any
order. A block that is all on one rank needs no place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .sharding import is_distributed, is_here, row_ranges, shards_of, split_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Member(NamedTuple):
    """One param whose blocks are to be shrunk."""

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
    """How a block's elements are dealt out, in ranges."""

    total: int
    ranges: tuple[tuple[int, int], ...]
    mine: int
    """Which of the ranges is this rank's."""


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
        return buffer[torch.tensor(self.roots, dtype=torch.int64, device=buffer.device)]


@lru_cache(maxsize=8)
def plan_of(shares: tuple[Shares, ...]) -> Plan:
    """Made once, as the shares seldom change."""
    return Plan(shares)


AT_ONCE = 1 << 22
"""How many elements are copied at a time: this memory is taken when params are half stepped."""


def sums_of_squares(values: Tensor, front: int, piece: int) -> Tensor:
    """Those of blocks of ``piece`` elements, each by :func:`reference.tree_sum`.

    ``values`` begin ``front`` elements after the first block does, as if after zeros. A slice of a
    block that is as long as a power of two has a sum of the block's tree.
    """
    end = front + len(values)

    def squares(first: int, last: int) -> Tensor:
        own = values[max(first - front, 0) : max(last - front, 0)].to(torch.float64)
        own = own * own
        before = min(max(front - first, 0), last - first)
        after = last - first - before - len(own)
        return torch.nn.functional.pad(own, (before, after)) if before or after else own

    count = -(-end // piece)
    if count == 1:  # zeros behind it would change no sum
        piece = end
    if piece <= AT_ONCE:
        some = AT_ONCE // piece * piece
        return torch.cat(
            [
                reference.tree_sum(squares(at, min(at + some, count * piece)).view(-1, piece))
                for at in range(0, end, some)
            ]
        )
    return torch.stack(
        [
            reference.tree_sum(
                torch.stack(
                    [
                        reference.tree_sum(squares(at, min(at + AT_ONCE, begin + piece, end)))
                        for at in range(begin, min(begin + piece, end), AT_ONCE)
                    ]
                )
            )
            for begin in range(0, end, piece)
        ]
    )


def sums_of_nodes(values: Tensor, begin: int, nodes: Sequence[Node]) -> list[Tensor]:
    """The nodes' sums of squares; ``values`` begin at element ``begin`` of their block."""
    firsts = [(node, (node.number << node.level) - begin) for node in nodes]
    return [
        sums_of_squares(values[first : first + (1 << node.level)], 0, 1 << node.level)[0]
        for node, first in firsts
    ]


class _Part:
    """What this rank has of a param, and what it knows of the blocks that are in it."""

    sums: Tensor
    """Of each of these blocks the sum of squares: of this rank's part, and then of all."""

    def __init__(self, member: Member) -> None:
        self.param, z, self.group = member
        self.z = torch.view_as_real(z) if z.is_complex() else z
        self.together = self.group.get("block") == "group"
        self.total = self.param.numel() * (2 if self.param.is_complex() else 1)
        self.size = reference.block_numel(self.param, self.group.get("block", "tensor"))
        dims = shards_of(self.param)
        self.groups = _groups(self.param, dims)
        ranges = self._ranges()
        by_memory = self.size == self.total or _rows_first(self.param)
        self.values = reference.in_memory_order(self.z) if by_memory else self.z.reshape(-1)
        # The values begin `front` elements after a block does, of which this rank has `piece`.
        self.shares: dict[int, Shares] = {}  # of the blocks that ranks have ranges of, by number
        self.terms, self.column = 0, _index_of(self.param, dims)
        if ranges is not None:
            begin, _ = ranges[self.column]
            self.first, self.front, self.piece = begin // self.size, begin % self.size, self.size
            cut = {c // self.size for c, end in ranges if 0 < c < end and c % self.size}
            for block in sorted(cut | ({0} if self.together and len(ranges) > 1 else set())):
                self.shares[block] = self._shares(block, ranges)
        else:  # each rank adds a term to the blocks that it has a part of
            self.first, self.front, self.piece = 0, 0, len(self.values)
            if self.size < self.total:
                rows = self.size * self.param.shape[0] // self.total
                first, last = _own_rows(self.param, dims)
                row = len(self.values) // max(1, last - first)
                self.first, self.front, self.piece = first // rows, first % rows * row, rows * row
            self.terms = prod(self.param.device_mesh.size(d) for d in dims)  # type: ignore[attr-defined]
        self.count = -(-(self.front + len(self.values)) // self.piece) if len(self.values) else 0
        self.sums = self._own_sums()

    def _ranges(self) -> list[tuple[int, int]] | None:
        """Of each rank, the elements; None if they are no ranges of the order of a block's."""
        if not is_distributed(self.param) or not shards_of(self.param):
            return [(0, self.total)]
        rows = row_ranges(self.param)
        if rows is None or (self.size == self.total and not _rows_first(self.param)):
            return None
        row = self.total // self.param.shape[0]
        return [(first * row, last * row) for first, last in rows]

    def _shares(self, block: int, ranges: Sequence[tuple[int, int]]) -> Shares:
        begin = block * self.size
        total = min(self.size, self.total - begin)
        clipped = (tuple(min(max(at - begin, 0), total) for at in ends) for ends in ranges)
        return Shares(total, tuple(clipped), self.column)  # type: ignore[arg-type]

    def _own_sums(self) -> Tensor:
        """Of blocks that other ranks have ranges of, too, zeros: they are learnt."""
        sums = torch.zeros(self.count, dtype=torch.float64, device=self.z.device)
        own = [i for i in range(self.count) if self.first + i not in self.shares]
        if own:
            begin, end = own[0] * self.piece - self.front, (own[-1] + 1) * self.piece - self.front
            values = self.values[max(begin, 0) : end]
            sums[own[0] : own[-1] + 1] = sums_of_squares(values, max(-begin, 0), self.piece)
        return sums

    def known(self, block: int, nodes: Sequence[Node]) -> list[Tensor]:
        """The sums of this rank's nodes of a block of ``shares``."""
        begin, end = self.shares[block].ranges[self.column]
        at = (block - self.first) * self.size - self.front + begin
        return sums_of_nodes(self.values[max(at, 0) :][: end - begin], begin, nodes)

    def fill(self, table: Tensor) -> None:
        """Writes this rank's terms into ``(blocks, ranks)``."""
        table[self.first : self.first + self.count, self.column] = self.sums

    def learn(self, table: Tensor, roots: Mapping[int, Tensor]) -> None:
        """Takes over what all ranks know together."""
        if self.terms:
            sums = reference.tree_sum(table)
            self.sums = sums if self.together else sums[self.first : self.first + self.count]
        for block, root in roots.items():
            if self.together:
                self.sums = root[None]
            elif 0 <= block - self.first < self.count:
                self.sums[block - self.first] = root

    def shrink(self, sums: Tensor, numels: Tensor) -> None:
        """The values, by the sums of all of their blocks, or by one of them all."""
        strength = reference.decay_strength(self.group)
        by_size = self.group.get("block_scaling") == "sqrt"
        k = reference.shrinkages(sums, numels, strength, by_size)
        for begin in range(0, len(self.values), AT_ONCE):
            values, of_values = self.values[begin : begin + AT_ONCE], k
            if self.count > 1:
                at = begin + self.front
                first, last = at // self.piece, -(-(at + len(values)) // self.piece)
                ends = torch.arange(first, last + 1, device=k.device) * self.piece - at
                lengths = ends.clamp(0, len(values)).diff()
                of_values = k.expand(self.count)[first:last]
                of_values = of_values.repeat_interleave(lengths, output_size=len(values))
            reference.shrink_values(values, of_values)
        if self.values.data_ptr() != self.z.data_ptr():
            self.z.copy_(self.values.view(self.z.shape))

    def numels(self) -> Tensor:
        """The reals of each block."""
        ends = (torch.arange(self.count, device=self.z.device) + self.first + 1) * self.size
        return (self.size - (ends - self.total).clamp(min=0)).to(torch.float64)


def why_not(param: Tensor, block: str | int) -> str | None:
    """What keeps ranks from taking the norms of a param's blocks, or None."""
    if block == "group" and not is_here(param):
        return "block='group' of a param on a mesh that leaves this rank out is not supported"
    if not is_distributed(param) or block in ("tensor", "group") or row_ranges(param) is not None:
        return None
    from torch.distributed.tensor import Shard

    if all(p.is_replicate() or type(p) is Shard for p in param.placements):
        return None
    return f"block={block!r} of a param with placements={param.placements} is not supported"


def _rows_first(param: Tensor) -> bool:
    """Whether each index of dim 0 is a range of memory."""
    rows = param.shape[0] if param.dim() else 1
    return rows == 1 or param.stride(0) * rows == param.numel()


def _own_rows(param: Tensor, dims: Sequence[int]) -> tuple[int, int]:
    """The rows of which this rank has some elements."""
    assert is_distributed(param)
    of_rows = [d for d in dims if param.placements[d].is_shard(0)]
    sizes = tuple(param.device_mesh.size(d) for d in of_rows)
    return split_rows(param.shape[0], sizes)[_index_of(param, of_rows)]


def _index_of(param: Tensor, dims: Sequence[int]) -> int:
    """This rank's number among those along these dims of the mesh."""
    index = 0
    for d in dims:
        assert is_distributed(param)
        index = index * param.device_mesh.size(d) + param.device_mesh.get_local_rank(d)
    return index


def _groups(param: Tensor, dims: Sequence[int]) -> tuple[ProcessGroup, ...]:
    """One for all ranks with parts where there is one, else one a dim of the mesh."""
    if not dims:
        return ()
    import torch.distributed as dist

    assert is_distributed(param)
    mesh = param.device_mesh
    if len(dims) > 1 and prod(mesh.size(d) for d in dims) == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None
        return (world,)
    return tuple(mesh.get_group(d) for d in dims)


@torch.no_grad()
def shrink(members: Sequence[Member]) -> None:
    """``z <- max(1 - s / norm(z), 0) * z`` of each block, each norm over all of its parts.

    Every rank calls it with the same params. One all-reduce of float64 numbers for each mesh: for
    each block that ranks have ranges of at most ``2 * log2(numel)`` numbers a rank; for each block
    of a param that is dealt out otherwise, a number a rank.
    """
    parts = [
        _Part(member) for member in members if member.param.numel() > 0 and is_here(member.param)
    ]
    by_mesh: dict[tuple[tuple[ProcessGroup, ...], torch.device], list[_Part]] = {}
    for part in parts:
        by_mesh.setdefault((part.groups, part.z.device), []).append(part)
    for (groups, device), of_mesh in by_mesh.items():
        if groups:
            _exchange(of_mesh, groups, device)
    of_groups: dict[int, list[_Part]] = {}  # whose params may be on several devices
    for part in parts:
        of_groups.setdefault(id(part.group), []).append(part)
    for own in of_groups.values():
        if own[0].together:
            sums = reference.tree_sum(torch.cat([part.sums.cpu() for part in own]))[None]
            numels = torch.tensor([float(sum(part.total for part in own))], dtype=torch.float64)
            for part in own:
                part.shrink(sums.to(part.z.device), numels.to(part.z.device))
        else:
            for part in own:
                part.shrink(part.sums, part.numels())


def _exchange(parts: Sequence[_Part], groups: Sequence[ProcessGroup], device: torch.device) -> None:
    """Has each part of a mesh know the sums of its blocks."""
    sizes = [-(-part.total // part.size) * part.terms for part in parts]
    blocks = [(part, block) for part in parts for block in part.shares]
    plan = plan_of(tuple(part.shares[block] for part, block in blocks))
    buffer = torch.zeros(sum(sizes) + plan.size, dtype=torch.float64, device=device)
    of_nodes = buffer[sum(sizes) :]
    tables = [
        table.view(-1, part.terms) if part.terms else table
        for part, table in zip(parts, buffer[: sum(sizes)].split(sizes), strict=True)
    ]
    for part, table in zip(parts, tables, strict=True):
        if part.terms:
            part.fill(table)
    known = [
        part.known(block, nodes) for (part, block), nodes in zip(blocks, plan.mine, strict=True)
    ]
    if plan.places:
        places = torch.tensor(plan.places, device=device)
        of_nodes[places] = torch.stack([s for sums in known for s in sums])
    _all_reduce(buffer[: sum(sizes) + plan.reduced], groups, parts[0].param)
    roots = iter(plan.complete(of_nodes).unbind())
    for part, table in zip(parts, tables, strict=True):
        part.learn(table, {block: next(roots) for block in part.shares})


def _all_reduce(buffer: Tensor, groups: Sequence[ProcessGroup], param: Tensor) -> None:
    import torch.distributed as dist

    assert is_distributed(param)
    # Where params are offloaded, the groups' device is another one.
    moved = buffer.to(param.device_mesh.device_type)
    for group in groups:
        dist.all_reduce(moved, group=group)
    if moved is not buffer:
        buffer.copy_(moved)
