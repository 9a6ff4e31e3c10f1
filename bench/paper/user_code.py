"""A user's own model and data, named as ``package.module:function``."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


def is_name(text: str) -> bool:
    """Whether it names a function of a module."""
    return ":" in text


def find(name: str) -> Callable[..., Any]:
    """The function of a name; modules are looked for in the working directory, too.

    Raises:
        ValueError: there is no such module or function; the message says which.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(import_module(module), function)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(f"{name}: {error}; expected package.module:function") from error
    if not callable(found):
        raise ValueError(f"{name}: it is no function")
    return found  # type: ignore[no-any-return]


def model(name: str, width: int) -> nn.Module:
    """What the function makes; it is called with ``width`` if it has an argument of that name.

    Raises:
        ValueError: there is no such function, or it made no ``torch.nn.Module``.
    """
    function = find(name)
    takes_width = "width" in inspect.signature(function).parameters
    made = function(width=width) if takes_width else function()
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name}: it made no torch.nn.Module, but {type(made).__name__}")
    return made


def images(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the function returns: inputs and labels to train on, then those to test on.

    Raises:
        ValueError: there is no such function, or it returned something else.
    """
    made = find(name)()
    if (
        not isinstance(made, tuple | list)
        or len(made) != 4
        or not all(isinstance(each, Tensor) for each in made)
    ):
        raise ValueError(f"{name}: it returned no four tensors: inputs, labels, inputs, labels")
    for inputs, labels in (made[:2], made[2:]):
        if labels.dtype != torch.int64 or labels.shape != inputs.shape[:1]:
            raise ValueError(
                f"{name}: labels are {labels.dtype} of {tuple(labels.shape)}, expected int64 of "
                f"({len(inputs)},)"
            )
    train, train_labels, test, test_labels = made
    return train, train_labels, test, test_labels
