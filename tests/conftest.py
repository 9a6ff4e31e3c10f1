from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path

import pytest
import torch

import cuda_on_host
from adamprox import backends

# Triton reads it when the kernels are imported; 0 leaves them to a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["COLUMNS"] = "120"  # whatever terminal the tests are run from
os.environ.pop("ADAMPROX_BACKEND", None)  # whatever its shell asks for


# They start processes of several threads, so one worker has them all, from the beginning; the many
# cells of parity come last and fill the gaps.
PROCESSES = {"test_distributed", "test_cli", "test_paper", "test_bench", "test_examples"}
PROCESSES |= {"test_torch_abi"}


def pytest_configure(config):
    config.addinivalue_line("markers", "both_abis: runs in test_torch_abi.py, too")


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: (item.path.stem not in PROCESSES) + (item.path.stem == "test_parity")
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With ``-n`` alone, a worker takes a whole file, but of parity a cell at a time.

    xdist's own groups would do, but have no effect with pytest 9.2.
    """
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            name = Path(nodeid.partition("::")[0]).stem
            if name == "test_parity":
                return nodeid
            return "processes" if name in PROCESSES else name

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _one_thread():
    """OpenMP's threads slow small tensors down tenfold where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _lighter_interpreter():
    """Three times as fast: it patches Triton's language once a device function, not at each call.

    A launch does it anew, and what that does not reach stays patched. Nor does it check each
    addition of integers for overflow, or make a table of all types to look up one.
    """
    if os.environ["TRITON_INTERPRET"] != "1":
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder, function = interpreter.interpreter_builder, interpreter.InterpretedFunction
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patching_call, called = function.__call__, set()

    def call(self, *args, **kwargs):
        if self in called:
            return self.rewrite()(*args, **kwargs)
        called.add(self)
        return patching_call(self, *args, **kwargs)

    function.__call__ = call

    np_dtype, known = interpreter._get_np_dtype, {}

    def known_np_dtype(dtype):
        if dtype.name not in known:
            known[dtype.name] = np_dtype(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = known_np_dtype


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
