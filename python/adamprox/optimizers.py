"""The optimizers: thin ``torch.optim`` classes, one a decay rule, over the backends.

The file is long for its docstrings: they are what ``help()`` shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, compiler
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from . import backends, checkpoints
from .hyperparameters import (
    COUNT,
    DEFAULTS,
    RULE_OPTIONS,
    RULES,
    Options,
    document,
    options_of,
    refuse_foreign_options,
    refuse_misspelled,
    validate,
)
from .loss_scaling import LossScaling
from .step import Engine, Stepped, Uninterrupted, take_step
from .telemetry import UpdateStats, checked

Betas = tuple[float | Tensor, float | Tensor]


class _FusedAdam(Stepped):
    """Adam's direction composed with a decay rule; the classes below say which."""

    decay: ClassVar[str]
    """The rule of the class: the ``decay`` of param groups that do not say theirs."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):  # whose signature it is, not what document() gave a base
            cls.__signature__ = None  # type: ignore[attr-defined]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        backend: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        known = options_of(self.decay)
        for key in options:
            if key not in known:
                name = type(self).__name__
                rules = [rule for rule, own in RULES.items() if key in own]
                hint = ""
                if rules:
                    hint = f", which is an option of decay={' and '.join(map(repr, rules))}"
                elif key == "decoupled_weight_decay":
                    hint = ": AdamW has decoupled decay"
                raise TypeError(
                    f"{name}.__init__() got an unexpected keyword argument {key!r}{hint}"
                )
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            **known,
            **options,
            "amsgrad": amsgrad,
            "decay": self.decay,
        }
        validate(defaults)
        self._backend = backends.requested(backend)
        self._engine = Engine()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; its values are checked first.

        Args:
            param_group: ``"params"``, and values of this group. What it does not say is as the
                constructor was told (``weight_decay``, too). If its ``decay`` is another one,
                options of that rule have their defaults.

        Raises:
            ValueError, TypeError: a value is out of its range or of a wrong type, a key is
                misspelled, or an option is none of the group's rule; the message names it.
            RuntimeError: ``differentiable=True``, or ``fused`` and ``foreach`` are both True.
        """
        if isinstance(param_group, dict):
            # Options are those of the constructor for groups of the class's own rule.
            rule = param_group.get("decay", self.decay)
            own = RULES.get(rule, {})
            options = {
                key: self.defaults.get(key, neutral) if rule == self.decay else neutral
                for key, neutral in own.items()
            }
            group = {**self.defaults, **options, **param_group}
            if len(param_group) > 1:  # else all values are the defaults, which have been checked
                refuse_misspelled(param_group)
                validate(group)
                refuse_foreign_options(group, param_group)
            others = {k: v for k, v in RULE_OPTIONS.items() if k in self.defaults and k not in own}
            for key, value in {**options, **others}.items():
                param_group.setdefault(key, value)
            # For torch's layout, without effect.
            param_group["decoupled_weight_decay"] = rule != "coupled"
            if group["decay_by"] == "schedule":
                # Not the lr itself: schedulers write into a tensor.
                param_group.setdefault("initial_lr", float(group["lr"]))
        super().add_param_group(param_group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # Read by GradScaler (see loss_scaling.py), and by frameworks that clip grads.
        return bool(self.defaults["fused"])

    # torch.compile reads every value of an attribute of that name, and compiles again when one has
    # changed; here the attribute has another name.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As ``torch.optim.Optimizer.param_groups``: a dict of values a group.

        A change takes effect at the next step.
        """
        return self._param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._param_groups = groups

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({k: v for k, v in state.items() if k != "param_groups"})
        self.param_groups = state["param_groups"]
        if "_engine" not in self.__dict__:
            self._engine = Engine()
        # The first edition's defaults lack some.
        self.defaults = {**DEFAULTS, "decay": self.decay, **self.defaults}
        for group in self.param_groups:
            checkpoints.complete(group, self.defaults)
        _unshare_counts(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``, from any class here or torch's Adam, AdamW.

        Hyper-parameters are the checkpoint's, as in torch; those of the decay only if it was saved
        under the same rule, and a warning says so if not. float32 moments of 16-bit params stay as
        they are; torch casts them. What others keep in the state is passed through.

        Args:
            state_dict: that of such an optimizer.

        Raises:
            ValueError, TypeError: states are missing, or a value is out of its range; the message
                names it, or the param groups differ in size; nothing was loaded.
        """
        checkpoints.load(self, state_dict, super().load_state_dict)

    def track_updates(self, every: int | None = 1, per: str = "group") -> None:
        """Has every ``every``-th step from now on note what it does, in its one pass.

        The others cost nothing, and no step waits for the device. It is no part of a checkpoint,
        nor of a copy. A CUDA graph whose capture was such a step notes at each replay; a tracked
        step of the same tensors must have come before the capture. Steps taken
        by :func:`step_in_backward` are none: with this, they raise a RuntimeError. A step of params
        that share memory is not noted.

        Args:
            every: a number of steps. 1 tracks each step; 0 or None, none.
            per: ``"group"`` or ``"tensor"``: what :meth:`update_stats` has one entry for.

        Raises:
            ValueError: an argument is out of its range; the message names it and its value.
        """
        self._engine.tracker = checked(every, per)

    def update_stats(self) -> list[UpdateStats]:
        """What the last tracked step did: of each param group, or of each tensor, that had a grad.

        Empty if no step has been tracked. Waits for that step, if it is on a GPU. A step that a
        ``GradScaler`` skips does nothing: the stats stay those of the tracked step before it. Of a
        DTensor they are of its local tensor: bins, counts and squares of norms add up over ranks.

        Returns:
            One :class:`UpdateStats` a group, or a tensor, with its name.
        """
        tracker = self._engine.tracker
        stats = [] if tracker is None else tracker.stats()
        self._engine.watch.look()
        return stats

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """A context in which the params are their moving averages, for evaluation.

        Params without an average stay as they are. In the end params and averages are what they
        were, to the bit, also after an exception. It takes a copy of the params. With FSDP2, call
        ``model.reshard()`` before entering and before leaving: a root module that was used stays
        unsharded, and would go on with the weights that it has.

        Returns:
            A context manager.

        Raises:
            RuntimeError: no param has an average (``ema_decay``), this is in effect already, or a
                step is taken within.
        """
        engine, saved = self._engine, []
        try:
            with engine.lock, torch.no_grad():  # a step of another thread is over, or begins later
                averaged = [
                    (param, self.state[param]["ema"])
                    for group in self.param_groups
                    for param in group["params"]
                    if "ema" in self.state.get(param, {})
                ]
                if not averaged:
                    raise RuntimeError("no param has an average yet: set ema_decay, and step once")
                if engine.blocked is not None:
                    raise RuntimeError("ema_weights() is in effect already")
                saved = [(param, param.detach().clone()) for param, _ in averaged]
                engine.blocked = "the params are their averages, within ema_weights()"
                for param, ema in averaged:
                    param.copy_(ema)
            yield
        finally:
            with (
                Uninterrupted(),
                engine.lock,
                torch.no_grad(),
                contextlib.ExitStack() as stack,
            ):  # all of them, whatever one raises
                if saved:
                    stack.callback(setattr, engine, "blocked", None)
                for param, before in saved:
                    stack.callback(param.copy_, before)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Steps each param that has a grad, by the formula of the class, or of its group's rule.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The loss that ``closure`` has returned; without one, None.

        Raises:
            RuntimeError: a tensor cannot be used or no backend can run; nothing was updated.
        """
        # By a module of torch's, since Dynamo looks for one in a frame.
        if compiler.is_dynamo_compiling():
            from . import compiled  # and Dynamo, only where it is in use

            observed = _has_hooks(self) and _is_own_step(self)
            traced = compiled.observed_traced_step if observed else compiled.traced_step
            return traced(self, closure)
        # Hooks see no argument where there is none.
        if (_profiler_enabled() or _has_hooks(self)) and _is_own_step(self):
            return _observed_step(self, *(() if closure is None else (closure,)))
        if closure is not None:
            return _step(self, closure)
        # What _step does then, but for a call: where caches are cold, each call is felt.
        attributes = self.__dict__
        scaled = "grad_scale" in attributes or "found_inf" in attributes
        take_step(self, LossScaling.of(self) if scaled else None)
        return None

    # So that torch leaves it alone: its wrapper, _observed_step here, costs as much as 40 tensors.
    step.hooked = True  # type: ignore[attr-defined]


def _step(optimizer: _FusedAdam, closure: Callable[[], float] | None = None) -> float | None:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    take_step(optimizer, LossScaling.of(optimizer))
    return loss


_observed_step = Optimizer.profile_hook_step(_step)


def _is_own_step(optimizer: Optimizer) -> bool:
    """If not, torch has called the hooks around the step of a subclass, which calls ours."""
    return type(optimizer).step is _FusedAdam.step


def _has_hooks(optimizer: Optimizer) -> bool:
    """Whether a hook would notice a step."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


def _unshare_counts(optimizer: Optimizer) -> None:
    """Each param gets a step count of its own: in the first edition they shared one."""
    seen = set()
    for state in optimizer.state.values():
        count = state.get(COUNT) if isinstance(state, dict) else None
        if isinstance(count, Tensor):
            if id(count) in seen:
                state[COUNT] = count.clone()
            seen.add(id(count))


@document(weight_decay="0")
class Adam(_FusedAdam):
    r"""Adam with coupled l2: the paper's Adam-l2, Algorithm 1 with line 5.

    .. math::
        g_t = \nabla f_t(x_{t-1}) + \lambda x_{t-1}, \quad
        x_t = x_{t-1} - \eta_t \alpha \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    with ``lr`` = :math:`\eta_t \alpha` and ``weight_decay`` = :math:`\lambda`, the share of a
    weight that is added to its gradient. The moments :math:`\hat m_t` and :math:`\hat v_t` are
    those of :math:`g_t`, so it is not scale-free. It equals ``torch.optim.Adam``.
    """

    decay = "coupled"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        backend: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, backend=backend, **options)


@document(
    more="""
        cautious: decay only where the update and the param do not have opposite signs, so that the
            decay never undoes what the update does (https://arxiv.org/abs/2510.12402 has it;
            default: False)."""
)
class AdamW(_FusedAdam):
    r"""Adam with decoupled weight decay: the paper's equation (4).

    .. math::
        x_t = (1 - s) x_{t-1} - \eta_t \alpha \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    with ``lr`` = :math:`\eta_t \alpha`. The decay strength ``s`` is the share of a weight that a
    step takes off. It equals ``torch.optim.AdamW``, and it is the first-order Taylor expansion of
    :class:`AdamProx` in ``s``.
    """

    decay = "decoupled"


_PROXIMAL = """
        metric: the norm of the proximal step, the paper's M_t. ``"identity"``: ``M_t = eta_t I``,
            which is scale-free (default). ``"adam"``: the general form of equation (3),
            ``M_t = diag(lr / (sqrt(vhat) + eps))``. Each coordinate has ``s / (sqrt(vhat) + eps)``
            in place of ``s``. It is not scale-free, and weakens the decay where gradients are
            large. With an l1 penalty, a coordinate that never had a gradient becomes zero.
        bounds: ``(low, high)``, either may be None: the param stays in this box, by the prox of the
            penalty and the box together. ``(0, None)`` keeps params from being negative. Each end
            is rounded inwards to the param's dtype (default: None)."""


@document(more=_PROXIMAL)
class AdamProx(_FusedAdam):
    r"""Adam with the proximal step of the squared l2 norm: the paper's equation (5).

    .. math::
        x_t = \operatorname{argmin}_x \tfrac12 \|x - z_t\|^2 + \tfrac s2 \|x\|^2
            = z_t / (1 + s), \quad
        z_t = x_{t-1} - \eta_t \alpha \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    with ``lr`` = :math:`\eta_t \alpha`. The decay strength ``s`` is about the share of a weight
    that a step takes off.
    """

    decay = "prox_sq_l2"


@document(
    more="""
        l2: adds ``l2 / 2`` times the squared l2 norm to the penalty (elastic net): the result is
            divided by ``1 + s2``, with ``s2`` from ``l2`` as ``s`` from ``weight_decay``
            (default: 0)."""
    + _PROXIMAL
)
class AdamProxL1(_FusedAdam):
    r"""Adam with the proximal step of the l1 norm, the soft threshold: the paper's section 5.

    .. math::
        x_t = \operatorname{argmin}_x \tfrac12 \|x - z_t\|^2 + s \|x\|_1
            = \operatorname{sign}(z_t) \max(|z_t| - s, 0), \quad
        z_t = x_{t-1} - \eta_t \alpha \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    The decay strength ``s`` is a length, as the weights are: a step takes it off each of them.
    Coordinates within ``s`` of zero become exactly zero. Complex params are pairs of reals: their
    real and imaginary parts are thresholded apart.
    """

    decay = "prox_l1"


@document(
    more="""
        block: what a norm is taken of. ``"tensor"``: a param (default). ``"row"``: each index of
            dim 0, which is a neuron, or a filter. An int n: n rows, as of an attention head; the
            last block of a param may have fewer. ``"group"``: all params of the group that have a
            grad, the paper's formula taken literally. Of a 1-D param a row is one element.
        block_scaling: ``"sqrt"`` multiplies ``s`` by the square root of the block's number of
            reals, so that one ``weight_decay`` suits blocks of any size. ``"none"``: the paper's,
            one ``s`` for all (default)."""
)
class AdamProxL2(_FusedAdam):
    r"""Adam with the proximal step of the l2 norm, not squared: the paper's section 5.

    .. math::
        x_t = \operatorname{argmin}_x \tfrac12 \|x - z_t\|^2 + s \sum_B \|x_B\|_2, \quad
        x_{t,B} = \max(1 - s / \|z_{t,B}\|, 0) z_{t,B}, \quad
        z_t = x_{t-1} - \eta_t \alpha \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    A block B is one param, or what ``block`` says. The decay strength ``s`` is a length, as the
    norms are: a step takes it off each block's norm. A block becomes exactly zero as a whole once
    its norm is at most ``s``. ``z`` is rounded to the param's dtype before its norm is taken.
    """

    decay = "prox_l2"
