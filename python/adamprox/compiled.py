"""``torch.compile``: a step is one custom op, and one graph serves every lr and every step count.

The graph hands the op what it writes (params and moments, declared as mutated) and the grads.
Hyper-parameters and step counts are no part of the graph: the op looks at the optimizer itself,
each time, as an eager step does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._dynamo.comptime import ComptimeContext, comptime
from torch.optim import Optimizer

from .freed_grad import FreedGrad
from .hyperparameters import STATES, is_on, states_of
from .loss_scaling import LossScaling
from .sharding import is_distributed
from .stand_ins import Given, make_states
from .step import Stepped, take_step

_optimizers: WeakValueDictionary[int, Stepped] = WeakValueDictionary()
_handles = itertools.count()


@torch.library.custom_op(
    "adamprox::step",
    mutates_args=("params", "states"),
    # It reads numbers on the host, and counts there.
    tags=(torch.Tag.cudagraph_unsafe,),
)
def step_op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    indices: Sequence[int],
    handle: int,
    grad_mode: bool,
) -> None:
    """One step of the optimizer of that handle, of its params of these indices and no others.

    The tensors stand in for its own, which they mostly are, but may be copies that the compiler has
    made. ``states`` has those of each param, one after another.
    """
    optimizer = _optimizers[handle]
    flat = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    given: Given = {param: {"grad": None} for param, _ in flat}
    rest = iter(states)
    for index, param, grad in zip(indices, params, grads, strict=True):
        owner, group = flat[index]
        own = {state.key: next(rest) for state in states_of(group)}
        given[owner] = {"param": param, "grad": grad, **own}
    try:
        take_step(optimizer, LossScaling.from_tensors(grad_scale, found_inf), given)
    except BaseException:
        torch.set_grad_enabled(grad_mode)  # the caller's: a graph that raises does not restore it
        raise


@step_op.register_fake
def _(*args: Any) -> None:
    """It returns nothing."""


@_disable_dynamo
def _untraced_step(optimizer: Stepped) -> None:
    take_step(optimizer, LossScaling.of(optimizer))


def traced_step(optimizer: Stepped, closure: Callable[[], float] | None) -> float | None:
    """``step`` as Dynamo traces it."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    groups = optimizer._param_groups
    if any(is_distributed(p) for group in groups for p in group["params"]):
        _untraced_step(optimizer)  # the op does not say how DTensors are dealt out
        return loss
    comptime(_break_if_hyper_parameters_wait)
    params, indices, keys = [], [], []
    index = 0
    for group in groups:
        # Read here, so that another graph is made when a state comes or goes.
        of_group = [s.key for s in STATES if s.needs is None or is_on(group, s.needs)]
        for param in group["params"]:
            if param.grad is not None and not isinstance(param.grad, FreedGrad):
                params.append(param)
                indices.append(index)
                keys.append(of_group)
            index += 1
    if not params:
        return loss
    comptime(_make_ready)
    grads = [param.grad for param in params]
    states = [
        optimizer.state[param][key]
        for param, of_param in zip(params, keys, strict=True)
        for key in of_param
    ]
    grad_mode = torch.is_grad_enabled()
    with torch.no_grad():
        step_op(
            params,
            grads,
            states,
            getattr(optimizer, "grad_scale", None),
            getattr(optimizer, "found_inf", None),
            indices,
            optimizer._engine.handle,
            grad_mode,
        )
    return loss


# With hooks.
observed_traced_step = Optimizer.profile_hook_step(traced_step)


def handle_with_states(optimizer: Stepped, indices: Sequence[int]) -> int:
    """The handle of an optimizer whose params of these indices have their states."""
    flat = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    make_states(optimizer, [flat[index] for index in indices])
    engine = optimizer._engine
    if engine.handle is None:
        engine.handle = next(_handles)
        _optimizers[engine.handle] = optimizer
    return engine.handle


def _make_ready(context: ComptimeContext) -> None:
    """Runs when the graph is made: the states that it is going to be handed are there then."""
    handle_with_states(_optimizer(context), _variable(context, "indices").as_python_constant())


def _variable(context: ComptimeContext, name: str) -> Any:
    traced: Any = context.get_local(name)
    return traced._i_will_not_complain_if_bc_breaks_VariableTracker()


def _optimizer(context: ComptimeContext) -> Stepped:
    optimizer: Stepped = _variable(context, "optimizer").value
    return optimizer


def _break_if_hyper_parameters_wait(context: ComptimeContext) -> None:
    """Ends the graph where it has set a hyper-parameter, which is stored only after it has run."""
    optimizer = _optimizer(context)
    translator = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    side_effects = translator.output.side_effects
    for group in optimizer.param_groups:
        variable = side_effects.id_to_variable.get(id(group))
        if variable is not None and side_effects.is_modified(variable):
            context.graph_break("a param group was changed within the compiled function")
