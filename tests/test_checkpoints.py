"""Checkpoints: to and from torch's optimizers, from class to class, and through torch's savers."""

from __future__ import annotations

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import adamprox
from adamprox.hyperparameters import DECAY_SETTINGS, DEFAULTS, RULE_OPTIONS, RULES
from registry import OPTIMIZERS, OPTIONS, same_bits

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
every_twin = pytest.mark.parametrize(
    "optimizer", [name for name, spec in OPTIMIZERS.items() if spec.twin]
)
with_amsgrad = pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])

SHAPES = ((5,), (), (4, 3), (7, 2))


def make_params(dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def make(optimizer: str, params, **arguments) -> torch.optim.Optimizer:
    spec = OPTIMIZERS[optimizer]
    return spec.cls(params, **{"lr": 1e-2, "weight_decay": spec.weight_decay, **arguments})


def steps(opt, params, seeds) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        opt.step()


def saved(state_dict):
    """Through a file that holds nothing but tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def states(opt, params) -> list[dict]:
    return [opt.state[param] for param in params]


def same_states(ours: list[dict], theirs: list[dict]) -> bool:
    return all(
        state.keys() == other.keys() and all(same_bits(state[key], other[key]) for key in state)
        for state, other in zip(ours, theirs, strict=True)
    )


def same_params(ours, theirs) -> bool:
    return all(same_bits(p.detach(), q.detach()) for p, q in zip(ours, theirs, strict=True))


def load(opt, state_dict, *others: int) -> None:
    """Loads it; one warning says that the groups of these indices had another rule."""
    if not others:  # a warning is an error
        opt.load_state_dict(state_dict)
        return
    text = rf"^{type(opt).__name__}: param_groups{re.escape(str([*others]))} .*another rule"
    with pytest.warns(UserWarning, match=text) as warned:
        opt.load_state_dict(state_dict)
    assert [warning.filename for warning in warned] == [__file__]  # where it was called


def coupling(cls) -> str:
    """The rule of one of torch's classes."""
    return "coupled" if cls is torch.optim.Adam else "decoupled"


def rule_of(optimizer: str) -> str:
    return OPTIMIZERS[optimizer].cls.decay


# With torch's.

TORCHS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.mark.both_abis
@with_amsgrad
@pytest.mark.parametrize("direction", ["from_torch", "to_torch"])
@pytest.mark.parametrize("implementation", TORCHS)
@every_twin
def test_ten_steps_of_each_are_twenty_of_torchs(optimizer, implementation, direction, amsgrad):
    spec = OPTIMIZERS[optimizer]
    arguments = {"lr": 1e-2, "weight_decay": spec.weight_decay, "amsgrad": amsgrad}

    def theirs(params):
        return spec.twin(params, **arguments, **TORCHS[implementation])

    def ours(params):
        return spec.cls(params, lr=0.5, betas=(0.5, 0.5))  # all else is the checkpoint's

    params, expected = make_params(), make_params()
    if direction == "from_torch":
        first, second = theirs(params), ours(params)
    else:
        first, second = spec.cls(params, **arguments), theirs(params)
    steps(first, params, range(10))
    second.load_state_dict(saved(first.state_dict()))
    steps(second, params, range(10, 20))
    whole = theirs(expected)
    steps(whole, expected, range(20))
    assert states(second, params)[0].keys() == states(whole, expected)[0].keys()
    for p, q in zip(params, expected, strict=True):
        assert (p - q).norm() <= 1e-6 * q.norm()
        assert torch.equal(second.state[p]["step"], whole.state[q]["step"])
        for key in second.state[p].keys() - {"step"}:
            moment, other = second.state[p][key], whole.state[q][key]
            assert (moment - other).norm() <= 1e-6 * other.norm(), key


@every_twin
def test_our_layout_is_torchs_and_more(optimizer):
    spec = OPTIMIZERS[optimizer]
    dicts = []
    for cls in (spec.cls, spec.twin):
        params = make_params()
        opt = cls(params)
        steps(opt, params, range(3))
        dicts.append(opt.state_dict())
    ours, theirs = dicts
    assert ours.keys() == theirs.keys()
    assert ours["state"].keys() == theirs["state"].keys()
    [group], [other] = ours["param_groups"], theirs["param_groups"]
    ours_alone = {"decay"} | DEFAULTS.keys() | RULES[group["decay"]].keys()
    assert group.keys() == other.keys() | ours_alone
    assert {key: group[key] for key in other} == other
    for index, state in ours["state"].items():
        assert list(state) == list(theirs["state"][index])
        for key, value in state.items():
            other = theirs["state"][index][key]
            assert (value.dtype, value.shape) == (other.dtype, other.shape)


@every_optimizer
def test_decay_is_coupled_or_not_by_the_class(optimizer):
    """torch.optim.Adam does either, as its group says."""
    coupled = OPTIMIZERS[optimizer].coupled
    for other in (torch.optim.Adam, torch.optim.AdamW):
        params = make_params()
        theirs = other(params)
        opt = make(optimizer, [{**theirs.param_groups[0], "params": params}])
        assert opt.param_groups[0]["decoupled_weight_decay"] == (not coupled)
        load(opt, theirs.state_dict(), *[0] * (rule_of(optimizer) != coupling(other)))
        assert opt.param_groups[0]["decoupled_weight_decay"] == (not coupled)
        theirs = torch.optim.Adam(params)
        theirs.load_state_dict(opt.state_dict())
        assert theirs.param_groups[0]["decoupled_weight_decay"] == (not coupled)


@with_amsgrad
@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.AdamW])
@every_optimizer
def test_any_class_goes_on_from_torchs_moments(optimizer, other, amsgrad):
    """What follows is what the class does from those params, moments and counts."""
    params = make_params()
    theirs = other(params, amsgrad=amsgrad)
    steps(theirs, params, range(5))
    opt = make(optimizer, params)
    same = rule_of(optimizer) == coupling(other)
    load(opt, saved(theirs.state_dict()), *[0] * (not same))
    assert same_states(states(opt, params), states(theirs, params))
    by_hand = copy.deepcopy(params)
    given = (*GIVEN, "weight_decay") if same else GIVEN
    fresh = make(optimizer, by_hand, **{key: theirs.defaults[key] for key in given})
    for p, q in zip(params, by_hand, strict=True):
        fresh.state[q] = copy.deepcopy(theirs.state[p])
    for each, its in ((opt, params), (fresh, by_hand)):
        steps(each, its, range(5, 8))
    assert same_params(params, by_hand)


GIVEN = ("lr", "betas", "eps", "amsgrad")


# From class to class: the decay's settings go with its rule.


ELSEWHERE = {"lr": 0.125, "betas": (0.5, 0.75), "eps": 1e-3, "maximize": True, "amsgrad": True}


@pytest.mark.parametrize("decay_by", ["lr", "schedule"])
@pytest.mark.parametrize("second", OPTIMIZERS)
@pytest.mark.parametrize("first", OPTIMIZERS)
def test_settings_of_the_decay_are_a_checkpoints_if_its_rule_is_the_same(first, second, decay_by):
    """All other values are the checkpoint's in any case."""
    params = make_params()
    theirs = make(first, params, **ELSEWHERE, weight_decay=0.75, decay_by=decay_by)
    steps(theirs, params, range(3))
    opt = make(second, params, weight_decay=0.375)
    same = first == second
    load(opt, saved(theirs.state_dict()), *[0] * (not same))
    [group] = opt.param_groups
    assert {key: group[key] for key in ELSEWHERE} == ELSEWHERE
    assert group["decay"] == rule_of(second)
    assert group["weight_decay"] == (0.75 if same else 0.375)
    assert group["decay_by"] == (decay_by if same else "lr")
    assert same_states(states(opt, params), states(theirs, params))
    twins = copy.deepcopy(params)
    arguments = {"weight_decay": group["weight_decay"], "decay_by": group["decay_by"]}
    twin = make(second, twins, **ELSEWHERE, **arguments)
    for p, q in zip(params, twins, strict=True):
        twin.state[q] = copy.deepcopy(theirs.state[p])
    for each, its in ((opt, params), (twin, twins)):
        steps(each, its, range(3, 6))
    assert same_params(params, twins)


@every_optimizer
def test_a_checkpoint_that_tells_no_rule_counts_as_of_the_same(optimizer):
    """So it is in the first edition, and in an old torch."""
    params = make_params()
    opt = make(optimizer, params, weight_decay=0.75, decay_by="schedule")
    state_dict = opt.state_dict()
    for key in ("decay", *RULE_OPTIONS):
        state_dict["param_groups"][0].pop(key, None)
    other = make(optimizer, params, weight_decay=0.375)
    load(other, copy.deepcopy(state_dict))
    assert other.param_groups[0]["weight_decay"] == 0.75
    assert other.param_groups[0]["decay_by"] == "schedule"
    for key in ("decay_by", "decoupled_weight_decay"):
        del state_dict["param_groups"][0][key]
    other = make(optimizer, params, weight_decay=0.375)
    load(other, state_dict)
    assert other.param_groups[0]["weight_decay"] == 0.75
    assert other.param_groups[0]["decay_by"] == "lr"
    assert other.param_groups[0]["decay"] == rule_of(optimizer)


def of_all_rules(params, order) -> torch.optim.Optimizer:
    """A group for each of the registry's combinations, in another order."""
    groups = [OPTIONS["rules"].groups[index] for index in order]
    return make(
        "AdamProx",
        [{"params": [param], **group} for param, group in zip(params, groups, strict=True)],
        weight_decay=0.0,
    )


def test_groups_of_several_rules_are_told_apart():
    count = len(OPTIONS["rules"].groups)
    params = [nn.Parameter(torch.ones(3)) for _ in range(count)]
    opt = of_all_rules(params, range(count))
    steps(opt, params, range(2))
    restored = copy.deepcopy(params)
    same = of_all_rules(restored, range(count))
    for group in same.param_groups:
        group["weight_decay"] = 7.0
        if "cautious" in group:
            group["cautious"] = not group["cautious"]
    load(same, saved(opt.state_dict()))
    assert [{**g, "params": None} for g in same.param_groups] == [
        {**g, "params": None} for g in opt.param_groups
    ]
    for each, its in ((opt, params), (same, restored)):
        steps(each, its, range(2, 5))
    assert same_params(params, restored)
    order = [1, 0, 2, *range(count - 1, 2, -1)]
    mixed = of_all_rules(restored, order)
    before = [{key: g[key] for key in DECAY_SETTINGS if key in g} for g in mixed.param_groups]
    others = [
        index
        for index, group in enumerate(opt.param_groups)
        if group["decay"] != mixed.param_groups[index]["decay"]
    ]
    assert 2 < len(others) < count
    load(mixed, saved(opt.state_dict()), *others)
    after = [{key: g[key] for key in DECAY_SETTINGS if key in g} for g in mixed.param_groups]
    assert [after[index] for index in others] == [before[index] for index in others]
    steps(mixed, restored, [5])


def test_options_of_a_rule_stay_with_their_rule():
    params = make_params()
    cautious = make("AdamW", params, cautious=True).state_dict()
    opt = make("AdamW", params)
    load(opt, copy.deepcopy(cautious))
    assert opt.param_groups[0]["cautious"] is True
    load(opt, torch.optim.AdamW(params).state_dict())
    assert opt.param_groups[0]["cautious"] is True  # torch's say nothing of it
    load(opt, make("AdamProx", params).state_dict(), 0)
    assert opt.param_groups[0]["cautious"] is True
    for optimizer in OPTIMIZERS.keys() - {"AdamW"}:
        opt = make(optimizer, params)
        load(opt, copy.deepcopy(cautious), 0)
        assert "cautious" not in opt.param_groups[0]
    torch.optim.AdamW(params).load_state_dict(copy.deepcopy(cautious))


def test_the_rule_is_the_classs_after_a_change_of_class():
    params = make_params()
    adamw = make("AdamW", params, weight_decay=1.0)
    steps(adamw, params, range(3))
    sparse = make("AdamProxL1", params, weight_decay=1e3)
    load(sparse, adamw.state_dict(), 0)
    for param in params:
        param.data.mul_(0.005)
    steps(sparse, params, [3])
    assert all(not param.any() for param in params)


@every_optimizer
def test_pickles_of_the_first_edition(optimizer):
    """Its groups and defaults did not say the rule."""
    params = make_params()
    opt = make(optimizer, params)
    steps(opt, params, range(2))
    first = copy.deepcopy(opt)
    for values in (first.defaults, *first.param_groups):
        for key in ("decay", *RULE_OPTIONS):
            values.pop(key, None)
    first.param_groups[0].pop("decay_by")
    other = pickle.loads(pickle.dumps(first))
    others = other.param_groups[0]["params"]
    assert other.param_groups[0]["decay"] == rule_of(optimizer)
    assert other.param_groups[0]["decay_by"] == "lr"
    for each, its in ((opt, params), (other, others)):
        steps(each, its, range(2, 4))
    assert same_params(params, others)
    other.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert other.param_groups[1]["decay"] == rule_of(optimizer)


# torch's checkpoints do not know of ours.


@pytest.mark.parametrize("scheduled", [False, True])
def test_torchs_checkpoint_leaves_our_own_keys_alone(scheduled):
    """The lr of the checkpoint may have been lowered long ago: it is not the initial one."""
    params = make_params()
    theirs = torch.optim.AdamW(params, lr=1e-3)
    if scheduled:
        torch.optim.lr_scheduler.ExponentialLR(theirs, 0.5)
    theirs.param_groups[0]["lr"] = 1e-5
    opt = make("AdamProx", params, lr=1e-2, decay_by="schedule")
    load(opt, theirs.state_dict(), 0)
    [group] = opt.param_groups
    assert group["decay_by"] == "schedule"
    assert group["decay"] == "prox_sq_l2"
    assert group["weight_decay"] == OPTIMIZERS["AdamProx"].weight_decay
    assert group["lr"] == 1e-5
    assert group["initial_lr"] == (1e-3 if scheduled else 1e-2)
    assert "initial_lr" not in theirs.state_dict()["param_groups"][0] or scheduled


def test_our_checkpoint_brings_its_own_keys():
    params = make_params()
    by_lr = make("AdamProx", params, lr=1.0).state_dict()
    by_schedule = make("AdamProx", params, lr=1e-2, decay_by="schedule").state_dict()
    opt = make("AdamProx", params, lr=1.0)
    opt.load_state_dict(saved(by_schedule))
    assert opt.param_groups[0]["decay_by"] == "schedule"
    assert opt.param_groups[0]["initial_lr"] == 1e-2
    opt.load_state_dict(saved(by_lr))
    assert opt.param_groups[0]["decay_by"] == "lr"
    assert "initial_lr" not in opt.param_groups[0]  # a scheduler would take it for its own


# float32 moments of 16-bit params.


def widen(opt) -> None:
    for state in opt.state.values():
        for key in state.keys() - {"step"}:
            state[key] = state[key].float()


@pytest.mark.both_abis
@with_amsgrad
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_optimizer
def test_float32_moments_keep_every_bit(optimizer, dtype, amsgrad):
    params = make_params(dtype)
    opt = make(optimizer, params, amsgrad=amsgrad)
    steps(opt, params, [0])
    widen(opt)
    steps(opt, params, range(1, 10))
    restored = copy.deepcopy(params)
    other = make(optimizer, restored)
    other.load_state_dict(saved(opt.state_dict()))
    assert all(s["exp_avg"].dtype == torch.float32 for s in states(other, restored))
    assert same_states(states(opt, params), states(other, restored))
    for each, its in ((opt, params), (other, restored)):
        steps(each, its, range(10, 20))
    assert same_params(params, restored)
    assert same_states(states(opt, params), states(other, restored))


def test_torchs_own_loading_loses_them():
    """So that the test above is known to ask for something."""
    params = make_params(torch.bfloat16)
    opt = make("AdamW", params)
    steps(opt, params, range(3))
    widen(opt)
    steps(opt, params, [3])
    theirs = torch.optim.AdamW(params)
    theirs.load_state_dict(opt.state_dict())
    assert not same_states(states(opt, params), states(theirs, params))


@pytest.mark.parametrize(
    ("param", "moment", "loaded"),
    [
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_other_moments_become_the_params_dtype_as_in_torch(param, moment, loaded):
    params = make_params(param)
    opt = make("AdamW", params)
    steps(opt, params, range(3))
    state_dict = opt.state_dict()
    for state in state_dict["state"].values():
        for key in state.keys() - {"step"}:
            state[key] = state[key].to(moment)
    opt.load_state_dict(state_dict)
    assert {s[key].dtype for s in opt.state.values() for key in s.keys() - {"step"}} == {loaded}
    steps(opt, params, [3])


# What is missing, wrong, or somebody else's.


def without(*path):
    def change(state_dict):
        *parents, last = path
        for key in parents:
            state_dict = state_dict[key]
        del state_dict[last]

    return change


def with_value(key, value):
    def change(state_dict):
        state_dict["param_groups"][0][key] = value

    return change


def with_two_problems(state_dict):
    del state_dict["state"][1]["exp_avg"], state_dict["state"][3]["exp_avg"]
    state_dict["param_groups"][0]["eps"] = -1.0


def with_amsgrad_but_no_maximum(state_dict):
    state_dict["param_groups"][0]["amsgrad"] = True


SPOILED = {
    "exp_avg": (without("state", 2, "exp_avg"), r"state\[2\]: missing 'exp_avg'$"),
    "step": (without("state", 1, "step"), r"state\[1\]: missing 'step'$"),
    "maximum": (
        with_amsgrad_but_no_maximum,
        r"state\[0\], state\[1\], state\[2\], state\[3\]: missing 'max_exp_avg_sq'$",
    ),
    "betas": (without("param_groups", 0, "betas"), r"param_groups\[0\]: missing 'betas'$"),
    "lr": (with_value("lr", -1.0), r"param_groups\[0\]: Invalid learning rate: -1.0$"),
    "lr type": (with_value("lr", "fast"), r"param_groups\[0\]: Invalid lr: 'fast'"),
    "one beta": (with_value("betas", (0.9,)), r"param_groups\[0\]: Invalid betas: \(0.9,\)"),
    "beta": (with_value("betas", (0.9, 1.0)), r"param_groups\[0\]: Invalid beta .* index 1: 1.0"),
    "eps": (with_value("eps", float("nan")), r"param_groups\[0\]: Invalid epsilon value: nan"),
    "weight_decay": (with_value("weight_decay", None), r"param_groups\[0\]: Invalid weight_decay"),
    "decay_by": (with_value("decay_by", "magic"), r"param_groups\[0\]: Invalid decay_by: 'magic'"),
    "differentiable": (with_value("differentiable", True), r"\[0\]: differentiable=True"),
    "two": (
        with_two_problems,
        r"\[0\]: Invalid epsilon .*state\[1\], state\[3\]: missing 'exp_avg'",
    ),
}


def loads_nothing(opt, params, state_dict, match: str) -> None:
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises((ValueError, TypeError), match=match) as error:
        opt.load_state_dict(state_dict)
    assert "nothing was loaded" in str(error.value)
    assert type(opt).__name__ in str(error.value)
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    assert same_states(states(opt, params), list(before["state"].values()))


@pytest.mark.parametrize(("spoil", "match"), SPOILED.values(), ids=SPOILED)
@every_optimizer
def test_what_is_missing_or_wrong_is_named(optimizer, spoil, match):
    params = make_params()
    opt = make(optimizer, params)
    steps(opt, params, range(3))
    state_dict = copy.deepcopy(opt.state_dict())
    spoil(state_dict)
    loads_nothing(opt, params, state_dict, match)


@every_optimizer
def test_what_others_keep_in_the_state_is_passed_through_as_in_torch(optimizer):
    """Unknown keys of a param, and entries that are no param's."""
    params, twins = make_params(), make_params()
    opt, theirs = make(optimizer, params), torch.optim.AdamW(twins)
    for each, its in ((opt, params), (theirs, twins)):
        steps(each, its, range(3))
        state_dict = copy.deepcopy(each.state_dict())
        for state in state_dict["state"].values():
            state["mu_product"] = torch.ones(())
            state["note"] = [1, 2]
        state_dict["state"]["head.weight"] = {"seen": 3}
        state_dict["state"][77] = 1.5
        each.load_state_dict(state_dict)
        assert each.state["head.weight"] == {"seen": 3}
        assert each.state[77] == 1.5
        assert each.state[its[0]]["note"] == [1, 2]
        assert each.state[its[0]].keys() == {"step", "exp_avg", "exp_avg_sq", "mu_product", "note"}
    state_dict = opt.state_dict()
    assert state_dict["state"]["head.weight"] == {"seen": 3}
    assert state_dict["state"].keys() == theirs.state_dict()["state"].keys()
    steps(opt, params, [3])
    assert [opt.state[param]["step"] for param in params] == [4] * 4


@every_optimizer
def test_a_state_that_has_none_of_ours_is_kept_and_ours_begin_beside_it(optimizer):
    params = make_params()
    opt = make(optimizer, params)
    steps(opt, params, range(3))
    state_dict = copy.deepcopy(opt.state_dict())
    state_dict["state"][2] = {"mu_product": torch.ones(())}
    opt.load_state_dict(state_dict)
    steps(opt, params, [3])
    assert [opt.state[param]["step"] for param in params] == [4, 4, 1, 4]
    assert opt.state[params[2]]["mu_product"] == 1


def with_step(optimizer, params):
    steps(optimizer, params, range(2))
    return optimizer


REFUSED = {
    "SGD": (lambda p: with_step(torch.optim.SGD(p, momentum=0.9), p), "missing 'betas', 'eps'$"),
    "Adamax": (lambda p: with_step(torch.optim.Adamax(p), p), "missing 'exp_avg_sq'$"),
    "differentiable": (  # torch steps non-leaf tensors only
        lambda p: torch.optim.AdamW(p, differentiable=True),
        r"param_groups\[0\]: differentiable=True",
    ),
}


@pytest.mark.filterwarnings("ignore:.*another rule")
@pytest.mark.parametrize(("other", "match"), REFUSED.values(), ids=REFUSED)
@every_optimizer
def test_checkpoints_of_other_optimizers_are_refused(optimizer, other, match):
    params = make_params()
    theirs = other(params)
    opt = with_step(make(optimizer, params), params)
    loads_nothing(opt, params, theirs.state_dict(), match)


@pytest.mark.parametrize("other", [torch.optim.NAdam, torch.optim.RAdam])
def test_checkpoints_of_others_that_have_our_states_load_as_into_torchs(other):
    params = make_params()
    theirs = other(params, decoupled_weight_decay=True)
    steps(theirs, params, range(2))
    opt, torchs = make("AdamW", params), torch.optim.AdamW(params)
    load(opt, theirs.state_dict())
    torchs.load_state_dict(theirs.state_dict())
    assert same_states(states(opt, params), states(torchs, params))
    ours, expected = opt.param_groups[0], torchs.param_groups[0]
    assert {key: ours[key] for key in expected if key != "params"} == {
        key: expected[key] for key in expected if key != "params"
    }
    steps(opt, params, [2])


@every_optimizer
def test_groups_of_another_size_are_refused_in_torchs_words(optimizer):
    params = make_params()
    opt = make(optimizer, params)
    with pytest.raises(ValueError, match="doesn't match the size"):
        opt.load_state_dict(make(optimizer, make_params()[:2]).state_dict())
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        make(optimizer, groups).load_state_dict(opt.state_dict())


def test_an_error_in_many_params_lists_a_few():
    params = [nn.Parameter(torch.ones(1)) for _ in range(100)]
    opt = make("AdamW", params)
    steps(opt, params, [0])
    state_dict = copy.deepcopy(opt.state_dict())
    for state in state_dict["state"].values():
        del state["exp_avg"]
    with pytest.raises(ValueError, match=r"state\[4\] and 95 more: missing 'exp_avg'"):
        opt.load_state_dict(state_dict)


@every_optimizer
def test_params_without_a_state_are_no_error(optimizer):
    """Frozen ones, and all of them before the first step."""
    params = make_params()
    opt = make(optimizer, params)
    opt.load_state_dict(make(optimizer, make_params()).state_dict())
    steps(opt, params[:2], [0])
    assert opt.state_dict()["state"].keys() == {0, 1}
    other = make(optimizer, params)
    other.load_state_dict(opt.state_dict())
    assert other.state.keys() == set(params[:2])


@every_optimizer
def test_a_checkpoint_of_an_old_torch(optimizer):
    """Counts were plain numbers, and groups had fewer keys."""
    params = make_params()
    opt = make(optimizer, params)
    steps(opt, params, range(3))
    old = copy.deepcopy(opt.state_dict())
    old["param_groups"] = [
        {key: group[key] for key in ("params", "lr", "betas", "eps", "weight_decay")}
        for group in old["param_groups"]
    ]
    for state in old["state"].values():
        state["step"] = int(state["step"])
    restored = copy.deepcopy(params)
    other = make(optimizer, restored)
    other.load_state_dict(old)
    for each, its in ((opt, params), (other, restored)):
        steps(each, its, range(3, 6))
    assert same_params(params, restored)


# Hooks of loading and saving.


def test_users_hooks_go_around_our_check():
    """One may rename what we refuse; another sees the float32 moments."""
    params = make_params(torch.bfloat16)
    opt = make("AdamW", params)
    steps(opt, params, range(2))
    widen(opt)
    state_dict = copy.deepcopy(opt.state_dict())
    for state in state_dict["state"].values():
        state["first"] = state.pop("exp_avg")
    seen = []

    def rename(_, state_dict):
        state = state_dict["state"].items()
        return {
            **state_dict,
            "state": {i: {RENAMED.get(key, key): v for key, v in s.items()} for i, s in state},
        }

    opt.register_load_state_dict_post_hook(
        lambda opt: seen.extend(state["exp_avg"].dtype for state in opt.state.values())
    )
    with pytest.raises(ValueError, match="missing 'exp_avg'"):
        opt.load_state_dict(state_dict)
    opt.register_load_state_dict_pre_hook(rename)
    opt.load_state_dict(state_dict)
    assert seen == [torch.float32] * len(params)
    assert len(opt._optimizer_load_state_dict_pre_hooks) == 1
    assert len(opt._optimizer_load_state_dict_post_hooks) == 1


RENAMED = {"first": "exp_avg"}


@every_optimizer
def test_hooks_of_saving_get_the_states_themselves_as_torchs_do(optimizer):
    ours, theirs = make_params(), make_params()

    def as_number(_, state_dict):
        assert len({state["step"].data_ptr() for state in state_dict["state"].values()}) == 4
        for state in state_dict["state"].values():
            state["step"] = int(state["step"])

    for opt, params in ((make(optimizer, ours), ours), (torch.optim.AdamW(theirs), theirs)):
        steps(opt, params, range(2))
        hook = opt.register_state_dict_post_hook(as_number)
        assert [state["step"] for state in opt.state_dict()["state"].values()] == [2] * 4
        assert [state["step"] for state in opt.state.values()] == [2] * 4
        assert all(isinstance(state["step"], int) for state in opt.state.values())
        hook.remove()
        opt.register_state_dict_post_hook(lambda _, state_dict: {"mine": state_dict})
        assert opt.state_dict().keys() == {"mine"}
        opt._optimizer_state_dict_post_hooks.clear()
    opt = make(optimizer, ours)
    steps(opt, ours, range(2))
    for state in opt.state.values():
        state["step"] = 2  # as old checkpoints had it
    steps(opt, ours, [2])
    assert [state["step"] for state in opt.state.values()] == [3] * 4
    assert all(isinstance(state["step"], Tensor) for state in opt.state.values())


@every_optimizer
def test_keys_of_users_and_schedulers_in_groups_are_kept(optimizer):
    params = make_params()
    opt = make(optimizer, [{"params": params, "lr_scale": 0.5}])
    torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10)
    other = make(optimizer, params)
    other.load_state_dict(saved(opt.state_dict()))
    assert {"lr_scale", "max_lr", "max_momentum"} <= other.param_groups[0].keys()
    assert other.param_groups == opt.param_groups


def test_loading_leaves_the_state_dict_as_it_was():
    params = make_params(torch.bfloat16)
    opt = make("AdamProx", params, decay_by="schedule")
    theirs = torch.optim.AdamW(make_params(torch.bfloat16))
    steps(theirs, theirs.param_groups[0]["params"], range(2))
    state_dict = theirs.state_dict()
    before = copy.deepcopy(state_dict)
    load(opt, state_dict, 0)
    assert state_dict["param_groups"] == before["param_groups"]
    assert same_states(list(state_dict["state"].values()), list(before["state"].values()))


# torch.distributed.checkpoint, in one process.


def make_model(dtype=torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    for param in model.parameters():
        param.data = torch.randn(param.shape, generator=generator).to(dtype)
    return model


in_one_process = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled",
    "ignore:TypedStorage is deprecated",  # torch 2.10 uses it itself
)
flattened = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])


def options(flat: bool) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=flat)


def trained(optimizer: str, dtype, **arguments):
    model = make_model(dtype)
    params = list(model.parameters())
    opt = make(optimizer, params, **arguments)
    steps(opt, params, range(5))
    return model, params, opt


@in_one_process
@flattened
@with_amsgrad
@every_optimizer
def test_through_distributed_checkpoint(optimizer, amsgrad, flat, tmp_path):
    model, params, opt = trained(optimizer, torch.float32, amsgrad=amsgrad)
    dcp.save(
        {"optim": get_optimizer_state_dict(model, opt, options=options(flat))},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    restored = copy.deepcopy(model)
    others = list(restored.parameters())
    other = make(optimizer, others, lr=1.0, amsgrad=amsgrad)
    template = {"optim": get_optimizer_state_dict(restored, other, options=options(flat))}
    assert same_params(params, others)  # torch makes the states by a step with lr=0
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(restored, other, template["optim"], options=options(flat))
    assert same_states(states(opt, params), states(other, others))
    for each, its in ((opt, params), (other, others)):
        steps(each, its, range(5, 10))
    assert same_params(params, others)


@in_one_process
@flattened
@every_optimizer
def test_float32_moments_through_distributed_checkpoint(optimizer, flat, tmp_path):
    """``dcp.load`` writes into the tensors that it is given, and casts: they must be float32."""
    model, params, opt = trained(optimizer, torch.bfloat16)
    widen(opt)
    steps(opt, params, range(5, 10))
    dcp.save(
        {"optim": get_optimizer_state_dict(model, opt, options=options(flat))},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    restored = copy.deepcopy(model)
    others = list(restored.parameters())
    other = make(optimizer, others)
    get_optimizer_state_dict(restored, other)  # makes the states
    widen(other)
    template = {"optim": get_optimizer_state_dict(restored, other, options=options(flat))}
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(restored, other, template["optim"], options=options(flat))
    assert same_states(states(opt, params), states(other, others))


@flattened
@pytest.mark.parametrize("direction", ["from_torch", "to_torch"])
@every_twin
def test_get_and_set_between_torchs_and_ours(optimizer, direction, flat):
    spec = OPTIMIZERS[optimizer]
    classes = [spec.twin, spec.cls] if direction == "from_torch" else [spec.cls, spec.twin]
    model = make_model()
    params = list(model.parameters())
    first, second = (cls(params, lr=1e-2, weight_decay=0.3) for cls in classes)
    steps(first, params, range(5))
    first.zero_grad()  # torch makes no states while there are grads
    state_dict = get_optimizer_state_dict(model, first, options=options(flat))
    if flat and direction == "from_torch":
        # torch asks for each key of the optimizer's groups, one by one.
        theirs = first.param_groups[0].keys()
        ours_alone = {k: v for k, v in second.param_groups[0].items() if k not in theirs}
        assert ours_alone.keys() >= {"decay", "decay_by"}
        for key, value in ours_alone.items():
            with pytest.raises(KeyError, match=r"param_groups\.0\.weight\."):
                set_optimizer_state_dict(model, second, dict(state_dict), options=options(flat))
            for name, _ in model.named_parameters():
                state_dict[f"param_groups.{name}.{key}"] = value
    set_optimizer_state_dict(model, second, state_dict, options=options(flat))
    assert same_states(states(first, params), states(second, params))
    assert second.param_groups[0]["lr"] == 1e-2
    steps(second, params, range(5, 10))


@every_optimizer
def test_the_names_of_params_lead_to_them(optimizer):
    """As get_optimizer_state_dict keys the states by name; another order of params is another."""
    model, params, opt = trained(optimizer, torch.float32)
    state_dict = get_optimizer_state_dict(model, opt)
    assert state_dict["state"].keys() == dict(model.named_parameters()).keys()
    other = make(optimizer, params[::-1])
    set_optimizer_state_dict(model, other, state_dict)
    assert same_states(states(opt, params), states(other, params))


def test_a_whole_optimizer_through_torch_save():
    params = make_params()
    opt = make("AdamProxL2", params, backend="cpu")
    steps(opt, params, range(3))
    buffer = io.BytesIO()
    torch.save(opt, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    [group] = other.param_groups
    assert isinstance(group["params"][0], Tensor)
    for each in (opt, other):
        steps(each, each.param_groups[0]["params"], range(3, 6))
    assert same_params(params, group["params"])
    assert other._backend == "cpu"


@pytest.mark.parametrize("amsgrad", [0, np.False_])
@pytest.mark.parametrize("cls", [adamprox.AdamW, torch.optim.AdamW])
def test_amsgrad_is_off_by_any_false_value(cls, amsgrad):
    params = make_params()
    theirs = cls(params, amsgrad=amsgrad)
    steps(theirs, params, range(2))
    assert all("max_exp_avg_sq" not in state for state in theirs.state.values())
    load(make("AdamW", params), theirs.state_dict())


def test_torchs_weight_decay_keeps_its_unit():
    """Where the rule is the same, its ``weight_decay`` is taken, which follows the lr."""
    params = make_params()
    theirs = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01)
    opt = make("AdamW", params, lr=1e-3, weight_decay=1e-5, decay_by="schedule")
    opt.load_state_dict(theirs.state_dict())
    assert opt.param_groups[0]["weight_decay"] == 0.01
    assert opt.param_groups[0]["decay_by"] == "lr"
