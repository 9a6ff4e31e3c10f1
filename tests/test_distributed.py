"""Ranks on gloo give the bits of one process: FSDP2, DDP, ZeRO, tensor parallelism, checkpoints."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch.multiprocessing

import ranks
from registry import OPTIMIZERS

WORLDS = tuple(map(int, os.environ.get("ADAMPROX_TEST_WORLDS", "2 3 4").split()))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Of each world: what each rank says of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        for name in OPTIMIZERS:
            ranks.resume(ranks.model(), name, None, folder / f"checkpoint-{name}-1", first=0)
    result = {}
    for world in WORLDS:  # each loads what the one before it saved
        torch.multiprocessing.start_processes(
            ranks.main, (world, folder), nprocs=world, start_method="spawn"
        )
        result[world] = [
            {
                (case, name): error
                for case, name, error, _ in map(
                    json.loads, (folder / f"{world}-{rank}.json").read_text().splitlines()
                )
            }
            for rank in range(world)
        ]
    return result


@pytest.mark.parametrize(
    ("world", "case", "optimizer"),
    [
        (w, case, name)
        for w in WORLDS
        for case in ranks.CASES
        for name in ranks.optimizers_of(case, w)
    ],
)
def test_ranks_give_the_bits_of_one_process(world, case, optimizer, runs):
    for rank, results in enumerate(runs[world]):
        error = results.get((case, optimizer), "not run: an earlier case failed")
        assert error is None, f"rank {rank}: {error}"
