"""Threads that share an optimizer; params that share memory; step counts."""

from __future__ import annotations

import copy
import functools
import os
import signal
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from faults import (
    MOMENTS,
    NAME,
    SECONDS,
    alike,
    alone,
    make,
    new_params,
    params_of,
    put,
    randn,
    ready,
    refused,
    refuses,
    run,
    set_grads,
    torchs,
    two_optimizers,
)
from registry import assert_same_bits, same_bits


@alone("all at once", "grads come and go", "others change it")
def test_threads_that_share_an_optimizer_wait_for_each_other(case):
    torch.set_num_threads(2)
    shapes = (*[(500,)] * 40, (70_000,), (70_000,))
    opt, problems, steps = ready(*shapes, steps=1), [], []

    def change(index: int, time: int) -> None:
        if case == "grads come and go":
            # A grad must not be replaced amid a step of another thread: torch frees it at once.
            with opt._engine.lock:
                come_and_go(index, time)
        elif case == "others change it" and index == 0:
            opt.load_state_dict(opt.state_dict())
            opt.param_groups[0]["lr"] = torch.tensor(1e-2)
            copy.deepcopy(opt)

    def come_and_go(index: int, time: int) -> None:
        for param in params_of(opt)[10 * index : 10 * index + 10]:
            param.grad = None if time % 2 else torch.ones_like(param)

    def work(index: int) -> None:
        for time in range(30):
            try:
                change(index, time)
                opt.step()
                steps.append(1)
            except BaseException as error:
                if "nothing was updated" not in str(error):
                    problems.append(error)

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS)
    torch.set_num_threads(1)
    assert not problems
    assert not any(worker.is_alive() for worker in workers)
    assert all(p.isfinite().all() for p in params_of(opt))
    if case == "all at once":
        twin = ready(*shapes, steps=1)
        for _ in steps:
            twin.step()
        assert_same_bits(opt, twin)


# Memory that several params share: one after the other, in the order of the groups.


def halves(opt, a, b, c):
    a.data, b.data = (memory := randn(4500))[:3000], memory[1500:]


def interleaved(opt, a, b, c):
    a.data, b.data = (memory := randn(6000))[::2], memory[1:3001]


def real_and_complex(opt, a, b, c):
    pairs = torch.view_as_complex(a.data.view(-1, 2))
    opt.param_groups[0]["params"][1] = nn.Parameter(pairs)


def in_another_group(opt, a, b, c):
    opt.param_groups.append({**opt.param_groups[0], "params": [b], "lr": 0.1})


AT_FIRST = {
    "memory": lambda opt, a, b, c: setattr(b, "data", a.data),
    "halves": halves,
    "interleaved": interleaved,
    "real and complex": real_and_complex,
    "listed again": lambda opt, a, b, c: opt.param_groups[0]["params"].append(a),
    "listed in another group": in_another_group,
}
LATER = {
    "exp_avg": lambda opt, a, b, c: opt.state[b].update(exp_avg=opt.state[a]["exp_avg"]),
    "step": lambda opt, a, b, c: opt.state[b].update(step=opt.state[a]["step"]),
    "state": lambda opt, a, b, c: opt.state.update({b: opt.state[a]}),
    "exp_avg in a param": lambda opt, a, b, c: opt.state[b].update(exp_avg=c.data[:3000]),
}
EACH_TIME = {
    "grad in a param": lambda opt, a, b, c: setattr(b, "grad", a.detach()),
    "grad in a later param": lambda opt, a, b, c: setattr(a, "grad", b.detach()),
    "grad in a state": lambda opt, a, b, c: setattr(b, "grad", opt.state[a]["exp_avg"]),
}
SHARED = {**AT_FIRST, **LATER, **EACH_TIME}


def sharing(what: str, make=make, **arguments) -> torch.optim.Optimizer:
    params = new_params((3000,), (3000,), (100_000,))
    opt = make(params, **arguments)
    for time in range(20):
        if time == 0 and what in AT_FIRST:
            SHARED[what](opt, *params)
        set_grads(opt, time)
        if (time == 1 and what in LATER) or (time > 0 and what in EACH_TIME):
            SHARED[what](opt, *params)
        opt.step()
    return opt


@pytest.mark.parametrize("what", SHARED)
def test_params_that_share_memory_are_stepped_one_after_the_other(what):
    expected, reference = sharing(what, torchs), sharing(what, backend="reference")
    torch.set_num_threads(2)
    for _ in range(3):
        opt = sharing(what)
        for p, q, r in zip(*map(params_of, (opt, reference, expected)), strict=True):
            assert same_bits(p.detach(), q.detach())
            torch.testing.assert_close(p, r, rtol=1e-5, atol=1e-6)
            assert float(opt.state[p]["step"]) == float(expected.state[r]["step"])


@two_optimizers
@pytest.mark.parametrize("shift", [-9000, -1, 0, 1])
@pytest.mark.parametrize("key", ["param", *MOMENTS])
def test_a_grad_in_the_params_own_memory_is_read_first(key, shift, optimizer):
    pair = []
    for backend in ("cpu", "reference"):
        opt = ready((60_000,), backend=backend, optimizer=optimizer, amsgrad=True)
        memory = randn(80_000).abs()
        put(opt, params_of(opt)[0], key, memory[10_000:70_000])
        params_of(opt)[0].grad = memory[10_000 + shift : 70_000 + shift]
        opt.step()
        pair.append(opt)
    assert_same_bits(*pair)


@two_optimizers
def test_a_param_listed_twice_is_warned_of_at_once_and_stepped_twice(optimizer):
    pair = []
    for backend in ("cpu", "reference"):
        first, second = new_params((5,), (5,))
        with pytest.warns(UserWarning, match="duplicate"):
            pair.append(make([first, second, first], optimizer, backend=backend))
        run(pair[-1], 0, 1, 2)
    assert_same_bits(*pair)
    assert [float(pair[0].state[p]["step"]) for p in params_of(pair[0])] == [6, 3, 6]


@two_optimizers
@pytest.mark.parametrize("how", ["zero_", "state_dict", "replaced"])
def test_a_count_belongs_to_one_param(optimizer, how):
    opt = ready(optimizer=optimizer)
    counts = [opt.state[p]["step"] for p in params_of(opt)]
    assert len({count.data_ptr() for count in counts}) == len(counts)
    if how == "zero_":
        counts[1].zero_()
    elif how == "state_dict":
        opt.state_dict()["state"][1]["step"].zero_()
    else:
        opt.state[params_of(opt)[1]]["step"] = counts[1] = torch.tensor(0.0)
    opt.step()
    assert counts == [3, 1, 3]
    assert all(opt.state[p]["step"] is c for p, c in zip(params_of(opt), counts, strict=True))


def test_a_state_that_is_reset_in_place_goes_on_as_torchs():
    results = []
    for maker in (torchs, make):
        opt = run(maker(new_params((50, 3), (50, 3), (50, 3))), *range(20))
        for value in opt.state[params_of(opt)[1]].values():
            value.zero_()
        run(opt, *range(20, 30))
        results.append([*params_of(opt), *(opt.state[p]["step"] for p in params_of(opt))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_state_dict_aliases_the_states_as_torchs_does():
    opt = ready(amsgrad=True)
    for param, state in zip(params_of(opt), opt.state_dict()["state"].values(), strict=True):
        assert state is opt.state[param]


COUNTS = {
    "float32": lambda: torch.tensor(2.0),
    "float64": lambda: torch.tensor(2.0, dtype=torch.float64),
    "float16": lambda: torch.tensor(2.0, dtype=torch.float16),
    "bfloat16": lambda: torch.tensor(2.0, dtype=torch.bfloat16),
    "int64": lambda: torch.tensor(2),
    "int32": lambda: torch.tensor(2, dtype=torch.int32),
    "one element": lambda: torch.tensor([2.0]),
    "in a buffer": lambda: torch.full((3,), 2.0)[1],
    "negated": lambda: torch._neg_view(torch.tensor(-2.0)),
    "shared": lambda: torch.tensor(2.0).share_memory_(),
    "fraction": lambda: torch.tensor(2.5),
    "small fraction": lambda: torch.tensor(1e-3),
    "more than bfloat16 can count": lambda: torch.tensor(256.0, dtype=torch.bfloat16),
    "more than float32 can count": lambda: torch.tensor(2.0**24),
    "2**40": lambda: torch.tensor(2**40),
    "huge": lambda: torch.tensor(1e30),
    "huge in float64": lambda: torch.tensor(1e300, dtype=torch.float64),
}


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_the_count_that_is_there_is_counted_in_place_with_torchs_numbers(count):
    results = []
    for maker in (torchs, make, functools.partial(make, backend="reference")):
        opt = ready((20,), (20,), (20,), steps=1, make=maker)
        own = opt.state[params_of(opt)[1]]["step"] = count()
        where, dtype = own.data_ptr(), own.dtype
        run(opt, 1, 2, 3)
        assert opt.state[params_of(opt)[1]]["step"] is own
        assert (own.data_ptr(), own.dtype) == (where, dtype)
        results.append([*(p.detach() for p in params_of(opt)), own])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, results[1], results[2]))


@pytest.mark.parametrize("number", [2, 2.0, 2.5, np.float64(2), np.int64(2), True], ids=repr)
def test_a_count_may_be_a_number(number):
    tensor = torch.tensor(float(number))
    alike(lambda o, p: put(o, p, "step", number), lambda o, p: put(o, p, "step", tensor))


@pytest.mark.parametrize("as_tensor", [torch.tensor, float], ids=["tensor", "float"])
@pytest.mark.parametrize("count", [-1.0, -2.5, -1e30, float("nan"), float("inf"), -float("inf")])
@two_optimizers
def test_a_count_that_cannot_be_one_is_refused_by_name(optimizer, count, as_tensor):
    refused(lambda o, p: put(o, p, "step", as_tensor(count)), NAME, optimizer=optimizer)


def test_a_lazy_clone_of_a_count_stays_as_it_was():
    opt = ready()
    clone = opt.state[params_of(opt)[0]]["step"]._lazy_clone()
    opt.step()
    assert (clone, opt.state[params_of(opt)[0]]["step"]) == (2, 3)


def shared_by_processes(make) -> list[Tensor]:
    """Children step one after another; what their parent has then."""
    params = [nn.Parameter(randn(20, seed=i).share_memory_()) for i in range(2)]
    opt = make(params)
    for param in params:
        states = {"step": torch.zeros(()), **{key: torch.zeros(20) for key in MOMENTS[:2]}}
        opt.state[param].update({key: value.share_memory_() for key, value in states.items()})
    for seed in range(3):
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            try:
                run(opt, seed)
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    return [*params, *(opt.state[p]["step"] for p in params)]


@alone("forked")
def test_states_in_shared_memory_are_stepped_where_they_are(case):
    ours, theirs = shared_by_processes(make), shared_by_processes(torchs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("key", ["exp_avg_sq", "max_exp_avg_sq"])
def test_a_param_whose_states_are_one_tensor_is_refused_before_others_are_stepped(key, first_step):
    opt = ready(amsgrad=True)
    params = params_of(opt)
    opt.state[params[1]][key] = opt.state[params[1]]["exp_avg"]
    if first_step:  # of the others
        del opt.state[params[0]], opt.state[params[2]]
    match = f"the param and the states of {NAME} share memory; nothing was updated"
    refuses(opt, match)
    assert (params[0] in opt.state) == (not first_step)
