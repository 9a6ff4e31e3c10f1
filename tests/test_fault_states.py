"""States of others, params that are replaced, steps in backward, telemetry."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import adamprox
from faults import MOMENTS, NAME, make, params_of, ready, refused, run, torchs, two_optimizers
from registry import assert_same_bits


def through_loading(opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    return opt


def into_a_new_one(opt):
    new = make([nn.Parameter(p.detach().clone()) for p in params_of(opt)])
    new.load_state_dict(opt.state_dict())
    return new


@pytest.mark.parametrize("copied", [through_loading, into_a_new_one, copy.deepcopy])
@pytest.mark.parametrize("maker", [make, torchs])
def test_what_others_keep_in_the_state_survives(copied, maker):
    opt = ready(make=maker)
    opt.state[params_of(opt)[0]].update(slow=torch.full((6,), 7.0), n=3, more={"k": [None, 2.0]})
    opt.state["wrapper"] = {"k": 2, "buffer": torch.ones(3, dtype=torch.float64)}
    opt = run(copied(opt if maker is make else into_a_new_one(opt)), 2, 3)
    for holder in (opt.state, opt.state_dict()["state"]):
        assert holder["wrapper"]["k"] == 2
        assert torch.equal(holder["wrapper"]["buffer"], torch.ones(3, dtype=torch.float64))
    state = opt.state[params_of(opt)[0]]
    assert torch.equal(state["slow"], torch.full((6,), 7.0))
    assert (state["n"], state["more"], float(state["step"])) == (3, {"k": [None, 2.0]}, 4)


@pytest.mark.parametrize("way", ["loaded", "set"])
@pytest.mark.parametrize("wide", [MOMENTS[:1], MOMENTS[1:2], MOMENTS[1:]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@two_optimizers
def test_moments_of_mixed_dtypes_go_on(optimizer, dtype, wide, way):
    """As near to steps of float32 moments as a rounding of each number at each step is."""
    results = []
    for backend, keys in (("cpu", wide), ("reference", wide), ("cpu", MOMENTS)):
        opt = ready((20,), dtype=dtype, optimizer=optimizer, amsgrad=True, backend=backend)
        state_dict = copy.deepcopy(opt.state_dict())
        state = state_dict["state"][0] if way == "loaded" else opt.state[params_of(opt)[0]]
        state.update({key: state[key].float() for key in keys})
        if way == "loaded":
            opt.load_state_dict(state_dict)
        results.append(run(opt, 2, 3, 4))
    assert_same_bits(*results[:2])
    mixed, wider = params_of(results[0])[0], params_of(results[2])[0]
    error = 6 * torch.finfo(dtype).eps
    torch.testing.assert_close(mixed, wider, rtol=error, atol=1e-3)


@pytest.mark.parametrize("lazy", [None, *MOMENTS])
@pytest.mark.parametrize("key", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_moments_of_a_dtype_that_loses_numbers_are_refused_and_stay(dtype, key, lazy):
    other = torch.float64 if dtype == torch.float32 else torch.float32

    def spoil(opt, param):
        state = opt.state[param]
        state[key] = state[key].real.to(other)
        if lazy is not None:
            state[lazy] = torch._neg_view(-state[lazy])

    refused(spoil, NAME, dtype=dtype, amsgrad=True)


def loop_with_shared_layer(in_backward: bool, reentrant: bool, uses: int):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    opt = make(layer.parameters())
    handle = adamprox.step_in_backward(layer, opt) if in_backward else contextlib.nullcontext()
    with handle:
        for time in range(5):
            y = torch.ones(2, 4, requires_grad=True) * (time + 1)
            for _ in range(uses):
                y = checkpoint(layer, y, use_reentrant=reentrant)
            try:
                (y**2).sum().backward()
            except RuntimeError:
                assert (in_backward, time) == (True, 0), "only the first iteration may refuse"
                return None
            opt.step()
            opt.zero_grad()
    return opt


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("uses", [1, 2, 3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_shared_layer_under_checkpoints_takes_the_plain_loops_steps(reentrant, uses):
    ours = loop_with_shared_layer(True, reentrant, uses)
    if ours is None:
        assert (reentrant, uses > 1) == (True, True)
    else:
        assert_same_bits(ours, loop_with_shared_layer(False, reentrant, uses))


def prune(module, opt) -> None:
    """A copy of fewer rows takes the first param's place, with its state."""
    old, new = module[0], nn.Parameter(module[0].detach()[:2].clone())
    state = opt.state.pop(old)
    opt.state[new] = {k: v[:2].clone() if v.dim() else v for k, v in state.items()}
    module[0] = opt.param_groups[0]["params"][0] = new


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("added", [False, True])
def test_a_param_that_is_replaced_is_stepped_in_backward(others, added):
    model = nn.ParameterList([nn.Parameter(torch.ones(4, 3)) for _ in range(1 + others)])
    opt = make(model.parameters())
    with adamprox.step_in_backward(model, opt):
        sum((p**2).sum() for p in model).backward()
        if added:
            model.append(nn.Parameter(torch.ones(3)))
            opt.add_param_group({"params": [model[-1]]})
        else:
            prune(model, opt)
        before = [p.detach().clone() for p in model]
        sum((p**2).sum() for p in model).backward()
        if added:  # as params that are none of the model's
            opt.step()
        assert not any(map(torch.equal, model, before))


# Telemetry.


def two_params() -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))])


@pytest.mark.parametrize("per", ["tensor", "group"])
def test_stats_are_of_what_was_stepped_although_params_were_replaced(per):
    module = two_params()
    opt = make(module.named_parameters())
    opt.track_updates(every=2, per=per)
    run(opt, 0, 1)
    sizes = [12, 5] if per == "tensor" else [17]
    assert [stats.numel for stats in opt.update_stats()] == sizes
    prune(module, opt)
    assert [stats.numel for stats in opt.update_stats()] == sizes
    opt.param_groups[0]["params"].pop()
    opt.param_groups[0]["param_names"].pop()
    assert [stats.numel for stats in opt.update_stats()] == sizes
    run(opt, 2, 3)
    assert [stats.numel for stats in opt.update_stats()] == [6]


def test_telemetry_keeps_neither_params_nor_grads_alive():
    module = two_params()
    opt = make(module.parameters())
    opt.track_updates(every=3)
    run(opt, 0, 1, 2)
    gone = [weakref.ref(t) for t in (module[0], module[0].grad, module[1].grad)]
    prune(module, opt)
    opt.zero_grad()
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    run(opt, 3)
    assert [stats.numel for stats in opt.update_stats()] == [17]


class Wrapper:
    """Has the optimizer's class and leaves its step to it."""

    def step(self, closure=None):
        return self.optimizer.step(closure)


class CopyingWrapper(Wrapper):
    """Has the attributes that the optimizer had, as Lightning Fabric's."""

    def __init__(self, opt):
        self.__dict__ = {k: v for k, v in opt.__dict__.items() if k not in ("state_dict", "step")}
        self.__class__ = type("Fabric" + type(opt).__name__, (CopyingWrapper, type(opt)), {})
        self.optimizer = opt


class AskingWrapper(Wrapper):
    """Asks the optimizer for attributes, as that of Lightning's Trainer."""

    def __init__(self, opt):
        self.optimizer = opt
        self.__class__ = type("Lightning" + type(opt).__name__, (AskingWrapper, type(opt)), {})

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


@pytest.mark.parametrize("reading", ["wrapper", "optimizer"])
@pytest.mark.parametrize("tracking", ["wrapper", "optimizer", "before"])
@pytest.mark.parametrize("wrapper", [CopyingWrapper, AskingWrapper])
def test_telemetry_works_through_wrappers(wrapper, tracking, reading):
    opt = ready()
    if tracking == "before":
        opt.track_updates()
    either = {"wrapper": wrapper(opt), "optimizer": opt}
    if tracking != "before":
        either[tracking].track_updates()
    either["wrapper"].step()
    (stats,) = either[reading].update_stats()
    assert (stats.step, stats.numel) == (3, 20)
    either[reading].track_updates(every=0)
    assert all(each.update_stats() == [] for each in either.values())
