"""Under torch.compile: one graph without a break, made once, that gives the bits of eager steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import adamprox
from adamprox.hyperparameters import states_of
from registry import CELLS, OPTIONS, Option, assert_same_bits, build, params_of

dynamo = pytest.importorskip("torch._dynamo")

STEPS = 50
SHAPES = ((3, 5), (), (7,), (2, 2))
every_compiler = pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
# Inductor's own machinery warns on import of what it itself uses.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh():
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


def graphs() -> int:
    return dynamo.utils.counters["stats"]["unique_graphs"]


def breaks() -> int:
    return sum(dynamo.utils.counters["graph_break"].values())


def randn(seed: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def make(optimizer: str, option: str | Option = "plain") -> torch.optim.Optimizer:
    option = OPTIONS[option] if isinstance(option, str) else option
    values = [randn(i, torch.empty(shape)) for i, shape in enumerate(SHAPES)]
    return build(optimizer, values, option, None, None)


def set_grads(opt: torch.optim.Optimizer, step: int, option: Option = OPTIONS["plain"]) -> None:
    for i, param in enumerate(params_of(opt)):
        param.grad = option.grad_layout(step, i)(randn(100 * step + i, param))


@pytest.mark.parametrize(
    ("optimizer", "option"),
    [cell for cell in CELLS if cell[1] in ("plain", "groups", "amsgrad", "schedule", "rules")],
)
@every_compiler
def test_one_graph_for_every_learning_rate_and_step_count(compiler, optimizer, option):
    compiled, eager = (make(optimizer, option) for _ in range(2))
    step = torch.compile(lambda: compiled.step(), backend=compiler, fullgraph=True)
    for i in range(STEPS):
        for opt in (compiled, eager):
            for group in opt.param_groups:
                group["lr"] = 1e-2 / (1 + i)
                group["betas"] = (0.9 - i / 100, 0.99)
            set_grads(opt, i)
        step()
        eager.step()
        assert_same_bits(compiled, eager)
    assert graphs() == 1
    assert breaks() == 0


def test_with_inductor():
    compiled, eager = (make("AdamProxL2", "groups") for _ in range(2))
    step = torch.compile(lambda: compiled.step(), fullgraph=True)
    for i in range(5):
        for opt in (compiled, eager):
            opt.param_groups[0]["lr"] = 1e-2 / (1 + i)
            set_grads(opt, i)
        step()
        eager.step()
    assert_same_bits(compiled, eager)
    assert graphs() == 1


@pytest.mark.parametrize("fullgraph", [False, True])
@every_compiler
def test_a_whole_train_step(compiler, fullgraph):
    """Dynamo breaks at backward(), if it is not asked to trace it, and never in our code."""
    models = [torch.nn.Linear(4, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [adamprox.AdamProxL1(m.parameters(), lr=0.1, weight_decay=0.3) for m in models]

    def train_step(model, opt, x):
        model(x).square().mean().backward()
        opt.step()

    traces_backward = {"trace_autograd_ops": fullgraph}
    if not hasattr(dynamo.config, "trace_autograd_ops"):  # as in torch 2.10
        if fullgraph:
            pytest.skip("this torch traces no backward")
        traces_backward = {}
    compiled = torch.compile(train_step, backend=compiler, fullgraph=fullgraph)
    for i in range(10):
        for opt in optimizers:
            opt.param_groups[0]["lr"] = 0.1 / (1 + i)
            opt.zero_grad()
        x = randn(i, torch.empty(8, 4))
        with dynamo.config.patch(**traces_backward):
            compiled(models[0], optimizers[0], x)
        train_step(models[1], optimizers[1], x)
    assert_same_bits(*optimizers)
    assert graphs() == (1 if fullgraph else 2)
    assert breaks() == (0 if fullgraph else 1)
    assert all("Tensor.backward()" in reason for reason in dynamo.utils.counters["graph_break"])


@every_compiler
def test_grads_made_in_the_graph(compiler):
    """A step and what makes its grads in one graph: the op's tensors are the graph's, not .grad."""
    compiled, eager = (make("AdamW") for _ in range(2))

    def step(opt, x):
        for param in opt.param_groups[0]["params"]:
            param.grad = torch.cos(param.detach() * x)
        opt.step()
        for param in opt.param_groups[0]["params"]:
            param.grad = None

    both = torch.compile(step, backend=compiler, fullgraph=True)
    for i in range(4):
        both(compiled, torch.tensor(1.0 + i))
        step(eager, torch.tensor(1.0 + i))
    # cos is the compiler's to compute.
    for ours, theirs in zip(params_of(compiled), params_of(eager), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert compiled.state[ours]["step"] == 4


@every_compiler
def test_a_learning_rate_set_in_the_compiled_function_is_not_ignored(compiler):
    """It is stored after the graph has run, so the graph ends before the step."""
    compiled, eager = (make("AdamW") for _ in range(2))

    def step(opt, lr):
        opt.param_groups[0]["lr"] = lr
        opt.step()

    broken = torch.compile(step, backend=compiler)
    for i in range(3):
        set_grads(compiled, i)
        set_grads(eager, i)
        broken(compiled, 0.5 / (1 + i))
        step(eager, 0.5 / (1 + i))
    assert_same_bits(compiled, eager)


@every_compiler
def test_changes_between_steps_are_seen(compiler):
    """Grads that come and go, states that are loaded, groups that are added."""
    compiled, eager = (make("AdamProx", "groups") for _ in range(2))
    step = torch.compile(lambda: compiled.step(), backend=compiler, fullgraph=True)
    added = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for i in range(12):
        for opt, new in zip((compiled, eager), added, strict=True):
            set_grads(opt, i)
            new.grad = randn(i, new)
            if i in (3, 4):
                params_of(opt)[i - 3].grad = None
            if i == 6:
                opt.load_state_dict(opt.state_dict())
            if i == 8:
                opt.add_param_group({"params": [new], "weight_decay": 1.0})
        step()
        eager.step()
    for group, other in zip(compiled.param_groups, eager.param_groups, strict=True):
        for ours, theirs in zip(group["params"], other["params"], strict=True):
            assert torch.equal(ours, theirs)
            assert compiled.state[ours]["step"] == eager.state[theirs]["step"]
    assert torch.equal(*added)
    assert not torch.equal(added[0], torch.ones(3))


@every_compiler
def test_a_rule_or_an_option_that_changes_is_seen(compiler):
    compiled, eager = (make("AdamProx") for _ in range(2))
    step = torch.compile(lambda: compiled.step(), backend=compiler, fullgraph=True)
    changes = ({"decay": "prox_l1"}, {"amsgrad": True}, {"decay": "prox_l2"}, {"amsgrad": False})
    for i, change in enumerate(({}, *changes, {"maximize": True})):
        for opt in (compiled, eager):
            for state in opt.state.values():
                state.setdefault("max_exp_avg_sq", state["exp_avg_sq"].clone())
            opt.param_groups[0].update(change)
            set_grads(opt, i)
        step()
        eager.step()
        assert_same_bits(compiled, eager)


@pytest.mark.parametrize("option", ["strided", "maximize"])
@every_compiler
def test_options(compiler, option):
    option = OPTIONS[option]
    compiled, eager = (make("AdamProxL2", option) for _ in range(2))
    step = torch.compile(lambda: compiled.step(), backend=compiler, fullgraph=True, dynamic=False)
    for i in range(3):
        for opt in (compiled, eager):
            set_grads(opt, i, option)
        step()
        eager.step()
    assert_same_bits(compiled, eager)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@every_compiler
def test_a_scaled_step(compiler, found_inf):
    compiled, eager = (make("AdamW") for _ in range(2))
    step = torch.compile(lambda: compiled.step(), backend=compiler, fullgraph=True)
    before = [param.detach().clone() for param in params_of(eager)]
    for opt in (compiled, eager):
        set_grads(opt, 0)
        opt.grad_scale, opt.found_inf = torch.tensor(3.0), torch.tensor(found_inf)
    step()
    eager.step()
    assert_same_bits(compiled, eager)
    unchanged = all(map(torch.equal, before, params_of(compiled)))
    assert unchanged == (found_inf != 0)


@every_compiler
def test_hooks_run(compiler):
    opt, calls = make("AdamW"), []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    step = torch.compile(lambda: opt.step(), backend=compiler)
    for i in range(2):
        set_grads(opt, i)
        step()
    assert calls == ["pre", "post"] * 2


@every_compiler
def test_a_step_that_raises_leaves_the_grad_mode_as_it_was(compiler):
    opt = make("AdamW")
    step = torch.compile(lambda: opt.step(), backend=compiler, fullgraph=True)
    set_grads(opt, 0)
    step()
    for state in opt.state.values():
        state["step"].fill_(-1)
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            with pytest.raises(RuntimeError, match="step count"):
                step()
            assert torch.is_grad_enabled() is mode


def test_no_grads_no_op():
    opt = make("AdamW")
    torch.compile(lambda: opt.step(), backend="eager", fullgraph=True)()
    assert len(opt.state) == 0


def test_a_compiled_step_does_not_keep_the_optimizer_alive():
    import gc
    import weakref

    opt = make("AdamW")
    set_grads(opt, 0)
    step = torch.compile(opt.step, backend="eager")
    step()
    alive = weakref.ref(opt)
    del opt, step
    dynamo.reset()
    gc.collect()
    assert alive() is None


def test_opcheck():
    """torch's own checks of a custom op's declaration."""
    from adamprox import compiled

    opt = make("AdamW")
    set_grads(opt, 0)
    params = params_of(opt)
    handle = compiled.handle_with_states(opt, range(len(params)))
    [group] = opt.param_groups
    states = [opt.state[param][state.key] for param in params for state in states_of(group)]
    assert len(states) >= 2 * len(params)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    with torch.no_grad():
        torch.library.opcheck(
            compiled.step_op,
            (
                [param.detach() for param in params],
                [param.grad for param in params],
                states,
                None,
                None,
                list(range(len(params))),
                handle,
                True,
            ),
            test_utils=tests,
        )


@every_compiler
def test_a_closure_makes_the_grads_and_its_loss_is_returned(compiler):
    compiled, eager = (make("AdamW") for _ in range(2))

    def step(opt, x):
        def closure():
            for param in params_of(opt):
                param.grad = param.detach() * x
            return x.square()

        return opt.step(closure)

    both = torch.compile(step, backend=compiler, fullgraph=True)
    for i in range(3):
        x = torch.tensor(1.0 + i)
        assert both(compiled, x) == step(eager, x) == x.square()
        for opt in (compiled, eager):
            for param in params_of(opt):
                param.grad = None
    assert_same_bits(compiled, eager)
