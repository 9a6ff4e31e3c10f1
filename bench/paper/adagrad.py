"""The appendix: Algorithms 2 and 3, with the bounds of Theorems 2 and 3 checked in numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

PROBLEMS = 6
# Condition number: dimensions. A round has 32 * dimensions * condition number steps.
DIMENSIONS = {1.0: 8, 1e2: 8, 1e4: 2}


class Quadratics(NamedTuple):
    """``f(x) = 1/2 (x - x*)^T H (x - x*)``, several problems at once.

    ``hessians`` is (problems, d, d), ``minimizers`` (problems, d); float64.
    """

    hessians: Tensor
    minimizers: Tensor


class Run(NamedTuple):
    """What Algorithm 2 leaves: mean, (problems, d); regret against x* and its bound, (problems,).

    The regret is ``sum_t f(x_t) - f(x*)``, the bound Theorem 2's (6).
    """

    mean: Tensor
    regret: Tensor
    bound: Tensor


class Round(NamedTuple):
    """A round of Algorithm 3; each the worst of all problems.

    Attributes:
        distance: ``norm_inf(xbar_i - x*)^2``.
        bound: ``D_inf^2 / 4^i``, Theorem 3's for the rounds so far.
        regret_share: the regret as a share of Theorem 2's bound.
        inside: whether x* was in the round's hypercube, which the proof needs.
    """

    condition_number: float
    dimensions: int
    round: int
    steps: int
    distance: float
    bound: float
    regret_share: float
    inside: bool


def quadratics(condition_number: float, dimensions: int, seed: int = 0) -> Quadratics:
    """Half of them with a diagonal Hessian, half rotated; eigenvalues from 1 to the number."""
    random = torch.Generator().manual_seed(seed)
    powers = torch.rand(PROBLEMS, dimensions, generator=random, dtype=torch.float64)
    powers[:, 0], powers[:, -1] = 0.0, 1.0
    hessians = torch.diag_embed(condition_number**powers)
    shape = (PROBLEMS // 2, dimensions, dimensions)
    basis = torch.linalg.qr(torch.randn(shape, generator=random, dtype=torch.float64)).Q
    hessians[::2] = basis @ hessians[::2] @ basis.mT
    minimizers = 2 * torch.rand(PROBLEMS, dimensions, generator=random, dtype=torch.float64) - 1
    return Quadratics(hessians, minimizers)


def adagrad(
    problems: Quadratics,
    start: Tensor,
    radius: float,
    eta: float,
    steps: int,
    diameter: float | None = None,
) -> Run:
    """Algorithm 2: AdaGrad, projected on the hypercube of that radius around ``start``.

    Args:
        start: (problems, d).
        diameter: D_inf in Theorem 2's bound (default: the hypercube's, ``2 * radius``).
    """
    diameter = 2 * radius if diameter is None else diameter
    x = start - problems.minimizers  # the minimizers are at 0 from here on
    lower, upper = x - radius, x + radius
    total, regret = torch.zeros_like(x), torch.zeros_like(x)
    # Not 0, for a coordinate without a gradient yet: it stays.
    squares = torch.full_like(x, torch.finfo(x.dtype).tiny)
    products, gradient, root = torch.empty_like(problems.hessians), x.clone(), x.clone()
    row = x.unsqueeze(1)
    for _ in range(steps):
        torch.mul(problems.hessians, row, out=products)
        torch.sum(products, 2, out=gradient)
        regret.addcmul_(gradient, x, value=0.5)
        squares.addcmul_(gradient, gradient)
        total.add_(x)
        x.addcdiv_(gradient, torch.sqrt(squares, out=root), value=-eta)
        torch.clamp(x, lower, upper, out=x)
    dimensions = x.shape[1]
    bound = (2 * dimensions * diameter**2 * squares.sum(dim=1)).sqrt()
    return Run(problems.minimizers + total / steps, regret.sum(dim=1), bound)


def adagrad_with_restarts(
    condition_number: float, rounds: int, advance: Callable[[], object] | None = None
) -> list[Round]:
    """Algorithm 3 from 0, ``T = 32 d M / mu`` steps a round.

    Its hypercubes have the radius ``D_inf / 2^(i-1)``: what the proof uses, ``D_inf_i``, and not
    the ``D_inf^2 / 4^(i-1)`` that Algorithm 3 prints (the two agree where ``D_inf = 1``).
    """
    dimensions = DIMENSIONS[condition_number]
    problems = quadratics(condition_number, dimensions)
    mean = torch.zeros_like(problems.minimizers)
    largest = (mean - problems.minimizers).abs().max().item()
    steps = math.ceil(32 * dimensions * condition_number)
    result = []
    for index in range(1, rounds + 1):
        radius = largest / 2 ** (index - 1)
        inside = bool(((mean - problems.minimizers).abs() <= radius).all())
        run = adagrad(problems, mean, radius, radius / math.sqrt(2), steps)
        mean = run.mean
        distance = (mean - problems.minimizers).abs().max().item() ** 2
        share = (run.regret / run.bound).max().item()
        bound = largest**2 / 4**index
        result.append(
            Round(condition_number, dimensions, index, steps, distance, bound, share, inside)
        )
        if advance is not None:
            advance()
    return result
