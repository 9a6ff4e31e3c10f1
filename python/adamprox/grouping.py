"""Which params of a model decay: not those of norms, nor biases, nor embeddings."""

from __future__ import annotations

from collections.abc import Iterator
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


def param_groups(
    model: nn.Module,
    weight_decay: float,
    without_decay: tuple[type[nn.Module], ...] = WITHOUT_DECAY,
) -> list[dict[str, Any]]:
    """The params of ``model`` in two groups: with ``weight_decay``, and with none.

    None have biases (params with "bias" in their own name, as in ``nn.Linear``,
    ``nn.MultiheadAttention`` and ``nn.LSTM``) and all params of torch's norms and embeddings. A
    param that several modules share has none if one of them says so: an embedding that is the head,
    too. Frozen params are included, so that they can be thawed.

    Args:
        model: its params, each once, keep their order.
        weight_decay: of the first group; the optimizer checks it.
        without_decay: types of modules all of whose own params have none. For norms of other
            packages: ``(*adamprox.WITHOUT_DECAY, TheirNorm)``.

    Returns:
        Groups for an optimizer's constructor; one that would be empty is left out.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is a {type(model).__name__}")
    exempt = {
        id(param)
        for module in model.modules()
        for name, param in _own_params(module)
        if isinstance(module, without_decay) or "bias" in name
    }
    groups: tuple[dict[str, Any], ...] = (
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    )
    for param in model.parameters():
        groups[id(param) in exempt]["params"].append(param)
    return [group for group in groups if group["params"]]


def _own_params(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Params by their names in this module; what parametrizes one of them bears its name."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    if is_parametrized(module):
        parametrized: Any = module.parametrizations
        for name, parametrizations in parametrized.items():
            yield from ((name, param) for param in parametrizations.parameters())
