"""`pytest bench`: a row of pytest-benchmark for each model, optimizer, backend and dtype.

`adamprox bench` times steps in turns, and its rows compare better; here, each gets its rounds at
once.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from adamprox.bench.contenders import DTYPES, contenders
from adamprox.bench.models import MODELS
from adamprox.bench.providers import NAMES, OURS, providers
from adamprox.bench.timing import synchronize

LARGE = 1 << 24  # elements

# Not the specification, which is not for speed.
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("device")
    large = metafunc.config.getoption("large")
    models = [name for name, model in MODELS.items() if large or model.numel < LARGE]
    optimizers = [(name, None) for name in NAMES if name not in OURS]
    optimizers += itertools.product(OURS, BACKENDS[device])
    cases = [
        (model, dtype, *optimizer)
        for model, dtype, optimizer in itertools.product(models, DTYPES, optimizers)
    ]
    ids = ["-".join(filter(None, case)) for case in cases]
    metafunc.parametrize(("model", "dtype", "name", "backend"), cases, ids=ids)


def test_step(benchmark, request, model, dtype, name, backend):
    device = torch.device(request.config.getoption("device"))
    found, skipped = providers([name], device, [backend] if backend else [])
    if skipped:
        pytest.skip(f"{name}: {skipped.popitem()[1]}")
    try:
        made, skipped = contenders(MODELS[model], found, device, DTYPES[dtype])
    except MemoryError as error:
        pytest.skip(str(error))
    if skipped:
        pytest.skip(f"{name}: {skipped.popitem()[1]}")
    [contender] = made

    def step():
        contender.optimizer.step()
        synchronize(device)

    benchmark.group = f"{model}, {dtype}"
    benchmark.extra_info["bytes"] = contender.cost and contender.cost.bytes
    benchmark(step)
