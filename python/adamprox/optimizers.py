"""The optimizers: thin ``torch.optim`` classes, one a decay rule, over the backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer, ParamsT

from . import _C, backends
from .arguments import document, validate
from .mending import Staged, mend, unstage
from .sharding import share_of

Betas = tuple[float | Tensor, float | Tensor]


class _FusedAdam(Optimizer):
    """Adam's direction composed with a decay rule; the classes below say which."""

    decay: ClassVar[str]

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
            group = {**self.defaults, **param_group}
            validate(group)
            if group["decay_by"] == "schedule":
                # Not the lr itself: schedulers write into a tensor.
                param_group.setdefault("initial_lr", float(group["lr"]))
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
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
            if group["decay_by"] == "schedule":
                group.setdefault("initial_lr", float(group["lr"]))

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``: each param with a step counter of its own."""
        result = super().state_dict()
        result["state"] = {
            index: {**state, "step": state["step"].clone()} if "step" in state else state
            for index, state in result["state"].items()
        }
        return result

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
        return (_observed_step if _is_observed(self) else _step)(self, closure)

    # So that torch leaves it alone: its wrapper, _observed_step here, costs as much as 40 tensors.
    step.hooked = True  # type: ignore[attr-defined]


def _step(optimizer: _FusedAdam, closure: Callable[[], float] | None = None) -> float | None:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()

    gather = optimizer._gather
    if optimizer._backend in (None, "cpu") and gather.step_on_cpu(
        optimizer.param_groups, optimizer.state, torch.get_num_threads()
    ):
        return loss

    staged = Staged()
    try:
        # At most twice: states that were missing may turn out to need copies.
        while findings := gather.read(optimizer.param_groups, optimizer.state, staged):
            mend(optimizer, findings, staged)
        decay, groups = optimizer.decay, optimizer.param_groups
        across_ranks = gather.norms_across_ranks
        if across_ranks:  # z first; a soft threshold of zero leaves it as it is, to the bit
            decay, groups = "prox_l1", [{**group, "weight_decay": 0.0} for group in groups]
            gather.release()
            gather = optimizer._gather_of_z
            gather.read(groups, optimizer.state, staged)
        gather.hold()
        tables = gather.tables()
        chosen = [backends.select(optimizer._backend, table.device[0]) for table in tables]
        gather.mark_written()
        for table, backend in zip(tables, chosen, strict=True):
            backend.step(table, decay, groups)
        gather.count_step()
        if across_ranks:
            from .block_norms import Block, shrink

            shrink(
                [
                    Block(p, staged.get(p, {}).get("param", share_of(p)), group)
                    for group in optimizer.param_groups
                    for p in group["params"]
                    if p.grad is not None
                ]
            )
    finally:
        gather.release()
    if staged:
        unstage(optimizer, staged)
    return loss


_observed_step = Optimizer.profile_hook_step(_step)


def _is_observed(optimizer: Optimizer) -> bool:
    """Whether a profiler or a hook would notice a step."""
    return bool(
        torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        or optimizer._optimizer_step_pre_hooks
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
