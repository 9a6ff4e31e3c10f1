"""What tracked steps note: the same integers and bits on every backend, and what they say."""

from __future__ import annotations

import copy
import math
import sys
import types
import weakref

import pytest
import torch
from torch import Tensor, nn

import adamprox
from adamprox import backends, telemetry
from adamprox.reference import BINS, CHUNK_SIZE, TILE_SIZE
from registry import (
    BACKENDS,
    DTYPES,
    OPTIMIZERS,
    OPTIONS,
    Option,
    assert_same_bits,
    build,
    params_of,
    same_bits,
)
from test_parity import CHUNK_EDGES, randn, special_values

every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
TWO = ("AdamW", "AdamProxL2")  # whose params are final at once, and after a second sweep
every_state = pytest.mark.parametrize("state", [None, torch.float32], ids=["own", "float32"])

FIELDS = ("bins", "param_norm", "update_norm", "zeros", "nans", "infs", "ratio")


def scattered(generator: torch.Generator, like: Tensor) -> Tensor:
    """A grad whose coordinates have scales from 2^-40 to 1, some of them zero: all bins fill."""
    scale = torch.exp2(-40 * torch.rand(like.shape, generator=generator, dtype=torch.float64))
    grad = randn(generator, like.shape, torch.complex128 if like.is_complex() else torch.float64)
    return (grad * scale).to(like.dtype)


def check(
    backend: str,
    optimizer: str,
    values: list[Tensor],
    option: Option = OPTIONS["plain"],
    state: torch.dtype | None = None,
    grads: list[Tensor] | None = None,
    steps: int = 3,
) -> list[adamprox.UpdateStats]:
    """The stats of a backend, which are those of the reference, in bits."""
    generator = torch.Generator().manual_seed(0)
    pair = [build(optimizer, values, option, name, state) for name in (backend, "reference")]
    for opt in pair:
        opt.track_updates(per="tensor")
        for group in opt.param_groups:
            group["eps"] = 1e-3  # so that small grads make small updates
    for step in range(steps):
        new = grads or [scattered(generator, value) for value in values]
        for opt in pair:
            for index, (param, grad) in enumerate(zip(params_of(opt), new, strict=True)):
                has_grad = option.has_grad(step, index)
                param.grad = option.grad_layout(step, index)(grad) if has_grad else None
            opt.step()
        assert_same_bits(*pair)
        ours, theirs = (opt.update_stats() for opt in pair)
        for a, b in zip(ours, theirs, strict=True):
            assert (a.name, a.step, a.numel) == (b.name, b.step, b.numel)
            for field in FIELDS:
                assert same_bits_of_any(getattr(a, field), getattr(b, field)), (a.name, field)
    return ours


def same_bits_of_any(ours: Tensor, theirs: Tensor) -> bool:
    if ours.is_floating_point():
        return same_bits(ours, theirs)
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def dtypes_with(state: torch.dtype | None) -> list[torch.dtype]:
    """Of params with such states; None: their own dtype's."""
    return [dtype.param for dtype in DTYPES.values() if dtype.state == state]


SHAPES = ((3, 100), (0, 3), (), (2, 2), (5,))


@every_state
@every_optimizer
@every_backend
def test_parity(backend, optimizer, state):
    """Of all dtypes in one step, with and without amsgrad, and of tensors without elements."""
    generator = torch.Generator().manual_seed(1)
    dtypes = dtypes_with(state)
    values = [randn(generator, shape, dtype) for dtype in dtypes for shape in SHAPES]
    check(backend, optimizer, values, OPTIONS["groups"], state, steps=2)


@pytest.mark.parametrize("option", ["strided", "skipped", "schedule", "rules"])
@every_backend
def test_parity_of_other_uses(backend, option):
    generator = torch.Generator().manual_seed(1)
    values = [randn(generator, shape, torch.float32) for shape in (*SHAPES, (3,), (6,))]
    for optimizer in ("AdamProx", "AdamProxL2"):
        check(backend, optimizer, values, OPTIONS[option])


@every_state
@pytest.mark.parametrize("optimizer", TWO)
@every_backend
def test_parity_at_chunk_edges(backend, optimizer, state):
    """And at those of tiles, of the CPU's blocks, and of what CUDA notes at a time."""
    generator = torch.Generator().manual_seed(2)
    sizes = (*CHUNK_EDGES, 255, 256, 257, 511, 512, 513, 1023, 1025)
    if backend != "cpu":  # the others are slow here, and have the borders of tiles and chunks only
        sizes = (TILE_SIZE - 1, TILE_SIZE + 1, CHUNK_SIZE + 1)
    dtypes = dtypes_with(state)
    values = [randn(generator, (size,), dtype) for size in sizes for dtype in dtypes]
    stats = check(backend, optimizer, values, state=state, steps=1)
    largest = max(stats, key=lambda of_tensor: of_tensor.numel)
    assert largest.bins.sum() == largest.numel
    assert (largest.bins > 0).sum() > BINS / 3


@every_state
@pytest.mark.parametrize("optimizer", TWO)
@every_backend
def test_parity_of_special_values(backend, optimizer, state):
    dtypes = dtypes_with(state)
    for dtype in dtypes if backend == "cpu" or optimizer == "AdamW" else dtypes[:1]:
        special = special_values(dtype)
        count = len(special)
        values = [special.repeat_interleave(count), *special.split(1)]
        grads = [special.repeat(count), *special.flip(0).split(1)]
        if backend == "cpu":
            values.append(values[0].repeat(5))  # in full blocks
            grads.append(grads[0].repeat(5))
        for option in ("plain", "amsgrad"):
            stats = check(backend, optimizer, values, OPTIONS[option], state, grads, steps=1)
        assert stats[0].nans > 0
        assert stats[0].bins.sum() < stats[0].numel


@every_state
@pytest.mark.parametrize("optimizer", TWO)
@every_backend
def test_a_tracked_step_gives_the_bits_of_an_untracked_one(backend, optimizer, state):
    generator = torch.Generator().manual_seed(4)
    dtypes = dtypes_with(state)
    values = [randn(generator, (size,), dtype) for size in (5, TILE_SIZE + 1) for dtype in dtypes]
    pair = [build(optimizer, values, OPTIONS["amsgrad"], backend, state) for _ in range(2)]
    pair[0].track_updates(every=2)
    for _ in range(3):
        grads = [scattered(generator, value) for value in values]
        for opt in pair:
            for param, grad in zip(params_of(opt), grads, strict=True):
                param.grad = grad.clone()
            opt.step()
        assert_same_bits(*pair)


# Magnitudes known beforehand: exp_avg_sq becomes 1 and exp_avg the magnitude, exactly, at a step so
# late that nothing is left to correct.

LR = 2.0**-7
EPS = 2.0**-23  # of float32
BY_HAND = {
    0: (0.0, 2.0**-100, 2.0**-28, 2.0**-27 * (1 - EPS / 2)),
    1: (2.0**-27, 2.0**-27 * (1 + EPS), 2.0**-26 * (1 - EPS / 2)),
    2: (2.0**-26, 2.0**-25 * (1 - EPS / 2)),
    12: (2.0**-16,),
    18: (1e-3,),  # 2^-10 = 0.00098
    27: (0.5, 0.75, 1 - EPS / 2),
    28: (1.0, 1 + EPS, 1.5, 2.0, 1e30),
}


def step_of_magnitudes(backend: str, magnitudes: Tensor, **group: float) -> adamprox.UpdateStats:
    """The stats of a step whose updates are these times LR."""
    param = torch.nn.Parameter(torch.ones_like(magnitudes))
    opt = adamprox.AdamW(
        [{"params": [param], **group}], lr=LR, betas=(0.5, 0.5), eps=0.0, backend=backend
    )
    opt.state[param] = {
        "step": torch.tensor(999.0),
        "exp_avg": 2 * magnitudes,
        "exp_avg_sq": torch.full_like(magnitudes, 2.0),
    }
    param.grad = torch.zeros_like(param)
    opt.track_updates()
    opt.step()
    [stats] = opt.update_stats()
    return stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
def test_bins_written_down_by_hand(backend, sign, dtype):
    for copies in (1, 20):  # in a part of a block, and in full ones
        values = [value for values in BY_HAND.values() for value in values] * copies
        stats = step_of_magnitudes(backend, sign * torch.tensor([*values, math.nan], dtype=dtype))
        expected = [copies * len(BY_HAND.get(index, ())) for index in range(BINS)]
        assert stats.bins.tolist() == expected
        assert stats.numel - stats.bins.sum() == 1  # the NaN


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
def test_a_magnitude_is_relative_to_the_learning_rate_without_its_schedule(backend):
    magnitudes = torch.tensor([0.75])
    assert step_of_magnitudes(backend, magnitudes).bins[27] == 1
    assert step_of_magnitudes(backend, magnitudes, initial_lr=4 * LR).bins[25] == 1
    assert step_of_magnitudes(backend, magnitudes, lr=0.0, initial_lr=LR).bins[0] == 1
    assert step_of_magnitudes(backend, magnitudes, lr=0.0).bins[0] == 1


def small(optimizer: str = "AdamW", **arguments) -> torch.optim.Optimizer:
    """Two groups of two params with grads."""
    params = [torch.nn.Parameter(torch.full((4,), float(i))) for i in range(4)]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    return OPTIMIZERS[optimizer].cls(groups, weight_decay=0.0, **arguments)


@pytest.mark.both_abis
def test_norms_and_counts_are_of_the_new_param_and_of_adams_update():
    opt = small("AdamProxL1", eps=0.0)
    opt.param_groups[1]["weight_decay"] = 2.0
    opt.track_updates(per="tensor")
    opt.step()
    *_, third, fourth = opt.update_stats()  # z = 1.5 and 2.5, and the threshold is 1
    assert third.param_norm == 1.0
    assert fourth.param_norm == 3.0
    assert third.update_norm == 1.0
    assert fourth.ratio == 1 / 3
    opt.step()  # to 0.5 - 0.5 and 1.5 - 0.5 before the threshold
    *_, third, fourth = opt.update_stats()
    assert third.zeros == fourth.zeros == 4
    assert fourth.param_norm == 0.0


@every_backend
def test_norms_are_close_to_those_in_double(backend):
    generator = torch.Generator().manual_seed(3)
    param = torch.nn.Parameter(torch.randn(5, 999, generator=generator))
    before, param.grad = param.detach().clone(), torch.randn(5, 999, generator=generator)
    opt = OPTIMIZERS["AdamW"].cls([param], weight_decay=0.0, backend=backend)
    opt.track_updates()
    opt.step()
    (stats,) = opt.update_stats()
    for norm, vector in (
        (stats.param_norm, param.detach()),
        (stats.update_norm, before.double() - param.detach()),
    ):
        torch.testing.assert_close(norm, vector.double().norm(), rtol=2**-15, atol=0.0)
    torch.testing.assert_close(
        stats.param_norm, param.detach().double().norm(), rtol=2**-21, atol=0
    )


@every_backend
def test_a_norm_may_overflow_where_no_param_is_infinite(backend):
    param = torch.nn.Parameter(torch.tensor([2.0**64, 1.0, 0.0]))
    param.grad = torch.zeros(3)
    opt = OPTIMIZERS["AdamW"].cls([param], weight_decay=0.0, backend=backend)
    opt.track_updates()
    opt.step()
    (stats,) = opt.update_stats()
    assert (stats.param_norm, stats.update_norm) == (math.inf, 0.0)
    assert (stats.infs, stats.nans, stats.zeros) == (0, 0, 1)


def test_a_groups_stats_are_those_of_its_tensors_together():
    of_tensors, of_groups = small(), small()
    of_tensors.track_updates(per="tensor")
    of_groups.track_updates(per="group")
    for opt in (of_tensors, of_groups):
        opt.step()
    tensors, groups = of_tensors.update_stats(), of_groups.update_stats()
    assert [s.name for s in groups] == ["group 0", "group 1"]
    assert [s.name for s in tensors] == [f"group {g}, param {i}" for g in (0, 1) for i in (0, 1)]
    for group, parts in zip(groups, (tensors[:2], tensors[2:]), strict=True):
        assert group.numel == sum(part.numel for part in parts) == 8
        assert torch.equal(group.bins, parts[0].bins + parts[1].bins)
        squares = sum(float(part.param_norm) ** 2 for part in parts)
        assert math.isclose(float(group.param_norm) ** 2, squares, rel_tol=1e-12)


def test_a_tensors_name_is_its_own():
    model = torch.nn.Linear(2, 3)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    opt = adamprox.AdamW(model.named_parameters())
    opt.track_updates(per="tensor")
    opt.step()
    assert [stats.name for stats in opt.update_stats()] == ["weight", "bias"]


def renamed(opt) -> None:
    opt.param_groups[0]["param_names"] = ["other", "names"]


def in_another_order(opt) -> None:
    for group in opt.param_groups:
        group["params"].reverse()
        group["param_names"].reverse()


def with_others(opt) -> None:
    opt.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(5))]
    opt.param_groups[0]["param_names"] = ["fifth"]
    opt.add_param_group({"params": [("sixth", torch.nn.Parameter(torch.ones(1)))]})


def without_a_group(opt) -> None:
    del opt.param_groups[0]


def without_names(opt) -> None:
    for group in opt.param_groups:
        del group["param_names"]


@pytest.mark.parametrize(
    "change",
    [renamed, in_another_order, with_others, without_a_group, without_names],
    ids=lambda change: change.__name__,
)
def test_names_are_those_of_the_tracked_step(change):
    """By the places that the params had then."""
    params = [torch.nn.Parameter(torch.full((4,), float(i))) for i in range(4)]
    for param in params:
        param.grad = torch.ones_like(param)
    params[1].grad = None
    named = list(zip(("a", "b", "c", "d"), params, strict=True))
    opt = adamprox.AdamW([{"params": named[:2]}, {"params": named[2:]}], lr=0.5, weight_decay=0.0)
    opt.track_updates(per="tensor")
    opt.step()
    change(opt)
    stats = opt.update_stats()
    assert [of_tensor.name for of_tensor in stats] == ["a", "c", "d"]
    assert [of_tensor.param_norm.item() for of_tensor in stats] == [1.0, 3.0, 5.0]


def test_notes_keep_no_param_alive():
    opt = small()
    opt.track_updates(per="tensor")
    opt.step()
    alive = [weakref.ref(param) for param in opt.state]
    for group in opt.param_groups:
        group["params"].clear()
    opt.state.clear()
    assert [param() for param in alive] == [None] * 4
    assert len(opt.update_stats()) == 4


@pytest.mark.both_abis
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_step_of_params_that_share_memory_is_not_noted(backend):
    """It is several, one after the other."""
    opt = small(backend=backend)
    opt.track_updates(per="tensor")
    opt.step()
    before = [stats.to_dict() for stats in opt.update_stats()]
    assert len(before) == 4
    opt.param_groups[1]["params"].append(opt.param_groups[0]["params"][0])
    opt.step()
    assert [stats.to_dict() for stats in opt.update_stats()] == before
    opt.param_groups[1]["params"].pop()
    opt.step()
    assert [stats.step for stats in opt.update_stats()] == [4, 3, 3, 3]


def test_every_so_many_steps():
    opt = small()
    assert opt.update_stats() == []
    opt.track_updates(every=3)
    seen = []
    for _ in range(7):
        opt.step()
        seen.append([stats.step for stats in opt.update_stats()])
    assert seen == [[], [], [3, 3], [3, 3], [3, 3], [6, 6], [6, 6]]
    opt.track_updates(every=0)
    opt.step()
    assert opt.update_stats() == []


def test_a_step_that_fails_leaves_the_stats_of_the_one_before():
    opt = small()
    opt.track_updates()
    opt.step()
    opt.param_groups[0]["params"][1].grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert [stats.step for stats in opt.update_stats()] == [1, 1]


def test_only_params_with_a_grad_take_part():
    opt = small()
    opt.param_groups[0]["params"][0].grad = None
    for param in opt.param_groups[1]["params"]:
        param.grad = None
    opt.track_updates(per="tensor")
    opt.step()
    assert [stats.name for stats in opt.update_stats()] == ["group 0, param 1"]


def test_a_copy_does_not_track():
    opt = small()
    opt.track_updates()
    twin = copy.deepcopy(opt)
    twin.step()
    assert twin.update_stats() == []


@pytest.mark.parametrize("arguments", [{"every": -1}, {"every": 1.5}, {"per": "layer"}])
def test_arguments_out_of_range_are_named(arguments):
    [(name, value)] = arguments.items()
    with pytest.raises(ValueError, match=f"Invalid {name}: {value!r}"):
        small().track_updates(**arguments)


@pytest.mark.parametrize("optimizer", TWO)
def test_the_number_of_threads_changes_no_bit(optimizer):
    generator = torch.Generator().manual_seed(5)
    values = [randn(generator, (size,), torch.float32) for size in (70_001, 15, 50_001, 1000)]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        check("cpu", optimizer, values, steps=1)


def test_summaries():
    bins = torch.zeros(BINS, dtype=torch.int64)
    bins[24], bins[28] = 3, 1  # [2^-4, 2^-3) and at least 1
    one = torch.tensor(1.0, dtype=torch.float64)
    zero = torch.tensor(0)
    stats = adamprox.UpdateStats("w", 7, 5, bins, 4 * one, one, zero + 2, zero, zero)
    assert stats.quantile(0.0) == -4.0
    assert stats.quantile(0.5) == -4 + 2 / 3
    assert stats.quantile(1.0) == 0.0
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"Invalid q: {q}"):
            stats.quantile(q)
    scalars = stats.to_dict("train/")
    assert scalars["train/w/ratio"] == 0.25
    assert scalars["train/w/zeros"] == 2.0
    assert scalars["train/w/log2_magnitude_iqr"] == -3.0 - (-4 + 1 / 3)
    assert all(type(value) is float for value in scalars.values())
    axes = stats.plot()
    heights = [patch.get_height() for patch in axes.patches]
    assert heights == [count / 4 for count in bins.tolist()]
    left = [patch.get_x() for patch in axes.patches]
    assert left[24] == -4.0  # where its bin begins
    assert stats.plot(axes) is axes


def test_the_quantiles_of_nothing_are_nan():
    nothing = adamprox.UpdateStats("w", 1, 0, torch.zeros(BINS), *[torch.tensor(0.0)] * 5)
    assert math.isnan(nothing.quantile(0.5))
    assert nothing.plot() is not None


def test_plot_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    opt = small()
    opt.track_updates()
    opt.step()
    with pytest.raises(ImportError, match="pip install matplotlib"):
        opt.update_stats()[0].plot()


# With the rest of PyTorch.


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
@pytest.mark.parametrize("optimizer", TWO)
def test_a_skipped_step_leaves_the_stats_of_the_one_before(backend, optimizer):
    opt = small(optimizer, backend=backend)
    opt.track_updates(every=2)
    found_inf = torch.tensor(0.0)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), found_inf
    opt.step()
    found_inf.fill_(1)
    opt.step()
    assert opt.update_stats() == []
    found_inf.fill_(0)
    for _ in range(3):
        opt.step()
    before = [stats.to_dict() for stats in opt.update_stats()]
    assert [stats.step for stats in opt.update_stats()] == [3, 3]
    found_inf.fill_(1)
    opt.step()
    assert [stats.to_dict() for stats in opt.update_stats()] == before
    assert [stats.step for stats in opt.update_stats()] == [3, 3]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
@pytest.mark.parametrize("initial_lr", [None, 0.5])
def test_capturable_notes_what_the_host_would(backend, initial_lr):
    def stats(wrap, capturable) -> list[dict[str, float]]:
        opt = small(backend=backend, capturable=capturable)
        opt.track_updates(per="tensor")
        for group in opt.param_groups:
            group["lr"] = wrap(2.0**-5)
            if initial_lr is not None:
                group["initial_lr"] = wrap(initial_lr)
        for _ in range(2):
            opt.step()
        found = opt.update_stats()
        assert [s.step for s in found] == [2, 2, 2, 2]
        return [{**s.to_dict(), "bins": s.bins.tolist()} for s in found]

    expected = stats(float, False)
    assert stats(torch.tensor, True) == expected
    assert stats(float, True) == expected


@pytest.mark.parametrize("backend", ["cuda_on_host"], indirect=True)
def test_a_replayed_graph_notes_each_time(backend):
    opt = small(backend=backend, capturable=True)
    opt.track_updates()
    opt.step()
    for step in range(2, 5):
        backends.BACKENDS[backend].replay()
        assert [stats.step for stats in opt.update_stats()] == [step, step]


def test_a_compiled_step_is_tracked_as_an_eager_one_is():
    pair = [small(), small()]
    for opt in pair:
        opt.track_updates(every=2, per="tensor")
    compiled = torch.compile(pair[0].step, backend="eager")
    for _ in range(4):
        compiled()
        pair[1].step()
    ours, theirs = ([s.to_dict() for s in opt.update_stats()] for opt in pair)
    assert ours == theirs
    assert [s.step for s in pair[0].update_stats()] == [4, 4, 4, 4]


def test_steps_in_backward_are_refused_by_name():
    model = torch.nn.Linear(2, 3)
    opt = adamprox.AdamW(model.parameters())
    before = copy.deepcopy(model.state_dict())
    opt.track_updates()
    with adamprox.step_in_backward(model, opt):
        with pytest.raises(RuntimeError, match=r"track_updates.*step_in_backward"):
            model(torch.ones(1, 2)).sum().backward()
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
        model.zero_grad()
        opt.track_updates(every=0)
        model(torch.ones(1, 2)).sum().backward()


def test_a_checkpoint_does_not_know():
    opt = small()
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    opt.track_updates()
    assert str(opt.state_dict()) == str(before)


def test_tensors_of_one_name_have_an_entry_each():
    """Of two networks, say, whose names torch does not compare."""
    networks = [nn.Linear(3, 2), nn.Linear(4, 2)]
    opt = adamprox.AdamW([{"params": network.named_parameters()} for network in networks])
    opt.track_updates(per="tensor")
    for param in (param for network in networks for param in network.parameters()):
        param.grad = torch.ones_like(param)
    opt.step()
    stats = [(stats.name, stats.numel) for stats in opt.update_stats()]
    assert stats == [("weight", 6), ("bias", 2), ("weight", 8), ("bias", 2)]


def test_a_count_that_32_bits_cannot_have_is_in_several_records(monkeypatch):
    param = torch.nn.Parameter(torch.zeros(3 * CHUNK_SIZE))
    opt = adamprox.AdamW([param], backend="reference")
    opt.track_updates()
    param.grad = torch.zeros_like(param)
    param.grad[:5] = 1
    monkeypatch.setattr(telemetry, "LARGEST_COUNT", CHUNK_SIZE)
    opt.step()
    [stats] = opt.update_stats()
    assert stats.zeros == stats.bins[0] == 3 * CHUNK_SIZE - 5


def test_a_capture_makes_no_records():
    """Each replay would make them anew, and none is made before the first."""
    table = types.SimpleNamespace(device=("cuda", 0), rows=list, num_chunks=0)
    with pytest.raises(RuntimeError, match="before the capture; nothing was updated"):
        telemetry.Tracker(1, "group").begin([table], [], capturing=True)
