"""The start of a step in a training loop: the caches are cold, and every grad is new.

This module needs torch alone, so that ``builds.py`` can time any build of the package with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

# Several times a large last-level cache; 256 MB.
FLUSH_NUMEL = 1 << 26


def flush(buffer: Tensor) -> None:
    """Drives everything else out of the caches, if the buffer is larger than they are.

    On a CPU, all threads of torch take part, each with the caches of its own core.
    """
    buffer.neg_()


class ColdStart:
    """Prepares an optimizer for a cold step: a backward pass makes new grads, then caches are lost.

    Autograd makes the grads, as in training: they have no Python object before a step asks for it.
    Their values stay those of the grads that the params have now.
    """

    def __init__(self, optimizer: Optimizer, buffer: Tensor, new_grads: bool = True) -> None:
        """Takes a buffer for :func:`flush`; a replay of a CUDA graph needs its grads in place."""
        self._optimizer = optimizer
        self._buffer = buffer
        params = [p for group in optimizer.param_groups for p in group["params"]] * new_grads
        self._params_and_grads = [(param, param.grad) for param in params]

    def __call__(self) -> None:
        """Leaves the optimizer ready for its step."""
        if self._params_and_grads:
            self._backward()
        flush(self._buffer)

    def _backward(self) -> None:
        self._optimizer.zero_grad()
        torch.autograd.backward([(param * grad).sum() for param, grad in self._params_and_grads])
