"""A share of zeros that is asked for, in place of a strength that gives some."""

from __future__ import annotations

import math
import struct
import warnings
import weakref
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer

from .hyperparameters import is_one_block
from .sharding import is_distributed, is_here, local_of, summed, whole_of
from .stand_ins import Given
from .telemetry import Tracker, ZeroCount
from .zeros import PENALTIES, FrozenZeros, free_engine_of, is_weights

Place = tuple[int, int]  # a param group, and a param's position there

# The controller. Share is short for the share of zeros.
GAIN = 0.4  # how fast the strength's logarithm grows, for each step and each unit of missing share
AHEAD = 40  # steps: the share that is compared is the one that is expected so much later
MOST_GROWTH = 0.03  # of the logarithm, for each step
LEAST_GROWTH = 0.006  # the same once the ramp is over
MOST_UNCOUNTED = 20  # steps in a row that were to be counted
LARGEST_STRENGTH = 10.0  # of a weight: Adam's update is seldom longer than 1, times lr


class SparsityTarget:
    """Adapts ``weight_decay`` during training, until a given share of the weights is zero.

    It applies to the param groups that have an l1 or l2 penalty (``AdamProxL1``, ``AdamProxL2``)
    and a ``weight_decay`` above 0; each gets the same factor. After t of T = ``steps`` steps, the
    share of zeros is led along the ramp

    .. math::
        p_t = p (1 - (1 - t / T)^3)

    of https://arxiv.org/abs/1710.01878, with the share p that is asked for. Once it reaches p, it
    is held: ``weight_decay`` becomes 0, and the zeros are frozen as by :func:`freeze_zeros`, so the
    training that follows is fine-tuning. If there are too many, those with the largest updates are
    let go; of equally large ones all stay. Where ``steps`` did not suffice, the strength is raised
    until the share is reached. That takes a learning rate that can move weights to zero: a schedule
    should not end before.

    With an l1 penalty single weights are counted, with an l2 penalty the blocks whose norms it
    takes; both only of params that require grad. A tensor's zero blocks are counted as its
    share of zeros times its number of blocks, rounded down: no single weights are zero but by
    chance. Of a DTensor all ranks' parts are counted. Half of the training is a good number of
    ``steps``.

    Every ``every``-th step counts its zeros while it updates the params (see ``track_updates``),
    and only then is a GPU waited for. A step that a ``GradScaler`` skips counts as a step, but
    changes no strength. Replays of a CUDA graph are not seen, and neither are steps of params that
    share memory. It warns where none of many steps could be counted, where the largest strength
    is not enough, and if it is left as a context before the share is reached.

    Args:
        optimizer: one of this package's. A ``weight_decay`` that is a tensor is changed in
            place; one that groups without a penalty have, too, is copied before.
        sparsity: the share p, between 0 and 1.
        steps: about how many steps it may take to get there, an int, 1 or more.
        every: for how many steps the strength stays the same, an int, 1 or more.

    Raises:
        TypeError: ``optimizer`` is none of this package's.
        ValueError: an argument is out of its range; no param group can have zeros, or one of them
            has ``block="group"``, or params that are complex or on a mesh without this rank; the
            share is of too few blocks.
        RuntimeError: the optimizer has another target, or its zeros are frozen.
    """

    def __init__(self, optimizer: Optimizer, sparsity: float, steps: int, every: int = 5) -> None:
        engine = free_engine_of(optimizer)
        if not _is_share(sparsity):
            raise ValueError(f"Invalid sparsity: {sparsity!r}, expected a number between 0 and 1")
        for name, value in (("steps", steps), ("every", every)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Invalid {name}: {value!r}, expected an int, 1 or more")
        self._weight_decays = _weight_decays(optimizer)
        self._reference, self._engine = weakref.ref(optimizer), engine
        self._sparsity, self._steps, self._every = float(sparsity), steps, every
        self._tracker = Tracker(every, "tensor")
        self._step, self._share, self._factor = 0, 0.0, 1.0
        self._zeros: dict[Place, int] = {}
        self._noted: dict[Place, int] = {}  # by which steps these are known
        self._frozen: FrozenZeros | None = None
        blocks = sum(member.blocks for member in self._members())
        if not 0 < self._wanted(blocks) < blocks:
            raise ValueError(
                f"Invalid sparsity: {sparsity!r}, no number of the {blocks} blocks is that share: "
                "block='row' makes more of them"
            )
        self._separate()
        self._uncounted = 0  # steps that were to be counted, one after the other
        engine.target = self

    @property
    def _optimizer(self) -> Optimizer:
        """Which has this, and is not kept alive by it."""
        optimizer = self._reference()
        if optimizer is None:
            raise RuntimeError("the optimizer of this SparsityTarget exists no more")
        return optimizer

    @property
    def held(self) -> bool:
        """Whether the share has been reached, and its zeros are frozen."""
        return self._frozen is not None

    @property
    def share(self) -> float:
        """The share of zeros when they were last counted, 0 to 1; once it is held, what is held."""
        return self._share

    def remove(self) -> None:
        """Ends this: ``weight_decay`` stays what it is, and zeros that were held may move."""
        if self._frozen is not None:
            self._frozen.remove()
        if self._engine.target is self:
            self._engine.target = None

    def __repr__(self) -> str:
        state = "held" if self.held else f"in step {self._step} of about {self._steps}"
        return f"<SparsityTarget {self._sparsity:.1%}: {self._share:.1%}, {state}>"

    def __enter__(self) -> SparsityTarget:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and not self.held:
            warnings.warn(f"{self!r} has ended before its share was reached", stacklevel=2)
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on, beside the states of the model and the optimizer.

        Returns:
            Numbers, and lists of numbers: places of groups and params, and what is theirs. No
            tensors and no dicts, so that ``torch.distributed.checkpoint`` keeps it whole.
        """
        return {
            "step": self._step,
            "share": self._share,
            "factor": self._factor,
            "held": self.held,
            "weight_decays": [[g, decay] for g, decay in self._weight_decays.items()],
            "zeros": [[*place, count] for place, count in self._zeros.items()],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where another one was saved.

        Make the target first, as a held one has left no ``weight_decay`` to start from. Then load
        the model, the optimizer, and this; on ranks, on each.

        If its zeros were held, those of the loaded params are frozen.

        Args:
            state_dict: what :meth:`state_dict` of the other one has returned.

        Raises:
            ValueError: it was saved for other param groups, or lacks a key; nothing was loaded.
        """
        keys = ("step", "share", "factor", "held", "weight_decays", "zeros")
        if missing := [key for key in keys if key not in state_dict]:
            raise ValueError(f"Invalid state_dict: it has no {missing[0]!r}")
        weight_decays = dict(state_dict["weight_decays"])
        groups = list(weight_decays)
        if groups != list(self._weight_decays):
            raise ValueError(
                f"Invalid state_dict: it is for the param groups {groups}, and this one adapts "
                f"{list(self._weight_decays)}"
            )
        if self._frozen is not None:
            self._frozen.remove()
            self._frozen = None
        self._step, self._share = state_dict["step"], state_dict["share"]
        self._factor, self._weight_decays = state_dict["factor"], weight_decays
        self._zeros, self._noted = {(g, i): n for g, i, n in state_dict["zeros"]}, {}
        self._separate()
        if state_dict["held"]:
            self._hold({}, fewer=True)
        else:
            self._set_weight_decays(self._factor)

    def _separate(self) -> None:
        """Copies each ``weight_decay`` that is a tensor of groups without a penalty, too."""
        groups = self._optimizer.param_groups
        of_others = {
            id(x["weight_decay"]) for g, x in enumerate(groups) if g not in self._weight_decays
        }
        for g in self._weight_decays:
            strength = groups[g]["weight_decay"]
            if isinstance(strength, Tensor) and id(strength) in of_others:
                groups[g]["weight_decay"] = strength.clone()

    def _due(self) -> bool:
        """Whether the step that begins now is noted; the optimizer asks at each. It is counted."""
        self._step += 1
        return not self.held and self._step % self._every == 0

    def _read(self, optimizer: Optimizer, tracker: Tracker, given: Given | None) -> None:
        """Counts the zeros that a step has left; holds them, or adapts the strength.

        ``given`` has the tensors that stood in for the optimizer's own in this step, if any did.
        """
        members = self._members()
        counts = self._count(tracker, members)
        self._uncounted = 0 if counts else self._uncounted + 1
        if self._uncounted == MOST_UNCOUNTED:
            warnings.warn(
                f"{self!r} could count no zeros in {MOST_UNCOUNTED} steps: do params share memory, "
                "or does a GradScaler skip all steps?",
                stacklevel=2,
            )
        if not counts:
            return
        blocks = sum(member.blocks for member in members)
        zeros = sum(self._zeros.get(m.place, 0) * m.blocks // m.param.numel() for m in members)
        before, self._share = self._share, zeros / blocks
        if zeros < self._wanted(blocks) or not self._hold(given or {}):
            self._adapt(before)
        self._engine.watch.warn(
            count
            for count, member in zip(counts, members, strict=True)
            if count is not None
            and is_weights(member.param)
            and member.blocks > 1
            and self._zeros[member.place] == member.param.numel()
        )

    def _members(self) -> list[_Member]:
        groups = self._optimizer.param_groups
        return [
            _Member.of((g, i), param, groups[g])
            for g in self._weight_decays
            for i, param in enumerate(groups[g]["params"])
            if param.requires_grad and param.numel() > 0
        ]

    def _count(self, tracker: Tracker, members: Sequence[_Member]) -> list[ZeroCount | None]:
        """What this rank has counted of each; empty if nothing is new, as the step was skipped.

        A param without a grad is not noted, and keeps the zeros that it had.
        """
        noted = {count.place: count for count in tracker.zeros()}
        counts = [noted.get(member.place) for member in members]
        new = [c is not None and self._noted.get(c.place) != c.step for c in counts]
        of_ranks = [m.param for m in members]
        sums = summed([0 if c is None else c.zeros for c in counts], of_ranks)
        news = summed(list(map(int, new)), of_ranks)
        self._noted.update((c.place, c.step) for c in counts if c is not None)
        self._zeros.update(
            (member.place, zeros)
            for member, zeros, is_new in zip(members, sums, news, strict=True)
            if is_new
        )
        return counts if any(news) else []

    def _wanted(self, blocks: int) -> int:
        return round(self._sparsity * blocks)

    def _adapt(self, before: float) -> None:
        """Multiplies the strength; the share was ``before`` when it was counted the last time."""
        groups = self._optimizer.param_groups
        if not any(float(groups[g]["lr"]) > 0 for g in self._weight_decays):
            return  # no strength would do anything
        ramp = cubic_ramp(self._step, self._steps)
        expected = self._share + AHEAD / self._every * (self._share - before)
        # At 95 % a point is more than at 50 %.
        missing = (self._sparsity * ramp - expected) / (1 - 0.9 * self._sparsity)
        growth = max(-MOST_GROWTH, min(GAIN * missing, MOST_GROWTH))
        if self._step >= self._steps:
            growth = max(growth, LEAST_GROWTH)
        largest = self._largest_factor(groups)
        factor = min(self._factor * math.exp(self._every * growth), largest)
        if factor == largest > self._factor and self._step >= self._steps:
            warnings.warn(
                f"{self!r} has no larger strength to try: do bounds keep params from zero?",
                stacklevel=2,
            )
        self._factor = factor
        self._set_weight_decays(factor)

    def _largest_factor(self, groups: Sequence[Mapping[str, Any]]) -> float:
        """At which the strength exceeds all updates in each group."""
        factors = [1.0]
        for member in self._members():
            group = groups[member.place[0]]
            unit = float(group["initial_lr"]) if group["decay_by"] == "schedule" else 1.0
            strength = self._weight_decays[member.place[0]] / unit / math.sqrt(member.size)
            factors.append(LARGEST_STRENGTH / strength)
        return max(factors)

    def _set_weight_decays(self, factor: float) -> None:
        for g, weight_decay in self._weight_decays.items():
            group = self._optimizer.param_groups[g]
            if isinstance(group["weight_decay"], Tensor):
                group["weight_decay"].fill_(factor * weight_decay)  # graphs read it there
            else:
                group["weight_decay"] = factor * weight_decay

    @torch.no_grad()
    def _hold(self, given: Given, fewer: bool = False) -> bool:
        """Freezes as many zero blocks as are wanted, or fewer, and lets the others go.

        False: there are fewer, and nothing was done.
        """
        members = self._members()
        blocks = sum(member.blocks for member in members)
        zeros = [_zeros_of(m, self._optimizer, given.get(m.param, {})) for m in members]
        surplus = _total(zeros, [len(z.lengths) for z in zeros]) - self._wanted(blocks)
        if surplus < 0 and not fewer:
            return False
        longest = _longest_kept(zeros, surplus)
        kept = [z.lengths <= longest for z in zeros]
        count = _total(zeros, [int(k.sum()) for k in kept])
        self._share = count / blocks
        masks = [(z.member.param, z.mask(k)) for z, k in zip(zeros, kept, strict=True)]
        self._frozen = self._engine.frozen = FrozenZeros(self._engine, masks)
        self._set_weight_decays(0.0)
        return True


def cubic_ramp(step: int, steps: int) -> float:
    """``1 - (1 - t / T)^3``: how far a share is led after t of T steps, and 1 from then on."""
    return 1 - (1 - min(step / steps, 1.0)) ** 3


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and 0 < float(value) < 1


def _weight_decays(optimizer: Optimizer) -> dict[int, float]:
    """Those of the param groups that can have zeros, which are checked, by the groups' indices."""
    result = {
        g: float(group["weight_decay"])
        for g, group in enumerate(optimizer.param_groups)
        if group["decay"] in PENALTIES and float(group["weight_decay"]) > 0
    }
    if not result:
        raise ValueError(
            "Invalid optimizer: no param group has decay='prox_l1' or 'prox_l2', as AdamProxL1 and "
            "AdamProxL2 have, and a weight_decay above 0 to start from. Make the target before a "
            "checkpoint of a held one is loaded"
        )
    for g in result:
        group = optimizer.param_groups[g]
        if is_one_block(group):
            raise ValueError(
                f"Invalid optimizer: param_groups[{g}] has block='group', and one block is zero as "
                "a whole or not at all"
            )
        for i, param in enumerate(group["params"]):
            if param.is_complex():
                raise ValueError(f"Invalid optimizer: param_groups[{g}]['params'][{i}] is complex")
            if not is_here(param):
                raise ValueError(
                    f"Invalid optimizer: param_groups[{g}]['params'][{i}] is on a mesh that leaves "
                    "this rank out, and all ranks count together"
                )
    return result


class _Member(NamedTuple):
    """A param whose zeros are counted, by blocks: weights, or what has a norm of its own."""

    place: Place
    param: Tensor
    rows: int | None
    """Indices of dim 0 in a block; None: a block is a weight."""
    size: int
    """Weights in a block."""
    blocks: int

    @staticmethod
    def of(place: Place, param: Tensor, group: Mapping[str, Any]) -> _Member:
        if group["decay"] == "prox_l1":
            return _Member(place, param, None, 1, param.numel())
        all_rows = param.shape[0] if param.dim() else 1
        block = group.get("block", "tensor")
        rows = all_rows if block == "tensor" else min(1 if block == "row" else block, all_rows)
        return _Member(place, param, rows, param.numel() // all_rows * rows, -(-all_rows // rows))


class _Zeros(NamedTuple):
    """The blocks of a param that are zero."""

    member: _Member
    zero: Tensor
    """bool: this rank's weights, or all the blocks."""
    lengths: Tensor
    """float32: of Adam's update of each zero block."""

    def mask(self, kept: Tensor) -> Tensor:
        """This rank's weights in those of the zero blocks that are kept."""
        _, param, rows, _, _ = self.member
        zero = self.zero.masked_scatter(self.zero, kept)
        if rows is None or param.dim() == 0:
            return zero.reshape(local_of(param).shape)
        zero = zero.repeat_interleave(rows)[: len(param)]
        zero = zero.view(-1, *(1,) * (param.dim() - 1)).expand(param.shape)
        if is_distributed(param):
            from torch.distributed.tensor import DTensor, Replicate

            mesh = param.device_mesh
            whole = DTensor.from_local(zero, mesh, [Replicate()] * mesh.ndim, run_check=False)
            zero = local_of(whole, param)
        return zero.clone()


def _zeros_of(member: _Member, optimizer: Optimizer, given: Mapping[str, Tensor | None]) -> _Zeros:
    """By the param and the states as a step has left them; without states no update is known."""
    tensors: dict[str, Any] = {"param": member.param, **optimizer.state.get(member.param, {})}
    tensors |= {key: tensor for key, tensor in given.items() if tensor is not None}
    param = tensors["param"].detach()
    update = torch.zeros_like(param, dtype=torch.float32)
    if "exp_avg" in tensors:
        square = tensors.get("max_exp_avg_sq", tensors["exp_avg_sq"]).float()
        eps = optimizer.param_groups[member.place[0]]["eps"]
        update = (tensors["exp_avg"].float() / (square.sqrt() + eps)).nan_to_num(0.0)
    if member.rows is None:
        zero = local_of(param) == 0
        return _Zeros(member, zero, local_of(update).abs()[zero])
    zero = _block_sums(param != 0, member.rows) == 0
    return _Zeros(member, zero, _block_sums(update.square(), member.rows).sqrt()[zero])


def _block_sums(x: Tensor, rows: int) -> Tensor:
    """Over blocks of so many indices of dim 0, of all ranks."""
    x = x.reshape(1) if x.dim() == 0 else x
    sums = x.unsqueeze(-1).sum(dim=tuple(range(1, x.dim() + 1)))
    whole = whole_of(sums)
    return pad(whole, (0, -len(whole) % rows)).view(-1, rows).sum(1)


def _total(zeros: Sequence[_Zeros], counts: Sequence[int]) -> int:
    """Of what each rank has counted in its weights, and every rank in all the blocks."""
    of_ranks = [z.zero if z.member.rows else z.member.param for z in zeros]
    return sum(summed(counts, of_ranks))


def _longest_kept(zeros: Sequence[_Zeros], surplus: int) -> float:
    """The least length that at most ``surplus`` of the updates exceed: half the range at a time.

    The bits of floats are in the order of the floats.
    """
    low, high = -1, 0x7F800000  # infinity
    while surplus > 0 and high - low > 1:
        middle = (low + high) // 2
        longer = _total(zeros, [int((z.lengths > _float(middle)).sum()) for z in zeros])
        low, high = (low, middle) if longer <= surplus else (middle, high)
    return _float(high)


def _float(bits: int) -> float:
    result: float = struct.unpack("f", struct.pack("I", bits))[0]
    return result
