"""``ema_decay``: an average of each param, kept by the step; ``ema_weights()``, to use it."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import adamprox
import registry
from adamprox import backends
from ranks import whole
from registry import BACKENDS, DTYPES, LAYOUTS, OPTIMIZERS, Option, params_of, same_bits
from test_capturable import randn, set_grads
from test_checkpoints import saved
from test_in_backward import both_ways
from test_optimizer import refusals

SHAPES = ((3, 5), (0, 3), (), (7,), (2, 2))
EMA = Option({"ema_decay": 0.75})
F32, BF16 = torch.float32, torch.bfloat16
every_backend = pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
both_dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def make(optimizer, backend=None, option=EMA, dtypes=(F32,), state=None, shapes=SHAPES):
    kinds = [(shape, dtype) for dtype in dtypes for shape in shapes]
    values = [randn(seed, *kind) for seed, kind in enumerate(kinds)]
    return registry.build(optimizer, values, option, backend, state)


def steps(opt, seeds) -> None:
    for seed in seeds:
        set_grads(opt, seed)
        opt.step()


def set_decay(decay: float | None, *groups: dict) -> None:
    for group in groups:
        group["ema_decay"] = decay


def copies(opt) -> list[Tensor]:
    """Of all params, states and step counts."""
    tensors = [t for p in params_of(opt) for t in (p, *opt.state.get(p, {}).values())]
    return [whole(tensor).detach().clone() for tensor in tensors]


def unchanged(opt, before: list[Tensor]) -> bool:
    return all(map(same_bits, copies(opt), before))


def numpy(tensor: Tensor) -> np.ndarray:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else whole(tensor)
    return tensor.detach().to(torch.float64, copy=True).numpy()


def step(opt, averages: dict[Tensor, np.ndarray]) -> None:
    """And compares with what NumPy makes, in double, of the params before and after it."""
    groups = [(p, group) for group in opt.param_groups for p in group["params"]]
    stepped = [(p, g["ema_decay"], numpy(p)) for p, g in groups if p.grad is not None]
    opt.step()
    for param, decay, start in stepped:
        if decay is not None:
            ema = averages.get(param, start)
            averages[param] = ema + (1 - decay) * (numpy(param) - ema)
    assert {p for p, _ in groups if "ema" in opt.state.get(p, {})} == averages.keys()
    for param, expected in averages.items():
        ema = opt.state[param]["ema"]
        assert ema.dtype == (F32 if param.dtype.itemsize == 2 else param.dtype)
        error = 1e-10 if ema.dtype == torch.float64 else 1e-6
        np.testing.assert_allclose(numpy(ema), expected, error, error)


GROUPS = Option(
    groups=(
        *({"ema_decay": 0.75}, {"ema_decay": 0.25, "amsgrad": True, "maximize": True}),
        *({"ema_decay": 0}, {"ema_decay": 1.0}, {"decay_by": "schedule"}),
    ),
    param_layout=lambda step, index: LAYOUTS[index % 4],
)
CASES = {
    f"states {state}": ([d.param for d in DTYPES.values() if d.state == state], state, SHAPES[:4])
    for state in (None, F32)
} | {"chunks": ((F32, BF16), None, ((adamprox.reference.CHUNK_SIZE + 9,),))}


@pytest.mark.parametrize("case", CASES)
@every_optimizer
@every_backend
def test_the_average_is_the_formulas(backend, optimizer, case):
    """Of the final param, which AdamProxL2 has shrunk. It starts as the param before its first step
    with it, where that is later too; without a grad, or turned off, it stays.
    """
    pair = ours, theirs = [make(optimizer, n, GROUPS, *CASES[case]) for n in (backend, "reference")]
    averages = {p: numpy(s["ema"]) for p, s in ours.state.items() if "ema" in s}
    starts = [p.detach().clone() for p in params_of(ours)]
    for seed, later in enumerate((None, 0.5, 0.5, None, 0.25)):
        for opt in pair:
            set_decay(later, opt.param_groups[4])
            set_grads(opt, seed)
            for param in params_of(opt)[-seed % 3 :: 3]:
                param.grad = None
            for state in opt.state.values() if seed == 2 else ():
                if "ema" in state:  # not aligned as the others are
                    state["ema"] = LAYOUTS[3](state["ema"])
        step(ours, averages)
        theirs.step()
        registry.assert_same_bits(*pair)
    assert len(averages) == len(starts)
    for param, start in list(zip(params_of(ours), starts, strict=True))[3::5]:  # ema_decay=1
        assert torch.equal(ours.state[param]["ema"], start.to(ours.state[param]["ema"].dtype))


@pytest.mark.parametrize("value", [-0.1, 1.5, torch.nan, "x", True])
@every_optimizer
def test_invalid_values_are_refused_by_name(optimizer, value):
    error = ValueError if isinstance(value, float) else TypeError
    match = f"Invalid ema_decay: {value!r}, expected a number"
    refusals(optimizer, {"ema_decay": value}, error, match)
    opt = make(optimizer)
    state_dict = copy.deepcopy(opt.state_dict())
    set_decay(value, *state_dict["param_groups"])
    with pytest.raises(ValueError, match=rf"nothing was loaded.*param_groups\[0\]: {match}"):
        opt.load_state_dict(state_dict)
    assert [group["ema_decay"] for group in opt.param_groups] == [0.75]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@every_optimizer
def test_for_a_while_the_params_are_their_averages(optimizer, mode):
    opt = make(optimizer, None, GROUPS, [dtype.param for dtype in DTYPES.values()])
    with pytest.raises(RuntimeError, match="no param has an average yet"), opt.ema_weights():
        raise AssertionError
    steps(opt, [0, 0])
    params = [(p, p.data_ptr(), p.detach().clone()) for p in params_of(opt)]
    before, emas = copies(opt), [opt.state[p].get("ema") for p, *_ in params]
    assert 0 < sum(ema is None for ema in emas) < len(emas)
    for error in (None, ZeroDivisionError):
        with mode(), contextlib.suppress(ZeroDivisionError), opt.ema_weights():
            assert torch.is_grad_enabled() == (mode is torch.enable_grad)
            for (param, place, old), ema in zip(params, emas, strict=True):
                assert param.data_ptr() == place
                assert same_bits(param.detach(), old if ema is None else ema.to(param.dtype))
            if error:
                raise error
        assert torch.is_grad_enabled()
        assert unchanged(opt, before)


@pytest.mark.parametrize("what", ["step", "ema_weights", "compiled", "in_backward"])
@every_optimizer
def test_within_it_a_step_and_another_one_are_refused(optimizer, what):
    net = nn.Linear(3, 2)
    opt = OPTIMIZERS[optimizer].cls(net.parameters(), lr=1e-2, ema_decay=0.75)
    steps(opt, range(3))
    before = copies(opt)
    attempt = {
        "step": opt.step,
        "ema_weights": lambda: opt.ema_weights().__enter__(),
        "compiled": torch.compile(lambda: opt.step(), backend="eager", fullgraph=True),
        "in_backward": lambda: net(torch.ones(1, 3)).sum().backward(),
    }[what]
    handle = adamprox.step_in_backward(net, opt) if what == "in_backward" else None
    with opt.ema_weights():
        averages = copies(opt)
        with torch.enable_grad(), pytest.raises(RuntimeError, match="ema_weights"):
            attempt()  # torch leaves grads off where a compiled function raises
        assert unchanged(opt, averages)
    assert unchanged(opt, before)
    if handle is not None:
        handle.remove()
    steps(opt, [3])
    assert not unchanged(opt, before)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
@both_dtypes
@every_optimizer
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(optimizer, dtype, way):
    uninterrupted, first = (make(optimizer, dtypes=[dtype]) for _ in range(2))
    steps(uninterrupted, range(6))
    steps(first, range(3))
    if way == "state_dict":
        second = OPTIMIZERS[optimizer].cls(copy.deepcopy(params_of(first)))
        second.load_state_dict(saved(first.state_dict()))
    else:
        second = copy.deepcopy(first) if way == "deepcopy" else pickle.loads(pickle.dumps(first))
    registry.assert_same_bits(second, first)
    steps(second, range(3, 6))
    registry.assert_same_bits(second, uninterrupted)


@pytest.mark.parametrize("lacks", ["key", "states", "torch's"])
@both_dtypes
@every_optimizer
def test_after_a_checkpoint_without_it_it_starts_as_the_param_then(optimizer, dtype, lacks):
    spec, opt = OPTIMIZERS[optimizer], make(optimizer, None, GROUPS, [dtype])
    groups = [{"params": group["params"]} for group in opt.param_groups]
    cls = spec.twin or torch.optim.AdamW if lacks == "torch's" else spec.cls
    before = cls(groups, lr=1e-2, weight_decay=spec.weight_decay)
    steps(before, range(2))
    state_dict = saved(before.state_dict())
    for group, own in zip(state_dict["param_groups"], opt.param_groups, strict=True):
        group["ema_decay"] = own["ema_decay"]
        if lacks != "states":
            del group["ema_decay"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is another rule's
        opt.load_state_dict(state_dict)
    averages = {}
    for seed in (2, 3):
        set_grads(opt, seed)
        step(opt, averages)
    assert len(averages) == len(groups) - 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamProxL2"])
def test_compiled_it_makes_a_new_graph_only_when_it_is_turned_on(optimizer):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, eager = (make(optimizer) for _ in range(2))
    traced = torch.compile(lambda: compiled.step(), backend="aot_eager", fullgraph=True)
    # One more, the first time that a number changes.
    changes = ((None, 1), (None, 1), (0.5, 2), (0.5, 2), (0.25, 3), (0.75, 3), (None, 3))
    for seed, (decay, graphs) in enumerate(changes):
        set_decay(decay, *compiled.param_groups, *eager.param_groups)
        set_grads(compiled, seed)
        traced()
        steps(eager, [seed])
        registry.assert_same_bits(compiled, eager)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@both_dtypes
@every_optimizer
def test_steps_in_backward_keep_it_too(optimizer, dtype):
    def turn_on(model, opt, step):
        set_decay(0.5 if step >= 3 else None, *opt.param_groups)

    _, opt = both_ways(optimizer, turn_on, dtype)
    assert all(state["ema"].dtype == F32 for state in opt.state.values())


def of_two_ranks(rank: int, folder) -> None:
    """Each of them has a run on the whole tensors beside that on its shards."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/s", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    given = None, Option(), (F32, BF16), None, ((5, 3), (1, 2))
    places = Shard(0), Shard(1), Replicate()
    for optimizer, place in ((name, (place,)) for name in OPTIMIZERS for place in places):
        opt, other = (make(optimizer, *given) for _ in range(2))
        shards = [distribute_tensor(p.detach(), mesh, place) for p in params_of(opt)]
        opt.param_groups[0]["params"] = [nn.Parameter(shard) for shard in shards]
        averages = {}
        for seed, decay in enumerate((None, 0.75, 0.75, 0.5)):
            set_decay(decay, *opt.param_groups, *other.param_groups)
            steps(other, [seed])
            for p, q in zip(params_of(opt), params_of(other), strict=True):
                p.grad = distribute_tensor(q.grad, mesh, place)
            step(opt, averages)
            opt.load_state_dict(opt.state_dict())
        before = copies(opt)
        opt.found_inf = torch.tensor(1.0)
        opt.step()
        with opt.ema_weights():
            for p, q in zip(params_of(opt), params_of(other), strict=True):
                ema = opt.state[p]["ema"]
                assert ema.placements == place
                assert same_bits(whole(p).detach(), whole(ema).to(p.dtype))
                # The last bits of a norm over columns depend on how many ranks have some.
                if optimizer != "AdamProxL2" or place != (Shard(1),):
                    assert same_bits(whole(ema), other.state[q]["ema"])
        assert unchanged(opt, before)
    dist.destroy_process_group()


def test_shards_have_the_average_of_the_whole(tmp_path):
    torch.multiprocessing.start_processes(of_two_ranks, (tmp_path,), nprocs=2, start_method="spawn")


def test_averages_wait_for_a_step_of_another_thread(monkeypatch):
    param = torch.nn.Parameter(torch.ones(3))
    opt = adamprox.AdamW([param], ema_decay=0.5, backend="reference")
    param.grad = torch.ones(3)
    opt.step()
    reached, go_on = threading.Event(), threading.Event()
    backend = backends.BACKENDS["reference"]
    plain = backend.step

    def step(table, groups):
        steps = plain(table, groups)
        yield next(steps)
        reached.set()
        assert go_on.wait(20)
        yield from steps

    monkeypatch.setattr(backend, "step", step)
    stepping = threading.Thread(target=opt.step)
    stepping.start()
    assert reached.wait(20)
    within = []

    def evaluate():
        with opt.ema_weights():
            within.append(torch.equal(param, opt.state[param]["ema"]))

    evaluating = threading.Thread(target=evaluate)
    evaluating.start()
    evaluating.join(0.1)
    assert within == []
    go_on.set()
    for thread in (stepping, evaluating):
        thread.join(20)
    assert within == [True]
    assert not torch.equal(param, opt.state[param]["ema"])
