"""What a step cannot use as it is: made, copied into shape, laid out anew, or refused by name.

Nothing is written before everything has been checked, so an error leaves every param untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from . import _C
from .freed_grad import FreedGrad
from .grouping import name_of
from .hyperparameters import COUNT, SIXTEEN_BITS, STATES, states_of
from .sharding import is_distributed, local_of, why_not
from .stand_ins import StandIns, count_dtype, make_states, range_of
from .tensors import dispatches, is_transformed

_DTYPES = (
    torch.float32,
    torch.float64,
    *SIXTEEN_BITS,
    torch.complex64,
    torch.complex128,
)
_TYPES = {state.key: state.type for state in STATES}


@_disable_dynamo  # which would trace it after a graph break
def mend(
    optimizer: Optimizer,
    groups: Sequence[dict[str, Any]],
    findings: Sequence[_C.Finding],
    stand_ins: StandIns,
    capturing: bool,
) -> None:
    """Makes missing states and counts, and copies of what lies otherwise than it must.

    Raises:
        RuntimeError: a tensor cannot be used; the message names it and says why.
    """
    findings = _without_freed_grads(findings)
    # A param that is listed twice is mended once.
    once: dict[tuple[int, str], _C.Finding] = {}
    for finding in findings:
        once.setdefault((id(finding.param), finding.key), finding)
    params = [_Param(optimizer, groups[f.group], f, stand_ins) for f in once.values()]
    for param in params:
        param.check()
    if capturing and any(param.key not in ("param", "grad") for param in params):
        raise RuntimeError(
            f"{type(optimizer).__name__}: states and step counts must be there before a step is "
            "captured into a CUDA graph, or each replay would make them anew: step once before, "
            "with the same grads"
        )
    new = {id(p.param): (p.param, p.group) for p in params if p.is_missing()}
    stand_ins.made += make_states(optimizer, new.values())
    with torch.inference_mode(False), torch.no_grad():  # so that copies are ordinary tensors
        for param in params:
            if not param.is_missing():
                param.mend()


def refuse_overlaps(
    optimizer: Optimizer,
    groups: Sequence[dict[str, Any]],
    findings: Sequence[_C.Finding],
    stand_ins: StandIns,
) -> None:
    """Raises a RuntimeError for a param that shares memory with its own states."""
    for finding in findings:
        if finding.key == "overlap":
            _Param(optimizer, groups[finding.group], finding, stand_ins).refuse_overlap()


def _without_freed_grads(findings: Sequence[_C.Finding]) -> Sequence[_C.Finding]:
    """A param whose step was taken in backward has nothing to mend: its grad is None now."""
    freed = {id(f.param) for f in findings if isinstance(f.param.grad, FreedGrad)}
    for finding in findings:
        if id(finding.param) in freed:
            finding.param.grad = None
    return [finding for finding in findings if id(finding.param) not in freed]


class _Param:
    """A param with a tensor (``key``) that a step cannot use as it is."""

    def __init__(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        finding: _C.Finding,
        stand_ins: StandIns,
    ) -> None:
        self.optimizer, self.group, self.stand_ins = optimizer, group, stand_ins
        self.param, self.key = finding.param, finding.key
        self.name = f"param_groups[{finding.group}]['params'][{finding.index}]"
        if (name := name_of([group], 0, finding.index)) is not None:
            self.name += f" ({name})"
        self.state: Any = optimizer.state.get(self.param) or {}
        self._own_is_missing = self.key not in self.state
        self._format = torch.preserve_format

    def tensor(self, key: str) -> Any:
        """What the step has at ``key``."""
        given = self.stand_ins.by_id.get(id(self.param), {})
        own = {"param": self.param, "grad": self.param.grad}
        return given[key] if key in given else own[key] if key in own else self.state.get(key)

    def refuse(self, problem: str) -> NoReturn:
        raise RuntimeError(f"{type(self.optimizer).__name__}: {problem}; nothing was updated")

    def check(self) -> None:
        """Raises a RuntimeError if it cannot be mended."""
        if self.key == "state":
            self._check_tensor("param")
            self._check_tensor("grad")
        elif self.key == "overlap":
            self.refuse_overlap()
            self.key = "grad"  # which may be amid what is written: it is copied before
        elif self.key == "bounds":
            self.refuse(
                f"bounds={self.group['bounds']!r} of {self.name}: between them is no number of "
                f"dtype={self.param.dtype}"
            )
        elif self.key in (COUNT, "step on device"):
            self._count()
        elif self.key == "block":
            self._check_tensor("param")
            self.key, self._format = "param", torch.contiguous_format
        else:
            self._check_tensor("param")
            if not self.is_missing():
                self._check_tensor(self.key)

    def refuse_overlap(self) -> None:
        """Raises a RuntimeError if what a step writes of it shares memory."""
        tensors = [self.tensor(key) for key in ("param", *(s.key for s in states_of(self.group)))]
        ranges = sorted(range_of(local_of(t)) for t in tensors if isinstance(t, Tensor))
        if any(first[1] > second[0] for first, second in pairwise(ranges)):
            self.refuse(f"the param and the states of {self.name} share memory")

    def mend(self) -> None:
        """Makes it, lays it out anew, or copies it."""
        if self.key == "step on device":
            device = local_of(self.param).device
            count = torch.tensor(self._count(), dtype=count_dtype(), device=device)
            self.stand_ins.replace(self.state, COUNT, count)
        elif self.key == COUNT:
            number, own = self._count(), self.state.get(COUNT)
            if isinstance(own, Tensor):
                # The next count as that tensor can have it: bfloat16 cannot have 257.
                copy = torch.tensor(float(own + 1) - 1, dtype=torch.float64, device="cpu")
                self.stand_ins.add(self.param, COUNT, copy, own)
            else:
                count = torch.tensor(number, dtype=count_dtype(), device="cpu")
                self.stand_ins.replace(self.state, COUNT, count)
        elif not self._widened() and not self._laid_out_anew():
            self._copy()

    def is_missing(self) -> bool:
        """Whether it is to be made: all states, or one that may begin beside older ones."""
        late = [state.key for state in STATES if state.starts == "param"]
        return self.key == "state" or (self.key in late and self._own_is_missing)

    def _widened(self) -> bool:
        """Moments of mixed dtypes become float32, once and for all."""
        keys = [state.key for state in states_of(self.group) if state.type == "moment"]
        moments = [self.tensor(key) for key in keys]
        mixed = len({moment.dtype for moment in moments}) > 1
        if self.key not in keys or self.param.dtype not in SIXTEEN_BITS or not mixed:
            return False
        for key, moment in zip(keys, moments, strict=True):
            self.stand_ins.replace(self.state, key, moment.to(torch.float32))
        return True

    def _laid_out_anew(self) -> bool:
        """A state whose strides are not the param's gets the param's, once and for all."""
        own = self.state.get(self.key)
        if self.key not in _TYPES or self.tensor(self.key) is not own:
            return False
        local = local_of(own)
        if local.is_inference() or local.is_neg() or local.is_conj():
            return False
        wanted = self._like(local.dtype)
        if local.stride() == wanted.stride():
            return False
        local.data = wanted.copy_(local)
        return True

    def _copy(self) -> None:
        tensor = self.tensor(self.key)
        moved = local_of(tensor, self.param)  # which may take communication
        copy = self._like(moved.dtype).copy_(moved)
        original = None if self.key == "grad" else local_of(tensor)
        self.stand_ins.add(self.param, self.key, copy, original)

    def _like(self, dtype: torch.dtype) -> Tensor:
        """New memory, laid out as the step has the param."""
        param = local_of(self.tensor("param"))
        return torch.empty_like(param, dtype=dtype, memory_format=self._format)

    def _count(self) -> float:
        what = f"the step count of {self.name}"
        if COUNT not in self.state:
            self.refuse(f"{what} is missing")
        try:
            if isinstance(self.state[COUNT], Tensor):
                self._check_memory(self.state[COUNT], what)
            count = float(self.state[COUNT])
        except (TypeError, ValueError, RuntimeError) as error:
            self.refuse(f"{what} cannot be read: {error!r}")
        if not 0 <= count < float("inf"):
            self.refuse(f"{what} is {count}, expected a finite number, 0 or more")
        if isinstance(self.state[COUNT], Tensor):
            self._check_writable(self.state[COUNT], what)
        return count

    def _check_writable(self, tensor: Tensor, what: str) -> None:
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            self.refuse(f"{what} was made in inference mode and cannot be written to outside of it")

    def _check_tensor(self, key: str) -> None:
        tensor, param = self.tensor(key), self.param
        what = self.name if key == "param" else f"{key} of {self.name}"
        if not isinstance(tensor, Tensor):
            self.refuse(f"{what} is {tensor!r}, expected a tensor")
        if tensor.is_sparse and key == "grad":
            self.refuse(
                f"sparse gradients are not supported, please consider SparseAdam: {self.name}.grad"
            )
        if is_distributed(tensor):
            if problem := why_not(tensor, param, may_move=key == "grad"):
                self.refuse(f"{what} {problem}")
        elif dispatches(tensor):
            self.refuse(f"{what} is a {type(tensor).__name__}, expected a plain one or a DTensor")
        elif is_transformed(tensor):
            self.refuse(
                f"{what} belongs to a transformation of torch.func, expected a plain tensor"
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            self.refuse(f"{what} has layout={tensor.layout}, expected torch.strided")
        if tensor.device.type not in ("cpu", "cuda"):
            self.refuse(f"{what} is on {tensor.device}, expected a cpu or cuda device")
        if tensor.dtype not in _DTYPES:
            self.refuse(f"{what} has dtype={tensor.dtype}, expected one of {_DTYPES}")
        own = local_of(param)
        if is_distributed(param) and not is_distributed(tensor) and tensor.shape != own.shape:
            self.refuse(
                f"{what} is a plain tensor of shape {tuple(tensor.shape)}, and the param a "
                f"DTensor, of which this rank has {tuple(own.shape)}: distribute it, or load it "
                "by torch.distributed.checkpoint"
            )
        if tensor.shape != param.shape:
            self.refuse(f"{what} has shape {tuple(tensor.shape)}, expected {tuple(param.shape)}")
        if tensor.device != param.device:
            self.refuse(f"{what} is on {tensor.device}, and the param on {param.device}")
        self._check_dtype(key, tensor, what)
        self._check_memory(tensor, what)
        if key != "grad":
            self._check_writable(tensor, what)
            if torch._debug_has_internal_overlap(local_of(tensor)) == 1:
                self.refuse(
                    f"{what} is expanded: several of its elements share one place in memory"
                )

    def _check_dtype(self, key: str, tensor: Tensor, what: str) -> None:
        param = self.param
        allowed = {param.dtype}
        if key in _TYPES and param.dtype in SIXTEEN_BITS:
            allowed = {torch.float32} | ({param.dtype} if _TYPES[key] == "moment" else set())
        if tensor.dtype not in allowed:
            self.refuse(f"{what} has dtype={tensor.dtype}, and the param {param.dtype}")

    def _check_memory(self, tensor: Tensor, what: str) -> None:
        on_device = tensor.device.type in ("cpu", "cuda") and tensor.layout == torch.strided
        if (
            dispatches(tensor)
            or not on_device
            or tensor.numel() == 0
            or torch._is_zerotensor(tensor)
        ):
            return
        last = tensor.storage_offset() + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        if (last + 1) * tensor.itemsize > tensor.untyped_storage().nbytes():
            self.refuse(f"{what} has a storage of too few bytes: it was freed or resized")
