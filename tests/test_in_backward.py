"""``step_in_backward``: the plain loop's bits, without its gradients."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

import adamprox
from adamprox.bench.memory import LAYER_BYTES, LAYERS, peak_training_bytes_of
from adamprox.freed_grad import FreedGrad
from registry import OPTIMIZERS, same_bits

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def make_model(dtype=torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(4)]
    model = nn.Sequential(*layers, nn.LayerNorm(6)).to(dtype)
    for param in model.parameters():
        param.data = torch.randn(param.shape, generator=generator).to(dtype)
    return model


def make(optimizer: str, params, **arguments) -> torch.optim.Optimizer:
    spec = OPTIMIZERS[optimizer]
    return spec.cls(params, **{"lr": 1e-2, "weight_decay": spec.weight_decay, **arguments})


def backward(model, seed: int) -> None:
    param = next(model.parameters())
    batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    model(batch.to(param.dtype)).square().mean().backward()


def freed(model) -> list[bool]:
    return [isinstance(p.grad, FreedGrad) for p in model.parameters()]


def assert_same_bits(ours, theirs) -> None:
    """Of two pairs of a model and its optimizer: every param, every state."""
    (model, opt), (other, its) = ours, theirs
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())
        assert opt.state[p].keys() == its.state[q].keys()
        for key, value in opt.state[p].items():
            assert same_bits(value, its.state[q][key]), key


def both_ways(optimizer: str, change=lambda model, opt, step: None, dtype=torch.float32, **given):
    """Ten steps of the plain loop and in backward; what ``change`` does, it does to both."""
    opts = []
    for in_backward in (False, True):
        model = make_model(dtype)
        opt = make(optimizer, model.parameters(), **given)
        if in_backward:
            adamprox.step_in_backward(model, opt)
        for step in range(10):
            change(model, opt, step)
            backward(model, step)
            if in_backward:
                grads = [p.grad for p in model.parameters()]
                assert all(grad is None or type(grad) is FreedGrad for grad in grads)
            else:
                opt.step()
                opt.zero_grad()
        opts.append((model, opt))
    assert_same_bits(*opts)
    return opts[1]


@pytest.mark.both_abis
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@every_optimizer
def test_bits_are_the_plain_loops(optimizer, amsgrad, dtype):
    _, opt = both_ways(optimizer, dtype=dtype, amsgrad=amsgrad)
    assert {int(state["step"]) for state in opt.state.values()} == {10}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_on_the_backend_asked_for(backend):
    both_ways("AdamProxL2", backend=backend)


@pytest.mark.both_abis
@every_optimizer
def test_frozen_and_thawed_params(optimizer):
    def change(model, opt, step):
        model[1].weight.requires_grad_(step > 3)
        model[2].requires_grad_(not 2 < step < 7)

    _, opt = both_ways(optimizer, change)
    assert {int(state["step"]) for state in opt.state.values()} == {6, 10}


@every_optimizer
def test_groups_hyper_parameters_and_params_that_come_later(optimizer):
    def change(model, opt, step):
        opt.param_groups[0]["lr"] = 1e-2 / (1 + step)
        if step == 4:
            late = list(model[4].parameters())
            opt.param_groups[0]["params"] = list(model[:4].parameters())
            for param in late:
                opt.state.pop(param, None)
            opt.add_param_group({"params": late, "lr": 0.1, "weight_decay": 0.0})

    both_ways(optimizer, change, decay_by="schedule")


@every_optimizer
def test_a_checkpoint_loaded_in_between(optimizer):
    def change(model, opt, step):
        if step == 5:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))

    both_ways(optimizer, change)


@pytest.mark.parametrize("zero_grad", [None, True, False])
@every_optimizer
def test_the_rest_of_a_plain_loop_may_stay(optimizer, zero_grad):
    """step(), also with a closure, finds nothing to do; zero_grad() either way."""
    model = make_model()
    opt = make(optimizer, model.parameters())
    plain_model = make_model()
    plain = make(optimizer, plain_model.parameters())
    adamprox.step_in_backward(model, opt)
    for step in range(6):
        plain.zero_grad()
        backward(plain_model, step)
        plain.step()
        if step % 2:
            opt.step(lambda: backward(model, step))  # noqa: B023
        else:
            backward(model, step)
            opt.step()
        assert not any(freed(model))
        if zero_grad is not None:
            opt.zero_grad(set_to_none=zero_grad)
    assert_same_bits((model, opt), (plain_model, plain))


@every_optimizer
def test_step_has_nothing_to_mend_of_what_is_freed(optimizer):
    """Although the moments lie otherwise than the params, and the count is no tensor."""
    model = make_model()
    opt = make(optimizer, model.parameters())
    adamprox.step_in_backward(model, opt)
    backward(model, 0)
    for state in opt.state.values():
        state["exp_avg"] = torch.stack([state["exp_avg"]] * 2, -1)[..., 0]
        state["step"] = 1
    opt.step()
    assert not any(freed(model))
    assert {state["step"] for state in opt.state.values()} == {1}
    backward(model, 1)
    assert {int(state["step"]) for state in opt.state.values()} == {2}


@every_optimizer
def test_params_that_are_not_the_models_are_left_to_step(optimizer):
    pair = []
    for in_backward in (False, True):
        model = make_model()
        opt = make(optimizer, model.parameters())
        if in_backward:
            adamprox.step_in_backward(model[:2], opt)
        for step in range(5):
            backward(model, step)
            if in_backward:
                assert freed(model) == [True] * 4 + [False] * 6
            opt.step()
            opt.zero_grad()
        pair.append((model, opt))
    assert_same_bits(*pair)


def test_a_params_step_leaves_the_others_counts_alone():
    """Although they lie in one buffer after a plain step."""
    model = make_model()
    opt = make("AdamW", model.parameters())
    backward(model, 0)
    opt.step()
    opt.zero_grad()
    adamprox.step_in_backward(model, opt)
    model[1].weight.square().sum().backward()
    counts = [int(opt.state[p]["step"]) for p in model.parameters()]
    assert counts == [1, 1, 2, 1, 1, 1, 1, 1, 1, 1]


def test_a_param_used_twice_takes_one_step():
    model = make_model()
    opt = make("AdamW", model.parameters())
    adamprox.step_in_backward(model, opt)
    batch = torch.ones(2, 6)
    model(model(batch)).sum().backward()
    assert {int(state["step"]) for state in opt.state.values()} == {1}


@every_optimizer
def test_removed(optimizer):
    model = make_model()
    opt = make(optimizer, model.parameters())
    with adamprox.step_in_backward(model, opt):
        backward(model, 0)
        assert all(freed(model))
    assert [p.grad for p in model.parameters()] == [None] * 10
    backward(model, 1)
    assert {int(state["step"]) for state in opt.state.values()} == {1}
    assert all(p.grad is not None for p in model.parameters())
    opt.step()
    adamprox.step_in_backward(model, opt)


# Params that replace others in the model, and in the optimizer.


def new_tensor(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_place_of(opt, old: list[nn.Parameter], new: list[nn.Parameter]) -> None:
    [group] = opt.param_groups
    turned = dict(zip(old, new, strict=True))
    group["params"] = [turned.get(param, param) for param in group["params"]]
    for param in old:
        opt.state.pop(param, None)


def assign_a_param(model) -> None:
    model[1].weight = nn.Parameter(new_tensor((6, 6), 1))


def register_a_param(model) -> None:
    del model[1].bias
    model[1].register_parameter("bias", nn.Parameter(new_tensor((6,), 2)))


def assign_a_module(model) -> None:
    layer = nn.Linear(6, 6)
    layer.weight.data, layer.bias.data = new_tensor((6, 6), 3), new_tensor((6,), 4)
    model[2] = nn.Sequential(layer)


def assign_a_param_of_a_new_module(model) -> None:
    assign_a_module(model)
    model[2][0].weight = nn.Parameter(new_tensor((6, 6), 5))


ASSIGNMENTS = (assign_a_param, register_a_param, assign_a_module, assign_a_param_of_a_new_module)


@pytest.mark.parametrize("assign", ASSIGNMENTS, ids=lambda assign: assign.__name__)
@every_optimizer
def test_params_assigned_to_the_model_later_take_their_steps_in_backward(optimizer, assign):
    def change(model, opt, step):
        if step == 4:
            old = list(model.parameters())
            assign(model)
            new = list(model.parameters())
            assert any(p is not q for p, q in zip(old, new, strict=True))
            in_place_of(opt, old, new)

    both_ways(optimizer, change)


def test_what_is_assigned_elsewhere_or_after_the_end_is_left_alone():
    model, other = make_model(), make_model()
    opt = make("AdamW", [*model.parameters(), *other.parameters()])
    handle = adamprox.step_in_backward(model, opt)
    before = repr(handle)
    assign_a_param_of_a_new_module(other)
    in_place_of(opt, [other[1].weight], [other[1].weight])
    assert repr(handle) == before
    backward(other, 0)
    assert not any(freed(other))
    handle.remove()
    assign_a_param(model)
    opt.add_param_group({"params": [model[1].weight]})
    backward(model, 0)
    assert not any(freed(model))
    assert not opt.state


def test_an_error_names_a_param_that_was_assigned_later():
    model = make_model()
    opt = make("AdamW", model.parameters())
    handle = adamprox.step_in_backward(model, opt)
    old = list(model.parameters())
    assign_a_param_of_a_new_module(model)
    in_place_of(opt, old, list(model.parameters()))
    backward(model, 0)
    opt.state[model[2][0].weight]["exp_avg"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"exp_avg of .*\(2\.0\.weight\) has shape \(3,\)"):
        backward(model, 1)
    handle.remove()


# A backward within another one.


class Checkpointed(nn.Module):
    """The second layer twice, each time in a checkpoint; the first and the last one outside."""

    def __init__(self, use_reentrant: bool):
        super().__init__()
        self.layers, self.use_reentrant = make_model(), use_reentrant

    def forward(self, x):
        def middle(x):
            return self.layers[1](x).tanh()

        x = self.layers[0](x)
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(middle, x, use_reentrant=self.use_reentrant)
        return self.layers[4](self.layers[3](self.layers[2](x)))


@pytest.mark.both_abis
@pytest.mark.parametrize("use_reentrant", [False, True])
@every_optimizer
def test_checkpoints_within_the_model(optimizer, use_reentrant):
    """Params in a reentrant one may get several gradients: a warning asks for step()."""
    pair = []
    for in_backward in (False, True):
        model = Checkpointed(use_reentrant)
        opt = make(optimizer, model.parameters())
        if in_backward:
            adamprox.step_in_backward(model, opt)
        for step in range(4):
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                backward(model, step)
            about = [str(w.message) for w in warned if "step_in_backward" in str(w.message)]
            if in_backward and use_reentrant and step == 0:
                assert sorted(text.split()[1] for text in about) == [
                    "layers.1.bias",
                    "layers.1.weight",
                ]
                assert all("optimizer.step()" in text for text in about)
            else:
                assert about == []
            if in_backward:
                left = [False, use_reentrant, False, False, False]
                assert freed(model) == [not x for x in left for _ in range(2)]
            opt.step()
            opt.zero_grad()
        pair.append((model, opt))
    assert_same_bits(*pair)


def test_a_backward_within_a_hook_takes_its_steps():
    """Only a gradient that an autograd function's backward makes may be one of several."""
    model, other = make_model(), make_model()
    opt = make("AdamW", [*model.parameters(), *other.parameters()])
    handles = [adamprox.step_in_backward(each, opt) for each in (model, other)]
    x = torch.ones(2, 6, requires_grad=True)
    x.register_hook(lambda grad: torch.enable_grad()(backward)(other, 0))
    model(x).sum().backward()
    assert all(freed(model) + freed(other))
    for handle in handles:
        handle.remove()


@every_optimizer
def test_schedulers_see_the_steps(optimizer):
    """Without a warning that there were none; warnings are errors here."""

    def change(model, opt, step):
        if step == 0:
            opt.schedule = OneCycleLR(opt, 0.1, total_steps=20)
        else:
            opt.schedule.step()

    _, opt = both_ways(optimizer, change)
    assert opt.param_groups[0]["betas"][0] != 0.9


# What comes too late.


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamProxL2"])
@pytest.mark.parametrize(
    "clip",
    [
        lambda params: nn.utils.clip_grad_norm_(params, 1.0),
        lambda params: nn.utils.clip_grad_norm_(params, 1.0, foreach=False),
        lambda params: nn.utils.clip_grad_value_(params, 1.0),
        lambda params: nn.utils.get_total_norm([p.grad for p in params]),
        lambda params: [p.grad.norm() for p in params],
        lambda params: [p.grad.mul_(0.5) for p in params],
    ],
)
def test_clipping_fails(optimizer, clip):
    model = make_model()
    adamprox_optimizer = make(optimizer, model.parameters())
    adamprox.step_in_backward(model, adamprox_optimizer)
    backward(model, 0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"0\.weight is gone.*step_in_backward.*Clipping"):
        clip(list(model.parameters()))
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


@pytest.mark.parametrize("call", ["step", "unscale_"])
@every_optimizer
def test_a_grad_scaler_fails(optimizer, call):
    model = make_model()
    opt = make(optimizer, model.parameters())
    adamprox.step_in_backward(model, opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(2, 6)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"0\.weight is gone.*step_in_backward.*GradScaler"):
        getattr(scaler, call)(opt)


def test_a_grad_scaler_that_is_off_does_not():
    model = make_model()
    opt = make("AdamW", model.parameters())
    adamprox.step_in_backward(model, opt)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(model(torch.ones(2, 6)).sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert {int(state["step"]) for state in opt.state.values()} == {1}


def test_a_freed_grad_has_shape_and_no_numbers():
    model = make_model()
    opt = make("AdamW", model.parameters())
    adamprox.step_in_backward(model, opt)
    backward(model, 0)
    param = model[0].weight
    assert param.grad.shape == param.shape
    assert repr(param.grad) == "FreedGrad(of 0.weight)"
    model.double()  # takes the grads along
    assert param.grad.dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"the grad of 0\.weight is gone"):
        param.grad.sum()
    model.float()
    backward(model, 1)


# What is refused at once.


def test_wrong_arguments():
    model = make_model()
    opt = make("AdamW", model.parameters())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but is a list"):
        adamprox.step_in_backward(list(model.parameters()), opt)
    theirs = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match=r"optimizer must be .* torch\.optim\.adamw\.AdamW"):
        adamprox.step_in_backward(model, theirs)
    with pytest.raises(ValueError, match="none of the params of model"):
        adamprox.step_in_backward(make_model(), opt)
    adamprox.step_in_backward(model[1:], opt)
    with pytest.raises(RuntimeError, match=r"1\.weight takes its steps in backward already"):
        adamprox.step_in_backward(model, opt)
    backward(model, 0)
    assert freed(model) == [False] * 2 + [True] * 8


def test_distributed_data_parallel_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(make_model())
        with pytest.raises(RuntimeError, match="averages gradients after"):
            adamprox.step_in_backward(model, make("AdamW", model.parameters()))
    finally:
        torch.distributed.destroy_process_group()


def test_an_error_names_the_param():
    model = make_model()
    opt = make("AdamW", model.parameters())
    adamprox.step_in_backward(model, opt)
    backward(model, 0)
    weight = model[1].weight
    opt.state[weight]["exp_avg"] = torch.zeros(3)
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"exp_avg of .*\(1\.weight\) has shape \(3,\)"):
        backward(model, 1)
    assert torch.equal(weight, before)


def test_an_optimizer_that_is_gone():
    model = make_model()
    adamprox.step_in_backward(model, make("AdamW", model.parameters()))
    gc.collect()
    with pytest.raises(RuntimeError, match="exists no more: keep a reference"):
        backward(model, 0)
    model.zero_grad()
    opt = make("AdamW", model.parameters())
    adamprox.step_in_backward(model, opt)
    backward(model, 0)
    assert len(opt.state) == 10


def test_the_handle_keeps_the_optimizer():
    model = make_model()
    handle = adamprox.step_in_backward(model, make("AdamW", model.parameters()))
    count = len(list(model.parameters()))
    assert repr(handle) == f"<AdamW's steps of {count} params, taken in backward>"
    gc.collect()
    backward(model, 0)
    assert all(freed(model))
    handle.remove()


# Memory.


def test_nothing_is_kept_alive():
    model = make_model()
    opt = make("AdamW", model.parameters())
    handle = adamprox.step_in_backward(model, opt)
    backward(model, 0)
    grads = []
    model[0].weight.register_hook(lambda grad: grads.append(weakref.ref(grad)))
    backward(model, 1)
    assert [grad() for grad in grads] == [None]
    alive = [weakref.ref(param) for param in model.parameters()]
    del model, opt, handle
    gc.collect()
    assert [param() for param in alive] == [None] * len(alive)


def test_copies_of_the_model_and_the_optimizer_are_plain():
    model = make_model()
    opt = make("AdamW", model.parameters())
    adamprox.step_in_backward(model, opt)
    backward(model, 0)
    buffer = io.BytesIO()
    torch.save((model, opt), buffer)
    buffer.seek(0)
    for other, its in (copy.deepcopy((model, opt)), torch.load(buffer, weights_only=False)):
        backward(other, 1)
        assert not any(freed(other))
        assert {int(state["step"]) for state in its.state.values()} == {1}


def test_the_peak_of_gradient_memory_falls(capsys):
    plain, in_backward = (peak_training_bytes_of(way) for way in ("step", "step_in_backward"))
    with capsys.disabled():
        print(f"\n{LAYERS} layers of {LAYER_BYTES:,} bytes: a step raises the peak by", end=" ")
        print(f"{plain:,} bytes, with step_in_backward by {in_backward:,}")
    assert plain > 0.9 * LAYERS * LAYER_BYTES
    assert in_backward < 4 * LAYER_BYTES


def test_a_param_that_takes_no_hook_leaves_none_behind():
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(3)) for _ in range(2)])
    with torch.inference_mode():
        frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    model.append(frozen)
    opt = adamprox.AdamW(list(model)[:2], lr=0.1)
    with pytest.raises(RuntimeError, match="nference"):
        adamprox.step_in_backward(model, opt)
    sum(p.sum() for p in list(model)[:2]).backward()
    assert all(torch.equal(p.grad, torch.ones(3)) for p in list(model)[:2])
    assert all(torch.equal(p, torch.ones(3)) for p in model)


def test_a_compiled_step_leaves_out_what_backward_has_stepped():
    """As a plain one does. A param that the model does not have is its to step."""
    model, other = make_model(), nn.Parameter(torch.ones(3))
    opt = make("AdamW", [*model.parameters(), other])
    with adamprox.step_in_backward(model, opt):
        step = torch.compile(lambda: opt.step(), backend="eager", fullgraph=True)
        for count in range(1, 4):
            other.grad = torch.ones(3)
            backward(model, count)
            step()
            assert {int(opt.state[p]["step"]) for p in (*model.parameters(), other)} == {count}
