"""Adam's direction and a proximal decay in one pass over memory, as ``torch.optim`` optimizers."""

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
