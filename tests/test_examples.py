"""The examples of bench/examples learn, and their frameworks do what they do with torch's AdamW."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from frameworks import EXAMPLES, FRAMEWORKS


@pytest.fixture(scope="module", params=FRAMEWORKS)
def example(request, tmp_path_factory):
    """Its name, what it printed, and the runs of frameworks.py."""
    for package in FRAMEWORKS[request.param].packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    # The bits must not depend on a GPU, nor the time on cores that others use.
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, Path(__file__).parent / "frameworks.py", request.param, folder],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=folder,
    )
    assert ran.returncode == 0, ran.stderr
    return request.param, ran.stdout, torch.load(folder / "runs.pt", weights_only=True)


def curve(losses: list[float]) -> Tensor:
    return torch.tensor(losses, dtype=torch.float64)


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == FRAMEWORKS.keys()


def test_it_learns(example):
    _, printed, runs = example
    before, after = map(float, re.search(r"loss before: (\S+), after: (\S+)", printed).groups())
    assert after < 0.6 * before
    for losses, *_ in runs.values():
        assert losses[-1] < losses[0]


def test_the_loss_curve_of_torch(example):
    name, _, runs = example
    pairs = [key for key in runs if key.startswith("torch") and "resumed" not in key]
    assert pairs
    for key in pairs:
        ours, theirs = (curve(runs[k][0]) for k in (key.replace("torch", "AdamW"), key))
        torch.testing.assert_close(ours[:20], theirs[:20], rtol=1e-6, atol=0)
        torch.testing.assert_close(ours, theirs, rtol=FRAMEWORKS[name].tolerance, atol=0)


def test_a_checkpoint_of_torch_goes_on(example):
    name, _, runs = example
    resumed, whole = runs["torch resumed with AdamW"], runs["torch"]
    assert 0 < resumed[2] < whole[2]
    ours, theirs = curve(resumed[0]), curve(whole[0])
    tolerance = FRAMEWORKS[name].tolerance
    torch.testing.assert_close(ours, theirs[-len(ours) :], rtol=tolerance, atol=0)


@pytest.mark.parametrize("run", ["AdamW", "bf16"])
def test_resuming_has_the_bits_of_not_stopping(example, run):
    _, _, runs = example
    losses, params, steps = runs[run]
    resumed_losses, resumed, steps_left = runs[f"{run} resumed"]
    assert 0 < steps_left < steps
    assert losses[-len(resumed_losses) :] == resumed_losses
    assert params.keys() == resumed.keys()
    for key in params:
        assert torch.equal(params[key], resumed[key]), key
