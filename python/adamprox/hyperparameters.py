"""The states of a param and the values of a param group, a line each; which values are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

Group = Mapping[str, Any]


class State(NamedTuple):
    """A state of a param, of its shape. csrc/math/scalars.h has the same table."""

    key: str
    type: str = "moment"
    """``"moment"``: the param's dtype, or float32 for 16-bit params; ``"compute"``: the latter."""
    needs: str | None = None
    """The value of the group that must be on."""
    starts: str = "zeros"
    """As ``"zeros"``, or as the ``"param"`` before its first step with this state."""


STATES = (
    State("exp_avg"),
    State("exp_avg_sq"),
    State("max_exp_avg_sq", needs="amsgrad"),
    State("ema", "compute", needs="ema_decay", starts="param"),
)
SIXTEEN_BITS = (torch.bfloat16, torch.float16)  # dtypes that are computed in float32
COUNT = "step"  # beside them: how many steps the param has made, one number


# The keys of the states that follow from the param, once it is final.
FOLLOWERS = tuple(state.key for state in STATES if state.type == "compute")


def is_on(group: Group, key: str) -> bool:
    """Whether a value of a group asks for the state that needs it."""
    value = group.get(key)
    # 0 is an ema_decay, and no amsgrad.
    return value is not None and value is not False if key == "ema_decay" else bool(value)


def states_of(group: Group) -> Iterator[State]:
    """The states that params of this group have."""
    return (s for s in STATES if s.needs is None or is_on(group, s.needs))


Bounds = tuple[float | Tensor | None, float | Tensor | None] | None


class Options(TypedDict, total=False):
    """The keyword arguments of every class."""

    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None
    decay_by: str
    ema_decay: float | Tensor | None
    cautious: bool
    l2: float | Tensor
    metric: str
    bounds: Bounds
    block: str | int
    block_scaling: str


# What a group has that does not say: for groups of older checkpoints, too. csrc/math/scalars.h and
# csrc/math/decay.h read those that a step needs.
DEFAULTS: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decay_by": "lr",
    "ema_decay": None,
}

# The options that only one rule has, with their neutral values, which are accepted elsewhere, too.
RULES: dict[str, dict[str, Any]] = {
    "coupled": {},
    "decoupled": {"cautious": False},
    "prox_sq_l2": {"metric": "identity", "bounds": None},
    "prox_l1": {"l2": 0.0, "metric": "identity", "bounds": None},
    "prox_l2": {"block": "tensor", "block_scaling": "none"},
}
BLOCK_NAMES = ("tensor", "row", "group")  # beside a number of rows
RULE_OPTIONS = {key: neutral for options in RULES.values() for key, neutral in options.items()}

# All that a group may have of ours; others are the user's own.
_KEYS = {"params", "param_names", "lr", "betas", "eps", "weight_decay", "decay", "initial_lr"}
_KEYS |= {*DEFAULTS, *RULE_OPTIONS}

# A checkpoint's are taken if it was saved under the same rule.
DECAY_SETTINGS = ("decay", "weight_decay", "decay_by", *RULE_OPTIONS)

ARGUMENTS = """
    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts that define param groups. Tensors may
            have any shape. They are float16, bfloat16, float32, float64, complex64 or complex128.
        lr: learning rate, about the length by which a step moves each weight, 0 or more; a float or
            a tensor of one element, as ``betas`` and ``weight_decay`` may be (default: 1e-3).
        betas: the share of the first and the second moment that a step keeps, each in [0, 1)
            (default: (0.9, 0.999)).
        eps: added to the denominator, 0 or more, in the unit of the gradients (default: 1e-8).
        weight_decay: lambda in the paper, 0 or more (default: {weight_decay}).
        amsgrad: divide by the root of the largest second moment so far (default: False).
        maximize: ascend (default: False).
        foreach, fused: accepted for torch.optim.AdamW's sake; every step is fused. With
            ``fused=True`` a GradScaler leaves unscaling and skipping to the step, as torch's does:
            that saves the wait for a GPU.
        capturable: step counts, and hyper-parameters that are tensors on a GPU, are read there. So
            a step can be captured into a CUDA graph, and its replays follow what is written into
            them, with the bits of the host. Step once before the capture (default: False).
        differentiable: refused if True.
        decay_by: what the decay strength ``s`` follows. ``"lr"``: ``s = lr * weight_decay``, as in
            torch (default). ``"schedule"``: ``s = lr / initial_lr * weight_decay``, the paper's
            ``eta_t * lambda``. ``initial_lr`` is the param group's, which torch's schedulers write,
            or else the lr at construction; a group that changes to this later needs one. The same
            decay needs ``initial_lr`` times the ``weight_decay`` that it takes by ``"lr"``. It has
            no effect on coupled decay (Adam), which goes into the gradient as it is.
        ema_decay: keeps a moving average of each param, ``ema += (1 - ema_decay) * (param - ema)``
            of the new param, in the same pass: state ``"ema"``, float32 for 16-bit params. It
            starts as the param, without bias correction; see :meth:`ema_weights`. In [0, 1]; None,
            the default, is off.{more}
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; None, the default, takes
            the environment's ``ADAMPROX_BACKEND`` or the best that can run. All give the same bits.

    All of them but ``params`` and ``backend`` are values of the param groups. So is ``decay``, the
    rule: ``"coupled"``, ``"decoupled"``, ``"prox_sq_l2"``, ``"prox_l1"`` or ``"prox_l2"``. The
    class sets its default. A group may have another one; a change takes effect at the next step.

    The state of a param has ``"exp_avg"`` and ``"exp_avg_sq"``, with ``amsgrad``
    ``"max_exp_avg_sq"``, and with ``ema_decay`` ``"ema"``, all of the param's shape. Its
    ``"step"`` is one number, how many steps it has made.

    Raises:
        ValueError, TypeError: an argument is out of its range or of a wrong type; the message names
            it and its value.
        RuntimeError: ``differentiable=True``, or the backend asked for cannot run here.
"""


def document(weight_decay: str = "1e-2", more: str = "") -> Callable[[type], type]:
    """Adds the arguments to the docstring of a class, and the options to its signature."""

    def add(cls: type) -> type:
        if cls.__doc__ is not None:  # python -OO has none
            # Python 3.13 has taken the indentation of a class's docstring away, and of no other.
            arguments = inspect.cleandoc(ARGUMENTS.format(weight_decay=weight_decay, more=more))
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\n{arguments}"
        _, *named, backend, _ = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
        options = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default)
            for key, default in options_of(cls.decay).items()  # type: ignore[attr-defined]
        ]
        cls.__signature__ = inspect.Signature([*named, *options, backend])  # type: ignore[attr-defined]
        return cls

    return add


def options_of(rule: str) -> dict[str, Any]:
    """The keyword options of a class with this rule, and their defaults."""
    options = {**DEFAULTS, **RULES[rule]}
    del options["amsgrad"]  # it may be positional
    return options


def validate(group: Group) -> None:
    """Refuses what torch.optim.AdamW refuses, in its words, and what cannot be done here."""
    lr, betas, eps, weight_decay = (group[k] for k in ("lr", "betas", "eps", "weight_decay"))
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if type(value) is not float and not isinstance(value, Real | Tensor):
            raise TypeError(f"Invalid {name}: {value!r}, expected a number")
    two = isinstance(betas, Collection) and len(betas) == 2
    if not two or not all(isinstance(beta, Real | Tensor) for beta in betas):
        raise TypeError(f"Invalid betas: {betas!r}, expected two numbers")
    host_only = group["foreach"] and not group["capturable"]
    if isinstance(lr, Tensor) and host_only:
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= eps:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not 0.0 <= weight_decay:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    _validate_types_of(betas, host_only)
    _validate_options(group)
    if group["decay"] not in RULES:
        raise ValueError(f"Invalid decay: {group['decay']!r}, expected one of {', '.join(RULES)}")
    if group["decay_by"] not in ("lr", "schedule"):
        raise ValueError(f"Invalid decay_by: {group['decay_by']!r}, expected 'lr' or 'schedule'")
    if group["decay_by"] == "schedule" and not group.get("initial_lr", lr) > 0.0:
        raise ValueError(
            f"Invalid initial learning rate for decay_by='schedule': {group.get('initial_lr', lr)}"
        )
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if group["differentiable"]:
        raise RuntimeError(
            "differentiable=True is not supported: the step writes in place, outside of autograd"
        )
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def _validate_options(group: Group) -> None:
    ema_decay = group.get("ema_decay")
    if ema_decay is not None:
        if isinstance(ema_decay, bool) or not isinstance(ema_decay, Real | Tensor):
            raise TypeError(f"Invalid ema_decay: {ema_decay!r}, expected a number or None")
        if isinstance(ema_decay, Tensor) and ema_decay.numel() != 1:
            raise ValueError("Tensor ema_decay must be 1-element")
        if not 0.0 <= float(ema_decay) <= 1.0:
            raise ValueError(f"Invalid ema_decay: {ema_decay}, expected a number from 0 to 1")
    if not isinstance(group.get("cautious", False), bool):
        raise TypeError(f"Invalid cautious: {group['cautious']!r}, expected True or False")
    if group.get("metric", "identity") not in ("identity", "adam"):
        raise ValueError(f"Invalid metric: {group['metric']!r}, expected 'identity' or 'adam'")
    l2 = group.get("l2", 0.0)
    if isinstance(l2, bool) or not isinstance(l2, Real | Tensor):
        raise TypeError(f"Invalid l2: {l2!r}, expected a number")
    if isinstance(l2, Tensor) and l2.numel() != 1:
        raise ValueError("Tensor l2 must be 1-element")
    if not float(l2) >= 0.0:
        raise ValueError(f"Invalid l2: {l2}, expected a number, 0 or more")
    _validate_bounds(group.get("bounds"))
    block = group.get("block", "tensor")
    if block not in BLOCK_NAMES and not is_row_count(block):
        names = ", ".join(map(repr, BLOCK_NAMES))
        raise ValueError(
            f"Invalid block: {block!r}, expected {names} or a number of rows, 1 or more"
        )
    scaling = group.get("block_scaling", "none")
    if scaling not in ("none", "sqrt"):
        raise ValueError(f"Invalid block_scaling: {scaling!r}, expected 'none' or 'sqrt'")


def is_one_block(group: Group) -> bool:
    """Whether all params of the group are one block of the l2 norm."""
    return group.get("decay") == "prox_l2" and group.get("block") == "group"


def is_row_count(block: Any) -> bool:
    """Whether ``block`` is a number of rows, 1 or more."""
    return isinstance(block, Integral) and not isinstance(block, bool) and int(block) >= 1


def _validate_bounds(bounds: Any) -> None:
    if bounds is None:
        return
    two = isinstance(bounds, Collection) and len(bounds) == 2
    if not two or not all(
        end is None or (isinstance(end, Real | Tensor) and not isinstance(end, bool))
        for end in bounds
    ):
        raise TypeError(f"Invalid bounds: {bounds!r}, expected None or two numbers or None's")
    low, high = bounds
    if any(isinstance(end, Tensor) and end.numel() != 1 for end in bounds):
        raise ValueError("Tensor bounds must be 1-element")
    if any(end is not None and not float(end) == float(end) for end in bounds) or (
        low is not None and high is not None and not float(low) <= float(high)
    ):
        raise ValueError(f"Invalid bounds: {bounds!r}, expected a low end and a high one")


def _validate_types_of(betas: Collection[Any], host_only: bool) -> None:
    if len({isinstance(beta, Tensor) for beta in betas}) != 1 or not all(
        isinstance(beta, float | Tensor) for beta in betas
    ):
        raise ValueError("betas must be either both floats or both Tensors")
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            if host_only:
                raise ValueError(
                    f"betas[{index}] as a Tensor is not supported for capturable=False "
                    "and foreach=True"
                )
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{index}] must be 1-element")


def refuse_misspelled(keys: Collection[str]) -> None:
    """Refuses keys of a param group that are nearly those of a value. Others are the user's own.

    Raises:
        ValueError: the message names the key and the value.
    """
    for key in keys:
        meant = [] if key in _KEYS else get_close_matches(str(key), _KEYS, n=1, cutoff=0.8)
        if meant and f"_{meant[0]}_" not in f"_{key}_":  # "weight_decay_mult" is no misspelling
            raise ValueError(f"Invalid key of a param group: {key!r}, did you mean {meant[0]!r}?")


def refuse_foreign_options(group: Group, given: Collection[str]) -> None:
    """Refuses options of other rules than the group's own, unless their values are neutral.

    Raises:
        ValueError: the message names the option and the rule.
    """
    for key in given:
        foreign = key in RULE_OPTIONS and key not in RULES[group["decay"]]
        if foreign and group[key] != RULE_OPTIONS[key]:
            raise ValueError(
                f"Invalid {key}: {group[key]!r}, decay={group['decay']!r} has no such option"
            )
