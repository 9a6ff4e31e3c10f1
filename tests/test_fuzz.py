"""What users do between steps, at random: the bits of the reference, or a clear error of both.

``ADAMPROX_FUZZ_ACTIONS=20000 ADAMPROX_FUZZ_SEED=1 pytest tests/test_fuzz.py`` takes minutes.
"""

from __future__ import annotations

import collections
import copy
import functools
import os
import pickle
import random
import threading
from fractions import Fraction
from typing import NamedTuple

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adamprox.hyperparameters import RULES
from registry import LAYOUTS, OPTIMIZERS, same_bits

SHAPES = ((5,), (4, 3), (2, 3, 2, 2), (), (70_000,), (12,), (0, 2))  # one takes two threads
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES += (torch.complex64,)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
NUMBERS = (float, float, torch.tensor, np.float32, np.float64, Fraction)
ERRORS = (RuntimeError, TypeError, ValueError, KeyError)  # the last of a group without a key
ACTIONS_A_RUN = 50


def randn(rng: random.Random, shape, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    wide = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


class Side:
    """An optimizer of a backend; both sides are made and treated alike."""

    def __init__(self, backend: str, optimizer: str, amsgrad: bool, seed: int):
        rng = random.Random(seed)
        params = [nn.Parameter(randn(rng, shape, rng.choice(DTYPES))) for shape in SHAPES]
        cut = rng.randrange(1, len(params))
        self.make = functools.partial(
            OPTIMIZERS[optimizer].cls, backend=backend, weight_decay=0.3, amsgrad=amsgrad
        )
        self.opt = self.make([{"params": params[:cut]}, {"params": params[cut:], "lr": 0.01}])
        self.problem: BaseException | None = None

    @property
    def params(self) -> list[Tensor]:
        return [param for group in self.opt.param_groups for param in group["params"]]

    def group_of(self, param: Tensor) -> dict:
        return next(g for g in self.opt.param_groups if any(p is param for p in g["params"]))

    def do(self, action, at: int, seed: int, errors=Exception) -> None:
        """What cannot be done is left: torch says so, on both sides."""
        rng, params = random.Random(seed), self.params
        self.problem = None
        try:
            action(self, params[at % len(params)], rng)
        except errors as error:
            self.problem = error


def dense(p: Tensor, rng: random.Random) -> Tensor:
    return randn(rng, p.shape, p.dtype)


def layout(values: Tensor, rng: random.Random) -> Tensor:
    if values.dim() == 4 and rng.random() < 0.5:
        return values.to(memory_format=torch.channels_last)
    return rng.choice(LAYOUTS)(values)


def special(p: Tensor, rng: random.Random) -> Tensor:
    grad = dense(p, rng)
    value = rng.choice((0.0, -0.0, float("inf"), float("nan"), 1e30, 1e-30, 6e-5, 1e-40))
    mask = torch.rand(p.shape, generator=torch.Generator().manual_seed(rng.getrandbits(32))) < 0.3
    return grad.masked_fill(mask, value)


def within_storage(tensor: Tensor, p: Tensor, rng: random.Random) -> Tensor:
    """A tensor of p's shape, somewhere in another one's memory."""
    room = tensor.untyped_storage().nbytes() // tensor.itemsize - p.numel()
    if room < 0:
        raise ValueError("it does not fit")
    at = rng.choice((min(room, tensor.storage_offset()), rng.randint(0, room)))
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), at, p.shape)


def memory_of(side: Side, p: Tensor, rng: random.Random) -> Tensor:
    """Of a param or a state, of this or another param."""
    other = rng.choice([q for q in side.params if q.dtype == p.dtype])
    states = [v for k, v in side.opt.state.get(other, {}).items() if k in MOMENTS]
    return within_storage(rng.choice([other, *states]).detach(), p, rng)


# Grads.


def grad_of_another_dtype(side, p, rng):
    p.grad_dtype = None
    p.grad = dense(p, rng).to(rng.choice(DTYPES))


def all_grads(side, p, rng):
    for param in side.params:
        param.grad = dense(param, rng)


def missing_grads(side, p, rng):
    for param in side.params:
        if param.grad is None:
            param.grad = dense(param, rng)


def set_grad(make):
    return lambda side, p, rng: setattr(p, "grad", make(p, rng))


GRADS = {
    "all": all_grads,
    "dense": set_grad(dense),
    "none": set_grad(lambda p, rng: None),
    "layout": set_grad(lambda p, rng: layout(dense(p, rng), rng)),
    "expanded": set_grad(lambda p, rng: randn(rng, (), p.dtype).expand(p.shape)),
    "negated": set_grad(lambda p, rng: torch._neg_view(layout(dense(p, rng), rng))),
    "conjugated": set_grad(lambda p, rng: layout(dense(p, rng), rng).conj()),
    "known zeros": set_grad(lambda p, rng: torch._efficientzerotensor(p.shape, dtype=p.dtype)),
    "special": set_grad(special),
    "sparse": set_grad(lambda p, rng: dense(p, rng).to_sparse()),
    "in other memory": lambda side, p, rng: setattr(p, "grad", memory_of(side, p, rng)),
    "of another dtype": grad_of_another_dtype,
    "zero_grad": lambda side, p, rng: side.opt.zero_grad(rng.random() < 0.5),
}


# Params.


def data_layout(side, p, rng):
    p.data = layout(p.data.clone(), rng)


def data_set(side, p, rng):
    with torch.no_grad():
        p.set_(torch.stack((p.data, p.data * 2))[rng.randrange(2)])


def data_swapped(side, p, rng):
    torch.utils.swap_tensors(p, nn.Parameter(layout(dense(p, rng), rng)))


def data_overlapping(side, p, rng):
    other = rng.choice([q for q in side.params if q.dtype == p.dtype])
    p.data = within_storage(other.detach(), p, rng)


def data_moved(side, p, rng):
    """By resizing its storage to nothing and back."""
    old, storage = p.detach().clone(), p.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
    p.data.copy_(old)


PARAMS = {
    "new": lambda side, p, rng: setattr(p, "data", dense(p, rng)),
    "in place": lambda side, p, rng: p.data.mul_(0.5),
    "layout": data_layout,
    "set_": data_set,
    "swapped": data_swapped,
    "overlapping": data_overlapping,
    "moved": data_moved,
    "negated": lambda side, p, rng: setattr(p, "data", torch._neg_view(dense(p, rng))),
    "expanded": lambda side, p, rng: setattr(p, "data", randn(rng, (), p.dtype).expand(p.shape)),
    "frozen": lambda side, p, rng: p.requires_grad_(not p.requires_grad),
}


# Param groups.


def number(key, *values):
    def action(side, p, rng):
        side.group_of(p)[key] = rng.choice(NUMBERS)(rng.choice(values))

    return action


def betas(side, p, rng):
    pair = rng.choice(((0.9, 0.999), (0.0, 0.5), (0.75, 0.875)))
    kind = rng.choice((tuple, list, np.array, torch.tensor, lambda b: tuple(map(torch.tensor, b))))
    side.group_of(p)["betas"] = kind(pair)


def amsgrad(side, p, rng):
    group = side.group_of(p)
    group["amsgrad"] = not group["amsgrad"]
    for param in group["params"] if rng.random() < 0.8 else ():
        if side.opt.state.get(param):
            side.opt.state[param].setdefault("max_exp_avg_sq", torch.zeros_like(param))


def decay_by(side, p, rng):
    group = side.group_of(p)
    group["decay_by"] = rng.choice(("lr", "schedule"))
    group.setdefault("initial_lr", 0.05)


def another_rule(side, p, rng):
    side.group_of(p).update(
        decay=rng.choice(list(RULES)),
        block=rng.choice(("tensor", "row", 2, 3, "group", 0)),
        block_scaling=rng.choice(("none", "sqrt")),
        metric=rng.choice(("identity", "adam")),
        bounds=rng.choice((None, (-1.0, 0.5), (0, None))),
        l2=rng.choice((0.0, 0.5)),
    )


def to_another_group(side, p, rng):
    group = side.group_of(p)
    group["params"] = [q for q in group["params"] if q is not p]
    rng.choice(side.opt.param_groups)["params"].append(p)


def remove_param(side, p, rng):
    if len(side.params) > 3:
        group = side.group_of(p)
        group["params"] = [q for q in group["params"] if q is not p]
        if rng.random() < 0.7:
            side.opt.state.pop(p, None)


def add_group(side, p, rng):
    if len(side.params) < 9:
        new = nn.Parameter(randn(rng, rng.choice(SHAPES), rng.choice(DTYPES)))
        side.opt.add_param_group({"params": [new], "lr": 0.03})


GROUPS = {
    "lr": number("lr", 0.0, 0.01, 0.03),
    "eps": number("eps", 0.0, 1e-8, 1e-3),
    "weight_decay": number("weight_decay", 0.0, 0.1, 3.0),
    "betas": betas,
    "maximize": lambda side, p, rng: side.group_of(p).update(maximize=rng.random() < 0.5),
    "amsgrad": amsgrad,
    "decay_by": decay_by,
    "rule": another_rule,
    "bad number": lambda side, p, rng: side.group_of(p).update({rng.choice(("lr", "betas")): "x"}),
    "key removed": lambda side, p, rng: side.group_of(p).pop(rng.choice(("lr", "eps", "betas"))),
    "tuple": lambda side, p, rng: side.group_of(p).update(params=tuple(side.group_of(p)["params"])),
    "to another": to_another_group,
    "twice": lambda side, p, rng: rng.choice(side.opt.param_groups)["params"].append(p),
    "remove": remove_param,
    "add": add_group,
}


# States; an empty one is left.


def change_state(change):
    def action(side, p, rng):
        state = side.opt.state.get(p)
        if state:
            change(state, p, rng)

    return action


def change_moment(change):
    def action(state, p, rng):
        key = rng.choice([key for key in state if key in MOMENTS])
        state[key] = change(state[key], rng)

    return change_state(action)


def zero_state(state, p, rng):
    for value in state.values():
        if isinstance(value, Tensor) and rng.random() < 0.8:
            value.zero_()


def widen(state, p, rng):
    for key in state:
        if key in MOMENTS and p.dtype.itemsize == 2 and rng.random() < 0.8:
            state[key] = state[key].float()


def share_state(side, p, rng):
    other = rng.choice([q for q in side.params if (q.shape, q.dtype) == (p.shape, p.dtype)])
    key = rng.choice((*MOMENTS[:2], "step"))
    if side.opt.state.get(p) and side.opt.state.get(other):
        side.opt.state[p][key] = side.opt.state[other][key]


def other_count(state, p, rng):
    kind = rng.choice((torch.float32, torch.float64, torch.int64, torch.float16, None, None))
    count = rng.choice((0, 1, 7, 2048, 2.5, 0.5, -1, 2**24, 1e30, float("nan")))
    if kind is torch.int64 and count != count:
        count = 3
    state["step"] = count if kind is None else torch.tensor(count).to(kind)


def foreign(side, p, rng):
    side.opt.state["wrapper"] = {"n": rng.random()}
    if side.opt.state.get(p):
        side.opt.state[p]["slow"] = dense(p, rng)


MAPPINGS = (dict, collections.OrderedDict, collections.UserDict)
STATES = {
    "zero": change_state(zero_state),
    "drop": lambda side, p, rng: side.opt.state.pop(p, None),
    "drop one": change_state(lambda state, p, rng: state.pop(rng.choice(list(state)))),
    "replace": change_moment(lambda value, rng: value * 0.5),
    "layout": change_moment(layout),
    "widen": change_state(widen),
    "dtype": change_moment(lambda value, rng: value.to(rng.choice(DTYPES))),
    "negated": change_moment(lambda value, rng: torch._neg_view(-value)),
    "share": share_state,
    "count": change_state(other_count),
    "count in place": change_state(lambda state, p, rng: state["step"].fill_(rng.randrange(9))),
    "foreign": foreign,
    "mapping": lambda side, p, rng: side.opt.state.update(
        {p: rng.choice(MAPPINGS)(dict(side.opt.state.get(p, {})))}
    ),
}


# Saving, loading, copying.


def load_own(side, p, rng):
    state_dict = side.opt.state_dict()
    side.opt.load_state_dict(copy.deepcopy(state_dict) if rng.random() < 0.5 else state_dict)


def load_spoiled(side, p, rng):
    state_dict = copy.deepcopy(side.opt.state_dict())
    state_dict["param_groups"][-1][rng.choice(("lr", "betas"))] = "x"
    side.opt.load_state_dict(state_dict)


def load_into_another(side, p, rng):
    new = side.make([{"params": list(g["params"])} for g in side.opt.param_groups if g["params"]])
    new.load_state_dict(side.opt.state_dict())
    side.opt = new


def load_from_torch(side, p, rng):
    groups = [{"params": list(g["params"])} for g in side.opt.param_groups]
    theirs = torch.optim.AdamW(groups, amsgrad=rng.random() < 0.5)
    theirs.step()
    side.opt.load_state_dict(theirs.state_dict())


def copied(side, p, rng):
    side.opt = rng.choice((copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))))(side.opt)


SAVING = {
    "load": load_own,
    "load spoiled": load_spoiled,
    "load into another": load_into_another,
    "load from torch": load_from_torch,
    "copy": copied,
    "track": lambda side, p, rng: side.opt.track_updates(
        rng.randrange(3), rng.choice(("group", "tensor"))
    ),
}


CHANGES = {
    f"{kind}: {name}": action
    for kind, actions in (("param", PARAMS), ("group", GROUPS), ("state", STATES), ("", SAVING))
    for name, action in actions.items()
}


# Steps; each gives the grads back that it has changed.


def in_a_thread(side, p, rng):
    errors = []

    def work():
        try:
            side.opt.step()
        except ERRORS as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def with_hooks(side, p, rng):
    def halve(*_):
        for param in side.params:
            param.grad = None if param.grad is None else param.grad / 2

    handles = side.opt.register_step_pre_hook(halve), side.opt.register_step_post_hook(halve)
    try:
        side.opt.step()
    finally:
        for handle in handles:
            handle.remove()


def with_default_dtype(side, p, rng):
    torch.set_default_dtype(torch.float64)
    try:
        side.opt.step()
    finally:
        torch.set_default_dtype(torch.float32)


def with_threads(side, p, rng):
    torch.set_num_threads(2)
    try:
        side.opt.step()
    finally:
        torch.set_num_threads(1)


def with_freed_memory(side, p, rng):
    """Of a tensor, which has all of it again when the step is over."""
    tensors = [p, *(v for v in side.opt.state.get(p, {}).values() if isinstance(v, Tensor))]
    if p.grad is not None and p.grad.layout == torch.strided and not p.grad._is_zerotensor():
        tensors.append(p.grad)
    storage = rng.choice(tensors).untyped_storage()
    size, data = storage.nbytes(), torch.empty(0, dtype=torch.uint8)
    saved = data.set_(storage).clone()
    storage.resize_(rng.choice((0, max(0, size - 1))))
    try:
        side.opt.step()
    finally:
        storage.resize_(size)
        torch.empty(0, dtype=torch.uint8).set_(storage).copy_(saved)


def within(context):
    def step(side, p, rng):
        with context():
            side.opt.step()

    return step


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


STEPS = {
    "plain": lambda side, p, rng: side.opt.step(),
    "closure": lambda side, p, rng: side.opt.step(lambda: all_grads(side, p, rng)),
    "hooks": with_hooks,
    "thread": in_a_thread,
    "threads": with_threads,
    "freed memory": with_freed_memory,
    "float64 by default": with_default_dtype,
    "no_grad": within(torch.no_grad),
    "inference_mode": within(torch.inference_mode),
    "function mode": within(FunctionMode),
}


def heal(side: Side) -> None:
    """So that the next step has nothing to refuse."""
    good = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    for group in side.opt.param_groups:
        group.update(good, params=list({id(p): p for p in group["params"]}.values()))
    for i, param in enumerate(side.params):
        param.grad, param.data = None, dense(param, random.Random(i))
        side.opt.state.pop(param, None)


# Comparison.


def resolved(value: Tensor) -> Tensor:
    return value.detach().resolve_conj().resolve_neg()


def same(ours, theirs) -> bool:
    if isinstance(theirs, Tensor):
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            return False
        ours, theirs = resolved(ours), resolved(theirs)
        is_real = theirs.is_floating_point() or theirs.is_complex()
        return same_bits(ours, theirs) if is_real else torch.equal(ours, theirs)
    if isinstance(theirs, collections.abc.Mapping):
        return list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in theirs)
    return type(ours) is type(theirs) and (ours == theirs or ours != ours)


def contents(side: Side) -> list:
    return [(param, side.opt.state.get(param, {})) for param in side.params]


def snapshot(side: Side) -> list:
    def frozen(value):
        return resolved(value).clone() if isinstance(value, Tensor) else value

    states = ({k: frozen(v) for k, v in state.items()} for _, state in contents(side))
    return list(zip(map(frozen, side.params), states, strict=True))


def assert_same(ours: list, theirs: list, what: str) -> None:
    assert len(ours) == len(theirs)
    for index, ((p, state), (q, other)) in enumerate(zip(ours, theirs, strict=True)):
        assert same(p, q), f"{what}: param {index}"
        assert sorted(state) == sorted(other), f"{what}: state {index}"
        for key in other:
            assert same(state[key], other[key]), f"{what}: {key} of param {index}"


FIELDS = ("bins", "param_norm", "update_norm", "zeros", "nans", "infs")


class Move(NamedTuple):
    """An action by its name, which param it is about, and what decides all else."""

    name: str
    at: int
    seed: int


def moves(actions) -> st.SearchStrategy[Move]:
    """Evenly: hypothesis alone would take the first ones most of the time."""

    def move(numbers: tuple[int, int]) -> Move:
        rng = random.Random(repr(numbers))
        return Move(rng.choice(list(actions)), rng.randrange(9), rng.getrandbits(32))

    return st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)).map(move)


class Machine(RuleBasedStateMachine):
    backend = "cpu"
    counts: collections.Counter
    tried: collections.Counter
    done: collections.Counter

    @initialize(
        optimizer=st.sampled_from(list(OPTIMIZERS)), amsgrad=st.booleans(), seed=st.integers(0, 999)
    )
    def start(self, optimizer, amsgrad, seed):
        self.sides = [Side(name, optimizer, amsgrad, seed) for name in (self.backend, "reference")]

    def both(self, action, move: Move, errors=Exception) -> BaseException | None:
        self.counts["actions"] += 1
        hypothesis.note(f"# {move}")
        for side in self.sides:
            side.do(action, move.at, move.seed, errors)
        ours, theirs = (side.problem for side in self.sides)
        assert type(ours) is type(theirs), (ours, theirs)
        self.tried[move.name] += 1
        self.done[move.name] += ours is None
        return ours

    @rule(move=moves(GRADS))
    def set_grad(self, move):
        self.both(GRADS[move.name], move)

    @rule(move=moves(CHANGES))
    def change(self, move):
        self.both(CHANGES[move.name], move)

    @rule(move=moves(STEPS), fill=st.booleans(), healed=st.booleans())
    def step(self, move, fill, healed):
        if fill:
            for side in self.sides:
                side.do(missing_grads, move.at, move.seed)
        before = [snapshot(side) for side in self.sides]
        problem = self.both(STEPS[move.name], move, ERRORS)
        self.counts["steps"] += 1
        if problem is not None:
            self.counts["refused"] += 1
            for side, old in zip(self.sides, before, strict=True):
                assert_same(snapshot(side), old, f"updated in spite of {problem!r}")
        assert_same(*map(contents, self.sides), "another result")
        stats = [side.opt.update_stats() for side in self.sides]
        for a, b in zip(*stats, strict=True):
            assert (a.name, a.step, a.numel) == (b.name, b.step, b.numel)
            assert all(same(getattr(a, field), getattr(b, field)) for field in FIELDS)
        if problem is not None and healed:
            for side in self.sides:
                heal(side)

    @rule(move=moves(STEPS))
    def step_again(self, move):
        self.step(move, True, True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["cpu"])
def test_whatever_is_done_a_step_has_the_references_bits_or_both_refuse(backend, capsys):
    wanted = int(os.environ.get("ADAMPROX_FUZZ_ACTIONS", "800"))
    seed = os.environ.get("ADAMPROX_FUZZ_SEED")
    counts, tried, done = (collections.Counter() for _ in range(3))
    while counts["actions"] < wanted:
        counters = {"counts": counts, "tried": tried, "done": done}
        machine = type("Machine", (Machine,), {"backend": backend, **counters})
        settings = hypothesis.settings(
            max_examples=-(-(wanted - counts["actions"]) // ACTIONS_A_RUN),
            stateful_step_count=ACTIONS_A_RUN,
            derandomize=seed is None,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        if seed is not None:
            machine = hypothesis.seed(int(seed) + counts["actions"])(machine)
        run_state_machine_as_test(machine, settings=settings)
    with capsys.disabled():
        print("\n{actions} actions, {steps} of them steps, {refused} refused".format_map(counts))
    # What never works tests nothing; but for this, which is to be refused.
    assert {name for name in tried if tried[name] > 9 and not done[name]} <= {": load spoiled"}
