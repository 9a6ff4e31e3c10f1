"""``ema_decay``: an average of each param, kept by the step; ``ema_weights()``: to evaluate with it."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

import adamprox
from adamprox.reference import CHUNK_SIZE, TILE_SIZE
from registry import BACKENDS, DTYPES, LAYOUTS, OPTIMIZERS, OPTIONS, Option
from registry import assert_same_bits, build, params_of, same_bits

SHAPES = ((3, 5), (0, 3), (), (7,), (2, 2))
EMA = Option({"ema_decay": 0.75})
TWO = ("AdamW", "AdamProxL2")  # whose params are final at once, and after a second sweep
every_backend = pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
wide_and_narrow = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def randn(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.complex128)
    return (values if dtype.is_complex else values.real).to(dtype)


def make(optimizer, backend=None, option=EMA, dtypes=(torch.float32,), state=None, shapes=SHAPES):
    kinds = [(dtype, shape) for dtype in dtypes for shape in shapes]
    values = [randn(seed, shape, dtype) for seed, (dtype, shape) in enumerate(kinds)]
    return build(optimizer, values, option, backend, state)


def set_grads(opt: Optimizer, seed: int, option: Option = EMA) -> None:
    for i, param in enumerate(params_of(opt)):
        grad = option.grad_layout(seed, i)(randn(1000 * seed + i, param.shape, param.dtype))
        param.grad = grad if option.has_grad(seed, i) else None


def steps(opt: Optimizer, seeds, option: Option = EMA) -> None:
    for seed in seeds:
        set_grads(opt, seed, option)
        opt.step()


def set_decay(decay: float | None, *opts: Optimizer) -> None:
    for opt in opts:
        for group in opt.param_groups:
            group["ema_decay"] = decay


def copies(opt: Optimizer) -> list[Tensor]:
    """Of all params, states and step counts."""
    params = params_of(opt)
    return copy.deepcopy([[p.detach(), *opt.state.get(p, {}).values()] for p in params])


def unchanged(opt: Optimizer, before: list[list[Tensor]]) -> bool:
    return all(
        len(a) == len(b) and all(map(same_bits, a, b))
        for a, b in zip(copies(opt), before, strict=True)
    )


def numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().to(torch.float64, copy=True).numpy()


class Averages:
    """What NumPy makes, in double, of the params before and after each step."""

    def __init__(self, opt: Optimizer) -> None:
        self.of = {p: numpy(state["ema"]) for p, state in opt.state.items() if "ema" in state}

    def step(self, opt: Optimizer) -> None:
        groups = [(p, group) for group in opt.param_groups for p in group["params"]]
        stepped = [(p, g["ema_decay"], numpy(p)) for p, g in groups if p.grad is not None]
        opt.step()
        for param, decay, start in stepped:
            if decay is not None:
                ema = self.of.get(param, start)
                self.of[param] = ema + (1 - decay) * (numpy(param) - ema)

    def check(self, opt: Optimizer) -> None:
        for param in params_of(opt):
            state = opt.state.get(param, {})
            assert ("ema" in state) == (param in self.of)
            if "ema" in state:
                wide = torch.float32 if param.dtype.itemsize == 2 else param.dtype
                assert state["ema"].dtype == wide
                error = 1e-10 if wide == torch.float64 else 1e-6
                np.testing.assert_allclose(numpy(state["ema"]), self.of[param], error, error)


GROUPS = Option(
    groups=(
        {"ema_decay": 0.75},
        {"ema_decay": 0.25, "amsgrad": True, "maximize": True},
        {"ema_decay": 0},
        {"ema_decay": 1.0},
        {"decay_by": "schedule"},
    ),
    has_grad=lambda step, index: (step + index) % 3 != 0,
    param_layout=lambda step, index: LAYOUTS[index % 4],
    grad_layout=lambda step, index: LAYOUTS[(step + index // 2) % 4],
)


@pytest.mark.parametrize("state", [None, torch.float32], ids=["own", "float32"])
@every_optimizer
@every_backend
def test_the_average_is_the_formulas_in_every_dtype(backend, optimizer, state):
    """It is of the final param, which AdamProxL2 has shrunk; without a grad it stays."""
    dtypes = [dtype.param for dtype in DTYPES.values() if dtype.state == state]
    given = GROUPS, dtypes, state, ((3, 5), (7,), ())
    ours, theirs = (make(optimizer, name, *given) for name in (backend, "reference"))
    starts = copies(ours)
    averages = Averages(ours)
    for seed in range(5):
        set_grads(ours, seed, GROUPS)
        averages.step(ours)
        averages.check(ours)
        steps(theirs, [seed], GROUPS)
        assert_same_bits(ours, theirs)
    for param, (start, *_) in zip(params_of(ours), starts, strict=True):
        if any(param is p for p in ours.param_groups[3]["params"]):  # ema_decay=1
            assert torch.equal(ours.state[param]["ema"], start.to(ours.state[param]["ema"].dtype))


@pytest.mark.parametrize("optimizer", TWO)
@every_backend
def test_tensors_of_several_chunks_and_an_average_of_another_alignment(backend, optimizer):
    torch.set_num_threads(2)
    shapes = ((2 * TILE_SIZE + 1,), (CHUNK_SIZE + 9,))
    given = EMA, (torch.float32, torch.bfloat16), None, shapes
    pair = ours, _ = [make(optimizer, name, *given) for name in (backend, "reference")]
    averages = Averages(ours)
    for seed in range(2):
        for opt in pair:
            set_grads(opt, seed)
        averages.step(ours)
        averages.check(ours)
        pair[1].step()
        assert_same_bits(*pair)
        for opt in pair:
            for state in opt.state.values():
                state["ema"] = LAYOUTS[3](state["ema"])


@pytest.mark.parametrize("optimizer", TWO)
@every_backend
def test_turned_on_later_it_starts_as_the_param_then_and_turned_off_it_stays(backend, optimizer):
    option = OPTIONS["skipped"]
    pair = ours, theirs = [make(optimizer, name, option) for name in (backend, "reference")]
    averages = Averages(ours)
    for seed, decay in enumerate((None, 0.5, 0.5, None, 0.25)):
        set_decay(decay, *pair)
        set_grads(ours, seed, option)
        averages.step(ours)
        averages.check(ours)
        steps(theirs, [seed], option)
        assert_same_bits(*pair)
    assert len(averages.of) == len(SHAPES)


@pytest.mark.parametrize(
    ("value", "error"),
    [(-0.1, ValueError), (1.5, ValueError), (torch.nan, ValueError), ("x", TypeError)]
    + [(True, TypeError), (False, TypeError)],
)
@every_optimizer
def test_invalid_values_are_refused_by_name(optimizer, value, error):
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    cls, match = OPTIMIZERS[optimizer].cls, f"Invalid ema_decay: {value!r}, expected a number"
    with pytest.raises(error, match=match):
        cls([a], ema_decay=value)
    with pytest.raises(error, match=match):
        cls([{"params": [a]}, {"params": [b], "ema_decay": value}])
    opt = cls([a], ema_decay=0.5)
    with pytest.raises(error, match=match):
        opt.add_param_group({"params": [b], "ema_decay": value})
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["ema_decay"] = value
    with pytest.raises(ValueError, match=rf"nothing was loaded.*param_groups\[0\]: {match}"):
        opt.load_state_dict(saved)
    assert [group["ema_decay"] for group in opt.param_groups] == [0.5]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@every_optimizer
def test_the_params_are_their_averages_for_a_while(optimizer, mode):
    opt = make(optimizer, None, GROUPS, [dtype.param for dtype in DTYPES.values()])
    steps(opt, [0, 0], GROUPS)
    params, before = params_of(opt), copies(opt)
    places = [p.data_ptr() for p in params]
    has = ["ema" in opt.state.get(p, {}) for p in params]
    assert 0 < sum(has) < len(has)
    with mode():
        enabled = torch.is_grad_enabled()
        with opt.ema_weights():
            assert torch.is_grad_enabled() == enabled
            for param, (old, *_), averaged in zip(params, before, has, strict=True):
                ema = opt.state[param]["ema"].to(param.dtype) if averaged else old
                assert same_bits(param.detach(), ema)
        assert unchanged(opt, before)
        assert torch.is_grad_enabled() == enabled
        with pytest.raises(ZeroDivisionError), opt.ema_weights():
            assert not unchanged(opt, before)
            raise ZeroDivisionError
        assert torch.is_grad_enabled() == enabled
    assert unchanged(opt, before)
    assert [p.data_ptr() for p in params_of(opt)] == places
    assert all(p is q and p.requires_grad for p, q in zip(params, params_of(opt), strict=True))


@pytest.mark.parametrize("what", ["step", "ema_weights", "compiled", "in_backward"])
@every_optimizer
def test_within_it_a_step_and_another_one_are_refused(optimizer, what):
    net = nn.Linear(3, 2)
    opt = OPTIMIZERS[optimizer].cls(net.parameters(), lr=1e-2, ema_decay=0.75)
    steps(opt, range(3))
    before = copies(opt)

    def refused() -> None:
        if what == "step":
            opt.step()
        elif what == "ema_weights":
            with opt.ema_weights():
                raise AssertionError
        elif what == "compiled":
            torch.compile(lambda: opt.step(), backend="eager", fullgraph=True)()
        else:
            net.zero_grad()
            with adamprox.step_in_backward(net, opt):
                net(torch.ones(1, 3)).sum().backward()

    with opt.ema_weights():
        averages = copies(opt)
        with pytest.raises(RuntimeError, match="ema_weights"):
            refused()
        assert unchanged(opt, averages)
    assert unchanged(opt, before)
    steps(opt, [3])
    assert not unchanged(opt, before)


def test_without_an_average_ema_weights_says_so():
    opt = make("AdamW")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no param has an average yet"), opt.ema_weights():
            raise AssertionError
        set_decay(None, opt)
        steps(opt, [0])
    set_decay(0.5, opt)
    steps(opt, [1])
    with opt.ema_weights():
        pass


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
@wide_and_narrow
@every_optimizer
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(optimizer, dtype, way):
    whole, first = (make(optimizer, dtypes=[dtype]) for _ in range(2))
    steps(whole, range(6))
    steps(first, range(3))
    if way == "state_dict":
        second = make(optimizer, None, OPTIONS["plain"], [dtype])
        second.load_state_dict(through_a_file(first.state_dict()))
        for param, other in zip(params_of(second), params_of(first), strict=True):
            param.data.copy_(other.data)
    else:
        second = copy.deepcopy(first) if way == "deepcopy" else pickle.loads(pickle.dumps(first))
    assert_same_bits(second, first)
    steps(second, range(3, 6))
    assert_same_bits(second, whole)
    assert all(state["ema"].dtype == torch.float32 for state in second.state.values())


@pytest.mark.parametrize("lacks", ["key", "states", "torch's"])
@wide_and_narrow
@every_optimizer
def test_after_a_checkpoint_without_it_it_starts_as_the_param_then(optimizer, dtype, lacks):
    spec = OPTIMIZERS[optimizer]
    if lacks == "torch's" and spec.twin is None:
        pytest.skip("torch has no such class")
    opt = make(optimizer, dtypes=[dtype])
    cls = spec.twin if lacks == "torch's" else spec.cls
    before = cls(params_of(opt), lr=1e-2, weight_decay=spec.weight_decay)
    steps(before, range(2))
    saved = through_a_file(before.state_dict())
    if lacks == "key":
        del saved["param_groups"][0]["ema_decay"]
    elif lacks == "states":
        saved["param_groups"][0]["ema_decay"] = 0.75
    opt.load_state_dict(saved)
    averages = Averages(opt)
    assert averages.of == {}
    for seed in (2, 3):
        set_grads(opt, seed)
        averages.step(opt)
        averages.check(opt)
    assert len(averages.of) == len(SHAPES)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("optimizer", TWO)
@every_backend
def test_a_step_that_a_grad_scaler_skips_leaves_it(backend, optimizer, capturable):
    option = Option({"ema_decay": 0.75, "capturable": capturable})
    opt, twin = (make(optimizer, name, option) for name in (backend, "reference"))
    for seed in range(4):
        set_grads(opt, seed)
        for param in params_of(opt):
            param.grad *= 4
        before = copies(opt)
        opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(float(seed % 2))
        opt.step()
        if seed % 2 == 0:
            steps(twin, [seed])
        else:
            assert unchanged(opt, before)
        assert_same_bits(opt, twin)


@pytest.mark.parametrize("backend", ["cuda_on_host"], indirect=True)
@every_optimizer
def test_replays_of_a_graph_follow_its_decay(backend, optimizer):
    decay = torch.tensor(0.75, dtype=torch.float64)
    captured = make(optimizer, backend, Option({"ema_decay": decay, "capturable": True}))
    eager = make(optimizer, "reference")
    for seed in range(8):
        grads = [p.grad for p in params_of(captured)]
        set_grads(captured, seed)
        for param, grad in zip(params_of(captured), grads, strict=True):
            if grad is not None:  # a graph reads the same memory
                param.grad = grad.copy_(param.grad)
        set_decay(1 / (1 + seed), eager)
        decay.fill_(1 / (1 + seed))
        replay = adamprox.backends.BACKENDS[backend].replay
        captured.step() if seed == 0 else replay()
        steps(eager, [seed])
        assert_same_bits(captured, eager)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("optimizer", TWO)
def test_compiled_it_makes_a_new_graph_only_when_it_is_turned_on_or_off(optimizer):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pair = compiled, eager = [make(optimizer) for _ in range(2)]
    step = torch.compile(lambda: compiled.step(), backend="aot_eager", fullgraph=True)
    for seed, (decay, graphs) in enumerate([(None, 1), (None, 1), (0.5, 2), (0.25, 2), (None, 2)]):
        set_decay(decay, *pair)
        set_grads(compiled, seed)
        step()
        steps(eager, [seed])
        assert_same_bits(*pair)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


@wide_and_narrow
@every_optimizer
def test_steps_in_backward_keep_it_too(optimizer, dtype):
    from test_in_backward import both_ways

    def turn_on(model, opt, step):
        if step == 3:
            set_decay(0.5, opt)

    _, opt = both_ways(optimizer, turn_on, dtype)
    assert all(state["ema"].dtype == torch.float32 for state in opt.state.values())


@pytest.mark.parametrize("optimizer", TWO)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_telemetry_notes_the_same(backend, optimizer):
    from test_telemetry import FIELDS, check

    values = [randn(1, s, d) for s in SHAPES for d in (torch.float32, torch.bfloat16)]
    ours, theirs = (check(backend, optimizer, values, o) for o in (EMA, OPTIONS["plain"]))
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


def of_two(rank: int, folder: Path) -> None:
    """Runs on two ranks; each has the whole run beside it."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for optimizer, spec in OPTIMIZERS.items():
        for placement in (Shard(0), Shard(1), Replicate()):
            whole = make(optimizer, shapes=((5, 3), (1, 2)), dtypes=(torch.float32, torch.bfloat16))
            place = (placement,)
            params = [distribute_tensor(p.detach().clone(), mesh, place) for p in params_of(whole)]
            decay = spec.weight_decay
            opt = spec.cls([nn.Parameter(p) for p in params], lr=1e-2, weight_decay=decay)
            averages = Averages(opt)
            for seed, decay in enumerate((None, 0.75, 0.75, 0.5)):
                set_decay(decay, opt, whole)
                steps(whole, [seed])
                for p, q in zip(params_of(opt), params_of(whole), strict=True):
                    p.grad = distribute_tensor(q.grad, mesh, place)
                averages.step(opt)
                averages.check(opt)
                opt.load_state_dict(opt.state_dict())
            before = copies(opt)
            opt.found_inf = torch.tensor(1.0)
            opt.step()
            with opt.ema_weights():
                for p, q in zip(params_of(opt), params_of(whole), strict=True):
                    ema = opt.state[p]["ema"]
                    assert ema.placements == place
                    assert same_bits(p.detach().full_tensor(), ema.full_tensor().to(p.dtype))
                    if optimizer != "AdamProxL2" or placement != Shard(
                        1
                    ):  # else its norm has others
                        assert same_bits(ema.full_tensor(), whole.state[q]["ema"]), (optimizer, placement, p, q, ema, whole.state[q])
            for old, new in zip(before, copies(opt), strict=True):
                for a, b in zip(old, new, strict=True):
                    assert np.array_equal(numpy(a), numpy(b))
    dist.destroy_process_group()


def test_shards_have_the_average_of_the_whole(tmp_path):
    torch.multiprocessing.start_processes(of_two, (tmp_path,), nprocs=2, start_method="spawn")
