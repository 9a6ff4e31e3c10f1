"""Checkpoints: to and from torch's optimizers, from class to class, and through torch's savers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from registry import OPTIMIZERS, same_bits

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


# With torch's.

TORCHS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


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
    assert group.keys() - other.keys() == {"decay_by"}
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
        opt.load_state_dict(theirs.state_dict())
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
    opt.load_state_dict(saved(theirs.state_dict()))
    assert same_states(states(opt, params), states(theirs, params))
    by_hand = copy.deepcopy(params)
    fresh = make(optimizer, by_hand, **{key: theirs.defaults[key] for key in GIVEN})
    for p, q in zip(params, by_hand, strict=True):
        fresh.state[q] = copy.deepcopy(theirs.state[p])
    for each, its in ((opt, params), (fresh, by_hand)):
        steps(each, its, range(5, 8))
    assert same_params(params, by_hand)


GIVEN = ("lr", "betas", "eps", "weight_decay", "amsgrad")


def test_the_rule_is_the_classs_after_a_change_of_class():
    params = make_params()
    adamw = make("AdamW", params, weight_decay=1.0)
    steps(adamw, params, range(3))
    sparse = make("AdamProxL1", params)
    sparse.load_state_dict(adamw.state_dict())
    for param in params:
        param.data.mul_(0.005)  # within s = lr * weight_decay of zero, had Adam not moved it
    for group in sparse.param_groups:
        group["weight_decay"] = 1e3
    steps(sparse, params, [3])
    assert all(not param.any() for param in params)


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
    opt.load_state_dict(theirs.state_dict())
    [group] = opt.param_groups
    assert group["decay_by"] == "schedule"
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


# What is missing, what is unknown.


def without(*path):
    def change(state_dict):
        *parents, last = path
        for key in parents:
            state_dict = state_dict[key]
        del state_dict[last]

    return change


def with_unknown_state(state_dict):
    for state in state_dict["state"].values():
        state["mu_product"] = torch.ones(())


def with_unknown_param(state_dict):
    state_dict["state"]["head.weight"] = state_dict["state"][0]


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
    "unknown state": (with_unknown_state, r"state\[0\].*state\[3\]: unknown 'mu_product'$"),
    "unknown param": (with_unknown_param, r"state\['head.weight'\]: no param group has such"),
}


def loads_nothing(opt, params, state_dict, match: str) -> None:
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=match) as error:
        opt.load_state_dict(state_dict)
    assert "nothing was loaded" in str(error.value)
    assert type(opt).__name__ in str(error.value)
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    assert same_states(states(opt, params), list(before["state"].values()))


@pytest.mark.parametrize(("spoil", "match"), SPOILED.values(), ids=SPOILED)
@every_optimizer
def test_what_is_missing_or_unknown_is_named(optimizer, spoil, match):
    params = make_params()
    opt = make(optimizer, params)
    steps(opt, params, range(3))
    state_dict = copy.deepcopy(opt.state_dict())
    spoil(state_dict)
    loads_nothing(opt, params, state_dict, match)


OTHERS = {
    "SGD": (lambda params: torch.optim.SGD(params, momentum=0.9), "missing 'betas', 'eps'.*mom"),
    "NAdam": (torch.optim.NAdam, "unknown 'mu_product'"),
    "Adamax": (torch.optim.Adamax, "missing 'exp_avg_sq'.*unknown 'exp_inf'"),
    "differentiable": (
        lambda params: torch.optim.AdamW(params, differentiable=True),
        r"param_groups\[0\]: differentiable=True",
    ),
}


@pytest.mark.parametrize(("other", "match"), OTHERS.values(), ids=OTHERS)
def test_checkpoints_of_other_optimizers_are_refused(other, match):
    params = make_params()
    theirs = other(params)
    if not theirs.defaults["differentiable"]:  # else torch steps non-leaf tensors only
        steps(theirs, params, range(2))
    opt = make("AdamW", params)
    steps(opt, params, range(2))
    loads_nothing(opt, params, theirs.state_dict(), match)


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
    state_dict = opt.state_dict()
    with_unknown_state(state_dict)
    with pytest.raises(ValueError, match=r"state\[4\] and 95 more: unknown 'mu_product'"):
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
    state_dict = opt.state_dict()
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
    with pytest.raises(ValueError, match=r"missing 'exp_avg'.*unknown 'first'"):
        opt.load_state_dict(state_dict)
    opt.register_load_state_dict_pre_hook(rename)
    opt.load_state_dict(state_dict)
    assert seen == [torch.float32] * len(params)
    assert len(opt._optimizer_load_state_dict_pre_hooks) == 1
    assert len(opt._optimizer_load_state_dict_post_hooks) == 1


RENAMED = {"first": "exp_avg"}


@every_optimizer
def test_hooks_of_saving(optimizer):
    """They get each param's own counter, and what they change is neither undone nor live."""
    params = make_params()
    opt = make(optimizer, params)
    steps(opt, params, range(2))

    def as_number(_, state_dict):
        assert len({state["step"].data_ptr() for state in state_dict["state"].values()}) == 4
        for state in state_dict["state"].values():
            state["step"] = int(state["step"])

    opt.register_state_dict_post_hook(as_number)
    assert [state["step"] for state in opt.state_dict()["state"].values()] == [2] * 4
    assert all(isinstance(state["step"], Tensor) for state in opt.state.values())
    opt.register_state_dict_post_hook(lambda _, state_dict: {"mine": state_dict})
    assert opt.state_dict().keys() == {"mine"}
    assert len(opt._optimizer_state_dict_post_hooks) == 2
    opt._optimizer_state_dict_post_hooks.clear()
    opt.state[params[0]]["step"] = 2  # as old checkpoints had it
    assert opt.state_dict()["state"][0]["step"] == 2


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
    opt.load_state_dict(state_dict)
    assert state_dict["param_groups"] == before["param_groups"]
    assert same_states(list(state_dict["state"].values()), list(before["state"].values()))


# torch.distributed.checkpoint, in one process.


def make_model(dtype=torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    for param in model.parameters():
        param.data = torch.randn(param.shape, generator=generator).to(dtype)
    return model


in_one_process = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
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
        with pytest.raises(KeyError, match=r"param_groups\.0\.weight\.decay_by"):
            set_optimizer_state_dict(model, second, dict(state_dict), options=options(flat))
        names = [name for name, _ in model.named_parameters()]
        state_dict.update({f"param_groups.{name}.decay_by": "lr" for name in names})
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
