"""The design's equations in NumPy, in float64, and a run of an optimizer beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import registry
from registry import DTYPES, params_of
from test_capturable import randn, set_grads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Arrays = list[np.ndarray]
if TYPE_CHECKING:
    Decay = Callable[[Arrays, Arrays, Arrays, dict[str, Any]], Arrays]
    # Of the params of a group, their updates and sqrt(vhat) + eps: the new params.


def rate(group: dict) -> float:
    """What the strength of the decay is ``weight_decay`` times."""
    return group["lr"] / (group["initial_lr"] if group["decay_by"] == "schedule" else 1)


def trajectory(params: Arrays, grads: Sequence[Arrays], group: dict, decay: Decay) -> Arrays:
    """The params of a group after one step for each of ``grads``."""
    states = [[np.zeros_like(param) for _ in range(3)] for param in params]
    beta1, beta2 = group["betas"]
    for t, of_step in enumerate(grads, 1):
        updates, denominators = [], []
        for grad, state in zip(of_step, states, strict=True):
            m, v, largest = state
            grad = -grad if group["maximize"] else grad
            m, v = m + (1 - beta1) * (grad - m), v + (1 - beta2) * (grad * grad - v)
            state[:] = m, v, np.maximum(largest, v)
            vhat = (state[2] if group["amsgrad"] else v) / (1 - beta2**t)
            denominators.append(np.sqrt(vhat) + group["eps"])
            updates.append(group["lr"] * m / (1 - beta1**t) / denominators[-1])
        params = decay(params, updates, denominators, group)
    return params


def check(
    optimizer: str,
    backend: str,
    dtype: str,
    option: registry.Option,
    shapes: Sequence[tuple[int, ...]],
    decay: Decay,
) -> None:
    """The bits of the reference in every dtype; in float64 the equations, to 1e-10."""
    if dtype != "float64" and backend == "reference":
        pytest.skip("it would be compared with itself")
    if backend == "triton" and dtype not in ("float64", "float32", "bfloat16_float32"):
        pytest.skip("test_parity has it, and the interpreter takes long")
    param_dtype, state = DTYPES[dtype]
    values = [randn(i, shape, param_dtype) for i, shape in enumerate(shapes)]
    given = values, option
    pair = ours, _ = [registry.build(optimizer, *given, n, state) for n in (backend, "reference")]
    grads = []
    for seed in range(1, 9):
        for opt in pair:
            set_grads(opt, seed)
            opt.step()
        grads.append({param: param.grad.clone() for param in params_of(ours)})
        registry.assert_same_bits(*pair)
    start = dict(zip(params_of(ours), values, strict=True))
    for group in ours.param_groups if dtype == "float64" else ():
        params = group["params"]
        of_steps = [[of_step[param].numpy() for param in params] for of_step in grads]
        expected = trajectory([start[p].numpy() for p in params], of_steps, group, decay)
        for param, wanted in zip(params, expected, strict=True):
            np.testing.assert_allclose(param.detach().numpy(), wanted, 1e-10, 1e-12)
