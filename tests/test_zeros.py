"""``sparsity`` counts zeros, and ``freeze_zeros`` keeps them."""

from __future__ import annotations

import gc
import signal
import weakref

import pytest
import torch
from torch import Tensor, nn

import adamprox
from registry import OPTIMIZERS, same_bits

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def network() -> nn.Sequential:
    """With 14 zeros among 24 + 5 numbers: a row, a column, and the whole bias."""
    model = nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(1, 3, bias=False))
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
        model[0].weight[1] = 0.0
        model[0].weight[:, 2] = 0.0
        model[0].bias.zero_()
        model[2].weight[0] = -0.0
    return model


# Counting.


def test_it_counts_numbers_rows_and_tensors():
    found = adamprox.sparsity(network())
    assert [tuple(tensor) for tensor in found.tensors] == [
        ("0.weight", (5, 4), 20, 8, 5, 1),
        ("0.bias", (5,), 5, 5, 0, 0),
        ("1.weight", (1,), 1, 0, 0, 0),
        ("2.weight", (3, 1), 3, 1, 3, 1),
    ]
    assert found.share == 14 / 29
    assert found.zero_tensors == 1
    assert found.to_dict()["tensors"][0]["share"] == 8 / 20
    assert found.to_dict()["share"] == found.share


def test_a_model_without_numbers_has_no_zeros():
    assert adamprox.sparsity(nn.ReLU()).share == 0.0
    model = nn.ParameterDict({"p": torch.zeros(3, 0)})
    [empty] = adamprox.sparsity(model).tensors
    assert (empty.numel, empty.zeros, empty.rows, empty.zero_rows, empty.share) == (0, 0, 3, 0, 0.0)
    assert adamprox.sparsity(model).zero_tensors == 0


def test_nan_is_no_zero_and_complex_zeros_are_whole():
    model = nn.ParameterDict({"p": torch.tensor([0j, 1j, complex("nan"), 0j])})
    [counted] = adamprox.sparsity(model).tensors
    assert counted.zeros == 2


def test_it_prints_a_table():
    lines = str(adamprox.sparsity(network())).splitlines()
    words = [" ".join(line.split()) for line in lines]
    assert words[0] == "param shape zeros share zero rows"
    assert words[2] == "0.weight 5 x 4 8 40.0 % 1 of 5"
    assert words[-1].endswith("14 48.3 % 2 of 8")
    assert "1 of 4 tensors are zero" in words[-1]
    assert max(map(len, lines)) <= 80


def test_a_name_in_brackets_is_kept():
    model = nn.ParameterDict({"[bold]": torch.zeros(2)})
    assert "[bold]" in str(adamprox.sparsity(model))


def test_another_models_type_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but is a list"):
        adamprox.sparsity([])


# Freezing.


def train(opt: torch.optim.Optimizer, model: nn.Module, steps: int, step=None) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        opt.zero_grad()
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        (step or opt.step)()


def values(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def make(optimizer: str, model: nn.Module, **arguments) -> torch.optim.Optimizer:
    cls = OPTIMIZERS[optimizer].cls
    return cls(model.parameters(), lr=1e-2, weight_decay=0.01, **arguments)


@every_optimizer
def test_zeros_stay_and_the_others_move_as_without(optimizer):
    model, twin = network(), network()
    opt, other = make(optimizer, model), make(optimizer, twin)
    train(opt, model, 2)  # zeros that are not frozen move
    assert adamprox.sparsity(model).share == 0
    model.load_state_dict(network().state_dict())
    opt.state.clear()
    with adamprox.freeze_zeros(opt):
        train(opt, model, 5)
        train(other, twin, 5)
        assert adamprox.sparsity(model).tensors[0].zeros == 8
        if optimizer != "AdamProxL2":  # whose norms are of all
            for before, ours, theirs in zip(
                values(network()), values(model), values(twin), strict=True
            ):
                assert same_bits(ours, torch.where(before == 0, 0.0, theirs))
    train(opt, model, 1)
    assert adamprox.sparsity(model).share == 0


def test_averages_and_steps_in_backward_keep_them_too():
    model = network()
    opt = make("AdamW", model, ema_decay=0.5)
    train(opt, model, 1)
    with torch.no_grad():
        model[0].weight[:3] = 0.0
    handle = adamprox.freeze_zeros(opt)
    train(opt, model, 2)
    assert (opt.state[model[0].weight]["ema"][:3] == 0).all()
    with adamprox.step_in_backward(model, opt):
        for _ in range(2):
            (model[0](torch.randn(8, 4)).square().sum() + model[2].weight.sum()).backward()
    assert (model[0].weight[:3] == 0).all()
    assert (model[0].weight[3:] != 0).all()
    handle.remove()
    handle.remove()  # again does nothing
    train(opt, model, 1)
    assert (model[0].weight != 0).all()


def test_under_torch_compile():
    model = network()
    before = model[0].weight.clone()
    opt = make("AdamProx", model)
    step = torch.compile(lambda: opt.step(), backend="eager", fullgraph=True)
    with adamprox.freeze_zeros(opt):
        train(opt, model, 3, step)
        assert adamprox.sparsity(model).tensors[0].zeros == 8
    assert (model[0].weight != before).sum() == before.count_nonzero()


def test_a_replaced_param_is_not_kept_alive_and_moves():
    model = network()
    opt = make("AdamW", model)
    adamprox.freeze_zeros(opt)
    old = weakref.ref(model[0].weight)
    model[0].weight = nn.Parameter(torch.zeros(5, 4))
    opt.param_groups[0]["params"][0] = model[0].weight
    opt.state.clear()
    gc.collect()
    assert old() is None
    train(opt, model, 1)
    assert (model[0].weight != 0).all()


def test_a_param_of_another_shape_is_refused_by_name_and_nothing_is_updated():
    model = network()
    opt = make("AdamW", model)
    handle = adamprox.freeze_zeros(opt)
    train(opt, model, 1)
    for key in (None, "exp_avg", "exp_avg_sq"):  # as pruning of rows does
        tensor = model[0].weight if key is None else opt.state[model[0].weight][key]
        tensor.data = tensor.data[:4].clone()
    model[0].weight.grad = torch.ones(4, 4)
    before = values(model)
    with pytest.raises(RuntimeError, match=r"params'\]\[0\] has shape \(4, 4\), and had \(5, 4\)"):
        opt.step()
    assert all(map(torch.equal, before, values(model)))
    handle.remove()
    opt.step()


def test_ctrl_c_leaves_no_zero_moved(monkeypatch, request):
    model = network()
    opt = make("AdamW", model)
    handle = adamprox.freeze_zeros(opt)
    keep = handle.keep

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        keep(*args)

    monkeypatch.setattr(handle, "keep", interrupted)
    # A shell's background jobs ignore it.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))
    with pytest.raises(KeyboardInterrupt):
        train(opt, model, 1)
    assert adamprox.sparsity(model).tensors[0].zeros == 8
    assert (model[0].weight != network()[0].weight).any()


def test_it_is_refused_twice_and_for_others():
    model = network()
    opt = make("AdamW", model)
    adamprox.freeze_zeros(opt)
    with pytest.raises(RuntimeError, match="frozen already"):
        adamprox.freeze_zeros(opt)
    with pytest.raises(TypeError, match=r"optimizer must be one of adamprox's, but is a .*SGD"):
        adamprox.freeze_zeros(torch.optim.SGD(model.parameters(), lr=1.0))


def test_a_pruned_network_is_fine_tuned():
    """l1 to zeros, then AdamW on what is left: the zeros stay the same."""
    torch.manual_seed(0)
    model = nn.Linear(20, 1)
    x = torch.randn(200, 20)
    y = x[:, :3].sum(1, keepdim=True)

    def fit(opt, steps):
        for _ in range(steps):
            opt.zero_grad()
            (model(x) - y).square().mean().backward()
            opt.step()
        return (model(x) - y).square().mean().item()

    pruned = fit(adamprox.AdamProxL1(model.parameters(), lr=1e-2, weight_decay=0.5), 400)
    zeros = [param == 0 for param in model.parameters()]
    assert 0.2 < adamprox.sparsity(model).tensors[0].share < 1
    opt = adamprox.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    with adamprox.freeze_zeros(opt):
        assert fit(opt, 400) < pruned
    assert all(torch.equal(zero, p == 0) for zero, p in zip(zeros, model.parameters(), strict=True))
