"""Trains in a framework, as its example does: ``frameworks.py EXAMPLE FOLDER``.

Runs the example as a user does, then its ``train`` as below; ``FOLDER/runs.pt`` has the loss curve,
the params and the number of steps of each run. One process for all of it, as importing takes longer
than training.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import adamprox

EXAMPLES = Path(__file__).parent.parent / "bench" / "examples"


class Framework(NamedTuple):
    packages: tuple[str, ...]
    checkpoint: str | int  # of a run that is half done; a name in the folder, if it is a string
    bf16: dict[str, Any]
    # How far from torch's loss curve. timm's transformer amplifies what is rounded: torch's own
    # fused AdamW gets 5e-7 away from torch's default in 40 steps, and 5e-5 in 80 with more data.
    tolerance: float = 1e-6


FRAMEWORKS = {
    "huggingface_trainer": Framework(
        ("transformers", "accelerate"), "checkpoint-24", {"bf16": True, "use_cpu": True}
    ),
    "accelerate_loop": Framework(("accelerate",), 1, {"mixed_precision": "bf16"}),
    "lightning_module": Framework(("lightning",), "epoch=1.ckpt", {"precision": "bf16-mixed"}),
    "timm_loop": Framework(
        ("timm", "torchvision"), "checkpoint-1.pth.tar", {"dtype": torch.bfloat16}, 1e-5
    ),
}


def import_torchvision() -> None:
    """So that frameworks can import it, where its library does not load.

    PyPI's torchvision is linked with a torch that has CUDA. Beside another one it describes two
    operators without having them, which is an error; nobody here uses them.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def in_framework(example: str, folder: Path) -> dict[str, tuple[list[float], dict[str, Any], int]]:
    framework = FRAMEWORKS[example]
    train = runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")["train"]
    runs = {}

    def run(name, optimizer, resumed=None, **arguments):
        if example == "accelerate_loop":  # one precision a process
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)
        checkpoint = framework.checkpoint
        if resumed is None:
            checkpoint = None
        elif isinstance(checkpoint, str):
            checkpoint = str(folder / resumed / checkpoint)
        where = folder / (resumed or name)
        where.mkdir(exist_ok=True)
        steps: list[object] = []
        counter = register_optimizer_step_post_hook(lambda *_: steps.append(None))
        losses, model = train(optimizer, str(where), checkpoint, **arguments)
        counter.remove()
        runs[name] = losses, model.state_dict(), len(steps)

    run("AdamW", adamprox.AdamW)
    run("AdamW resumed", adamprox.AdamW, "AdamW")
    run("torch", torch.optim.AdamW)
    run("torch resumed with AdamW", adamprox.AdamW, "torch")
    run("bf16", adamprox.AdamProxL1, **framework.bf16)
    run("bf16 resumed", adamprox.AdamProxL1, "bf16", **framework.bf16)
    if example == "huggingface_trainer":
        train.__globals__["Trainer"] = with_its_own_groups(train.__globals__["Trainer"])
        run("AdamW, Trainer's groups", adamprox.AdamW)
        run("torch, Trainer's groups", torch.optim.AdamW)
    return runs


def with_its_own_groups(trainer):
    """A Trainer that makes the optimizer itself."""

    def new(*args, optimizers, **kwargs):
        choice = type(optimizers[0]), {"lr": 3e-3, "weight_decay": 0.1}
        return trainer(*args, **kwargs, optimizer_cls_and_kwargs=choice)

    return new


def check_a_scaler_of_accelerate() -> None:
    """An infinity changes nothing; accelerate notices what its GradScaler skips, if that skips."""
    from accelerate.optimizer import AcceleratedOptimizer

    for fused in (None, True):
        weight = torch.nn.Parameter(torch.ones(3))
        plain = torch.nn.Parameter(torch.ones(3))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = AcceleratedOptimizer(adamprox.AdamProx([weight], fused=fused), scaler=scaler)
        reference = adamprox.AdamProx([plain])
        for factor in (1.0, torch.inf, 2.0):
            optimizer.zero_grad()
            scaler.scale((weight * factor).square().sum()).backward()
            before = weight.detach().clone()
            optimizer.step()
            if factor == torch.inf:
                assert torch.equal(weight, before)
                assert optimizer.step_was_skipped is (fused is None)
            else:
                assert not optimizer.step_was_skipped
                plain.grad = 2 * factor**2 * plain.detach()
                reference.step()
                assert torch.equal(weight, plain)


def check_the_factory_of_timm() -> None:
    """create_optimizer_v2 makes what its registry has, with its groups of layers."""
    import timm
    from timm.optim import create_optimizer_v2
    from timm.optim._optim_factory import OptimInfo, default_registry

    for name in ("Adam", "AdamW", "AdamProx", "AdamProxL1", "AdamProxL2"):
        cls = getattr(adamprox, name)
        default_registry.register(OptimInfo("adamprox" + name.lower(), cls, has_betas=True))
        model = timm.create_model("test_vit", num_classes=2)
        optimizer = create_optimizer_v2(
            model, "adamprox" + name.lower(), lr=1.0, weight_decay=0.1, layer_decay=0.5
        )
        assert type(optimizer) is cls
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
        assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2


ALSO = {"accelerate_loop": check_a_scaler_of_accelerate, "timm_loop": check_the_factory_of_timm}

if __name__ == "__main__":
    example, folder = sys.argv[1:]
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    torch.save(in_framework(example, Path(folder)), Path(folder) / "runs.pt")
    if example in ALSO:
        ALSO[example]()
