"""Steps that are replays of a CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def capture_steps(optimizer: Any) -> None:
    """Makes an optimizer with ``capturable=True`` replay its steps; its grads stay where they are.

    The first step makes the states, the second one is captured, and all after it are replays.
    """
    optimizer.step = _Replayed(optimizer.step)


def is_captured(optimizer: Any) -> bool:
    """Whether its steps are such replays, which read the grads where they were."""
    return isinstance(optimizer.step, _Replayed)


class _Replayed:
    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step
        self._stepped = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self._stepped:
            self._stepped = True
            self._step()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph):
                self._step()
        self._graph.replay()
