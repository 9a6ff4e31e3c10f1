"""``torch.compile``: a step is one custom op, and one graph serves every lr and every step count.

The graph hands the op what it writes (params and moments, declared as mutated) and the grads.
Hyper-parameters and step counts are no part of the graph: the op looks at the optimizer itself,
each time, as an eager step does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._dynamo import assume_constant_result
from torch._dynamo.comptime import ComptimeContext, comptime
from torch.optim import Optimizer

from .loss_scaling import LossScaling
from .mending import Given, make_states

if TYPE_CHECKING:
    from .optimizers import _FusedAdam

_optimizers: WeakValueDictionary[int, _FusedAdam] = WeakValueDictionary()
_handles = itertools.count()


@torch.library.custom_op(
    "adamprox::step",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
    # It reads numbers on the host, and counts there.
    tags=(torch.Tag.cudagraph_unsafe,),
)
def step_op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    indices: Sequence[int],
    handle: int,
) -> None:
    """One step of the optimizer of that handle, of its params of these indices and no others.

    The tensors stand in for its own, which they mostly are, but may be copies that the compiler has
    made. ``max_exp_avg_sqs`` has those of the groups with amsgrad.
    """
    optimizer = _optimizers[handle]
    flat = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    given: Given = {param: {"grad": None} for param, _ in flat}
    largest = iter(max_exp_avg_sqs)
    rows = zip(indices, params, grads, exp_avgs, exp_avg_sqs, strict=True)
    for index, param, grad, exp_avg, exp_avg_sq in rows:
        owner, group = flat[index]
        given[owner] = {
            "param": param,
            "grad": grad,
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
            **({"max_exp_avg_sq": next(largest)} if group["amsgrad"] else {}),
        }
    from .optimizers import step_tensors  # which imports this module when it compiles

    step_tensors(optimizer, LossScaling.from_tensors(grad_scale, found_inf), given)


@step_op.register_fake
def _(*args: Any) -> None:
    """It returns nothing."""


def traced_step(optimizer: _FusedAdam, closure: Callable[[], float] | None) -> float | None:
    """``step`` as Dynamo traces it."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    comptime(_break_if_hyper_parameters_wait)
    groups = optimizer._param_groups
    params, indices, amsgrads = [], [], []
    index = 0
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                params.append(param)
                indices.append(index)
                amsgrads.append(group["amsgrad"])
            index += 1
    if not params:
        return loss
    handle = _handle_with_states(optimizer, indices)
    grads = [param.grad for param in params]
    states = [optimizer.state[param] for param in params]
    with torch.no_grad():
        step_op(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [s["max_exp_avg_sq"] for s, a in zip(states, amsgrads, strict=True) if a],
            getattr(optimizer, "grad_scale", None),
            getattr(optimizer, "found_inf", None),
            indices,
            handle,
        )
    return loss


# With hooks.
observed_traced_step = Optimizer.profile_hook_step(traced_step)


@assume_constant_result  # type: ignore[untyped-decorator]
def _handle_with_states(optimizer: _FusedAdam, indices: Sequence[int]) -> int:
    """Runs when the graph is made: the states that it is going to be handed are there then."""
    flat = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    make_states(optimizer, [flat[index] for index in indices])
    if optimizer._handle is None:
        optimizer._handle = next(_handles)
        _optimizers[optimizer._handle] = optimizer
    return optimizer._handle


def _break_if_hyper_parameters_wait(context: ComptimeContext) -> None:
    """Ends the graph where it has set a hyper-parameter, which is stored only after it has run."""
    traced: Any = context.get_local("optimizer")
    optimizer = traced._i_will_not_complain_if_bc_breaks_VariableTracker().value
    translator = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    side_effects = translator.output.side_effects
    for group in optimizer.param_groups:
        variable = side_effects.id_to_variable.get(id(group))
        if variable is not None and side_effects.is_modified(variable):
            context.graph_break("a param group was changed within the compiled function")
