"""How much of a model is zero, and keeping it so."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from .grouping import name_of
from .sharding import local_of, shards_of, whole_of
from .stand_ins import Given
from .tables import table
from .telemetry import Tracker, ZeroCount

if TYPE_CHECKING:
    from .step import Engine, Stepped

PENALTIES = ("prox_l1", "prox_l2")  # the rules that make exact zeros
FIRST_WATCHED = 16


class TensorSparsity(NamedTuple):
    """What is zero in one param."""

    name: str
    """As in ``model.named_parameters()``."""
    shape: tuple[int, ...]
    """The param's own; of a DTensor the whole one's."""
    numel: int
    """How many numbers it has; a complex one is one."""
    zeros: int
    """How many of its numbers are zero."""
    rows: int
    """The indices of dim 0: neurons, or filters. 0 for a param of less than two dims."""
    zero_rows: int
    """How many of its rows are zero as a whole."""

    @property
    def share(self) -> float:
        """``zeros / numel``, 0 to 1, and 0 without elements."""
        return self.zeros / self.numel if self.numel else 0.0


class Sparsity(NamedTuple):
    """What is zero in a model: see :func:`sparsity`. Printed, it is a table."""

    tensors: tuple[TensorSparsity, ...]
    """One for each param, in the model's order."""

    @property
    def share(self) -> float:
        """The share of all numbers of the model that are zero, 0 to 1."""
        numel = sum(tensor.numel for tensor in self.tensors)
        return sum(tensor.zeros for tensor in self.tensors) / numel if numel else 0.0

    @property
    def zero_tensors(self) -> int:
        """How many tensors with elements are zero as a whole."""
        return sum(tensor.zeros == tensor.numel > 0 for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for a log.

        Returns:
            ``"share"`` and ``"zero_tensors"``, and in ``"tensors"`` a dict for each param, with the
            fields of :class:`TensorSparsity` and its ``"share"``.
        """
        return {
            "share": self.share,
            "zero_tensors": self.zero_tensors,
            "tensors": [{**t._asdict(), "share": t.share} for t in self.tensors],
        }

    def __str__(self) -> str:
        header = ("param", "shape", "zeros", "share", "zero rows")
        rows: list[tuple[str, ...]] = [
            (t.name, " x ".join(map(str, t.shape)), f"{t.zeros:,}", _percent(t.share), _rows(t))
            for t in self.tensors
        ]
        total = TensorSparsity(
            f"all ({self.zero_tensors} of {len(self.tensors)} tensors are zero)",
            (),
            *(sum(t[i] for t in self.tensors) for i in range(2, 6)),  # type: ignore[misc]
        )
        rows.append((total.name, "", f"{total.zeros:,}", _percent(self.share), _rows(total)))
        return table(rows, header)


def sparsity(model: nn.Module) -> Sparsity:
    """Counts the zeros in each param of ``model``: single numbers, rows and whole tensors.

    It reads every param once, and waits for a GPU. Of a DTensor it counts all ranks' parts, so
    every rank calls it.

    Args:
        model: its params may have any shape and dtype; one that modules share counts once.

    Returns:
        The counts, which ``print`` shows as a table.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is a {type(model).__name__}")
    return Sparsity(tuple(_count(name, param) for name, param in model.named_parameters()))


@torch.no_grad()
def _count(name: str, param: Tensor) -> TensorSparsity:
    zero = param == 0
    rows = param.shape[0] if param.dim() > 1 else 0
    zeros = int(whole_of(zero.sum()))
    zero_rows = 0
    if rows and param.numel():  # a row without elements is no zero row
        others = (param != 0).sum(dim=tuple(range(1, param.dim())))
        zero_rows = int((whole_of(others) == 0).sum())
    return TensorSparsity(name, tuple(param.shape), param.numel(), zeros, rows, zero_rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _rows(tensor: TensorSparsity) -> str:
    return f"{tensor.zero_rows:,} of {tensor.rows:,}" if tensor.rows else ""


def freeze_zeros(optimizer: Optimizer) -> FrozenZeros:
    """What is zero in the optimizer's params now stays zero in its steps: for fine-tuning.

    Any rule may follow: an optimizer without decay, say, on what a run of ``AdamProxL1`` has left.
    After each step, also one taken in backward, it writes zeros where they were, and into averages
    of ``ema_decay``. It does not ask where a zero comes from: a bias that is still at its initial
    zero stays there, too. It keeps a bool for each number of a param that has a zero. It is no part
    of a checkpoint: call it again after one is loaded.

    Args:
        optimizer: one of this package's; its params are read once, now.

    Returns:
        A handle: ``remove()``, or leaving it as a context, ends this.

    Raises:
        TypeError: ``optimizer`` is none of this package's.
        RuntimeError: the optimizer's zeros are frozen already, or a :class:`SparsityTarget` is
            going to freeze them.
    """
    engine = free_engine_of(optimizer)
    params = (param for group in optimizer.param_groups for param in group["params"])
    engine.frozen = FrozenZeros(engine, ((p, local_of(p.detach()) == 0) for p in params))
    return engine.frozen


def free_engine_of(optimizer: Optimizer) -> Engine:
    """The optimizer's engine, if neither a handle nor a :class:`SparsityTarget` has its zeros.

    Raises:
        TypeError, RuntimeError: as :func:`freeze_zeros`.
    """
    engine: Engine | None = getattr(optimizer, "_engine", None)
    if engine is None:
        raise TypeError(
            f"optimizer must be one of adamprox's, but is a {torch.typename(optimizer)}"
        )
    if engine.target is not None:
        raise RuntimeError("this optimizer has a SparsityTarget already: remove() it")
    if engine.frozen is not None:
        raise RuntimeError("the zeros of this optimizer are frozen already: remove() the handle")
    return engine


class FrozenZeros:
    """The handle of :func:`freeze_zeros`: what was zero stays zero until it ends.

    As a context it ends when it is left.
    """

    def __init__(self, engine: Engine, zeros: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Of params, and where this rank's part of each is to stay zero."""
        self._engine = weakref.ref(engine)  # which has this
        self._zeros = WeakTensorKeyDictionary()
        for param, zero in zeros:
            if zero.any():
                self._zeros[param] = zero

    def check(self, optimizer: Any) -> None:
        """For the optimizer, before a step: follows params that have moved to another device.

        Args:
            optimizer: whose step begins.

        Raises:
            RuntimeError: a param has another shape now; nothing was updated.
        """
        for g, group in enumerate(optimizer._param_groups):
            for i, param in enumerate(group["params"]):
                zero = self._zeros.get(param)
                if zero is None:
                    continue
                own = local_of(param.detach())
                if own.shape != zero.shape:
                    name = name_of(optimizer._param_groups, g, i)
                    name = name or f"param_groups[{g}]['params'][{i}]"
                    raise RuntimeError(
                        f"{name} has shape {tuple(own.shape)}, and had "
                        f"{tuple(zero.shape)} when its zeros were frozen: remove() the handle; "
                        "nothing was updated"
                    )
                if own.device != zero.device:
                    self._zeros[param] = zero.to(own.device)

    @torch.no_grad()
    def keep(self, optimizer: Any, given: Given | None) -> None:
        """For the optimizer, after a step: writes the zeros that it has moved.

        Args:
            optimizer: whose step is over.
            given: the tensors that stood in for the optimizer's own in this step, if any did.
        """
        for group in optimizer._param_groups:
            for param in group["params"]:
                zero = self._zeros.get(param)
                if zero is not None:
                    tensors = (given or {}).get(param, {})
                    ema = tensors.get("ema", optimizer.state.get(param, {}).get("ema"))
                    for tensor in (tensors.get("param", param), ema):
                        if tensor is not None:
                            local_of(tensor).masked_fill_(zero, 0)

    def remove(self) -> None:
        """Lets the zeros move again."""
        engine = self._engine()
        if engine is not None and engine.frozen is self:
            engine.frozen = None

    def __enter__(self) -> FrozenZeros:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class ZeroWatch:
    """Warns once of a tensor of weights that a step has left zero as a whole.

    Steps 16, 32, 64, ... are noted, if a group has a penalty that makes zeros. What one of them has
    noted is looked at when the next one is due, or sooner where others wait for the device anyway.
    """

    def __init__(self) -> None:
        self.at: float = FIRST_WATCHED
        """The next step that is looked at; infinite when there is no more to say."""
        self._tracker = Tracker(1, "tensor")
        self._notes: tuple[Tracker, Callable[[], bool], set[tuple[int, int]]] | None = None

    def _due(self, optimizer: Stepped) -> bool:
        """Whether the step that begins now is noted, at ``at``; looks at the one before."""
        self.look()
        self.at *= 2
        return math.isfinite(self.at) and bool(_watched(optimizer))

    def _read(self, optimizer: Stepped, tracker: Tracker, given: Given | None) -> None:
        """Has the notes of a step that is over sent to the host."""
        self._notes = *tracker.copied(), _watched(optimizer)

    def look(self) -> None:
        """Warns of what has been noted, if that has come from the device."""
        if self._notes is None:
            return
        notes, are_there, places = self._notes
        if are_there():
            self._notes = None
            self.warn(c for c in notes.zeros() if c.place in places and c.zeros == c.numel)

    def warn(self, whole: Iterable[ZeroCount]) -> None:
        """Warns of the first of these tensors, and of none ever after."""
        for count in whole:
            if math.isfinite(self.at):
                self.at = math.inf
                warnings.warn(
                    f"{count.name} is zero as a whole after step {count.step}. Mostly the decay is "
                    "too strong then: lower weight_decay, or have adamprox.SparsityTarget find it",
                    stacklevel=2,
                )


def _watched(optimizer: Stepped) -> set[tuple[int, int]]:
    """The places of weights, not biases, that a penalty may make zero.

    Where a :class:`SparsityTarget` counts whole tensors, these are to become zero. A rank that has
    a part of a param does not know the whole, so such params are left out.
    """
    by_target = optimizer._engine.target is not None
    return {
        (g, i)
        for g, group in enumerate(optimizer._param_groups)
        if group["decay"] in PENALTIES
        # A number on a GPU is not waited for.
        and (isinstance(group["weight_decay"], Tensor) or group["weight_decay"] > 0)
        and not (by_target and counts_tensors(group))
        for i, param in enumerate(group["params"])
        if is_weights(param) and not shards_of(param)
    }


def counts_tensors(group: Mapping[str, Any]) -> bool:
    """Whether the group's penalty makes whole tensors zero, and nothing less."""
    return (group["decay"], group.get("block", "tensor")) == ("prox_l2", "tensor")


def is_weights(param: Tensor) -> bool:
    """Whether it is more than a bias or a number."""
    return param.dim() >= 2 and param.numel() > 1
