from __future__ import annotations

import pytest
import torch

import cuda_on_host
from adamprox import backends


@pytest.fixture(autouse=True)
def _one_thread():
    """OpenMP's threads slow small tensors down tenfold where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _built_for_the_host(tmp_path_factory):
    return cuda_on_host.build(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture
def backend(request, monkeypatch) -> str:
    """The name of a backend that can be asked for."""
    if request.param == "cuda_on_host":
        built = request.getfixturevalue("_built_for_the_host")
        monkeypatch.setitem(backends.BACKENDS, request.param, built)
    return request.param
