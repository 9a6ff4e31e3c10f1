"""State dicts in torch's layout; loading one, torch's or ours: checked, float32 moments kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

StateDict = dict[str, Any]

_GROUP_KEYS = ("lr", "betas", "eps", "weight_decay")  # torch's others have defaults
_OUR_GROUP_KEYS = ("decay_by", "initial_lr")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_16_BITS = (torch.bfloat16, torch.float16)
_LISTED = 5  # of the params that share a problem


def save(optimizer: Optimizer, torchs_state_dict: Callable[[], StateDict]) -> StateDict:
    """What ``torchs_state_dict`` gives, before the hooks that users have registered."""
    handle = optimizer.register_state_dict_post_hook(_with_own_counters, prepend=True)
    try:
        return torchs_state_dict()
    finally:
        handle.remove()


def _with_own_counters(_: Optimizer, state_dict: StateDict) -> StateDict:
    states = state_dict["state"].items()
    return {
        **state_dict,
        "state": {
            param: {**state, "step": state["step"].clone()} if _counts(state) else state
            for param, state in states
        },
    }


def _counts(state: Any) -> bool:
    return isinstance(state, dict) and isinstance(state.get("step"), Tensor)


def load(
    optimizer: Optimizer, state_dict: StateDict, torchs_load: Callable[[StateDict], None]
) -> None:
    """Loads ``state_dict`` by ``torchs_load``, among the hooks that users have registered."""
    moments: list[tuple[Tensor, str, Tensor]] = []

    # Registered now, so it sees what the users' hooks have made of the state dict.
    def check(_: Optimizer, state_dict: StateDict) -> StateDict:
        _refuse(optimizer, _problems(state_dict))
        moments.extend(_wide_moments(optimizer, state_dict))
        return {**state_dict, "param_groups": list(_completed_groups(optimizer, state_dict))}

    # Before the users' hooks. torch has cast them to the param's dtype.
    def keep_wide_moments(_: Optimizer) -> None:
        for param, key, moment in moments:
            optimizer.state[param][key] = moment.to(param.device)

    handles = (
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(keep_wide_moments, prepend=True),
    )
    try:
        torchs_load(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def _refuse(optimizer: Optimizer, problems: dict[str, list[str]]) -> None:
    if not problems:
        return
    texts = []
    for problem, places in problems.items():
        more = f" and {len(places) - _LISTED} more" if len(places) > _LISTED else ""
        texts.append(f"{', '.join(places[:_LISTED])}{more}: {problem}")
    raise ValueError(
        f"{type(optimizer).__name__} cannot load this state dict; nothing was loaded; "
        + "; ".join(texts)
    )


def _problems(state_dict: StateDict) -> dict[str, list[str]]:
    """What keeps a state dict from being loaded, each with its places."""
    problems: dict[str, list[str]] = {}

    def note(problem: str, place: str) -> None:
        problems.setdefault(problem, []).append(place)

    amsgrad = {}
    for index, group in enumerate(state_dict["param_groups"]):
        amsgrad.update(dict.fromkeys(group["params"], group.get("amsgrad", False)))
        if missing := [key for key in _GROUP_KEYS if key not in group]:
            note(f"missing {_quoted(missing)}", f"param_groups[{index}]")
        if group.get("differentiable"):
            note("differentiable=True is not supported", f"param_groups[{index}]")
    for param, state in state_dict["state"].items():
        place = f"state[{param!r}]"
        if param not in amsgrad:
            note("no param group has such a param", place)
            continue
        if not state:  # that param has not taken a step yet
            continue
        required = ("step", *_MOMENTS[: 3 if amsgrad[param] else 2])
        if missing := [key for key in required if key not in state]:
            note(f"missing {_quoted(missing)}", place)
        if unknown := [key for key in state if key not in ("step", *_MOMENTS)]:
            note(f"unknown {_quoted(unknown)}", place)
    return problems


def _quoted(keys: list[str]) -> str:
    return ", ".join(map(repr, keys))


def _completed_groups(optimizer: Optimizer, state_dict: StateDict) -> Iterator[dict[str, Any]]:
    """The saved groups; one of torch's keeps what only ours have from the optimizer's own."""
    ours = optimizer.param_groups
    for index, saved in enumerate(state_dict["param_groups"]):
        own = ours[index] if index < len(ours) and "decay_by" not in saved else {}
        yield {**{key: own[key] for key in _OUR_GROUP_KEYS if key in own}, **saved}


def _wide_moments(
    optimizer: Optimizer, state_dict: StateDict
) -> Iterator[tuple[Tensor, str, Tensor]]:
    """The float32 moments of 16-bit params."""
    ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, param in zip(ids, params, strict=False):  # torch refuses unequal numbers
        for key in _MOMENTS if param.dtype in _16_BITS else ():
            moment = (state_dict["state"].get(index) or {}).get(key)
            if isinstance(moment, Tensor) and moment.dtype == torch.float32:
                yield param, key, moment
