"""Adam's direction and a proximal decay in one pass over memory, as ``torch.optim`` optimizers."""

from importlib.metadata import version as _version

from .grouping import WITHOUT_DECAY, param_groups
from .in_backward import step_in_backward
from .optimizers import Adam, AdamProx, AdamProxL1, AdamProxL2, AdamW
from .telemetry import UpdateStats

__version__ = _version("adamprox")
__all__ = [
    "WITHOUT_DECAY",
    "Adam",
    "AdamProx",
    "AdamProxL1",
    "AdamProxL2",
    "AdamW",
    "UpdateStats",
    "param_groups",
    "step_in_backward",
]
