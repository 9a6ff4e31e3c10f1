"""What the paper says of the update rules, as properties of the optimizers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from registry import OPTIMIZERS, PROXIMAL, rounding_bound, same_bits

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
every_prox = pytest.mark.parametrize("optimizer", PROXIMAL)
every_strength = pytest.mark.parametrize("s", [0.0, 2**-7, 0.5, 3.0])

U = torch.finfo(torch.float64).eps / 2  # the largest relative error of one rounding


def one_step(optimizer: str, x: Tensor, grad: Tensor, **arguments) -> Tensor:
    param = torch.nn.Parameter(x.clone())
    param.grad = grad
    OPTIMIZERS[optimizer].cls([param], **arguments).step()
    return param.detach()


def prox(optimizer: str, z: Tensor, s: float) -> Tensor:
    """The decay alone: without a gradient, Adam's direction stays at z."""
    return one_step(optimizer, z, torch.zeros_like(z), lr=1.0, weight_decay=s)


def points(count: int, dim: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(count, dim, generator=generator, dtype=torch.float64)


# The proximal operators.


@every_strength
@every_prox
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_prox_is_the_argmin(optimizer, dim, s):
    """F(x) - F(prox) >= |x - prox|^2 / 2 for all x, since F is 1-strongly convex.

    It holds at the minimum only: elsewhere F has a slope, and falls below the parabola along it.
    """
    penalty = OPTIMIZERS[optimizer].penalty

    def objective(x: Tensor, z: Tensor) -> Tensor:
        return (x - z).square().sum(-1) / 2 + s * penalty.value(x)

    grid = torch.linspace(-4, 4, 801, dtype=torch.float64)[:, None].expand(-1, dim)
    for z in points(20, dim, scale=2.0):
        p = prox(optimizer, z, s)
        nearby = [p + points(50, dim, scale=10.0**-k) for k in range(6)]
        for x in (grid, torch.zeros_like(z), z, *nearby):
            gap = objective(x, z) - objective(p, z) - (x - p).square().sum(-1) / 2
            rounding = 8 * dim * U * (objective(x, z) + objective(p, z))
            assert (gap >= -rounding).all()


@every_strength
@every_prox
def test_moreau_identity(optimizer, s):
    """Z = prox of s h + prox of its conjugate."""
    for z in points(20, 5, scale=2.0):
        rest = OPTIMIZERS[optimizer].penalty.conjugate_prox(z, s)
        error = (prox(optimizer, z, s) + rest - z).abs()
        assert (error <= 8 * U * z.abs()).all()


@every_strength
@every_prox
def test_prox_is_firmly_non_expansive(optimizer, s):
    zs = points(20, 5, scale=2.0)
    ps = torch.stack([prox(optimizer, z, s) for z in zs])
    dz, dp = zs[:, None] - zs, ps[:, None] - ps
    assert (dp.square().sum(-1) <= (dp * dz).sum(-1) + 64 * U).all()


@every_strength
@every_prox
def test_prox_is_odd_to_the_bit(optimizer, s):
    z = points(1, 1000, scale=2.0)[0]
    assert same_bits(prox(optimizer, -z, s), -prox(optimizer, z, s))


@every_prox
def test_without_decay_prox_is_the_identity_to_the_bit(optimizer):
    z = points(1, 1000)[0]
    assert same_bits(prox(optimizer, z, 0.0), z)


@every_strength
@every_prox
def test_prox_of_a_block_of_zeros_is_zero(optimizer, s):
    for zero in (0.0, -0.0):
        z = torch.full((9,), zero, dtype=torch.float64)
        assert torch.equal(prox(optimizer, z, s), z)


REAL_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)


@REAL_DTYPES
def test_prox_l1_is_zero_exactly_up_to_s(dtype):
    s = torch.tensor(0.375, dtype=dtype)
    above = torch.nextafter(s, torch.ones_like(s))
    below = torch.nextafter(s, torch.zeros_like(s))
    z = torch.stack([s, below, s * 0, above, s + 1])
    p = prox("AdamProxL1", z, s.item())
    assert torch.equal(p == 0, torch.tensor([True, True, True, False, False]))
    assert torch.equal(p[3:], torch.stack([above - s, torch.ones_like(s)]))


@REAL_DTYPES
def test_prox_l2_is_zero_exactly_up_to_norm_s(dtype):
    z = torch.tensor([3.0, -4.0], dtype=dtype)
    assert torch.equal(prox("AdamProxL2", z, 5.0), torch.zeros_like(z))
    assert torch.equal(prox("AdamProxL2", z, 6.0), torch.zeros_like(z))
    assert (prox("AdamProxL2", z, math.nextafter(5.0, 0.0)) != 0).all() or dtype.itemsize < 8
    assert (prox("AdamProxL2", z, 4.96875) != 0).all()


def test_prox_l1_keeps_nan_infinity_and_the_sign_of_zero():
    z = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, -0.25])
    expected = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, -0.0])
    assert same_bits(prox("AdamProxL1", z, 0.5), expected)


# The update rules of the paper.


def paper(optimizer: str, x: Tensor, grads: Tensor, alpha: float, etas, lam: float) -> Tensor:
    """The paper's Algorithm 1, or its equation (5) or section 5 in place of line 8."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    spec = OPTIMIZERS[optimizer]
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, (g, eta) in enumerate(zip(grads, etas, strict=True), start=1):
        g = g + lam * x if spec.coupled else g
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        x = spec.rule(x, eta * alpha * m_hat / (v_hat.sqrt() + eps), eta * lam)
    return x


@every_optimizer
@pytest.mark.parametrize("decay_by", ["lr", "schedule"])
def test_the_paper_line_by_line(optimizer, decay_by):
    """With lr = eta_t alpha, the decay is eta_t lambda by schedule, and alpha times that by lr."""
    spec, alpha, lam, steps = OPTIMIZERS[optimizer], 0.05, 0.02, 60
    etas = [(1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)]
    x0, *grads = points(steps + 1, 40)
    param = torch.nn.Parameter(x0.clone())
    by_schedule = decay_by == "schedule" or spec.coupled
    weight_decay = lam if by_schedule else lam / alpha
    opt = spec.cls([param], lr=alpha, weight_decay=weight_decay, decay_by=decay_by)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: etas[min(t, steps - 1)])
    for g in grads:
        param.grad = g.clone()
        opt.step()
        scheduler.step()
    expected = paper(optimizer, x0, grads, alpha, etas, lam)
    bound = rounding_bound(steps, x0.abs().max().item(), alpha, torch.float64)
    assert (param - expected).abs().max() <= bound
    other = paper(optimizer, x0, grads, alpha, etas, 0.99 * lam)
    assert (expected - other).abs().max() > 1e6 * bound


@pytest.mark.parametrize("arguments", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", [name for name, spec in OPTIMIZERS.items() if spec.twin])
def test_twin_in_torch(optimizer, dtype, arguments):
    spec, steps, lr = OPTIMIZERS[optimizer], 50, 1e-2
    x0, *grads = points(steps + 1, 200).to(dtype)
    ours, theirs = torch.nn.Parameter(x0.clone()), torch.nn.Parameter(x0.clone())
    arguments = {"lr": lr, "weight_decay": spec.weight_decay, **arguments}
    opts = spec.cls([ours], **arguments), spec.twin([theirs], foreach=False, **arguments)
    for g in grads:
        for param, opt in zip((ours, theirs), opts, strict=True):
            param.grad = g.clone()
            opt.step()
    bound = rounding_bound(steps, x0.abs().max().item(), lr, dtype)
    assert (ours - theirs).abs().max() <= bound
    assert (ours - x0).abs().max() > 1e3 * bound


def test_adamw_is_the_first_order_taylor_expansion_of_adamprox():
    """With u the update at eta = 1 and lambda the decay, the remainder of (4) to (5) is

    ``eta^2 lambda (lambda x + u) / (1 + eta lambda)``: of slope 2 in eta, in log-log, to within
    ``log2((1 + eta lambda) / (1 + eta lambda / 2)) < eta lambda``.
    """
    x, grad, lam = *points(2, 100), 0.5
    etas = [2.0**-k for k in range(2, 14)]
    remainders = [
        torch.dist(
            one_step("AdamW", x, grad, lr=eta, weight_decay=lam),
            one_step("AdamProx", x, grad, lr=eta, weight_decay=lam),
        ).item()
        for eta in etas
    ]
    for eta, larger, smaller in zip(etas, remainders, remainders[1:], strict=False):
        rounding = 8 * U * x.norm().item() / smaller
        assert 2 - eta * lam - rounding < math.log2(larger / smaller) < 2 + rounding


# Scale-freeness.


def iterates(
    optimizer: str, scale: Tensor, dtype: torch.dtype, weight_decay: float, **options
) -> Tensor:
    """Of f with gradient ``scale * (x - target)``, and noise of the same scale."""
    x0, target, *noise = points(102, 64).to(dtype)
    param = torch.nn.Parameter(x0.clone())
    opt = OPTIMIZERS[optimizer].cls([param], lr=1e-2, eps=0.0, weight_decay=weight_decay, **options)
    history = []
    for n in noise:
        param.grad = scale.to(dtype) * (param.detach() - target + n)
        opt.step()
        history.append(param.detach().clone())
    return torch.stack(history)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("optimizer", "decays", "free"),
    [
        (name, decays, not (spec.coupled and decays))
        for name, spec in OPTIMIZERS.items()
        for decays in (True, False)
    ],
    ids=lambda value: value if isinstance(value, str) else "yes" if value else "no",
)
def test_scale_freeness_to_the_bit(optimizer, decays, free, dtype):
    """With eps = 0, a power of two times each coordinate of all gradients changes nothing."""
    weight_decay = OPTIMIZERS[optimizer].weight_decay * decays
    exponents = torch.arange(64) % 41 - 20
    scale = torch.ldexp(torch.ones(64), exponents)
    plain = iterates(optimizer, torch.ones(64), dtype, weight_decay)
    scaled = iterates(optimizer, scale, dtype, weight_decay)
    assert same_bits(plain, scaled) == free
    assert plain[-1].isfinite().all()


def test_cautious_decay_is_scale_free_to_the_bit():
    """It looks at signs alone."""
    scale = torch.ldexp(torch.ones(64), torch.arange(64) % 41 - 20)
    arguments = torch.float32, 30.0
    plain, scaled = (
        iterates("AdamW", s, *arguments, cautious=True) for s in (torch.ones(64), scale)
    )
    assert same_bits(plain, scaled)
    assert not same_bits(plain, iterates("AdamW", scale, *arguments))


# Precision.


def test_error_against_float64_is_no_larger_than_torchs():
    """After 2000 steps in float32: a factor near 1 is applied as a subtraction, rounding once."""
    steps, arguments = 2000, {"lr": 1e-3, "weight_decay": 0.1}
    x0 = points(1, 1000)[0].float()
    runs = {
        "ours": (OPTIMIZERS["AdamW"].cls, torch.float32, {}),
        "torch's": (torch.optim.AdamW, torch.float32, {"foreach": False}),
        "exact": (torch.optim.AdamW, torch.float64, {"foreach": False}),
    }
    params = {name: torch.nn.Parameter(x0.to(dtype)) for name, (_, dtype, _) in runs.items()}
    opts = {
        name: cls([params[name]], **arguments, **options)
        for name, (cls, _, options) in runs.items()
    }
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        grad = torch.randn(x0.shape, generator=generator)
        for name, opt in opts.items():
            params[name].grad = grad.to(params[name].dtype)
            opt.step()
    errors = {name: (param - params["exact"]).abs() for name, param in params.items()}
    assert errors["ours"].max() <= errors["torch's"].max()
    assert errors["ours"].mean() <= errors["torch's"].mean()
