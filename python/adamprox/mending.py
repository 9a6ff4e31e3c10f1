"""What the gather cannot use as it is: made, copied into shape, or refused by name.

Nothing is written before everything has been checked, so an error leaves every param untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _C
from .freed_grad import FreedGrad
from .sharding import is_distributed, share_of, why_not

Staged = dict[Tensor, dict[str, Tensor]]

# Tensors that stand in for a param's own, by key; a grad that is None keeps it from being stepped.
Given = dict[Tensor, dict[str, Tensor | None]]

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)


@torch.no_grad()
def mend(
    optimizer: Optimizer, findings: Iterable[_C.Finding], staged: Staged, given: Given
) -> None:
    """Makes missing states and counters, and dense copies (into ``staged``) of strided tensors.

    Raises:
        RuntimeError: a tensor cannot be used; the message names it and says why.
    """
    findings = _without_freed_grads(list(findings))
    without_state = set()
    for finding in findings:
        _check(optimizer, finding, given, twice=finding.param in without_state)
        if finding.key == "state":
            without_state.add(finding.param)
    make_states(
        optimizer,
        [(f.param, optimizer.param_groups[f.group]) for f in findings if f.key == "state"],
    )
    counters: dict[tuple[float, torch.device], Tensor] = {}
    for finding in findings:
        param, group = finding.param, optimizer.param_groups[finding.group]
        state = optimizer.state[param]
        if finding.key == "state":
            continue
        if finding.key == "step on device":
            count = float(state["step"])
            if (count, param.device) not in counters:
                counters[count, param.device] = torch.full(
                    (), count, dtype=_counter_dtype(), device=param.device
                )
            state["step"] = counters[count, param.device]
        elif finding.key == "step":
            state["step"] = torch.tensor(float(state["step"]), dtype=_counter_dtype(), device="cpu")
        else:
            _stage(param, _tensors(param, state, group, given), staged)


def refuse_in_capture(optimizer: Optimizer, findings: Iterable[_C.Finding]) -> None:
    """Of what is to be mended, what each replay of a CUDA graph would do anew.

    Raises:
        RuntimeError: a state or a step count is missing, or not where a graph can read it.
    """
    if any(finding.key in ("state", "step", "step on device") for finding in findings):
        raise RuntimeError(
            f"{type(optimizer).__name__}: states and step counts must be there before a step is "
            "captured into a CUDA graph, or each replay would make them anew: step once before, "
            "with the same grads"
        )


@torch.no_grad()
def make_states(
    optimizer: Optimizer, params_and_groups: Iterable[tuple[Tensor, dict[str, Any]]]
) -> None:
    """Zeros for those that have no state yet, which share a step count."""
    counter = torch.tensor(0.0, dtype=_counter_dtype(), device="cpu")
    for param, group in params_and_groups:
        state = optimizer.state[param]
        if not state:
            state["step"] = counter
            for key in ("exp_avg", "exp_avg_sq", *_amsgrad_keys(group)):
                state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)


@torch.no_grad()
def unstage(optimizer: Optimizer, staged: Staged, given: Given) -> None:
    """Copies what the step has written into staged tensors back to where it belongs."""
    for param, copies in staged.items():
        original = {"param": param, **optimizer.state[param], **given.get(param, {})}
        for key, copy in copies.items():
            if key != "grad":
                share_of(original[key]).copy_(copy)


def _without_freed_grads(findings: list[_C.Finding]) -> list[_C.Finding]:
    """A param whose step was taken in backward has nothing to mend: its grad is None now."""
    freed = {f.param for f in findings if isinstance(f.param.grad, FreedGrad)}
    for param in freed:
        param.grad = None
    return [finding for finding in findings if finding.param not in freed]


def stand_ins(given: Given, staged: Staged) -> Mapping[Tensor, Mapping[str, Tensor | None]]:
    """What the gather is to read instead of a param's own tensors."""
    if not given:
        return staged
    return {param: {**tensors, **staged.get(param, {})} for param, tensors in given.items()}


def _tensors(
    param: Tensor, state: dict[str, Any], group: dict[str, Any], given: Given
) -> dict[str, Any]:
    keys = ("exp_avg", "exp_avg_sq", *_amsgrad_keys(group))
    own = {"param": param, "grad": param.grad, **{key: state.get(key) for key in keys}}
    return {**own, **given.get(param, {})}


def _amsgrad_keys(group: dict[str, Any]) -> tuple[str, ...]:
    return ("max_exp_avg_sq",) if group["amsgrad"] else ()


def _counter_dtype() -> torch.dtype:
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _stage(param: Tensor, tensors: dict[str, Any], staged: Staged) -> None:
    like = torch.empty_like(share_of(tensors["param"]), memory_format=torch.preserve_format)
    staged[param] = {}
    for key, tensor in tensors.items():
        share = share_of(tensor, param)
        if share.stride() != like.stride() or share.is_conj() or share.is_neg():
            staged[param][key] = torch.empty_like(like, dtype=share.dtype).copy_(share)
        elif key == "grad" and is_distributed(tensor) and share is not tensor.to_local():
            staged[param][key] = share  # moved, or waited for


def _check(optimizer: Optimizer, finding: _C.Finding, given: Given, twice: bool) -> None:
    param, group = finding.param, optimizer.param_groups[finding.group]
    index = max(i for i, p in enumerate(group["params"]) if p is param)
    name = f"param_groups[{finding.group}]['params'][{index}]"
    if "param_names" in group:
        name += f" ({group['param_names'][index]})"

    def refuse(problem: str) -> None:
        raise RuntimeError(f"{type(optimizer).__name__}: {problem}; nothing was updated")

    if twice or finding.key == "twice":
        refuse(f"a param appears twice in the param groups, again as {name}")
    state = optimizer.state.get(param) or {}
    tensors = _tensors(param, state, group, given)
    if tensors["grad"] is not None and tensors["grad"].is_sparse:
        refuse(f"sparse gradients are not supported, please consider SparseAdam: {name}.grad")
    if not state:
        tensors = {key: tensors[key] for key in ("param", "grad")}
    elif finding.key in ("step", "step on device"):
        try:
            float(state["step"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            refuse(f"the step count of {name} cannot be read: {error!r}")

    for key, tensor in tensors.items():
        what = name if key == "param" else f"{key} of {name}"
        if not isinstance(tensor, Tensor):
            refuse(f"{what} is {tensor!r}, expected a tensor")
        if is_distributed(tensor):
            if problem := why_not(tensor, param, may_move=key == "grad"):
                refuse(f"{what} {problem}")
        elif type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            refuse(f"{what} is a {type(tensor).__name__}, expected a plain one or a DTensor")
        if tensor.layout != torch.strided:
            refuse(f"{what} has layout={tensor.layout}, expected torch.strided")
        if tensor.device.type not in ("cpu", "cuda"):
            refuse(f"{what} is on {tensor.device}, expected a cpu or cuda device")
        if tensor.dtype not in _DTYPES:
            refuse(f"{what} has dtype={tensor.dtype}, expected one of {_DTYPES}")
        if tensor.shape != param.shape:
            refuse(f"{what} has shape {tuple(tensor.shape)}, expected {tuple(param.shape)}")
        if tensor.device != param.device:
            refuse(f"{what} is on {tensor.device}, and the param on {param.device}")
        # Moments may be float32 where the param is narrower; exp_avg says so for all of them.
        wide = key not in ("param", "grad") and param.dtype in (torch.bfloat16, torch.float16)
        first = tensors["exp_avg"].dtype if wide and key != "exp_avg" else tensor.dtype
        allowed = {param.dtype, torch.float32} & {first} if wide else {param.dtype}
        if tensor.dtype not in allowed:
            refuse(f"{what} has dtype={tensor.dtype}, and the param {param.dtype}")
        if key != "grad" and torch._debug_has_internal_overlap(share_of(tensor)) == 1:
            refuse(f"{what} is expanded: several of its elements share one place in memory")
