"""What a step uses in place of a param's own tensors, and the states that it makes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _C
from .hyperparameters import COUNT, SIXTEEN_BITS, Group, State, states_of

Given = dict[Tensor, dict[str, Tensor | None]]
"""Tensors that the caller has in place of a param's own, by key; a grad that is None: no step."""

Made = list[tuple[Tensor, dict[str, Tensor]]]
"""Params, and states that were made for them."""


class StandIns:
    """Tensors that one step uses in place of a param's own, by the param's id and a key."""

    def __init__(self, given: Given) -> None:
        self.by_id = {id(param): dict(tensors) for param, tensors in given.items()}
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.made: Made = []
        self._replaced: list[tuple[Any, str, Any]] = []

    def add(self, param: Tensor, key: str, copy: Tensor, original: Tensor | None) -> None:
        """Uses ``copy``, which is written back to ``original``, if that is not None."""
        self.by_id.setdefault(id(param), {})[key] = copy
        if original is not None:
            self._copies.append((original, copy))

    def replace(self, state: Any, key: str, value: Tensor) -> None:
        """Puts a value of another kind into a param's state, for good."""
        self._replaced.append((state, key, state[key]))
        state[key] = value

    def forget_states(self, optimizer: Optimizer) -> None:
        """Brings back the states as they were before a step that is not taken after all."""
        for state, key, before in reversed(self._replaced):
            state[key] = before
        for param, new in self.made:
            state = optimizer.state.get(param, {})
            for key in new:
                state.pop(key, None)
            if not state:
                optimizer.state.pop(param, None)

    def overlap(self, tables: Iterable[_C.Table]) -> bool:
        """Whether what is written back may share memory with any other tensor of the step."""
        ranges = [(*range_of(original), True) for original, _ in self._copies]
        tables = list(tables)
        if not ranges or sum(table.num_rows for table in tables) == 1:
            return False
        for table in tables:
            for row in table.rows():
                tensors = (row.param, row.grad, *row.states.values())
                ranges += [(*range_of(tensor), False) for tensor in tensors]
        end, original = 0, False  # of the range that reaches furthest
        for first, last, is_original in sorted(ranges):
            if first < end and (original or is_original):
                return True
            original = is_original
            end = max(end, last)
        return False

    @torch.no_grad()
    def write_back(self) -> None:
        """Copies what the step has written to where it belongs."""
        for original, copy in self._copies:
            original.copy_(copy)


def range_of(tensor: Tensor) -> tuple[int, int]:
    """The bytes from its first element to its last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.itemsize


@torch.no_grad()
def make_states(optimizer: Optimizer, params_and_groups: Iterable[tuple[Tensor, Group]]) -> Made:
    """States and a step count for those that have none; an error leaves all as they are.

    Returns:
        what it has made.
    """
    wanted = [
        (param, group, _missing(optimizer, param, group)) for param, group in params_and_groups
    ]
    with torch.inference_mode(False):
        # Views of one buffer: they lie side by side, which is what reading them costs.
        fresh = [param for param, _, missing in wanted if missing is None]
        counts = iter(torch.zeros(len(fresh), dtype=count_dtype(), device="cpu").unbind())
        made: Made = []
        for param, group, missing in wanted:
            states = states_of(group) if missing is None else missing
            new = {state.key: _start(state, param) for state in states}
            made.append((param, new if missing is not None else {COUNT: next(counts), **new}))
    for param, new in made:
        optimizer.state[param].update(new)
    return made


def _missing(optimizer: Optimizer, param: Tensor, group: Group) -> list[State] | None:
    """The states that begin beside older ones; None: there are none at all."""
    state = optimizer.state.get(param)
    states = list(states_of(group))
    if state is None or not any(key in state for key in (COUNT, *(s.key for s in states))):
        return None
    return [s for s in states if s.starts == "param" and s.key not in state]


def _start(state: State, param: Tensor) -> Tensor:
    dtype = (
        torch.float32 if state.type == "compute" and param.dtype in SIXTEEN_BITS else param.dtype
    )
    if state.starts == "param":
        return param.detach().to(dtype, copy=True)
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def count_dtype() -> torch.dtype:
    """Of a new step count, as in torch."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
