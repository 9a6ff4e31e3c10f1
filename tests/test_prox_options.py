"""Options of the elementwise proximal rules: Adam's metric, the elastic net, and bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adamprox
import equations
import registry
from adamprox import reference
from registry import BACKENDS, DTYPES, OPTIMIZERS, params_of, same_bits
from test_capturable import randn, set_grads
from test_mathematics import U, points
from test_optimizer import refusals

every_backend = pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
both_optimizers = pytest.mark.parametrize("optimizer", ["AdamProx", "AdamProxL1"])
both_metrics = pytest.mark.parametrize("metric", ["identity", "adam"])
BOXES = (None, (0, None), (None, 0.25), (-0.5, 0.75), (0.125, 0.125))
every_box = pytest.mark.parametrize("bounds", BOXES, ids=str)


def ends(bounds) -> tuple[float, float]:
    low, high = bounds or (None, None)
    return (-math.inf if low is None else low, math.inf if high is None else high)


@both_optimizers
@both_metrics
@every_box
@pytest.mark.parametrize(("s", "l2"), [(0.0, 0.0), (0.5, 0.0), (3.0, 0.0), (0.0, 2.0), (0.5, 4.0)])
def test_it_is_the_argmin_in_its_metric(optimizer, metric, bounds, s, l2):
    """Of sum(w (x - z)^2) / 2 + s h(x) + l2/2 |x|^2 in the box; w is 1, or sqrt(vhat) + eps.

    With the weights w, it exceeds its minimum by at least sum(w (x - argmin)^2) / 2.
    """
    if l2 and optimizer == "AdamProx":
        pytest.skip("it has no l2")
    low, high = ends(bounds)
    h = torch.abs if optimizer == "AdamProxL1" else lambda x: x * x / 2
    for x, grad in points(40, 2 * 16).unflatten(1, (2, 16)) * 2:
        param = nn.Parameter(x.clone())
        param.grad = grad
        options = {"metric": metric, "bounds": bounds} | ({"l2": l2} if l2 else {})
        cls = OPTIMIZERS[optimizer].cls
        cls([param], lr=1.0, eps=0.125, weight_decay=s, betas=(0.0, 0.5), **options).step()
        p = param.detach()
        weight = grad.abs() + 0.125 if metric == "adam" else torch.ones_like(grad)
        z = x - grad / (grad.abs() + 0.125)

        assert ((p >= low) & (p <= high)).all()
        others = [p + 10.0**-k * points(1, 16)[0] for k in range(8)]
        others += [torch.full_like(p, value) for value in np.linspace(-3, 3, 121)]
        for other in others:
            other = other.clamp(low, high)
            difference = sum(
                sign * (weight * (y - z) ** 2 / 2 + s * h(y) + l2 * y * y / 2)
                for sign, y in ((1, other), (-1, p))
            )
            # Of z, too, which the step has rounded otherwise.
            rounding = 64 * U * (1 + s + l2 + weight) * (1 + x**2 + z**2 + other**2)
            assert (difference - weight * (other - p) ** 2 / 2 >= -rounding).all()


KINDS = (
    *({}, {"maximize": True}, {"amsgrad": True, "betas": (0.5, 0.75)}),
    {"decay_by": "schedule", "initial_lr": 0.25, "weight_decay": 3.0},
    *({"bounds": (0, None)}, {"bounds": (-0.25, 0.5)}),
)
SHAPES = [shape for shape in ((3, 5), (0, 3), (), (7,)) for _ in KINDS]


def prox(params, updates, denominators, group):
    """The design's step of each param."""
    result = []
    for param, update, denominator in zip(params, updates, denominators, strict=True):
        z, eta = param - update, equations.rate(group)
        of_metric = denominator if group["metric"] == "adam" else 1.0
        s, s2 = eta * group["weight_decay"] / of_metric, eta * group.get("l2", 0.0) / of_metric
        if group["decay"] == "prox_l1":
            x = np.sign(z) * np.maximum(np.abs(z) - s, 0) / (1 + s2)
        else:
            x = z / (1 + s)
        result.append(np.clip(x, *ends(group["bounds"])))
    return result


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("AdamProx", {"metric": "adam"}),
        ("AdamProxL1", {"metric": "adam"}),
        ("AdamProxL1", {"l2": 4.0}),
        ("AdamProxL1", {"l2": 4.0, "metric": "adam"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
@every_backend
def test_it_is_the_designs_equation_in_every_dtype(backend, dtype, optimizer, options):
    option = registry.Option({**options, "weight_decay": 0.3}, KINDS)
    equations.check(optimizer, backend, dtype, option, SHAPES, prox)


# The elastic net against its limits.


def run(optimizer: str, steps: int = 20, scale: Tensor | float = 1.0, **arguments) -> Tensor:
    """The params after each step on a bowl with noise."""
    start, target, *noise = points(steps + 2, 64)
    param = nn.Parameter(start.clone())
    opt = OPTIMIZERS[optimizer].cls([param], lr=1e-2, **arguments)
    history = []
    for n in noise:
        param.grad = scale * (param.detach() - target + n)
        opt.step()
        history.append(param.detach().clone())
    return torch.stack(history)


@both_metrics
def test_the_elastic_net_has_l1_and_l2_as_its_limits(metric):
    l1 = run("AdamProxL1", weight_decay=0.3, metric=metric)
    assert same_bits(run("AdamProxL1", weight_decay=0.3, metric=metric, l2=0.0), l1)
    l2 = run("AdamProx", weight_decay=0.7, metric=metric)
    without_l1 = run("AdamProxL1", weight_decay=0.0, metric=metric, l2=0.7)
    torch.testing.assert_close(without_l1, l2, rtol=1e-12, atol=1e-12)
    assert not same_bits(run("AdamProxL1", weight_decay=0.3, metric=metric, l2=0.7), l1)


# The paper's point: the identity metric is scale-free, Adam's is not.

OPTIONS = ({"bounds": (-0.5, 0.5)}, {"l2": 3.0}, {"bounds": (0, None), "l2": 3.0})


@both_metrics
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (name, options)
        for name in ("AdamProx", "AdamProxL1")
        for options in ({}, *OPTIONS)
        if name == "AdamProxL1" or "l2" not in options
    ],
    ids=str,
)
def test_the_identity_metric_is_scale_free_and_adams_is_not(optimizer, metric, options):
    scale = torch.ldexp(torch.ones(64), torch.arange(64) % 41 - 20)
    arguments = {"eps": 0.0, "weight_decay": 0.3, "metric": metric, **options}
    plain, scaled = run(optimizer, **arguments), run(optimizer, scale=scale, **arguments)
    assert same_bits(plain, scaled) == (metric == "identity")


# Bounds.


@both_optimizers
@both_metrics
@every_backend
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "complex64"])
def test_no_stored_value_leaves_the_box(optimizer, metric, backend, dtype):
    """Its ends are no numbers of the dtype: they are rounded inwards."""
    third, tiny = 1 / 3, 2.0**-26 / 3
    boxes = ((-third, third), (0.1, third), (-third, -0.1), (-tiny, tiny), (-1e-50, 1e-50))
    values = [randn(i, (40,), DTYPES[dtype].param) for i in range(len(boxes))]
    option = registry.Option({"metric": metric}, tuple({"bounds": box} for box in boxes))
    opt = registry.build(optimizer, values, option, backend, DTYPES[dtype].state)
    for seed in range(4):
        set_grads(opt, seed)
        opt.step()
        for param, (low, high) in zip(params_of(opt), boxes, strict=True):
            wide = param.detach().double()
            assert ((wide >= low) & (wide <= high)).all()
            assert wide.max() > low + (high - low) * 0.9 or abs(high) < 1e-7  # zeros alone


@both_optimizers
@both_metrics
@pytest.mark.parametrize("bounds", [(None, None), (-math.inf, math.inf), [None, math.inf]], ids=str)
def test_open_ends_change_no_bit(optimizer, metric, bounds):
    arguments = {"weight_decay": 0.3, "metric": metric}
    assert same_bits(run(optimizer, **arguments, bounds=bounds), run(optimizer, **arguments))


@both_optimizers
@every_backend
def test_nan_stays_nan_and_what_is_large_goes_to_the_end(optimizer, backend):
    large = math.inf if optimizer == "AdamProxL1" else 1e38  # 0 times infinity is NaN
    param = nn.Parameter(torch.tensor([math.nan, large, -large, 0.0]))
    cls = OPTIMIZERS[optimizer].cls
    opt = cls([param], lr=0.1, weight_decay=0.0, bounds=(-2.0, 3.0), backend=backend)
    param.grad = torch.zeros(4)
    opt.step()
    assert same_bits(param.detach(), torch.tensor([math.nan, 3.0, -2.0, 0.0]))


def test_a_box_without_a_number_of_the_dtype_is_refused_by_name_and_nothing_is_updated():
    wide, narrow = (nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float64, torch.bfloat16))
    opt = adamprox.AdamProx([wide, narrow], bounds=(0.1, 0.1000001))
    for param in (wide, narrow):
        param.grad = torch.ones_like(param)
    match = r"bounds=\(0.1, 0.1000001\) of param_groups\[0\]\['params'\]\[1\]: between them is no"
    with pytest.raises(RuntimeError, match=match):
        opt.step()
    assert (wide == 1).all()
    assert not opt.state


@every_backend
def test_a_coordinate_that_never_had_a_gradient_becomes_zero_in_adams_metric(backend):
    param = nn.Parameter(torch.tensor([1.0, 1.0]))
    opt = adamprox.AdamProxL1([param], lr=1e-3, weight_decay=1e-3, metric="adam", backend=backend)
    param.grad = torch.tensor([0.0, 1.0])
    opt.step()
    assert param[0] == 0
    assert param[1] > 0.99


# Values.


@pytest.mark.parametrize("wrap", [torch.tensor, lambda x: torch.tensor(x, dtype=torch.float64)])
@both_metrics
@every_backend
def test_the_new_numbers_may_be_tensors_also_on_the_device(backend, metric, wrap):
    def groups(number):
        return (
            {"l2": number(2.0), "bounds": (number(-0.5), None)},
            {"bounds": (None, number(0.25)), "decay_by": "schedule", "initial_lr": 0.25},
        )

    values = [randn(i, shape) for i, shape in enumerate(((3, 5), (7,), (), (4,)))]
    runs = []
    for number, capturable in ((float, False), (wrap, False), (wrap, True)):
        option = registry.Option({"metric": metric, "capturable": capturable}, groups(number))
        opt = registry.build("AdamProxL1", values, option, backend, None)
        for seed in range(4):
            set_grads(opt, seed)
            opt.step()
        runs.append(opt)
    for other in runs[1:]:
        for p, q in zip(params_of(runs[0]), params_of(other), strict=True):
            assert same_bits(p.detach(), q.detach())


REFUSED = (
    ({"metric": "euclid"}, ValueError, "Invalid metric: 'euclid', expected 'identity' or 'adam'"),
    ({"bounds": 1.0}, TypeError, "Invalid bounds: 1.0, expected None or two"),
    ({"bounds": (1.0,)}, TypeError, r"Invalid bounds: \(1.0,\), expected None or two"),
    ({"bounds": ("0", 1)}, TypeError, r"Invalid bounds: \('0', 1\), expected None or two"),
    ({"bounds": (1.0, 0.0)}, ValueError, r"Invalid bounds: \(1.0, 0.0\), expected a low end"),
    ({"bounds": (math.nan, 0.0)}, ValueError, r"Invalid bounds: \(nan, 0.0\), expected a low end"),
)


@both_optimizers
@pytest.mark.parametrize(("options", "error", "match"), REFUSED, ids=str)
def test_bad_values_are_refused(optimizer, options, error, match):
    refusals(optimizer, options, error, match)


@pytest.mark.parametrize(
    ("l2", "error"), [(-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)]
)
def test_a_bad_l2_is_refused(l2, error):
    refusals("AdamProxL1", {"l2": l2}, error, f"Invalid l2: {l2!r}")


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "AdamProxL2"])
@pytest.mark.parametrize("option", [{"metric": "adam"}, {"l2": 1.0}, {"bounds": (0, 1)}], ids=str)
def test_rules_without_them_refuse_them_by_name(optimizer, option):
    cls, param = OPTIMIZERS[optimizer].cls, nn.Parameter(torch.ones(2))
    [(key, value)] = option.items()
    with pytest.raises(ValueError, match=f"Invalid {key}: .*has no such option"):
        cls([{"params": [param], key: value}])


@both_optimizers
@every_backend
def test_ends_beyond_the_largest_number_of_the_dtype(optimizer, backend):
    """The box has the numbers that the dtype has in it."""
    cls, largest = OPTIMIZERS[optimizer].cls, torch.finfo(torch.float16).max
    for bounds, value, expected in (
        ((None, 1e6), largest, largest),
        ((-1e6, None), -largest, -largest),
        ((-1e6, 1e6), 2.0, 2.0),
    ):
        param = nn.Parameter(torch.full((3,), value, dtype=torch.float16))
        opt = cls([param], lr=1e3, weight_decay=0.0, bounds=bounds, backend=backend)
        param.grad = torch.full_like(param, -value / abs(value))  # away from zero
        opt.step()
        assert (param.abs() <= largest).all()
        assert abs(value) < largest or (param == expected).all()


@pytest.mark.parametrize("bounds", [(1e5, 2e5), (1e5, None), (None, -1e5)], ids=str)
def test_a_box_beyond_the_largest_number_is_refused(bounds):
    param = nn.Parameter(torch.ones(3, dtype=torch.float16))
    param.grad = torch.ones_like(param)
    opt = adamprox.AdamProx([param], bounds=bounds)
    with pytest.raises(RuntimeError, match=r"between them is no number of dtype=torch\.float16"):
        opt.step()
    assert (param == 1).all()


def test_ends_are_rounded_as_the_equations_say():
    largest = torch.finfo(torch.bfloat16).max
    assert reference.round_inwards((-1e39, 1e39), torch.bfloat16) == (-largest, largest)
    assert reference.round_inwards((1e39, math.inf), torch.bfloat16) == (math.inf, math.inf)
    assert reference.round_inwards((-1e39, 1e300), torch.float64) == (-1e39, 1e300)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_an_end_that_is_rounded_to_zero_keeps_its_sign(dtype, backend):
    param = nn.Parameter(torch.tensor([-0.5, 0.5], dtype=dtype))
    opt = adamprox.AdamProx([param], bounds=(-1e-50, 1e-50), backend=backend)
    param.grad = torch.zeros_like(param)
    opt.step()
    assert same_bits(param.detach(), torch.tensor([-0.0, 0.0], dtype=dtype))


@every_backend
def test_of_ends_in_the_wrong_order_the_high_one_counts(backend):
    """Where they are tensors that only the step reads. The host refuses them."""
    ends = torch.tensor(0.75), torch.tensor(0.25)
    param = nn.Parameter(torch.tensor([0.0, 0.5, 1.0]))
    values = {"lr": torch.tensor(0.125), "weight_decay": 0.0, "capturable": True}
    opt = adamprox.AdamProx([param], bounds=(None, None), backend=backend, **values)
    opt.param_groups[0]["bounds"] = ends
    param.grad = torch.zeros_like(param)
    if backend in ("cpu", "reference"):
        with pytest.raises(RuntimeError, match="between them is no number"):
            opt.step()
    else:
        opt.step()
        assert param.tolist() == [0.25] * 3


@every_backend
def test_the_ends_of_bounds_are_rounded_for_each_dtype_of_a_group(backend):
    values = [randn(i, (40,), DTYPES[name].param) for i, name in enumerate(DTYPES)]
    values = [value for value in values if not value.is_complex()]
    option = registry.Option({"bounds": (-1 / 3, 0.1), "lr": 0.5})
    pair = [registry.build("AdamProx", values, option, n, None) for n in (backend, "reference")]
    for opt in pair:
        set_grads(opt, 1)
        opt.step()
    registry.assert_same_bits(*pair)
    for param in params_of(pair[0]):
        assert param.detach().double().min() >= -1 / 3
        assert param.detach().double().max() <= 0.1
