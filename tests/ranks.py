"""What the processes of test_distributed.py run: cases, each against the same steps of one process.

A case is a function of (mesh's world size, optimizer's name); it runs on every rank.
"""

from __future__ import annotations

import copy
import ctypes
import faulthandler
import gc
import json
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adamprox
from adamprox import block_norms
from adamprox.sharding import local_of
from registry import OPTIMIZERS, same_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

STEPS = 4


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def decay_of(name: str) -> float:
    # Adam's first steps are lr long in each coordinate; the norms here are about 1, and some
    # blocks of AdamProxL2 vanish.
    return {"AdamProxL2": 3.0}.get(name, OPTIMIZERS[name].weight_decay)


def make(name: str, params: Iterable[Any], **arguments: Any) -> torch.optim.Optimizer:
    given = {"lr": 1e-2, "weight_decay": decay_of(name), **arguments}
    return OPTIMIZERS[name].cls(params, **given)


def model() -> nn.Module:
    """Uneven shards on 2, 3 and 4 ranks, some of them empty, and norms."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 1)
    )


def wide_model() -> nn.Module:
    """Of several chunks of the reduction tree, which shards cut anywhere."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(131, 290), nn.ReLU(), nn.Linear(290, 67, bias=False))


def batch(step: int, features: int = 7) -> Tensor:
    return torch.randn(12, features, generator=torch.Generator().manual_seed(step))


def backward(net: nn.Module, step: int, features: int = 7) -> None:
    net.zero_grad()
    whole(net(batch(step, features))).square().mean().backward()


class Twin:
    """The same steps in one process, on plain tensors, with the grads that the ranks have."""

    def __init__(self, net: nn.Module, name: str, **arguments: Any) -> None:
        self.net = copy.deepcopy(net)
        self.optimizer = make(name, self.net.parameters(), **arguments)

    def step(self, net: nn.Module) -> None:
        for p, q in zip(net.parameters(), self.net.parameters(), strict=True):
            q.grad = None if p.grad is None else whole(p.grad).detach().clone()
        self.optimizer.step()

    def check(self, net: nn.Module, optimizer: torch.optim.Optimizer, exactly: bool = True) -> None:
        """Params and states of the whole run, on every rank."""

        def equal(ours: Tensor, theirs: Tensor) -> bool:
            if exactly:
                return same_bits(ours, theirs)
            return torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)

        for (key, p), q in zip(net.named_parameters(), self.net.parameters(), strict=True):
            assert equal(whole(p).detach(), q.detach()), f"{key}: {whole(p)}, expected {q}"
            state, expected = optimizer.state[p], self.optimizer.state[q]
            assert state.keys() == expected.keys()
            for name, value in expected.items():
                assert equal(whole(state[name]), value), f"{name} of {key}"
                if isinstance(p, DTensor) and name != "step":
                    assert state[name].placements == p.placements


def train(net: nn.Module, name: str, twin: Twin, features: int = 7, **arguments: Any) -> Any:
    optimizer = make(name, net.parameters(), **arguments)
    exactly = name != "AdamProxL2" or all(rows_only(p) for p in net.parameters())
    for step in range(STEPS):
        backward(net, step, features)
        twin.step(net)
        optimizer.step()
        twin.check(net, optimizer, exactly)
    return optimizer


def rows_only(param: Tensor) -> bool:
    """Whether each rank has some of the rows."""
    return not isinstance(param, DTensor) or all(
        p in (Replicate(), Shard(0)) for p in param.placements
    )


def fsdp(net: nn.Module, mesh: Any, **arguments: Any) -> nn.Module:
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **arguments)
    return fully_shard(net, mesh=mesh, **arguments)


def case_fsdp(world: int, name: str) -> None:
    net = model()
    twin = Twin(net, name)
    fsdp(net, init_device_mesh("cpu", (world,)))
    shares = [p.to_local().numel() for p in net.parameters()]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, shares)
    assert any(len(set(x)) > 1 for x in zip(*everyone, strict=True))  # uneven
    optimizer = train(net, name, twin)
    assert all(isinstance(optimizer.state[p]["exp_avg"], DTensor) for p in net.parameters())


def case_fsdp_of_several_chunks(world: int, name: str) -> None:
    net = wide_model()
    twin = Twin(net, name)
    train(fsdp(net, init_device_mesh("cpu", (world,))), name, twin, features=131)


def case_fsdp_in_bfloat16_with_amsgrad(world: int, name: str) -> None:
    net = wide_model().to(torch.bfloat16)
    twin = Twin(net, name, amsgrad=True)
    fsdp(net, init_device_mesh("cpu", (world,)))
    optimizer = make(name, net.parameters(), amsgrad=True)
    for step in range(STEPS):
        net.zero_grad()
        net(batch(step, 131).bfloat16()).square().mean().backward()
        twin.step(net)
        optimizer.step()
        twin.check(net, optimizer)


def of_every_rule(net: nn.Module) -> list[dict[str, Any]]:
    """A group for each param, of the rules in turns; the last ones have the rule of the class."""
    rules = [{"decay": o.cls.decay, "weight_decay": decay_of(n)} for n, o in OPTIMIZERS.items()]
    params = list(net.parameters())
    assert len(params) > len(rules)
    return [
        {"params": [param], **(rules[i] if i < len(rules) else {})}
        for i, param in enumerate(params)
    ]


def case_fsdp_with_a_rule_for_each_param(world: int, name: str) -> None:
    """And averages of the params as they are in the end."""
    net = model()
    twin = Twin(net, name)
    twin.optimizer = make(name, of_every_rule(twin.net), ema_decay=0.75)
    fsdp(net, init_device_mesh("cpu", (world,)))
    optimizer = make(name, of_every_rule(net), ema_decay=0.75)
    for step in range(STEPS):
        backward(net, step)
        twin.step(net)
        optimizer.step()
        twin.check(net, optimizer)
    assert all("ema" in optimizer.state[p] for p in net.parameters())


def case_fsdp_tracked(world: int, name: str) -> None:
    """A rank's notes are of its shares, and add up to those of one process."""
    net = wide_model()
    twin = Twin(net, name)
    optimizer = make(name, fsdp(net, init_device_mesh("cpu", (world,))).parameters())
    both = optimizer, twin.optimizer
    for opt in both:
        opt.track_updates()
    for step in range(2):
        backward(net, step, 131)
        twin.step(net)
        optimizer.step()
    [ours], [theirs] = (opt.update_stats() for opt in both)
    counts = [torch.stack([*s.bins, s.zeros, s.nans, s.infs]) for s in (ours, theirs)]
    squares = [torch.stack([s.param_norm, s.update_norm]) ** 2 for s in (ours, theirs)]
    for of_rank, of_all in (counts, squares):
        dist.all_reduce(of_rank)
        torch.testing.assert_close(of_rank, of_all, rtol=2**-20, atol=0)


def case_fsdp_offloaded(world: int, name: str) -> None:
    net = model()
    twin = Twin(net, name)
    fsdp(net, init_device_mesh("cpu", (world,)), offload_policy=CPUOffloadPolicy(pin_memory=False))
    train(net, name, twin)


def case_fsdp_replicated(world: int, name: str) -> None:
    """HSDP: a mesh of replicas and shards."""
    replicas = 2 if world == 4 else 1
    net = wide_model()
    twin = Twin(net, name)
    mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("copy", "shard"))
    train(fsdp(net, mesh), name, twin, features=131)


def case_fsdp_mixed_with_plain(world: int, name: str) -> None:
    net = model()
    twin = Twin(net, name)
    fully_shard(net[0], mesh=init_device_mesh("cpu", (world,)))
    train(net, name, twin)


def case_tensor_parallel(world: int, name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 3))
    twin = Twin(net, name)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(net, init_device_mesh("cpu", (world,)), plan)
    train(net, name, twin)


def case_tensor_parallel_with_grads_placed_otherwise(world: int, name: str) -> None:
    """A norm's grads under sequence parallelism: each rank has a term of the sum."""
    net = nn.LayerNorm(6)
    twin = Twin(net, name)
    mesh = init_device_mesh("cpu", (world,))
    parallelize_module(net, mesh, SequenceParallel())
    optimizer = make(name, net.parameters())
    for step in range(STEPS):
        net.zero_grad()
        net(batch(step, 6).view(1, 12, 6)).to_local().square().mean().backward()
        for p in net.parameters():  # whole numbers, since a sum's order must not matter
            terms = torch.arange(6.0) * (dist.get_rank() + 1)
            p.grad = DTensor.from_local(terms, mesh, (Partial(),), run_check=False)
        twin.step(net)
        optimizer.step()
        twin.check(net, optimizer)
        assert all(p.grad.placements == (Partial(),) for p in net.parameters())


def case_fsdp_with_tensor_parallel(world: int, name: str) -> None:
    parallel = 2 if world == 4 else 1
    net = wide_model()
    twin = Twin(net, name)
    mesh = init_device_mesh("cpu", (world // parallel, parallel), mesh_dim_names=("dp", "tp"))
    parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fsdp(net, mesh["dp"])
    train(net, name, twin, features=131)
    if parallel == 2 and name == "AdamProxL2":  # rows that two dimensions of the mesh divide
        with pytest.raises(
            RuntimeError, match=r"block=2 of a param with placements=.*nothing was updated"
        ):
            make(name, net.parameters(), block=2).step()


def case_columns(world: int, name: str) -> None:
    """Shard(1): the norm is global too."""
    mesh = init_device_mesh("cpu", (world,))
    net = nn.Linear(293, 131, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.randn(131, 293, generator=torch.Generator().manual_seed(0)))
    twin = Twin(net, name)
    net.weight = nn.Parameter(distribute_tensor(net.weight.detach(), mesh, (Shard(1),)))
    optimizer = make(name, net.parameters())
    for step in range(STEPS):
        grad = torch.randn(131, 293, generator=torch.Generator().manual_seed(step))
        net.weight.grad = distribute_tensor(grad, mesh, (Shard(1),))
        twin.step(net)
        optimizer.step()
        twin.check(net, optimizer, exactly=name != "AdamProxL2")


BLOCKS = (
    *({"block": "row", "weight_decay": 9.0}, {"block": 2, "weight_decay": 14.0}),
    *({"block": 3, "block_scaling": "sqrt"}, {"block": 40, "weight_decay": 30.0}),
    *({"block": "group", "weight_decay": 90.0}, {"block": "group", "block_scaling": "sqrt"}),
)


def case_blocks(world: int, name: str) -> None:
    """Rows, rows that edges of shards divide, and all params together; other params beside them."""
    if name != "AdamProxL2":
        return
    mesh = init_device_mesh("cpu", (world,))
    for build, features in ((model, 7), (wide_model, 131)):
        for options in BLOCKS:
            net = build()
            twin = Twin(net, name, **options)
            optimizer = make(name, fsdp(net, mesh).parameters(), **options)
            for step in range(2):
                backward(net, step, features)
                if step == 1:
                    net[0].bias.grad = None
                twin.step(net)
                with pytest.MonkeyPatch.context() as patch:
                    if step == 1:  # a block is more than what is copied at a time
                        patch.setattr(block_norms, "AT_ONCE", 16)
                    if options["block"] == "row":  # no rank needs another one
                        patch.setattr(block_norms, "shrink", None)
                    optimizer.step()
                twin.check(net, optimizer)


def case_blocks_with_options_of_another_rule(world: int, name: str) -> None:
    """They are left over where a group's rule is changed, and have no effect."""
    if name != "AdamProxL1":
        return
    net = model()
    options = {"decay": "prox_l2", "block": "tensor", "block_scaling": "none", "weight_decay": 9.0}
    twin = Twin(net, "AdamProxL2", **{key: options[key] for key in ("block", "weight_decay")})
    net = fsdp(net, init_device_mesh("cpu", (world,)))
    l2, low = torch.tensor(3.0), torch.tensor(0.0)
    optimizer = make(name, net.parameters(), l2=l2, bounds=(low, 0.25), capturable=True)
    optimizer.param_groups[0].update(options)
    for step in range(2):
        backward(net, step)
        twin.step(net)
        optimizer.step()
        twin.check(net, optimizer)


class LargestTensor(TorchDispatchMode):
    """How many bytes the largest tensor has that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and not isinstance(each, DTensor):
                self.bytes = max(self.bytes, each.numel() * each.itemsize)
        return result


def case_norms_take_memory_for_their_part(world: int, name: str) -> None:
    """Not for the whole of a param, of which a rank may have a thousandth."""
    if name != "AdamProxL2":
        return
    rows = 40_000 * world + 1
    for block in ("tensor", "group", rows // 2):
        net = nn.Sequential(nn.Linear(1, rows, bias=False))
        net = fsdp(net, init_device_mesh("cpu", (world,)))
        optimizer = make(name, net.parameters(), block=block)
        set_grads(net, 0)
        optimizer.step()
        set_grads(net, 1)
        with LargestTensor() as largest:
            optimizer.step()
        own = net[0].weight.to_local().numel()
        assert largest.bytes <= 2 * 8 * (own + 1), (block, largest.bytes, own)


def case_blocks_of_columns(world: int, name: str) -> None:
    """Shards of columns, and on 4 ranks of both: a term for each block of each rank."""
    if name != "AdamProxL2":
        return
    shape = (2, world // 2) if world == 4 else (1, world)
    mesh = init_device_mesh("cpu", shape)
    for options in BLOCKS:
        values = [torch.randn(13, 6, 5, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
        net = nn.ParameterList([v.transpose(0, 2).contiguous().transpose(0, 2) for v in values[:1]])
        net.append(nn.Parameter(values[1]))
        twin = Twin(net, name, **options)
        for i, p in enumerate(list(net)):
            net[i] = nn.Parameter(distribute_tensor(p.detach(), mesh, (Shard(0), Shard(1))))
        optimizer = make(name, net.parameters(), **options)
        for step in range(2):
            set_grads(net, step)
            twin.step(net)
            optimizer.step()
            twin.check(net, optimizer, exactly=False)


def case_partial_params_are_refused(world: int, name: str) -> None:
    mesh = init_device_mesh("cpu", (world,))
    share = torch.ones(3)
    param = nn.Parameter(DTensor.from_local(share, mesh, (Partial(),), run_check=False))
    param.grad = DTensor.from_local(torch.ones(3), mesh, (Partial(),), run_check=False)
    with pytest.raises(RuntimeError, match=r"Partial.*nothing was updated"):
        make(name, [param]).step()
    assert torch.equal(share, torch.ones(3))


def case_plain_states_are_refused(world: int, name: str) -> None:
    """Those of a whole checkpoint, say."""
    net = fsdp(model(), init_device_mesh("cpu", (world,)))
    optimizer = make(name, net.parameters())
    backward(net, 0)
    optimizer.step()
    param = net[0].weight
    state = optimizer.state[param]
    state["exp_avg"] = state["exp_avg"].full_tensor()
    before = param.full_tensor()
    message = r"exp_avg of .* is a plain tensor of shape .* and the param a DTensor"
    with pytest.raises(RuntimeError, match=f"{message}.*nothing was updated"):
        optimizer.step()
    assert torch.equal(param.full_tensor(), before)


def case_states_of_another_mesh_are_refused(world: int, name: str) -> None:
    meshes = [init_device_mesh("cpu", shape) for shape in ((world,), (1, world))]
    params = [nn.Parameter(distribute_tensor(torch.ones(world), meshes[0])), torch.ones(world)]
    messages = "is on .*, and the param on", "and the param is not"
    for param, message in zip(params, messages, strict=True):
        param.grad = torch.ones_like(param)
        optimizer = make(name, [param.requires_grad_()])
        optimizer.step()
        optimizer.state[param]["exp_avg"] = distribute_tensor(torch.zeros(world), meshes[1])
        before = param.detach().clone()
        with pytest.raises(RuntimeError, match=f"exp_avg of .*{message}.*nothing was updated"):
            optimizer.step()
        assert torch.equal(local_of(param.detach()), local_of(before))


def case_a_param_of_the_first_rank_alone(world: int, name: str) -> None:
    """On the others nothing is to be done, beside a param of all."""
    mesh = DeviceMesh("cpu", [0])
    everywhere = init_device_mesh("cpu", (world,))
    values = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(distribute_tensor(values, m, (Shard(0),))) for m in (mesh, everywhere)]
    twin = nn.Parameter(values.clone())
    optimizers = make(name, params), make(name, [twin])
    for p in (*params, twin):
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(params[1].full_tensor(), twin)
    if dist.get_rank() == 0:
        assert torch.equal(params[0].to_local(), twin)
    elif name == "AdamProxL2":  # others do not know the norm of all
        with pytest.raises(RuntimeError, match="leaves this rank out is not supported; nothing"):
            make(name, params, block="group").step()
        with pytest.raises(ValueError, match=r"\['params'\]\[0\] is on a mesh that leaves this"):
            adamprox.SparsityTarget(optimizers[0], 0.5, 10)


def case_compiled_steps(world: int, name: str) -> None:
    net = model()
    twin = Twin(net, name)
    optimizer = make(name, fsdp(net, init_device_mesh("cpu", (world,))).parameters())
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for number in range(2):
        backward(net, number)
        twin.step(net)
        step()
        twin.check(net, optimizer)


def case_a_zero_part_is_no_zero_tensor(world: int, name: str) -> None:
    """A rank whose rows are zero does not warn of the whole."""
    if name != "AdamProxL1":
        return
    net = fsdp(nn.Sequential(nn.Linear(3, world, bias=False)), init_device_mesh("cpu", (world,)))
    with torch.no_grad():
        net[0].weight.to_local().fill_(0.0 if dist.get_rank() else 1.0)
    optimizer = make(name, net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            net[0].weight.grad = torch.zeros_like(net[0].weight)
            optimizer.step()


def case_steps_in_backward(world: int, name: str) -> None:
    """The twin has the grads that were there before each step, as ranks average by rounding."""
    net = model()
    twin = Twin(net, name)
    fsdp(net, init_device_mesh("cpu", (world,)))
    optimizer = make(name, net.parameters())
    grads: dict[Tensor, Tensor] = {}

    def note(param: Tensor) -> None:
        assert param.grad is not None
        grads[param] = param.grad.clone()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(note)
    with adamprox.step_in_backward(net, optimizer):
        for step in range(STEPS):
            net(batch(step, 7)).square().mean().backward()
            for p, q in zip(net.parameters(), twin.net.parameters(), strict=True):
                assert p.grad is None
                q.grad = whole(grads[p]).detach()
            twin.optimizer.step()
            twin.check(net, optimizer)


def case_skipped_and_frozen(world: int, name: str) -> None:
    net = model()
    twin = Twin(net, name)
    fsdp(net, init_device_mesh("cpu", (world,)))
    optimizer = make(name, net.parameters())
    for step in range(STEPS):
        backward(net, step)
        for index, p in enumerate(net.parameters()):
            if (index + step) % 3 == 0 and step > 0:
                p.grad = None
        twin.step(net)
        optimizer.step()
        twin.check(net, optimizer)


def case_zeros_counted_and_frozen(world: int, name: str) -> None:
    """Of all ranks together; each keeps those of its shards."""

    def with_zeros() -> nn.Module:
        net = model()
        with torch.no_grad():
            net[0].weight[1] = 0
            net[0].weight[:, 3] = 0
            net[3].bias.zero_()
        return net

    twin = with_zeros()
    mesh = init_device_mesh("cpu", (world,))
    net = fsdp(with_zeros(), mesh)
    counted = adamprox.sparsity(net)
    assert counted == adamprox.sparsity(twin)
    assert counted.tensors[0][3:] == (11, 5, 1)
    optimizer = make(name, net.parameters())
    with adamprox.freeze_zeros(optimizer):
        for step in range(STEPS):
            backward(net, step)
            optimizer.step()
            optimizer.zero_grad()
    after = adamprox.sparsity(net)
    assert after.tensors[0][3:] == (11, 5, 1) or name.startswith("AdamProxL")
    assert after.tensors[0].zeros >= 11
    assert after.zero_tensors >= 1


def case_zeros_of_columns(world: int, name: str) -> None:
    """Of a param of three dims, of which each rank has uneven parts of all rows."""
    if name != "AdamW":
        return
    values = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0))
    values[1] = values[:, 2] = 0
    mesh = init_device_mesh("cpu", (world,))
    [found] = adamprox.sparsity(
        nn.ParameterList([distribute_tensor(values, mesh, (Shard(1),))])
    ).tensors
    assert found[3:] == (7 * 3 + 3 * 3, 4, 1)


def case_led_to_a_share_of_zeros(world: int, name: str) -> None:
    """All ranks count together, and decide as one process does; and with rows as blocks."""
    if name not in ("AdamProxL1", "AdamProxL2"):
        return
    net = model()
    twin = Twin(net, name)
    optimizer = make(name, fsdp(net, init_device_mesh("cpu", (world,))).parameters())
    targets = [adamprox.SparsityTarget(o, 0.4, 20, every=2) for o in (optimizer, twin.optimizer)]
    for step in range(60):
        set_grads(net, step)
        twin.step(net)
        optimizer.step()
    twin.check(net, optimizer)
    assert targets[0].held
    assert targets[0].state_dict() == targets[1].state_dict()
    for target, each in zip(targets, (net, twin.net), strict=True):
        target.remove()
        with torch.no_grad():
            for p in each.parameters():
                p.mul_(0)
        target._optimizer.param_groups[0].update(decay="prox_l2", block="row")
        assert target._hold({})
    assert targets[0].share == targets[1].share == round(0.4 * 28) / 28
    ours, theirs = (target._frozen._zeros for target in targets)
    for p, q in zip(net.parameters(), twin.net.parameters(), strict=True):
        mine = ours.get(p, torch.zeros(p.to_local().shape, dtype=torch.bool))
        all_ranks = DTensor.from_local(
            mine, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
        ).full_tensor()
        assert torch.equal(all_ranks, theirs.get(q, torch.zeros(q.shape, dtype=torch.bool)))


def case_ddp(world: int, name: str) -> None:
    net = model()
    twin = Twin(net, name)
    parallel = DistributedDataParallel(net)
    optimizer = make(name, net.parameters())
    for step in range(STEPS):
        parallel.zero_grad()
        parallel(batch(step * world + dist.get_rank())).square().mean().backward()
        twin.step(net)
        optimizer.step()
        twin.check(net, optimizer)


def case_zero(world: int, name: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # torch.jit, which warns

    net = model()
    twin = Twin(net, name)
    arguments = {"lr": 1e-2, "weight_decay": twin.optimizer.defaults["weight_decay"]}
    optimizer = ZeroRedundancyOptimizer(net.parameters(), OPTIMIZERS[name].cls, **arguments)
    for step in range(STEPS):
        backward(net, step)
        twin.step(net)
        optimizer.step()
        for p, q in zip(net.parameters(), twin.net.parameters(), strict=True):
            assert same_bits(p.detach(), q.detach())
    mine = optimizer.optim.state
    assert len(mine) < len(list(net.parameters()))


def heap_bytes() -> int:
    """What C's heap has in use."""

    class Info(ctypes.Structure):
        _fields_ = tuple((name, ctypes.c_size_t) for name in "abcdefghij")

    call = ctypes.CDLL(None).mallinfo2
    call.restype = Info
    info = call()
    return info.h + info.e  # uordblks, hblkhd


def case_memory_does_not_grow(world: int, name: str) -> None:
    net = model()
    fsdp(net, init_device_mesh("cpu", (world,)))
    optimizer = make(name, net.parameters())
    backward(net, 0)
    tensors = [t for p in net.parameters() for t in (p, p.grad)]

    def held() -> tuple[int, ...]:
        counts = [
            sys.getrefcount(x)
            for t in tensors
            for x in (t, t._local_tensor, t._spec, t._spec.mesh, t._spec.placements)
        ]
        gc.collect()
        return (len(gc.get_objects()), sys.getallocatedblocks(), *counts)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.step()

    run(100)
    held()
    growths = []
    for _ in range(3):  # what leaks grows each time
        before, heap = held(), heap_bytes()
        run(500)
        after, grown = held(), heap_bytes() - heap
        assert after[2:] == before[2:]  # references
        growths.append((after[0] - before[0], after[1] - before[1], grown))
    objects, blocks, grown = map(min, zip(*growths, strict=True))
    assert objects < 50, growths
    assert blocks < 250, growths
    assert grown < 500 * 32, growths  # less than a smallest allocation a step


def checkpoint_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"net": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}


def load_checkpoint(net: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    saved = checkpoint_of(net, optimizer)
    dcp.load(saved, checkpoint_id=path)
    set_model_state_dict(net, saved["net"])
    set_optimizer_state_dict(net, optimizer, saved["optimizer"])


def set_grads(net: nn.Module, step: int) -> None:
    """The same ones on any number of ranks."""
    for index, p in enumerate(net.parameters()):
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + index))
        on_ranks = isinstance(p, DTensor)
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if on_ranks else grad


def resume(net: nn.Module, name: str, load: Path | None, save: Path, first: int) -> Any:
    """STEPS steps from a checkpoint to another."""
    optimizer = make(name, net.parameters())
    if load is not None:
        load_checkpoint(net, optimizer, load)
    for step in range(first, first + STEPS):
        set_grads(net, step)
        optimizer.step()
    dcp.save(checkpoint_of(net, optimizer), checkpoint_id=save)
    return optimizer


def case_checkpoint(world: int, name: str) -> None:
    """Saved by ``world - 1`` ranks (or one process), loaded and saved again by ``world``."""
    net = fsdp(model(), init_device_mesh("cpu", (world,)))
    load, save = (FOLDER / f"checkpoint-{name}-{ranks}" for ranks in (world - 1, world))
    optimizer = resume(net, name, load, save, first=STEPS * (world - 1))
    twin = Twin(model(), name)
    for step in range(STEPS * world):
        set_grads(twin.net, step)
        twin.optimizer.step()
    twin.check(net, optimizer)


CASES: dict[str, Callable[[int, str], None]] = {
    key.removeprefix("case_"): function
    for key, function in sorted(globals().items())
    if key.startswith("case_")
}
FOLDER = Path()
ONLY = os.environ.get("ADAMPROX_TEST_ONLY", "")  # an optimizer, to look into something


def optimizers_of(case: str, world: int) -> list[str]:
    """All on three ranks; elsewhere, one for each way of sharding. Checkpoints are a chain."""
    if case == "memory_does_not_grow":  # takes long
        return ["AdamW", "AdamProxL2"] if world == 2 else []
    every = world == 3 or case in ("checkpoint", "fsdp")
    return list(OPTIMIZERS) if every else ["AdamW", "AdamProxL1", "AdamProxL2"]


def main(rank: int, world: int, folder: Path) -> None:
    """Runs every case with every optimizer; writes what went wrong, a line of JSON a case."""
    global FOLDER
    FOLDER = folder
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ["TORCH_FR_BUFFER_SIZE"] = "50"  # torch's record of collectives, full before long
    store = f"file://{folder}/store-{world}"
    timeout = timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    with (folder / f"{world}-{rank}.json").open("w") as out:
        for case, function in CASES.items():
            for name in (n for n in optimizers_of(case, world) if not ONLY or n == ONLY):
                error, start = None, time.monotonic()
                try:
                    function(world, name)
                except BaseException:
                    error = traceback.format_exc()
                print(
                    json.dumps((case, name, error, round(time.monotonic() - start, 2))),
                    file=out,
                    flush=True,
                )
                if error is not None:
                    return  # the other ranks may wait for this one: they get an error when it ends
    dist.destroy_process_group()
    # Not by the interpreter's end: a thread of gloo that frees a finished collective then asks for
    # the interpreter, and the process aborts ("terminate called without an active exception").
    os._exit(0)
