"""Which params of a model decay, and how: not those of norms, nor biases, nor embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import is_parametrized

WITHOUT_DECAY: tuple[type[nn.Module], ...] = (
    _NormBase,  # every batch norm and instance norm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.EmbeddingBag,
)
"""Torch's norms and embeddings: the types of modules whose params have no decay by default."""

Rules = Mapping[Any, Mapping[str, Any]]  # a union of keys would refuse a dict of one kind


def param_groups(
    model: nn.Module,
    weight_decay: float,
    without_decay: tuple[type[nn.Module], ...] = WITHOUT_DECAY,
    rules: Rules | None = None,
) -> list[dict[str, Any]]:
    """The params of ``model`` in two groups, with ``weight_decay`` and with none; two more a rule.

    No decay have biases (params with "bias" in their own name, as in ``nn.Linear``,
    ``nn.MultiheadAttention`` and ``nn.LSTM``) and all params of torch's norms and embeddings. A
    param that several modules share has none if one of them says so: an embedding that is the head,
    too. Frozen params are included, so that they can be thawed. Groups have the params' names, as
    torch's optimizers and ``update_stats()`` show them.

    Args:
        model: its params, each once, keep their order.
        weight_decay: of the first group, in the unit that the optimizer's class gives it; the
            optimizer checks it.
        without_decay: types of modules all of whose own params have none. For norms of other
            packages: ``(*adamprox.WITHOUT_DECAY, TheirNorm)``.
        rules: values of param groups, by a pattern of the params' names (as of a shell: ``*``,
            ``?``, ``[...]``) or by a type of the modules that own them. A param takes those of the
            first key that it matches; their ``weight_decay`` is for params that decay. For example
            ``{"features.*": {"decay": "prox_l1", "weight_decay": 0.2}, nn.Linear: {"lr": 1e-4}}``.

    Returns:
        Groups for an optimizer's constructor; one that would be empty is left out.

    Raises:
        TypeError: ``model`` is no module, a key of ``rules`` neither a pattern nor a type, or its
            values no mapping.
        ValueError: no param matches a key of ``rules``, or all that do match a key before it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is a {type(model).__name__}")
    rules = rules or {}
    exempt = {
        id(param)
        for module in model.modules()
        for name, param in _own_params(module)
        if isinstance(module, without_decay) or "bias" in name
    }
    matches = [_matching(model, key) for key in rules]
    for key, matching in zip(rules, matches, strict=True):
        if not matching:
            names = ", ".join(repr(name) for name, _ in islice(model.named_parameters(), 3))
            raise ValueError(
                f"Invalid rules: no param of the model matches {key!r}; a pattern is of whole "
                f"names, as {names}"
            )
        if not isinstance(rules[key], Mapping):
            raise TypeError(f"Invalid rules: {key!r}: {rules[key]!r}, expected a dict of values")
    used: set[int] = set()
    groups: list[dict[str, Any]] = [
        {"params": [], "param_names": [], "weight_decay": weight_decay, **values, **without}
        for values in ({}, *rules.values())
        for without in ({}, {"weight_decay": 0.0})
    ]
    for name, param in model.named_parameters():
        rule = next((i for i, ids in enumerate(matches, 1) if id(param) in ids), 0)
        used.add(rule)
        group = groups[2 * rule + (id(param) in exempt)]
        group["params"].append(param)
        group["param_names"].append(name)
    for rule, key in enumerate(rules, 1):
        if rule not in used:
            raise ValueError(f"Invalid rules: all params that match {key!r} match a key before it")
    return [group for group in groups if group["params"]]


def name_of(groups: Sequence[Mapping[str, Any]], group: int, index: int) -> str | None:
    """The name of a param; None if it has none, as one that was appended to a group's params."""
    names = groups[group].get("param_names", ())
    return names[index] if index < len(names) else None


def _matching(model: nn.Module, key: object) -> set[int]:
    """The ids of the params that match a key of rules."""
    if isinstance(key, str):
        named = model.named_parameters(remove_duplicate=False)
        return {id(param) for name, param in named if fnmatchcase(name, key)}
    if not (isinstance(key, type) and issubclass(key, nn.Module)):
        raise TypeError(f"Invalid rules: {key!r}, expected a pattern or a type of modules")
    return {
        id(param)
        for module in model.modules()
        if isinstance(module, key)
        for _, param in _own_params(module)
    }


def _own_params(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Params by their names in this module; what parametrizes one of them bears its name."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    if is_parametrized(module):
        parametrized: Any = module.parametrizations
        for name, parametrizations in parametrized.items():
            yield from ((name, param) for param in parametrizations.parameters())
