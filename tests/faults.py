"""What the tests of faults share: optimizers to spoil, how two compare, and cases run alone.

What may hang or crash runs in a process of its own, many cases in one.
"""

from __future__ import annotations

import collections
import copy
import faulthandler
import functools
import gc
import json
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from registry import OPTIMIZERS, assert_same_bits, bits

two_optimizers = pytest.mark.parametrize("optimizer", ["AdamW", "AdamProxL2"])  # one sweep, two
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
TENSORS = ("param", "grad", *MOMENTS)
NAME = r"param_groups\[0\]\['params'\]\[1\]"
ERRORS = (RuntimeError, TypeError, ValueError)
SECONDS = 60  # for what takes milliseconds or, traced, seconds; on a machine that others use


# Optimizers, what they hold, and how two of them compare.


def make(params, optimizer: str = "AdamW", **arguments) -> torch.optim.Optimizer:
    defaults = {"lr": 1e-2, "weight_decay": OPTIMIZERS[optimizer].weight_decay, "backend": "cpu"}
    return OPTIMIZERS[optimizer].cls(params, **{**defaults, **arguments})


def torchs(params, **arguments) -> torch.optim.Optimizer:
    """One param after the other."""
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.3, foreach=False, **arguments)


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def params_of(opt) -> list[Tensor]:
    return [param for group in opt.param_groups for param in group["params"]]


def set_grads(opt, seed: int) -> None:
    for index, param in enumerate(params_of(opt)):
        param.grad = randn(*param.shape, seed=100 * seed + index, dtype=param.dtype)


def run(opt, *seeds: int) -> torch.optim.Optimizer:
    for seed in seeds:
        set_grads(opt, seed)
        opt.step()
    return opt


def new_params(*shapes, dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*s, seed=i, dtype=dtype)) for i, s in enumerate(shapes)]


def ready(*shapes, steps=2, dtype=torch.float32, make=make, **arguments) -> torch.optim.Optimizer:
    """After some steps, with the grads of the next one."""
    params = new_params(*(shapes or ((6,), (4, 3), (2,))), dtype=dtype)
    opt = run(make(params, **arguments), *range(steps))
    set_grads(opt, steps)
    return opt


def tensor_of(opt, param: Tensor, key: str) -> Tensor:
    return {"param": param, "grad": param.grad, **opt.state.get(param, {})}[key]


def put(opt, param: Tensor, key: str, value) -> None:
    if key in ("param", "grad"):
        setattr(param, {"param": "data"}.get(key, key), value)
    else:
        opt.state[param][key] = value


def readable(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.is_nested:
        return False
    if tensor.layout != torch.strided or torch._is_functional_tensor(tensor):
        return False
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (tensor.storage_offset() + last + 1) * tensor.itemsize if tensor.numel() else 0
    return not tensor.is_quantized and tensor.untyped_storage().nbytes() >= size


def frozen(value):
    """A tensor's numbers; of what has none that can be read, which object it is."""
    if isinstance(value, collections.abc.Mapping):
        return {key: frozen(entry) for key, entry in value.items()}
    if not isinstance(value, Tensor):
        return repr(value)
    if not readable(value):
        return id(value)
    value = value.detach().resolve_conj().resolve_neg()
    is_real = value.is_floating_point() or value.is_complex()
    return value.dtype, (bits(value) if is_real else value).tolist()


def snapshot(opt) -> list:
    return [(frozen(param), frozen(opt.state.get(param, {}))) for param in params_of(opt)]


def refuses(opt, match: str | None = None, step=None, errors=ERRORS) -> None:
    before = snapshot(opt)
    with pytest.raises(errors, match=match):
        (step or opt.step)()
    assert snapshot(opt) == before


def kept(opt) -> list:
    """Copies, for :func:`restore`."""
    tensors = [(p.detach(), p.grad, dict(opt.state.get(p, {}))) for p in params_of(opt)]
    return copy.deepcopy(tensors)


def restore(opt, copies: list) -> None:
    opt.state.clear()
    for param, (value, grad, state) in zip(params_of(opt), copies, strict=True):
        param.data, param.grad = value, grad
        if state:
            opt.state[param] = state


def refused(spoil, match: str | None = None, errors=ERRORS, **arguments) -> None:
    """``spoil`` may return what steps; after its repair the step is the usual one."""
    opt, twin = ready(**arguments), ready(**arguments)
    copies = kept(opt)
    refuses(opt, match, spoil(opt, params_of(opt)[1]), errors)
    restore(opt, copies)
    opt.step()
    twin.step()
    assert_same_bits(opt, twin)


def alike(spoil, plain=lambda opt, param: None, **arguments) -> None:
    """Steps after ``spoil`` have the numbers of those after ``plain``."""
    opt, twin = ready(**arguments), ready(**arguments)
    spoil(opt, params_of(opt)[1])
    plain(twin, params_of(twin)[1])
    for seed in range(10, 13):
        opt.step()
        twin.step()
        assert [p for p, _ in snapshot(opt)] == [q for q, _ in snapshot(twin)]
        for p, q in zip(params_of(opt), params_of(twin), strict=True):
            for key in twin.state[q]:
                assert frozen(opt.state[p][key]) == frozen(twin.state[q][key]), key
        set_grads(opt, seed)
        set_grads(twin, seed)


class Acting:
    """A number, a sequence or a key that acts when it is looked at."""

    def __init__(self, act, value):
        self.act, self.value = act, value

    def __float__(self):
        self.act()
        return self.value

    def __getitem__(self, index):
        self.act()
        return self.value[index]

    def __len__(self):
        return 2

    def __hash__(self):
        return hash(self.value)

    def __eq__(self, other):
        self.act()
        return False


def put_first(key, entries: dict) -> None:
    """So that a look-up of an entry of the same hash meets it."""
    old = dict(entries)
    entries.clear()
    entries.update({key: None})
    entries.update(old)


# Cases that may hang or crash.

ALONE: dict[str, functools.partial] = {}
OUTCOMES: dict[Path, dict[str, str]] = {}


def alone(*cases: str):
    """Has the test run once a case, in the process of :func:`outcomes`."""

    def register(body):
        names = {case: f"{body.__name__}[{case}]" for case in cases}
        ALONE.update({name: functools.partial(body, case) for case, name in names.items()})

        @pytest.mark.parametrize("case", cases)
        def test(case, request):
            if request.path not in OUTCOMES:
                OUTCOMES[request.path] = outcomes(request)
            outcome = OUTCOMES[request.path][names[case]]
            assert outcome == "ok", outcome

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return register


def run_alone(names: list[str]) -> None:
    """Prints what comes of each."""

    def too_late(*_):
        raise TimeoutError("it does not end")

    signal.signal(signal.SIGALRM, too_late)
    torch.set_num_threads(1)
    ready()
    gc.collect()
    gc.freeze()  # so that collecting what comes later is cheap
    for name in names:
        faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
        signal.alarm(SECONDS)
        try:
            ALONE[name]()
            outcome = "ok"
        except BaseException:
            outcome = traceback.format_exc()
        signal.alarm(0)
        print(json.dumps([name, outcome]), flush=True)


def outcomes(request) -> dict[str, str]:
    """Of the cases that were asked for; after one that ends the process, another takes the rest."""
    asked = {item.name for item in request.session.items if item.path == request.path}
    results: dict[str, str] = {}
    while rest := [name for name in ALONE if name in asked and name not in results]:
        code = f"import faults, {request.path.stem}; faults.run_alone({rest!r})"
        process = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", code],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        results.update(json.loads(line) for line in process.stdout.splitlines() if line[:1] == "[")
        if missing := [name for name in rest if name not in results]:
            results[missing[0]] = f"exit status {process.returncode}: {process.stderr[-2000:]}"
    return results
