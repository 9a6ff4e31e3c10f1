"""Steps taken during backward: each param's as soon as its gradient is there, which is then freed.

The gradients never exist all at once, so their memory is that of the largest few.
"""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle

from .backends import capturing
from .freed_grad import FreedGrad
from .hyperparameters import is_one_block
from .optimizers import _FusedAdam
from .sharding import is_distributed, local_of
from .step import Engine, take_step


def step_in_backward(model: nn.Module, optimizer: _FusedAdam) -> StepInBackward:
    """Has ``loss.backward()`` take the optimizer's steps, and free each gradient once it is used.

    The bits are those of ``loss.backward(); optimizer.step(); optimizer.zero_grad()``, with the
    hyper-parameters that the param groups have during backward. ``optimizer.step()`` may stay in
    the loop: it steps what has a gradient still (params that are not the model's). Hooks of
    ``optimizer.step()`` run there only. Params may be frozen, thawed, added to the optimizer, and
    replaced: what is assigned to the model's modules later takes its steps in backward, too.

    A param whose gradient comes in a backward within another one, as reentrant checkpoints make it,
    may get several: ``optimizer.step()`` takes its step, and a warning says so.

    Each backward is a step, so gradients cannot be accumulated over several. Nor can they be
    clipped or unscaled before the first param moves: both fail, in the first iteration. But
    clipping of DTensors finds no gradients, and does nothing. An error in one param's step leaves
    that param as it was, and others may have been stepped.

    Args:
        model: its params take their steps in backward, as far as the optimizer has them.
        optimizer: one of this package's.

    Returns:
        A handle: ``remove()``, or leaving it as a context, ends this.

    Raises:
        TypeError: ``model`` is no module or ``optimizer`` none of this package's.
        ValueError: the optimizer has none of the model's params, or a group has ``block="group"``.
        RuntimeError: the steps of one are taken in backward already, or the model has a
            ``DistributedDataParallel``, whose gradients are not averaged yet by then. While this is
            in effect: clipping, ``GradScaler.unscale_`` or ``GradScaler.step``; and a backward
            while the optimizer's ``track_updates`` is on.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is a {type(model).__name__}")
    if not isinstance(optimizer, _FusedAdam):
        raise TypeError(
            f"optimizer must be one of adamprox's, but is a {torch.typename(optimizer)}"
        )
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise RuntimeError(
            "model: DistributedDataParallel averages gradients after the hooks of their params "
            "have run, so steps in backward would take them as they are on this process"
        )
    known = {id(param) for group in optimizer.param_groups for param in group["params"]}
    params = dict(model.named_parameters())
    if not any(id(param) in known for param in params.values()):
        raise ValueError("optimizer has none of the params of model")
    for index, group in enumerate(optimizer.param_groups):
        if is_one_block(group):
            raise ValueError(f"optimizer: {_ONE_BLOCK.format(f'param_groups[{index}]')}")
    for name, param in params.items():
        for step in _steps_of(param):
            if step.optimizer() is not None:
                raise RuntimeError(f"model: {name} takes its steps in backward already")
            step.remove()
    return StepInBackward(optimizer, _Steps(model, optimizer))


_ONE_BLOCK = (
    "{} has block='group', one norm of all its params, and a step in backward knows one param only"
)


class StepInBackward:
    """The handle of :func:`step_in_backward`: the steps are taken in backward until it ends.

    As a context it ends when it is left. It keeps the optimizer alive.
    """

    def __init__(self, optimizer: _FusedAdam, steps: _Steps) -> None:
        self._optimizer = optimizer  # which is kept alive by this; the hooks do not
        self._steps = steps

    def remove(self) -> None:
        """Leaves the steps to ``optimizer.step()`` again; freed grads are None then."""
        self._steps.remove()

    def __repr__(self) -> str:
        optimizer = type(self._optimizer).__name__
        return f"<{optimizer}'s steps of {len(self._steps)} params, taken in backward>"

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Steps:
    """The steps of a model's params, and of those that are assigned to its modules later."""

    def __init__(self, model: nn.Module, optimizer: _FusedAdam) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._steps: list[weakref.ref[_ParamStep]] = []
        self._hooks = (
            register_module_parameter_registration_hook(self._registered),
            register_module_module_registration_hook(self._module_registered),
        )
        weakref.finalize(optimizer, _remove_all, self._hooks)
        try:
            self._add_modules(model, "")
        except BaseException:
            self.remove()
            raise

    def __len__(self) -> int:
        return sum(step() is not None for step in self._steps)

    def remove(self) -> None:
        _remove_all(self._hooks)
        for reference in self._steps:
            if (step := reference()) is not None:
                step.remove()
        self._steps.clear()

    def _add_modules(self, module: nn.Module, prefix: str) -> None:
        for name, child in module.named_modules(prefix=prefix):
            self._names[child] = name
        for name, param in module.named_parameters(prefix=prefix):
            self._add(param, name)

    def _add(self, param: nn.Parameter, name: str) -> None:
        if not (param.is_floating_point() or param.is_complex()):
            return  # it cannot have a gradient
        optimizer = self._optimizer()
        if optimizer is not None and not any(s.optimizer() is optimizer for s in _steps_of(param)):
            self._steps.append(weakref.ref(_ParamStep(optimizer, param, name)))

    def _registered(self, module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        prefix = self._names.get(module)
        if prefix is not None and param is not None:
            self._add(param, f"{prefix}.{name}" if prefix else name)

    def _module_registered(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        prefix = self._names.get(module)
        if prefix is not None and child is not None:
            self._add_modules(child, f"{prefix}.{name}" if prefix else name)


def _wait_for_grad(param: Tensor) -> None:
    """Where FSDP2 offloads grads: before torch 2.13 it calls hooks while the grad is on its way."""
    if is_distributed(param) and param.device_mesh.device_type == "cuda":
        with torch.no_grad():
            on_host = local_of(param).device.type == "cpu"
        if on_host:
            torch.cuda.current_stream().synchronize()


class _ParamStep:
    """Takes one param's step, as an optimizer of its own that shares the state."""

    def __init__(self, optimizer: _FusedAdam, param: nn.Parameter, name: str) -> None:
        # torch's collector of cycles does not look into hooks of tensors: no strong references.
        self.optimizer = weakref.ref(optimizer)
        self._name = name
        self._place = 0, 0  # where the param groups had the param the last time
        self._param = weakref.ref(param)
        self._warned = False
        # Its own, since several devices' threads may run backward, and for what it has uploaded.
        self._engine: Engine | None = None
        frozen = not param.requires_grad
        if frozen:  # torch wants it so; the hooks stay when it is frozen again
            param.requires_grad_(True)
        self._hooks = (
            param.register_hook(_make_room_in(weakref.ref(param))),
            param.register_post_accumulate_grad_hook(self),
        )
        if frozen:
            param.requires_grad_(False)

    def remove(self) -> None:
        _remove_all(self._hooks)
        param = self._param()
        if param is not None and isinstance(param.grad, FreedGrad):
            param.grad = None

    def __call__(self, param: nn.Parameter) -> None:
        optimizer = self.optimizer()
        if optimizer is None:
            raise RuntimeError(
                "the optimizer that step_in_backward was given exists no more: keep a reference to "
                "it, or to what step_in_backward returned"
            )
        group = self._group_of(param, optimizer)
        if group is None:
            return
        if is_one_block(group):
            raise RuntimeError(_ONE_BLOCK.format(f"the param group of {self._name}"))
        if optimizer._engine.tracker is not None or optimizer._engine.target is not None:
            raise RuntimeError(
                "track_updates() and SparsityTarget read notes of whole steps, and "
                "step_in_backward takes a param's at a time: end one of them, by "
                "track_updates(every=0) or remove()"
            )
        if _is_nested():
            self._leave_to_step()
            return
        if self._engine is None:
            self._engine = Engine()
            self._engine.watch.at = math.inf  # it watches whole steps
        self._engine.blocked = optimizer._engine.blocked
        self._engine.frozen = optimizer._engine.frozen
        state = optimizer.state.get(param, {})
        alone = object.__new__(type(optimizer))
        alone.__dict__.update(
            optimizer.__dict__,
            _engine=self._engine,
            _param_groups=[{**group, "params": [param], "param_names": [self._name]}],
            state=defaultdict(dict, {param: state}),
        )
        _wait_for_grad(param)
        take_step(alone)
        if capturing():  # a graph reads what the engine has uploaded
            optimizer._engine.captured.append(self._engine)
        optimizer.state[param] = alone.state[param]
        optimizer._opt_called = True  # type: ignore[attr-defined] # torch's schedulers ask for it
        # Of other kinds of tensors (DTensor) a grad must be one, too.
        param.grad = (
            None if is_traceable_wrapper_subclass(param) else FreedGrad.of(param, self._name)
        )

    def _leave_to_step(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"step_in_backward: {self._name} gets its gradient in a backward within another "
                "one, as reentrant checkpoints make it. It may be one of several, so that its step "
                "is left to optimizer.step(), which must follow; or use use_reentrant=False",
                stacklevel=3,
            )

    def _group_of(self, param: Tensor, optimizer: _FusedAdam) -> dict[str, Any] | None:
        groups = optimizer.param_groups
        group, index = self._place
        if group < len(groups) and any(p is param for p in groups[group]["params"][index:][:1]):
            return groups[group]
        for group, candidate in enumerate(groups):
            for index, other in enumerate(candidate["params"]):
                if other is param:
                    self._place = group, index
                    return candidate
        return None


def _steps_of(param: Tensor) -> list[_ParamStep]:
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    return [hook for hook in hooks.values() if isinstance(hook, _ParamStep)]


def _make_room_in(reference: weakref.ref[nn.Parameter]) -> Callable[[Tensor], None]:
    """Takes what is left of the last gradient away before the next one comes."""

    def make_room(_: Tensor) -> None:
        param = reference()
        if param is not None and isinstance(param.grad, FreedGrad):
            param.grad = None

    return make_room


def _remove_all(hooks: Iterable[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _is_nested() -> bool:
    """Whether this backward was started by an autograd function's own backward."""
    frame, in_backward = sys._getframe(1), False
    while (caller := frame.f_back) is not None:
        frame, code = caller, caller.f_code
        if code.co_name == "_engine_run_backward":
            in_backward = True
        elif in_backward and code.co_name == "apply" and code.co_filename == _FUNCTION_FILE:
            return True
    return False


_FUNCTION_FILE = torch.autograd.Function.backward.__code__.co_filename
