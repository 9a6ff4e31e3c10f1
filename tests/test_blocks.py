"""Blocks of AdamProxL2: rows, several rows, and whole groups; their norms and their scaling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adamprox
import equations
import registry
from adamprox.reference import CHUNK_SIZE
from registry import BACKENDS, DTYPES, params_of, same_bits
from test_capturable import randn, set_grads
from test_mathematics import U
from test_optimizer import refusals

every_backend = pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
every_block = pytest.mark.parametrize("block", ["tensor", "row", 2, 3, "group"])
both_scalings = pytest.mark.parametrize("scaling", ["none", "sqrt"])

# Rows around what vectors, warps, tiles and chunks have; several chunks, odd and even.
ROWS = (
    *((1, 3), (20, 1), (3, 5, 2), (41, 9), (700, 31), (9, 32), (9, 33), (3, 64)),
    *((17, 255), (4, 257), (5, 1023), (3, 1025), (9, 2048), (3, 2049), (2, 5000)),
    *((3, CHUNK_SIZE - 1), (2, CHUNK_SIZE), (3, CHUNK_SIZE + 1), (2, 2 * CHUNK_SIZE + 5)),
    *((), (0, 3), (7,), (CHUNK_SIZE + 3,), (5 * CHUNK_SIZE, 1), (70_001,)),
)
FEW_ROWS = ((20, 1), (41, 9), (9, 33), (5, 300), (3, 2049), (2, CHUNK_SIZE + 1), (), (0, 3), (7,))


@every_block
@both_scalings
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_rows_of_every_size_give_the_references_bits(backend, dtype, block, scaling):
    param_dtype, state = DTYPES[dtype]
    shapes = ROWS if backend == "cpu" else FEW_ROWS
    values = [randn(i, shape, param_dtype) for i, shape in enumerate(shapes)]
    # Times lr: what some of the blocks have as a norm, whose elements are about 1.
    strength = 30.0 if scaling == "sqrt" else {"tensor": 300.0, "group": 1000.0}.get(block, 100.0)
    option = registry.Option({"block": block, "block_scaling": scaling, "weight_decay": strength})
    pair = [registry.build("AdamProxL2", values, option, n, state) for n in (backend, "reference")]
    for step in range(2):
        for opt in pair:
            set_grads(opt, step)
            opt.step()
        registry.assert_same_bits(*pair)


def pieces(param: Tensor, block) -> list[Tensor]:
    """The blocks of one param, as rows of numbers."""
    if block in ("tensor", "group") or param.dim() == 0:
        return [param.reshape(-1)]
    rows = 1 if block == "row" else block
    return [piece.reshape(-1) for piece in param.split(rows)] if len(param) else []


def step_of(params: list[Tensor], grads: list[Tensor], **options) -> tuple[list, list]:
    """z and x of one step, whose z is ``param - grad / (abs(grad) + eps)``."""
    ours = [nn.Parameter(param.clone()) for param in params]
    for param, grad in zip(ours, grads, strict=True):
        param.grad = grad
    adamprox.AdamProxL2(ours, lr=1.0, eps=0.125, betas=(0.0, 0.5), **options).step()
    z = [p - g / (g.abs() + 0.125) for p, g in zip(params, grads, strict=True)]
    return z, [param.detach() for param in ours]


def doubles(seed: int, *shapes) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@every_block
@both_scalings
@pytest.mark.parametrize("s", [0.0, 0.5, 2.0, 40.0])
def test_it_is_the_argmin_and_moreaus_identity_holds(s, scaling, block):
    """x minimizes 1/2 |x - z|^2 + s |x| of each block; z - x is z's projection on the ball of s."""
    shapes = ((5, 3), (7, 2, 2), (4,), ())
    params, grads = doubles(0, *shapes), doubles(1, *shapes)
    options = {"block": block, "block_scaling": scaling, "weight_decay": s}
    z, x = step_of(params, grads, **options)
    blocks = [(pieces(a, block), pieces(b, block)) for a, b in zip(z, x, strict=True)]
    pairs = [pair for a, b in blocks for pair in zip(a, b, strict=True)]
    if block == "group":
        pairs = [tuple(torch.cat(part) for part in zip(*pairs, strict=True))]
    vanished = 0
    for z_b, x_b in pairs:
        s_b = s * (math.sqrt(len(z_b)) if scaling == "sqrt" else 1)
        rounding = 64 * U * (1 + s_b) * (1 + z_b.norm() ** 2)
        dual = z_b * min(1.0, s_b / z_b.norm().item())
        assert (x_b + dual - z_b).norm() <= rounding
        for other in (
            z_b,
            0 * z_b,
            1.001 * x_b,
            *(x_b + 10.0**-k * dual.flip(0) for k in range(6)),
        ):
            difference = sum(
                sign * ((y - z_b).norm() ** 2 / 2 + s_b * y.norm())
                for sign, y in ((1, other), (-1, x_b))
            )
            assert difference - (other - x_b).norm() ** 2 / 2 >= -rounding
        vanished += bool((x_b == 0).all())
    assert vanished == {0.0: 0, 40.0: len(pairs)}.get(s, vanished)


def prox_l2(params, updates, _, group):
    """The design's step of the params of a group."""
    s = equations.rate(group) * group["weight_decay"]
    by_size, together = group["block_scaling"] == "sqrt", group["block"] == "group"
    new = [torch.from_numpy(np.array(x - u)) for x, u in zip(params, updates, strict=True)]
    blocks = [block.numpy() for z in new for block in pieces(z, group["block"])]  # views of z
    norms = [np.sqrt((block**2).sum()) for block in blocks]
    sizes = [block.size for block in blocks]
    if together:
        norms = [np.sqrt(sum(norm**2 for norm in norms))] * len(blocks)
        sizes = [sum(sizes)] * len(blocks)
    for block, norm, size in zip(blocks, norms, sizes, strict=True):
        strength = s * np.sqrt(size) if by_size else s
        block *= max(1 - strength / norm, 0) if norm > 0 else 0
    return [z.numpy() for z in new]


KINDS = (
    {"block": "row", "weight_decay": 3.0},
    {"block": 2, "block_scaling": "sqrt", "weight_decay": 2.0, "maximize": True},
    {"block": "group", "weight_decay": 30.0, "amsgrad": True, "betas": (0.5, 0.75)},
    {"block": "group", "block_scaling": "sqrt", "weight_decay": 3.0},
    {"block": "row", "decay_by": "schedule", "initial_lr": 0.25, "block_scaling": "sqrt"},
)


@pytest.mark.parametrize("dtype", DTYPES)
@every_backend
def test_it_is_the_designs_equation_in_every_dtype(backend, dtype):
    shapes = [shape for shape in ((3, 5), (6, 2, 2), (7,), ()) for _ in KINDS]
    option = registry.Option({"weight_decay": 1.0}, KINDS)
    equations.check("AdamProxL2", backend, dtype, option, shapes, prox_l2)


@every_block
@both_scalings
def test_it_is_scale_free(block, scaling):
    """With eps=0, a power of two for each coordinate's gradients changes no bit."""
    values = [randn(0, (9, 4), torch.float32), randn(1, (5,), torch.float32)]
    option = {"block": block, "block_scaling": scaling, "weight_decay": 0.25}
    runs = []
    for scaled in (False, True):
        params = [nn.Parameter(value.clone()) for value in values]
        opt = adamprox.AdamProxL2(params, lr=0.125, eps=0.0, **option)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            for param in params:
                factor = torch.arange(param.numel()).view(param.shape) % 21 - 10
                grad = torch.randn(param.shape, generator=generator)
                param.grad = torch.ldexp(grad, factor) if scaled else grad
            opt.step()
        runs.append(params)
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(*runs, strict=True))
    assert all(param.count_nonzero() > 1 for param in runs[0])


@every_backend
def test_one_block_has_the_bits_of_the_tensor(backend):
    values = [randn(i, (6, CHUNK_SIZE // 4 + 1), torch.float32) for i in range(2)]
    runs = []
    for block in ("tensor", 6, 100, "group"):
        option = registry.Option({"block": block, "weight_decay": 30.0})
        opts = [registry.build("AdamProxL2", [v], option, backend, None) for v in values]
        for opt in opts:
            set_grads(opt, 1)
            opt.step()
        runs.append([params_of(opt)[0].detach() for opt in opts])
    for run in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(run, runs[0], strict=True))


@every_backend
def test_a_change_takes_effect_at_the_next_step(backend):
    values = [randn(i, (700, 31), torch.float32) for i in range(2)]
    option = registry.Option({"weight_decay": 100.0})
    pair = [registry.build("AdamProxL2", values, option, n, None) for n in (backend, "reference")]
    for step, block in enumerate(("row", "tensor", 7, "group", "row", 2)):
        for opt in pair:
            opt.param_groups[0]["block"] = block
            opt.param_groups[0]["block_scaling"] = ("none", "sqrt")[step % 2]
            set_grads(opt, step)
            opt.step()
        registry.assert_same_bits(*pair)


@every_backend
def test_a_group_without_some_grads_is_a_block_of_the_others(backend):
    """The others are not shrunk."""
    first, second, third = (nn.Parameter(v) for v in doubles(3, (5, 2), (3,), (4,)))
    first.grad, third.grad = torch.ones_like(first), torch.ones_like(third)
    before = second.detach().clone()
    options = {"lr": 0.5, "block": "group", "block_scaling": "sqrt", "weight_decay": 0.5}
    z = [p.detach() - 0.5 / (1 + 1e-8) for p in (first, third)]
    adamprox.AdamProxL2([first, second, third], backend=backend, **options).step()
    assert torch.equal(second.detach(), before)
    norm = torch.cat([part.reshape(-1) for part in z]).norm()
    for param, part in zip((first, third), z, strict=True):
        wanted = part * max(1 - 0.25 * math.sqrt(14) / norm, 0)
        torch.testing.assert_close(param.detach(), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_tracked_steps_note_chunks_of_any_size(backend):
    shapes = ROWS if backend == "cpu" else FEW_ROWS
    values = [randn(i, shape, torch.float32) for i, shape in enumerate(shapes)]
    groups = ({"block": "row"}, {"block": 3, "ema_decay": 0.5}, {"block": "group"})
    stats = []
    for name in (backend, "reference"):
        option = registry.Option({"weight_decay": 100.0}, groups)
        opt = registry.build("AdamProxL2", values, option, name, None)
        opt.track_updates(per="tensor")
        set_grads(opt, 1)
        opt.step()
        stats.append((opt.update_stats(), opt))
    (ours, opt), (theirs, reference) = stats
    registry.assert_same_bits(opt, reference)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for field in ("bins", "param_norm", "update_norm", "zeros", "nans", "infs"):
            assert torch.equal(getattr(a, field), getattr(b, field)), (a.name, field)


BAD = {
    "name": ({"block": "column"}, ValueError, "Invalid block: 'column'"),
    "zero": ({"block": 0}, ValueError, "Invalid block: 0"),
    "negative": ({"block": -2}, ValueError, "Invalid block: -2"),
    "bool": ({"block": True}, ValueError, "Invalid block: True"),
    "fraction": ({"block": 1.5}, ValueError, r"Invalid block: 1\.5"),
    "none": ({"block": None}, ValueError, "Invalid block: None"),
    "scaling": ({"block_scaling": "root"}, ValueError, "Invalid block_scaling: 'root'"),
}


@pytest.mark.parametrize(("options", "error", "match"), BAD.values(), ids=BAD)
def test_bad_values_are_refused(options, error, match):
    refusals("AdamProxL2", options, error, match)


@pytest.mark.parametrize("block", ["column", 0, 1.5, True])
@every_backend
def test_a_bad_block_in_a_group_is_refused_and_nothing_is_updated(backend, block):
    param = nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2)
    opt = adamprox.AdamProxL2([param], backend=backend)
    opt.param_groups[0]["block"] = block
    with pytest.raises(ValueError, match=r"Invalid block.*nothing was updated"):
        opt.step()
    assert torch.equal(param.detach(), torch.ones(3, 2))
    assert not opt.state


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "AdamProx", "AdamProxL1"])
def test_other_rules_refuse_them_by_name(optimizer):
    cls = registry.OPTIMIZERS[optimizer].cls
    params = [nn.Parameter(torch.ones(2))]
    for option in ({"block": "row"}, {"block_scaling": "sqrt"}):
        with pytest.raises(ValueError, match=f"Invalid {next(iter(option))}"):
            cls([{"params": params, **option}])
        cls([{"params": params, "decay": "prox_l2", **option}])
    cls([{"params": params, "block": "tensor", "block_scaling": "none"}])


def test_what_is_misspelled_or_another_rules_is_told():
    param = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"Invalid key of a param group: 'blok', .*'block'"):
        adamprox.AdamProxL2([{"params": [param], "blok": "row"}])
    for key in ("weight_decays", "lrs", "blocks"):
        with pytest.raises(ValueError, match=f"Invalid key.*: '{key}', did you mean"):
            adamprox.AdamProxL2([{"params": [param], key: 0.3}])
    own = {"lr_scale": 0.5, "weight_decay_mult": 1.0}  # the user's
    adamprox.AdamProxL2([{"params": [param], **own}])
    with pytest.raises(TypeError, match=r"unexpected.*'block', which is an option of.*'prox_l2'"):
        adamprox.AdamW([param], block="row")
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"Invalid rules: 'weight': 0\.1, expected a dict"):
        adamprox.param_groups(model, 0.1, rules={"weight": 0.1})
    with pytest.raises(ValueError, match=r"matches 'w'; a pattern is of whole names, as 'weight'"):
        adamprox.param_groups(model, 0.1, rules={"w": {}})


def test_one_norm_of_params_that_share_memory_is_refused():
    memory = torch.ones(10)
    params = [nn.Parameter(memory[:6]), nn.Parameter(memory[4:])]
    for param in params:
        param.grad = torch.ones_like(param)
    opt = adamprox.AdamProxL2(params, block="group")
    with pytest.raises(RuntimeError, match=r"share memory.*block='group'.*nothing was updated"):
        opt.step()
    assert torch.equal(memory, torch.ones(10))
    # Those of other groups may.
    own = nn.Parameter(torch.ones(3))
    own.grad = torch.ones(3)
    groups = [{"params": params, "block": "tensor"}, {"params": [own], "block": "group"}]
    adamprox.AdamProxL2(groups, lr=0.1).step()
    assert (own != 1).all()
    assert (memory != 1).all()


def test_steps_in_backward_have_rows_but_no_groups():
    model, twin = (nn.Linear(4, 3) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    opts = [adamprox.AdamProxL2(m.parameters(), block="row", lr=0.1) for m in (model, twin)]
    inputs = torch.randn(5, 4)
    with adamprox.step_in_backward(model, opts[0]):
        model(inputs).square().sum().backward()
    twin(inputs).square().sum().backward()
    opts[1].step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())
    opts[0].param_groups[0]["block"] = "group"
    with pytest.raises(ValueError, match=r"param_groups\[0\] has block='group'"):
        adamprox.step_in_backward(model, opts[0])
    opts[0].param_groups[0]["block"] = "row"
    with adamprox.step_in_backward(model, opts[0]):
        opts[0].param_groups[0]["block"] = "group"  # refused later, too
        with pytest.raises(RuntimeError, match="one norm of all its params"):
            model(inputs).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())


def test_a_network_without_its_zero_rows_gives_the_same_outputs():
    """At least a quarter of the hidden neurons; what is left is that much smaller."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    targets = (inputs[:, :2] > 0).float().sum(1, keepdim=True)
    first, second = nn.Linear(8, 64), nn.Linear(64, 1)
    # A neuron's weights and its bias are one row.
    rows = nn.Parameter(torch.cat([first.weight, first.bias[:, None]], 1).detach())
    groups = [{"params": [rows]}, {"params": second.parameters(), "decay": "decoupled"}]
    opt = adamprox.AdamProxL2(groups, lr=1e-2, block="row", weight_decay=0.6)

    def hidden(of_rows: Tensor) -> Tensor:
        return torch.relu(inputs @ of_rows[:, :-1].T + of_rows[:, -1])

    for _ in range(300):
        opt.zero_grad()
        (second(hidden(rows)) - targets).square().mean().backward()
        opt.step()
    kept = (rows != 0).any(1)
    assert 0.25 <= 1 - kept.double().mean() < 1
    with torch.no_grad():
        whole = second(hidden(rows))
        smaller = hidden(rows[kept]) @ second.weight[:, kept].T + second.bias
    torch.testing.assert_close(smaller, whole)
    assert (whole - targets).square().mean() < 0.1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_number_of_rows_may_be_numpys(backend):
    results = []
    for rows in (2, np.int64(2)):
        param = nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
        param.grad = torch.ones_like(param)
        opt = adamprox.AdamProxL2([param], lr=0.1, weight_decay=3.0, block=rows, backend=backend)
        opt.step()
        results.append(param.detach())
    assert same_bits(*results)


@every_backend
@pytest.mark.parametrize("block", ["row", 2, "tensor", "group"])
def test_rows_without_elements(block, backend):
    empty, param = nn.Parameter(torch.empty(5, 0)), nn.Parameter(torch.ones(4, 3))
    opt = adamprox.AdamProxL2([empty, param], lr=0.1, block=block, backend=backend)
    for each in (empty, param):
        each.grad = torch.ones_like(each)
    opt.step()
    assert (param < 1).all()
    assert opt.state[empty]["step"] == 1
