"""A step takes no memory beyond params, grads and states."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from adamprox.bench.memory import peak_extra_bytes_of
from adamprox.bench.models import MODELS
from adamprox.bench.providers import OURS, providers

# 64 MB of params.
MODEL = "one tensor of 16 M"
PARAM_BYTES = 4 * MODELS[MODEL].numel

# The kernel counts resident pages in batches, of 64 pages and more for each thread and CPU; and
# whatever Python does between the two readings counts, too.
TOLERANCE = 1 << 20


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamProxL2"])
def test_a_step_of_ours_does_not_raise_the_peak(optimizer):
    assert peak_extra_bytes_of(MODEL, optimizer, "cpu") < TOLERANCE


def test_a_step_of_foreach_raises_the_peak_by_the_size_of_the_params():
    # So that the measurement is known to see what there is.
    extra = peak_extra_bytes_of(MODEL, "torch foreach", "")
    assert 0.9 * PARAM_BYTES < extra < 3 * PARAM_BYTES


def allocations(optimizer):
    """The bytes of each allocation that torch makes on the CPU during a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return [size for size in sizes if size > 0]


@pytest.mark.parametrize("name", [*OURS, "torch foreach"])
def test_a_step_of_ours_allocates_no_tensor(name):
    [provider], _ = providers([name], torch.device("cpu"))
    params = [torch.nn.Parameter(torch.zeros(20_000)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = provider.make(params)
    optimizer.step()
    assert bool(allocations(optimizer)) == (name == "torch foreach")
