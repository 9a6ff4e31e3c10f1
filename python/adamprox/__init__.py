r"""Adam's direction and a proximal decay in one pass over memory, as ``torch.optim`` optimizers.

The paper is *Understanding AdamW through Proximal Methods and Scale-Freeness*,
https://arxiv.org/abs/2202.00089. Of its symbols, :math:`x` is the param, :math:`\eta_t \alpha` is
``lr``, :math:`\lambda` is ``weight_decay``, and :math:`\hat m_t` and :math:`\hat v_t` are the
moments ``exp_avg`` and ``exp_avg_sq``, divided by ``1 - beta1**t`` and ``1 - beta2**t``. The decay
strength ``s`` is made of ``lr`` and ``weight_decay``, as ``decay_by`` says.
"""

from importlib.metadata import version as _version

from .grouping import WITHOUT_DECAY, param_groups
from .in_backward import step_in_backward
from .optimizers import Adam, AdamProx, AdamProxL1, AdamProxL2, AdamW
from .sparsity_target import SparsityTarget
from .telemetry import UpdateStats
from .zeros import freeze_zeros, sparsity

__version__ = _version("adamprox")
__all__ = [
    "WITHOUT_DECAY",
    "Adam",
    "AdamProx",
    "AdamProxL1",
    "AdamProxL2",
    "AdamW",
    "SparsityTarget",
    "UpdateStats",
    "freeze_zeros",
    "param_groups",
    "sparsity",
    "step_in_backward",
]
