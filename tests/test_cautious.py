"""``AdamW(cautious=True)``: decay never undoes what the update does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adamprox
import equations
import registry
from registry import BACKENDS, DTYPES, OPTIMIZERS, same_bits
from test_optimizer import refusals

every_backend = pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
KINDS = (
    *({}, {"maximize": True}, {"amsgrad": True, "betas": (0.5, 0.75)}),
    {"decay_by": "schedule", "initial_lr": 0.25, "weight_decay": 3.0},
)
SHAPES = [shape for shape in ((3, 5), (0, 3), (), (7,)) for _ in KINDS]


def cautious(params, updates, _, group):
    """The design's step of each param."""
    s = equations.rate(group) * group["weight_decay"]
    return [np.where(u * x < 0, 1, 1 - s) * x - u for x, u in zip(params, updates, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@every_backend
def test_it_is_the_designs_equation_in_every_dtype(backend, dtype):
    option = registry.Option({"cautious": True}, KINDS)
    equations.check("AdamW", backend, dtype, option, SHAPES, cautious)


TINY = 2.0**-100  # the product of two of them is no float32 number
LEAST = 2.0**-149  # the update by it is a zero with its sign
INF, NAN = math.inf, math.nan
# Param, grad, new param: the update is an eighth with the sign of 1, or a quarter of what is tiny.
SIGNS = (
    *((1.0, 1.0, 0.75), (1.0, -1.0, 1.125), (-1.0, 1.0, -1.125), (-1.0, -1.0, -0.75)),
    *((0.0, 1.0, -0.125), (-0.0, 1.0, -0.125), (0.0, -1.0, 0.125), (-0.0, -1.0, 0.125)),
    *((1.0, 0.0, 0.875), (-1.0, 0.0, -0.875), (0.0, 0.0, 0.0), (-0.0, 0.0, -0.0)),
    *((1.0, LEAST, 0.875), (1.0, -LEAST, 0.875), (-1.0, LEAST, -0.875), (-1.0, -LEAST, -0.875)),
    *((TINY, -TINY, 1.25 * TINY), (-TINY, TINY, -1.25 * TINY), (TINY, TINY, 0.625 * TINY)),
    *((INF, -1.0, INF), (-INF, 1.0, -INF), (INF, 1.0, NAN), (-INF, -1.0, NAN), (INF, 0.0, NAN)),
    *((NAN, 1.0, NAN), (NAN, -1.0, NAN), (1.0, NAN, NAN), (-1.0, INF, NAN), (0.0, NAN, NAN)),
)


@pytest.mark.parametrize("maximize", [False, True])
@every_backend
def test_every_combination_of_signs_by_hand(backend, maximize):
    values, grads, expected = torch.tensor(SIGNS).repeat(9, 1).T.contiguous()
    param = nn.Parameter(values.clone())
    numbers = {"lr": 0.25, "betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.5}
    given = {"cautious": True, "maximize": maximize, "backend": backend}
    opt = adamprox.AdamW([param], **numbers, **given)
    param.grad = -grads if maximize else grads
    opt.step()
    assert same_bits(param.detach(), expected), torch.stack([values, grads, param, expected])


def stepped(sign: float, cautious: list[bool], weight_decay: float = 0.3) -> Tensor:
    """Params whose updates have their signs, or the opposite ones."""
    param = nn.Parameter(torch.linspace(-2, 2, 40))
    opt = adamprox.AdamW([param], lr=1e-2, weight_decay=weight_decay)
    param.grad = sign * param.detach()
    for each in cautious:
        opt.param_groups[0]["cautious"] = each
        opt.step()
    return param.detach()


def test_where_signs_agree_it_is_adamw_and_elsewhere_without_decay_from_the_next_step_on():
    assert same_bits(stepped(1.0, [True] * 2), stepped(1.0, [False] * 2))
    assert same_bits(stepped(-1.0, [True] * 2), stepped(-1.0, [False] * 2, weight_decay=0.0))
    orders = ([True] * 2, [True, False], [False, True], [False] * 2)
    assert len({tuple(stepped(-1.0, order).tolist()) for order in orders}) == len(orders)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS.keys() - {"AdamW"}))
def test_other_rules_accept_its_neutral_value_alone(optimizer):
    cls, (a, b) = OPTIMIZERS[optimizer].cls, (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = cls([{"params": [a], "cautious": False}])
    match = f"Invalid cautious: True, decay='{cls.decay}' has no such option"
    for refused in (opt.add_param_group, lambda group: cls([group])):
        with pytest.raises(ValueError, match=match):
            refused({"params": [b], "cautious": True})


@pytest.mark.parametrize("value", [None, 1, 0.0, "yes"])
def test_what_is_no_bool_is_refused(value):
    match = f"Invalid cautious: {value!r}, expected True or False"
    refusals("AdamW", {"cautious": value}, TypeError, match)
