"""Loading a state dict, torch's or ours: checked first; float32 moments, foreign entries stay."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .hyperparameters import (
    COUNT,
    DECAY_SETTINGS,
    DEFAULTS,
    RULE_OPTIONS,
    SIXTEEN_BITS,
    STATES,
    states_of,
    validate,
)

StateDict = dict[str, Any]

_GROUP_KEYS = ("lr", "betas", "eps", "weight_decay")  # torch's others have defaults
_LISTED = 5  # of the params that share a problem


def load(
    optimizer: Optimizer, state_dict: StateDict, torchs_load: Callable[[StateDict], None]
) -> None:
    """Loads ``state_dict`` by ``torchs_load``, among the hooks that users have registered."""
    wide: list[tuple[Tensor, str, Tensor]] = []
    others: list[int] = []

    # Registered now, so it sees what the users' hooks have made of the state dict.
    def check(_: Optimizer, state_dict: StateDict) -> StateDict:
        groups = _completed_groups(optimizer, state_dict, others)
        _refuse(optimizer, _problems(state_dict, groups))
        wide.extend(_wide_states(optimizer, state_dict))
        return {**state_dict, "param_groups": groups}

    # Before the users' hooks. torch has cast them to the param's dtype.
    def keep_wide_states(_: Optimizer) -> None:
        for param, key, state in wide:
            optimizer.state[param][key] = state

    handles = (
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(keep_wide_states, prepend=True),
    )
    try:
        torchs_load(state_dict)
    finally:
        for handle in handles:
            handle.remove()
    if others:
        own = [optimizer.param_groups[index] for index in others]
        kept = [key for key in DECAY_SETTINGS if any(key in group for group in own)]
        warnings.warn(
            f"{type(optimizer).__name__}: param_groups{others} of this state dict: saved under "
            "another rule of decay, whose weight_decay means something else: the optimizer's own "
            f"{', '.join(kept)} stay",
            stacklevel=3,
        )


def complete(group: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Adds what a group saved by torch's classes, or by an older edition, does not have."""
    for key in (*DEFAULTS, "decay"):
        group.setdefault(key, defaults[key])
    group["decoupled_weight_decay"] = group["decay"] != "coupled"
    if group["decay_by"] == "schedule":
        group.setdefault("initial_lr", float(group["lr"]))


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


def _problems(state_dict: StateDict, groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What keeps a state dict from being loaded, each with its places."""
    problems: dict[str, list[str]] = {}

    def note(problem: str, place: str) -> None:
        problems.setdefault(problem, []).append(place)

    of_param: dict[Any, dict[str, Any]] = {}
    for index, group in enumerate(groups):
        of_param.update(dict.fromkeys(group["params"], group))
        if missing := [key for key in _GROUP_KEYS if key not in group]:
            note(f"missing {_quoted(missing)}", f"param_groups[{index}]")
        elif group.get("differentiable"):
            note("differentiable=True is not supported", f"param_groups[{index}]")
        else:
            try:
                validate({**DEFAULTS, **group})
            except (TypeError, ValueError, RuntimeError) as error:
                note(str(error), f"param_groups[{index}]")
    for param, state in state_dict["state"].items():
        # Entries that are no param's, or have none of our states, belong to others.
        if param not in of_param or not isinstance(state, Mapping):
            continue
        required = [COUNT, *(s.key for s in states_of(of_param[param]) if s.starts == "zeros")]
        missing = [key for key in required if key not in state]
        if missing and any(key in state for key in (COUNT, *(s.key for s in STATES))):
            note(f"missing {_quoted(missing)}", f"state[{param!r}]")
    return problems


def _quoted(keys: list[str]) -> str:
    return ", ".join(map(repr, keys))


def _completed_groups(
    optimizer: Optimizer, state_dict: StateDict, others: list[int]
) -> list[dict[str, Any]]:
    """The saved groups, with the settings of the decay that the optimizer is to have.

    Notes in ``others`` which of them were saved under another rule.
    """
    completed = []
    for index, saved in enumerate(state_dict["param_groups"]):
        own: dict[str, Any] = dict(
            optimizer.param_groups[index]
            if index < len(optimizer.param_groups)  # torch refuses unequal numbers
            else optimizer.defaults
        )
        settings = {key: own[key] for key in DECAY_SETTINGS if key in own}
        if _rule_of(saved) in (None, own["decay"]):
            # weight_decay is torch's too: a saved group without it is refused.
            settings = {k: v for k, v in settings.items() if k not in saved and k != "weight_decay"}
            if "decay_by" not in saved:
                settings["decay_by"] = "lr"  # torch's, which its weight_decay is meant for
        else:
            others.append(index)
        # What only ours have stays, where the checkpoint is torch's.
        kept = {key: own[key] for key in DEFAULTS if key in own and key not in saved}
        group = {**saved, **kept, **settings}
        if group.get("decay_by") == "schedule" and "initial_lr" in own:
            group.setdefault("initial_lr", own["initial_lr"])
        for key in RULE_OPTIONS:  # of the rule that the checkpoint had
            if key not in own:
                group.pop(key, None)
        completed.append(group)
    return completed


def _rule_of(saved: Mapping[str, Any]) -> str | None:
    """The rule under which a group was saved; None: it does not say."""
    if "decay" in saved:
        return str(saved["decay"])
    if "decay_by" in saved or "decoupled_weight_decay" not in saved:
        return None  # the first edition, or an older torch
    return "decoupled" if saved["decoupled_weight_decay"] else "coupled"


def _wide_states(
    optimizer: Optimizer, state_dict: StateDict
) -> Iterator[tuple[Tensor, str, Tensor]]:
    """The states of 16-bit params that are float32, or have to be."""
    ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, param in zip(ids, params, strict=False):  # torch refuses unequal numbers
        state = state_dict["state"].get(index)
        if param.dtype not in SIXTEEN_BITS or not isinstance(state, Mapping):
            continue
        for known in STATES:
            value = state.get(known.key)
            if isinstance(value, Tensor) and (
                value.dtype == torch.float32 or known.type == "compute"
            ):
                yield param, known.key, value.to(param.device, torch.float32)
