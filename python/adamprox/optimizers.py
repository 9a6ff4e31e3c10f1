"""The optimizers: thin ``torch.optim`` classes, one a decay rule, over the backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer, ParamsT

from . import _C, backends, checkpoints
from .arguments import document, validate
from .loss_scaling import LossScaling
from .mending import Given, Staged, mend, refuse_in_capture, stand_ins, unstage
from .sharding import share_of
from .telemetry import Tracker, UpdateStats, checked

Betas = tuple[float | Tensor, float | Tensor]


class _FusedAdam(Optimizer):
    """Adam's direction composed with a decay rule; the classes below say which."""

    decay: ClassVar[str]
    _handle: int | None = None  # of compiled.py
    _tracker: Tracker | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decay_by: str = "lr",
        backend: str | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decay_by": decay_by,
            "decoupled_weight_decay": self.decay != "coupled",  # of torch's layout, without effect
        }
        validate(defaults)
        self._backend = backends.requested(backend)
        self._make_gathers()
        super().__init__(params, defaults)

    def _make_gathers(self) -> None:
        self._gather = _C.Gather(self.decay)
        self._gather_of_z = _C.Gather("prox_l1")  # see _step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; its values are checked first."""
        if isinstance(param_group, dict):
            # The class decides, and not a group that comes from another class.
            param_group["decoupled_weight_decay"] = self.defaults["decoupled_weight_decay"]
            group = {**self.defaults, **param_group}
            validate(group)
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
        """As ``torch.optim.Optimizer.param_groups``."""
        return self._param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._param_groups = groups

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({k: v for k, v in state.items() if k != "param_groups"})
        self.param_groups = state["param_groups"]
        self._make_gathers()
        for group in self.param_groups:
            # Saved by torch.optim's classes, or by an older one of them.
            group.setdefault("amsgrad", False)
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("capturable", False)
            group.setdefault("differentiable", False)
            group.setdefault("fused", None)
            group.setdefault("decay_by", self.defaults["decay_by"])
            group["decoupled_weight_decay"] = self.decay != "coupled"
            if group["decay_by"] == "schedule":
                group.setdefault("initial_lr", float(group["lr"]))

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``: each param with a step counter of its own."""
        return checkpoints.save(self, super().state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``, from any class here or torch's Adam, AdamW.

        Hyper-parameters are the checkpoint's, as in torch. float32 moments of 16-bit params stay as
        they are; torch casts them.

        Raises:
            ValueError: keys are missing or unknown, which the message names, or the param groups
                differ in size; nothing was loaded.
        """
        checkpoints.load(self, state_dict, super().load_state_dict)

    def track_updates(self, every: int | None = 1, per: str = "group") -> None:
        """Has every ``every``-th step from now on note what it does, in its one pass.

        The others cost nothing, and no step waits for the device. It is no part of a checkpoint,
        nor of a copy. A CUDA graph whose capture was such a step notes at each replay. Steps taken
        by :func:`step_in_backward` are none: with this, they raise a RuntimeError.

        Args:
            every: 1 tracks each step; 0 or None, none.
            per: ``"group"`` or ``"tensor"``: what :meth:`update_stats` has one entry for.

        Raises:
            ValueError: an argument is out of its range; the message names it and its value.
        """
        self._tracker = checked(every, per)

    def update_stats(self) -> list[UpdateStats]:
        """What the last tracked step did: of each param group, or of each tensor, that had a grad.

        Empty if no step has been tracked. Waits for that step, if it is on a GPU. A step that a
        ``GradScaler`` skips does nothing: the stats stay those of the tracked step before it. Of a
        DTensor they are of this rank's share: bins, counts and squares of norms add up over ranks.
        """
        return [] if self._tracker is None else self._tracker.stats(self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: a tensor cannot be used or no backend can run; nothing was updated.
        """
        if torch.compiler.is_compiling():
            from . import compiled  # and Dynamo, only where it is in use

            traced = compiled.observed_traced_step if _has_hooks(self) else compiled.traced_step
            return traced(self, closure)
        if _is_observed(self):  # hooks see no argument where there is none
            return _observed_step(self, *(() if closure is None else (closure,)))
        return _step(self, closure)

    # So that torch leaves it alone: its wrapper, _observed_step here, costs as much as 40 tensors.
    step.hooked = True  # type: ignore[attr-defined]


def _step(optimizer: _FusedAdam, closure: Callable[[], float] | None = None) -> float | None:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()

    step_tensors(optimizer, LossScaling.of(optimizer), {})
    return loss


def step_tensors(optimizer: _FusedAdam, scaling: LossScaling | None, given: Given) -> None:
    """The step itself; ``given`` has tensors that stand in for the optimizer's own."""
    gather = optimizer._gather
    tracker = optimizer._tracker
    if tracker is not None and not tracker.due():
        tracker = None
    if tracker is None and scaling is None and not given:
        of_optimizer, name = (optimizer._param_groups, optimizer.state), optimizer._backend
        if name in (None, "cpu") and gather.step_on_cpu(*of_optimizer, torch.get_num_threads()):
            return
        if name in (None, "cuda") and gather.step_on_cuda(*of_optimizer):
            return

    capturing = backends.capturing()
    if capturing:
        _check_capture(optimizer)
    staged = Staged()
    recipes = backends.follow_recipes(optimizer._backend)
    try:
        # At most three times: states that were missing may turn out to need copies, and counts a
        # place on a device.
        while findings := gather.read(
            optimizer.param_groups,
            optimizer.state,
            stand_ins(given, staged),
            *recipes,
            scaling is not None,
        ):
            if capturing:
                refuse_in_capture(optimizer, findings)
            mend(optimizer, findings, staged, given)
        decay, groups = optimizer.decay, optimizer.param_groups
        across_ranks = gather.norms_across_ranks
        if across_ranks:  # z first; a soft threshold of zero leaves it as it is, to the bit
            if capturing:
                raise RuntimeError(
                    f"{type(optimizer).__name__} on shards cannot be captured into a CUDA graph: "
                    "other ranks have parts of its norms; nothing was updated"
                )
            if scaling is not None and not scaling.host_lets_step():
                return
            decay, groups = "prox_l1", [{**group, "weight_decay": 0.0} for group in groups]
            gather.release()
            gather = optimizer._gather_of_z
            gather.read(
                groups, optimizer.state, stand_ins(given, staged), *recipes, scaling is not None
            )
        gather.hold()
        tables = gather.tables()
        chosen = [backends.select(optimizer._backend, table.device[0]) for table in tables]
        if capturing and not all(table.has_recipes for table in tables):
            raise RuntimeError(
                f"{type(optimizer).__name__}: what the host steps cannot be captured into a CUDA "
                "graph: params on the CPU, or backend='reference'; nothing was updated"
            )
        if scaling is not None and not scaling.apply(tables):
            return
        if tracker is not None:
            tracker.begin(tables, capturing)
        gather.begin_step()
        for table, backend in zip(tables, chosen, strict=True):
            backend.step(table, decay, groups)
        gather.count_step()
        if across_ranks:
            from .block_norms import Block, shrink

            shares = {
                p: staged.get(p, {}).get("param", share_of(p))
                for group in optimizer.param_groups
                for p in group["params"]
                if p.grad is not None
            }
            shrink(
                [
                    Block(p, shares[p], group)
                    for group in optimizer.param_groups
                    for p in group["params"]
                    if p in shares
                ]
            )
            if tracker is not None:
                tracker.note_params(tables, shares)
    finally:
        gather.release()
    if staged:
        unstage(optimizer, staged, given)


def _check_capture(optimizer: Optimizer) -> None:
    """Refuses, in torch's words, to be captured into a CUDA graph without ``capturable``."""
    # Its name in newer versions of torch, and in older ones.
    names = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    getattr(optimizer, next(name for name in names if hasattr(optimizer, name)))()


_observed_step = Optimizer.profile_hook_step(_step)


def _is_observed(optimizer: Optimizer) -> bool:
    """Whether a profiler or a hook would notice a step."""
    return torch.autograd._profiler_enabled() or _has_hooks(optimizer)  # type: ignore[attr-defined]


def _has_hooks(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


@document(
    weight_decay="0",
    decay_by=""" Without effect here:
            ``weight_decay`` goes into the gradient as it is.""",
)
class Adam(_FusedAdam):
    r"""Adam with coupled l2: the paper's Adam-l2, Algorithm 1 with line 5.

    .. math::
        g_t &= \nabla f_t(x_{t-1}) + \lambda x_{t-1} \\
        x_t &= x_{t-1} - \eta_t \alpha \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    with ``lr`` = :math:`\eta_t \alpha`. It equals ``torch.optim.Adam``, and it is not scale-free.
    """

    decay = "coupled"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decay_by: str = "lr",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decay_by=decay_by,
            backend=backend,
        )


@document()
class AdamW(_FusedAdam):
    r"""Adam with decoupled weight decay: the paper's equation (4).

    .. math::
        x_t = (1 - s) x_{t-1} - \eta_t \alpha \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    It equals ``torch.optim.AdamW``, and it is the first-order Taylor expansion of
    :class:`AdamProx` in the decay strength ``s``.
    """

    decay = "decoupled"


@document()
class AdamProx(_FusedAdam):
    r"""Adam with the proximal step of the squared l2 norm: the paper's equation (5).

    .. math::
        x_t = \operatorname{argmin}_x \tfrac12 \|x - z_t\|^2 + \tfrac s2 \|x\|^2
            = z_t / (1 + s), \quad
        z_t = x_{t-1} - \eta_t \alpha \hat m_t / (\sqrt{\hat v_t} + \epsilon)
    """

    decay = "prox_sq_l2"


@document()
class AdamProxL1(_FusedAdam):
    r"""Adam with the proximal step of the l1 norm, the soft threshold: the paper's section 5.

    .. math::
        x_t = \operatorname{argmin}_x \tfrac12 \|x - z_t\|^2 + s \|x\|_1
            = \operatorname{sign}(z_t) \max(|z_t| - s, 0), \quad
        z_t = x_{t-1} - \eta_t \alpha \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    Coordinates within ``s`` of zero become exactly zero. Complex params are pairs of reals: their
    real and imaginary parts are thresholded apart.
    """

    decay = "prox_l1"


@document()
class AdamProxL2(_FusedAdam):
    r"""Adam with the proximal step of the l2 norm, not squared: the paper's section 5.

    .. math::
        x_t = \operatorname{argmin}_x \tfrac12 \|x - z_t\|^2 + s \|x\|_2
            = \max(1 - s / \|z_t\|, 0) z_t, \quad
        z_t = x_{t-1} - \eta_t \alpha \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    The block whose norm is taken is one param tensor: it becomes exactly zero as a whole once its
    norm is at most ``s``. ``z`` is rounded to the param's dtype before its norm is taken.
    """

    decay = "prox_l2"
