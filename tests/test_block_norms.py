"""However a block is dealt out, its shares' sums complete the reduction tree of the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adamprox import reference
from adamprox.block_norms import Member, Plan, Shares, nodes_of, shrink, sums_of_nodes


@st.composite
def dealt_out(draw):
    total = draw(st.integers(0, 5000))
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=6)))
    return total, list(zip([0, *cuts], [*cuts, total], strict=True))


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(st.lists(dealt_out(), min_size=1, max_size=3))
def test_shares_complete_the_tree_of_the_whole(blocks):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(total, generator=generator) for total, _ in blocks]
    ranks = max(len(ranges) for _, ranges in blocks)
    buffers = []
    for rank in range(ranks):
        shares = [
            Shares(total, tuple(ranges), min(rank, len(ranges) - 1)) for total, ranges in blocks
        ]
        plan = Plan(shares)
        buffer = torch.zeros(plan.size, dtype=torch.float64)
        sums = []
        for v, share, nodes in zip(values, shares, plan.mine, strict=True):
            begin, end = share.ranges[share.mine]
            sums += sums_of_nodes(v[begin:end], begin, nodes)
        if sums:
            buffer[torch.tensor(plan.places)] = torch.stack(sums)
        buffers.append(buffer)
    # Where fewer ranks have a share of a block than of another, the last one is in several buffers.
    buffer = torch.stack(buffers).amax(0)
    roots = plan.complete(buffer).tolist()
    for v, root in zip(values, roots, strict=True):
        assert root == (reference.sums_of_squares(v, len(v)).item() if len(v) else 0.0)


@settings(deadline=None, derandomize=True, database=None)
@given(dealt_out())
def test_a_share_is_few_nodes(dealt):
    total, ranges = dealt
    for begin, end in ranges:
        nodes = list(nodes_of(begin, end, total))
        assert len(nodes) <= 2 * max(1, total.bit_length())
        covered = [
            i for level, number in nodes for i in range(number << level, (number + 1) << level)
        ]
        assert [i for i in covered if i < total] == list(range(begin, end))


@pytest.mark.parametrize("size", [1, 2, 3, 2047, 2048, 2049, 40_000])
def test_the_trees_sum_is_a_sum(size):
    values = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = values.sum()
    assert (reference.tree_sum(values) - expected).abs() <= expected * 2**-53 * size.bit_length()


def test_norms_of_groups_whose_params_are_dealt_out_by_device():
    """Their parts come a device after the other."""
    groups = [{"block": "group", "lr": 1.0, "weight_decay": 2.0, "decay_by": "lr"} for _ in "ab"]
    z = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (5, 6, 7, 8)]
    members = [Member(nn.Parameter(each), each.clone(), groups[i % 2]) for i, each in enumerate(z)]
    shrink(members)
    for one, two in ((0, 2), (1, 3)):
        norm = torch.cat([z[one], z[two]]).double().norm().item()
        for i in (one, two):
            torch.testing.assert_close(members[i].z, (1 - 2 / norm) * z[i])
