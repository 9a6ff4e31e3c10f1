"""What a training loop does with an optimizer: each class beside torch.optim.AdamW."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.profiler import ProfilerActivity, profile

from adamprox.hyperparameters import DEFAULTS, RULE_OPTIONS
from registry import OPTIMIZERS, rounding_bound, same_bits

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)

SHAPES = ((5,), (), (4, 3))


def make_params(*shapes, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes or SHAPES]


def make(optimizer: str, params, **arguments) -> torch.optim.Optimizer:
    spec = OPTIMIZERS[optimizer]
    return spec.cls(params, **{"lr": 1e-2, "weight_decay": spec.weight_decay, **arguments})


def step(opt, params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) if param.requires_grad else None
    opt.step()


def same_params(ours, theirs) -> bool:
    return all(same_bits(p.detach(), q.detach()) for p, q in zip(ours, theirs, strict=True))


def assert_like_torchs(optimizer: str, loop, lr: float = 1e-2) -> None:
    """``loop(opt, params)`` by ours and by torch's: the same counts, and params but for rounding.

    Where torch has no such optimizer, by AdamW and AdamProx without decay, which are equal.
    """
    spec = OPTIMIZERS[optimizer]
    given = {"lr": lr, "weight_decay": spec.weight_decay if spec.twin else 0.0}
    ours, theirs = make_params(), make_params()
    pair = spec.cls(ours, **given), (spec.twin or torch.optim.AdamW)(theirs, **given)
    for opt, params in zip(pair, (ours, theirs), strict=True):
        loop(opt, params)
    for group, other in zip(pair[0].param_groups, pair[1].param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            count, expected = (opt.state.get(x, {}).get("step") for opt, x in zip(pair, (p, q)))  # noqa: B905
            assert (count is None) == (expected is None)
            assert count is None or torch.equal(count, expected)
            bound = rounding_bound(20, max(1.0, q.abs().max().item()), 4 * lr, torch.float32)
            assert (p - q).abs().max() <= bound


# Schedulers.


class OneOfOnesOwn(lr_scheduler.LRScheduler):
    def get_lr(self):
        return [lr / (1 + self.last_epoch) for lr in self.base_lrs]


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 0.5**t),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt), lr_scheduler.ExponentialLR(opt, 0.8)], [4]
    ),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 20),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.8)]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-3, 1e-2, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 4),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.02, total_steps=20),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt),
    "LRScheduler": OneOfOnesOwn,
    "SWALR": lambda opt: swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=5),
}
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)


def test_every_scheduler_of_torch_is_here():
    assert {*lr_scheduler.__all__, "SWALR"} == SCHEDULERS.keys()


def advance(schedule) -> None:
    loss = [1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []
    schedule.step(*loss)


SOME = [nn.Parameter(torch.ones(1))]


def hyper_parameters(opt) -> list[dict]:
    hidden = {"params", "decay", *RULE_OPTIONS, *DEFAULTS} - torch.optim.AdamW(SOME).defaults.keys()
    return [{k: copy.copy(v) for k, v in g.items() if k not in hidden} for g in opt.param_groups]


@every_scheduler
@every_optimizer
def test_schedulers_do_what_they_do_to_torchs(optimizer, scheduler):
    """The groups are the same after each step, to the bit; the params those of such groups."""
    ours, theirs, by_hand = make_params(), make_params(), make_params()
    weight_decay = OPTIMIZERS[optimizer].weight_decay
    pair = make(optimizer, ours), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=weight_decay)
    schedules = [scheduler(opt) for opt in pair]
    fresh = make(optimizer, by_hand)
    seen = []
    for seed in range(15):
        groups = [hyper_parameters(opt) for opt in pair]
        for group in groups[1]:  # the class's own business
            group["decoupled_weight_decay"] = groups[0][0]["decoupled_weight_decay"]
        assert groups[0] == groups[1]
        seen.append((groups[1][0]["lr"], groups[1][0]["betas"]))
        fresh.param_groups[0]["lr"], fresh.param_groups[0]["betas"] = seen[-1]
        step(pair[0], ours, seed)
        step(pair[1], theirs, seed)
        step(fresh, by_hand, seed)
        for schedule in schedules:
            advance(schedule)
    assert same_params(ours, by_hand)
    assert len({lr for lr, _ in seen}) > 1
    cycles_betas = scheduler in (SCHEDULERS["OneCycleLR"], SCHEDULERS["CyclicLR"])
    assert (len({betas for _, betas in seen}) > 1) == cycles_betas


@every_scheduler
@every_optimizer
def test_scheduled_steps_are_torchs(optimizer, scheduler):
    def loop(opt, params):
        schedule = scheduler(opt)
        for seed in range(15):
            step(opt, params, seed)
            advance(schedule)

    assert_like_torchs(optimizer, loop, lr=0.05)


@pytest.mark.both_abis
@pytest.mark.parametrize("decay_by", ["lr", "schedule"])
@every_scheduler
@every_optimizer
def test_lr_as_a_tensor_is_scheduled_as_a_float_is(optimizer, scheduler, decay_by):
    """torch's schedulers write into such a tensor in place."""
    finals = []
    for tensor in (False, True):
        params = make_params()
        lr = torch.tensor(2.0**-7, dtype=torch.float64)
        lr = lr if tensor else lr.item()
        opt = make(optimizer, params, lr=lr, weight_decay=0.1, decay_by=decay_by)
        schedule = scheduler(opt)
        for seed in range(5):
            step(opt, params, seed)
            advance(schedule)
        assert isinstance(opt.param_groups[0]["lr"], Tensor) == tensor
        finals.append(params)
    assert same_params(*finals)


@pytest.mark.parametrize("decay_by", ["lr", "schedule"])
@every_scheduler
@every_optimizer
def test_a_schedule_is_taken_up_again(optimizer, scheduler, decay_by):
    params = make_params()
    opt = make(optimizer, params, decay_by=decay_by)
    schedule = scheduler(opt)
    for seed in range(5):
        step(opt, params, seed)
        advance(schedule)
    restored = copy.deepcopy(params)
    other = make(optimizer, restored, decay_by=decay_by)
    again = scheduler(other)
    again.load_state_dict(copy.deepcopy(schedule.state_dict()))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for each, its, schedule_of_it in ((opt, params, schedule), (other, restored, again)):
        for seed in range(5, 12):
            step(each, its, seed)
            advance(schedule_of_it)
    assert same_params(params, restored)
    assert hyper_parameters(opt) == hyper_parameters(other)


# Averages of weights.

AVERAGES = {
    "SWA": swa_utils.get_swa_multi_avg_fn,
    "EMA": lambda: swa_utils.get_ema_multi_avg_fn(0.9),
}


def train(opt, model, averaged, steps: int) -> list[list[Tensor]]:
    """The params after each step."""
    history = []
    for seed in range(steps):
        batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        opt.zero_grad()
        model(batch).square().mean().backward()
        opt.step()
        averaged.update_parameters(model)
        history.append([param.detach().clone() for param in model.parameters()])
    return history


@pytest.mark.parametrize("average", AVERAGES)
@every_optimizer
def test_averaged_models(optimizer, average):
    """They see each step's params, and keep them apart from the model's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=AVERAGES[average]())
    opt = make(optimizer, model.parameters(), weight_decay=0.1)
    history = train(opt, model, averaged, 6)
    for index, param in enumerate(averaged.module.parameters()):
        values = [params[index] for params in history]
        if average == "SWA":
            expected = torch.stack(values).mean(0)
        else:
            expected = values[0]
            for value in values[1:]:
                expected = 0.9 * expected + 0.1 * value
        torch.testing.assert_close(param.detach(), expected)
        assert not torch.equal(param.detach(), values[-1])
    batches = [torch.randn(8, 3) for _ in range(3)]
    swa_utils.update_bn(batches, averaged)
    assert averaged.module[1].num_batches_tracked == 3


# Hooks and the profiler.


def hooked(opt, params) -> list[str]:
    """What hooks see of a step with a closure, in order."""
    events = []

    def note(what, replace=None):
        def hook(optimizer, args, kwargs):
            assert optimizer is opt
            counts = [int(state["step"]) for state in opt.state.values()]
            events.append(f"{what} {len(args)} {sorted(kwargs)} {counts}")
            return replace

        return hook

    def closure(name):
        def run():
            events.append(f"closure {name} {torch.is_grad_enabled()}")
            for param in params:
                param.grad = torch.ones_like(param)
            return name

        return run

    handles = [
        opt.register_step_pre_hook(note("pre")),
        opt.register_step_pre_hook(note("replacing", ((opt, closure("new")), {}))),
        opt.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        events.append(str(opt.step(closure("old"))))
        handles[1].remove()
        events.append(str(opt.step(closure("old"))))
        events.append(str(opt.step()))
    finally:
        for handle in handles:
            handle.remove()
    events.append(str(opt.step(closure("old"))))
    return events


@pytest.mark.both_abis
@every_optimizer
def test_hooks_of_a_step_are_called_as_torchs_are(optimizer):
    ours, theirs = make_params(), make_params()
    events = hooked(make(optimizer, ours), ours)
    assert events == hooked(torch.optim.AdamW(theirs, foreach=False), theirs)
    assert events.count("new") == 1
    assert events.count("old") == 2


@every_optimizer
def test_a_closure_by_keyword_and_a_hook(optimizer):
    params = make_params()
    opt = make(optimizer, params)
    opt.register_step_post_hook(lambda *_: None)
    assert opt.step(closure=lambda: "loss") == "loss"


@every_optimizer
def test_an_error_in_a_pre_hook_updates_nothing(optimizer):
    params = make_params()
    opt = make(optimizer, params)
    before = copy.deepcopy(params)
    opt.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(opt, params, 0)
    assert same_params(params, before)
    assert not opt.state


def labels(opt, params) -> set[str]:
    step(opt, params, 0)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(opt, params, 1)
        opt.zero_grad()
    name = type(opt).__name__
    found = {event.key for event in profiler.key_averages() if event.key.startswith("Optimizer.")}
    return {label.replace(name, "class") for label in found}


@every_optimizer
def test_a_profiler_sees_the_labels_of_torch(optimizer):
    ours, theirs = make_params(), make_params()
    found = labels(make(optimizer, ours), ours)
    assert found == labels(torch.optim.AdamW(theirs), theirs)
    assert found == {"Optimizer.step#class.step", "Optimizer.zero_grad#class.zero_grad"}


# Gradients, closures.


@pytest.mark.both_abis
@pytest.mark.parametrize("set_to_none", [True, False])
@every_optimizer
def test_zero_grad(optimizer, set_to_none):
    """A grad of zeros is a step, as in torch; None is none."""

    def loop(opt, params):
        for seed in range(5):
            step(opt, params, seed)
            opt.zero_grad(set_to_none=set_to_none)
            assert all((p.grad is None) == set_to_none for p in params)
            assert set_to_none or not any(p.grad.any() for p in params)
            opt.step()

    assert_like_torchs(optimizer, loop)


@pytest.mark.both_abis
@every_optimizer
def test_closures(optimizer):
    """With gradients on, although the caller has turned them off; the loss is returned."""
    losses = []

    def loop(opt, params):
        def closure():
            opt.zero_grad()
            loss = sum((param.square() + param).sum() for param in params)
            loss.backward()
            return loss

        with torch.no_grad():
            returned = [opt.step(closure) for _ in range(10)]
        assert all(loss.requires_grad for loss in returned)
        losses.append([loss.item() for loss in returned])
        assert opt.step() is None

    assert_like_torchs(optimizer, loop)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == sorted(losses[0], reverse=True)


@every_optimizer
def test_an_error_in_a_closure_updates_nothing(optimizer):
    params = make_params()
    opt = make(optimizer, params)
    step(opt, params, 0)
    before, counts = copy.deepcopy(params), [int(s["step"]) for s in opt.state.values()]
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert same_params(params, before)
    assert [int(s["step"]) for s in opt.state.values()] == counts


# Param groups.


@pytest.mark.both_abis
@pytest.mark.parametrize("when", [0, 1, 5])
@every_optimizer
def test_add_param_group_at_any_time(optimizer, when):
    def loop(opt, params):
        late = make_params((3,), (2, 2), seed=1)
        schedule = lr_scheduler.ExponentialLR(opt, 0.9)
        for seed in range(10):
            if seed == when:
                opt.add_param_group({"params": iter(late), "lr": 0.03, "betas": (0.5, 0.9)})
                opt.add_param_group({"params": make_params((4,), seed=2)[0], "eps": 1e-3})
                for group in opt.param_groups[1:]:
                    group["initial_lr"] = group["lr"]
                schedule.base_lrs = [group["lr"] for group in opt.param_groups]
            step(opt, [p for group in opt.param_groups for p in group["params"]], seed)
            schedule.step()
        assert [len(group["params"]) for group in opt.param_groups] == [3, 2, 1]
        counts = [[int(opt.state[p]["step"]) for p in g["params"]] for g in opt.param_groups]
        assert counts == [[10] * 3, [10 - when] * 2, [10 - when]]

    assert_like_torchs(optimizer, loop)


@every_optimizer
def test_a_named_group_after_named_params(optimizer):
    params = make_params()
    opt = make(optimizer, [(f"p{i}", param) for i, param in enumerate(params)])
    opt.add_param_group({"params": [("late", make_params((3,))[0])]})
    assert [group["param_names"] for group in opt.param_groups] == [["p0", "p1", "p2"], ["late"]]
    with pytest.raises(ValueError, match="with/without names"):
        opt.add_param_group({"params": make_params((3,))})


def freezing(in_groups):
    """Params freeze and thaw, as a whole or one by one, with and without a grad left behind."""

    def loop(opt, params):
        for seed in range(12):
            params[0].requires_grad_(seed not in (3, 4, 5))
            for param in params[1:]:
                param.requires_grad_(seed > 6)
            if in_groups and seed == 8:
                opt.param_groups[0]["params"].pop(0)
            step(opt, params, seed)

    return loop


@pytest.mark.both_abis
@pytest.mark.parametrize("in_groups", [False, True], ids=["requires_grad", "and groups"])
@every_optimizer
def test_freezing_and_thawing(optimizer, in_groups):
    assert_like_torchs(optimizer, freezing(in_groups))


@pytest.mark.both_abis
@every_optimizer
def test_a_frozen_param_with_a_grad_is_stepped_as_in_torch(optimizer):
    """Whoever freezes a param has to clear its grad; torch asks for the grad only."""

    def loop(opt, params):
        for seed, param in itertools.product(range(3), params):
            step(opt, params, seed)
            param.requires_grad_(False)
            opt.step()
            param.requires_grad_(True)

    assert_like_torchs(optimizer, loop)
