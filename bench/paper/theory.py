"""Section 3 in numbers: which updates are scale-free, which are stable, and what Theorem 1 says.

The updates are those of the paper's equations (2) and (3), for each of its directions ``p_t``.
SGD's and AdaGrad's are written out in plain PyTorch. Adam's are this package's. ``eps`` is 0, as
Agarwal et al. (2020) advise for AdaGrad.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adamprox import Adam, AdamProx, AdamW

from . import adagrad

if TYPE_CHECKING:
    from collections.abc import Callable

    Direction = Callable[[Tensor], Tensor]
    Gradient = Callable[[Tensor], Tensor]

STEPS = 200
ETA = 2.0**-6
WEIGHT_DECAY = 2.0**-4
SCALES = (2.0**-20, 1.0, 2.0**5, 2.0**17)  # of a coordinate's gradients each
START = (-1.3, 1.1, 0.4, -0.9)
MINIMIZER = (0.7, -0.4, 0.2, 0.5)


def sgd() -> Direction:
    """``p_t = g_t``."""
    return lambda g: g


def adagrad_direction() -> Direction:
    """``p_t = g_t / sqrt(sum of g_i^2)``, and 0 where no gradient was."""
    squares: list[Tensor | float] = [0.0]

    def direction(g: Tensor) -> Tensor:
        squares[0] = squares[0] + g * g
        return torch.nan_to_num(g / torch.sqrt(torch.as_tensor(squares[0])))

    return direction


DIRECTIONS = {"SGD": sgd, "AdaGrad": adagrad_direction}
DECAYS = ("none", "coupled, equation (2)", "proximal, equation (3)", "proximal, M_t of AdaGrad")


def path(
    direction: Direction,
    decay: str,
    gradient: Gradient,
    start: Tensor,
    eta: float | Tensor = ETA,
    weight_decay: float = WEIGHT_DECAY,
    steps: int = STEPS,
) -> Tensor:
    """The iterates of one of ``DECAYS``, (steps + 1, ...).

    With ``coupled`` the direction is of ``gradient(x) + weight_decay * x``. With ``proximal`` it is
    of the gradient alone, and ``x = (x - eta * p) / (1 + weight_decay * eta)``. With the ``M_t`` of
    AdaGrad the direction is SGD's, and ``eta / sqrt(sum of g_i^2)`` stands for ``eta`` twice.
    """
    x, squares = start, torch.zeros_like(start)
    iterates = [x]
    for _ in range(steps):
        g = gradient(x)
        if decay == "none":
            x = x - eta * direction(g)
        elif decay == DECAYS[1]:
            x = x - eta * direction(g + weight_decay * x)
        elif decay == DECAYS[2]:
            x = (x - eta * direction(g)) / (1 + weight_decay * eta)
        else:
            squares = squares + g * g
            metric = eta / torch.sqrt(squares)
            x = (x - metric * direction(g)) / (1 + weight_decay * metric)
        iterates.append(x)
    return torch.stack(iterates)


def path_of_adam(decay: str, gradient: Gradient, start: Tensor, steps: int = STEPS) -> Tensor:
    """As :func:`path`, of Adam's direction: by this package's optimizer of that decay."""
    optimizers = dict(zip(DECAYS, (AdamW, Adam, AdamProx), strict=False))
    weight_decay = 0.0 if decay == "none" else WEIGHT_DECAY
    param = torch.nn.Parameter(start.clone())
    optimizer = optimizers[decay]([param], ETA, eps=0.0, weight_decay=weight_decay)
    iterates = [start]
    for _ in range(steps):
        param.grad = gradient(param.detach())
        optimizer.step()
        iterates.append(param.detach().clone())
    return torch.stack(iterates)


class Scaled(NamedTuple):
    """Whether the iterates have the same bits once each coordinate's gradients are scaled."""

    direction: str
    decay: str
    scale_free: bool
    largest_difference: float


def scale_freeness() -> list[Scaled]:
    """Each direction with each decay on a convex function that is not quadratic."""
    start = torch.tensor(START, dtype=torch.float64)
    result = []
    for name, decay in itertools.product((*DIRECTIONS, "Adam"), DECAYS):
        if decay == DECAYS[3] and name != "SGD":
            continue
        plain, scaled = (
            path_of_adam(decay, gradient, start)
            if name == "Adam"
            else path(DIRECTIONS[name](), decay, gradient, start)
            for gradient in map(gradient_of, (torch.ones(len(SCALES)), torch.tensor(SCALES)))
        )
        difference = (plain - scaled).abs().nan_to_num(torch.inf).max().item()
        result.append(Scaled(name, decay, difference == 0, difference))
    return result


def gradient_of(scales: Tensor) -> Gradient:
    """Of ``sum of scale * (log cosh u + u^2 / 20)``, ``u = x - x*``; h'' is from 0.1 to 1.1."""
    scales = scales.double()
    minimizer = torch.tensor(MINIMIZER, dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        u = x - minimizer
        return scales * (torch.tanh(u) + u / 10)

    return gradient


class Convergence(NamedTuple):
    """How near ``x*`` an algorithm comes on functions of one family of Theorem 1."""

    algorithm: str
    condition_number: float
    distance: float


def theorem_1() -> list[Convergence]:
    """Gradient descent and AdaGrad, no decay: the functions differ by a scale a coordinate.

    Each is at the best of several step sizes.
    """
    start = torch.tensor(START, dtype=torch.float64)
    minimizer = torch.tensor(MINIMIZER, dtype=torch.float64)
    result = []
    for name, largest in itertools.product(("SGD", "AdaGrad"), (1.0, 2.0**5, 2.0**17)):
        gradient = gradient_of(torch.tensor([1.0, largest, 1.0, largest]))
        distances = []
        for exponent in range(-20, 3):
            iterates = path(DIRECTIONS[name](), "none", gradient, start, 2.0**exponent)
            distances.append((iterates[-1] - minimizer).norm().nan_to_num(torch.inf).item())
        result.append(Convergence(name, 11 * largest, min(distances)))
    return result


class Stability(NamedTuple):
    """The largest ``eta`` of 2^(k / 8) at which the iterates converge, and that of the theory."""

    weight_decay: float
    decay: str
    largest_eta: float
    theory: float


def stability() -> list[Stability]:
    """SGD on ``1/2 x^2`` and ``weight_decay / 2 x^2``, which is coupled or proximal.

    What limits ``eta`` is the gradient of f and the decay together where they are coupled:
    ``2 / (1 + weight_decay)``. Where it is proximal, the decay lifts the limit instead:
    ``2 / (1 - weight_decay)``, and none from ``weight_decay = 1`` on. So the rate depends on the
    gradient of f alone (Duchi et al., 2010b).
    """
    etas = 2 ** (torch.arange(-24, 49, dtype=torch.float64) / 8)
    result = []
    for weight_decay, decay in itertools.product((0.0, 0.5, 1.0, 4.0), DECAYS[1:3]):
        start = torch.ones_like(etas)
        iterates = path(sgd(), decay, lambda x: x, start, etas, weight_decay)
        largest = etas[iterates[-1].abs() < 0.1].max().item()
        limit = 1 + weight_decay if decay == DECAYS[1] else 1 - weight_decay
        result.append(
            Stability(weight_decay, decay, largest, 2 / limit if limit > 0 else torch.inf)
        )
    return result


class Rotation(NamedTuple):
    """How near AdaGrad comes in a fixed number of steps; the worst of some problems."""

    hessian: str
    condition_number: float
    distance: float


def rotation(steps: int = 256, dimensions: int = 8) -> list[Rotation]:
    """Algorithm 2 on quadratics: a diagonal Hessian's condition number does not matter."""
    result = []
    for condition_number in (1.0, 1e2, 1e4, 1e6):
        problems = adagrad.quadratics(condition_number, dimensions)
        start = torch.zeros_like(problems.minimizers)
        run = adagrad.adagrad(problems, start, radius=1.0, eta=2**-0.5, steps=steps)
        distances = (run.mean - problems.minimizers).norm(dim=1)
        for name, first in (("rotated", 0), ("diagonal", 1)):
            result.append(Rotation(name, condition_number, distances[first::2].max().item()))
    return sorted(result)
