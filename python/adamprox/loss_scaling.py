"""Mixed precision as ``torch.amp.GradScaler`` asks for it: unscaled and skipped within the step.

An optimizer that says so (``_step_supports_amp_scaling``) is given two tensors of one number as
attributes, for one step: ``grad_scale``, by which the loss was multiplied, or None where
``unscale_`` has been called; and ``found_inf``, not 0 if a grad is infinite or NaN. A grad is
multiplied by ``1 / grad_scale``, which is exact for a power of two, as it is read; ``.grad`` itself
stays as it is. If ``found_inf`` is not 0, no param, state or step count changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _C


class LossScaling(NamedTuple):
    """What a GradScaler has set; either may be missing."""

    grad_scale: Tensor | None
    found_inf: Tensor | None

    @staticmethod
    def from_tensors(grad_scale: Tensor | None, found_inf: Tensor | None) -> LossScaling | None:
        """None: neither is set, and there is nothing to do."""
        if grad_scale is None and found_inf is None:
            return None
        return LossScaling(grad_scale, found_inf)

    @staticmethod
    def of(optimizer: Optimizer) -> LossScaling | None:
        """What is set on an optimizer."""
        # The class has no defaults for them: GradScaler multiplies a grad_scale that is there.
        attributes = optimizer.__dict__
        if "grad_scale" not in attributes and "found_inf" not in attributes:
            return None
        return LossScaling.from_tensors(attributes.get("grad_scale"), attributes.get("found_inf"))

    def host_lets_step(self) -> bool:
        """Whether ``found_inf`` is 0; the host waits for it."""
        return self.found_inf is None or self.found_inf.item() == 0

    def apply(self, tables: Iterable[_C.Table]) -> bool:
        """Hands them to the tables; False if the host knows that nothing is to be stepped.

        A GPU reads them itself. The host waits for one only where it is the host that steps.
        """
        tables = list(tables)
        by_host = any(not table.has_recipes for table in tables)
        if by_host and not self.host_lets_step():
            return False
        for table in tables:
            if table.has_recipes:
                # The tensors themselves where they are there already: a graph's replays read them.
                device = "cpu" if table.device[0] == "cpu" else torch.device(*table.device)
                table.set_loss_scaling(*(None if t is None else t.to(device) for t in self))
            elif self.grad_scale is not None:
                table.loss_scale = self.grad_scale.item()
        return True
