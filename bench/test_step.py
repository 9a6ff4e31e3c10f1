"""`pytest bench`: the same steps for pytest-benchmark, grouped by model."""

from __future__ import annotations

import pytest
import torch

from models import MODELS
from step_time import OURS, TORCH


@pytest.mark.parametrize("optimizer", [*TORCH, *OURS])
@pytest.mark.parametrize("model", MODELS)
def test_step(benchmark, model, optimizer):
    benchmark.group = model
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in MODELS[model]()]
    for param in params:
        param.grad = torch.randn_like(param)
    step = (TORCH | OURS)[optimizer](params).step
    step()
    benchmark(step)
