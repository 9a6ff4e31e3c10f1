"""Trains in a framework, as its example does: ``frameworks.py EXAMPLE FOLDER``.

Runs the example as a user does, then its ``train`` as below; ``FOLDER/runs.pt`` has the loss curves
and the params of each run. One process for all of it, as importing takes longer than training.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

import adamprox

EXAMPLES = Path(__file__).parent.parent / "bench" / "examples"


class Framework(NamedTuple):
    package: str
    checkpoint: str | int  # of a run that is half done; a name in the folder, if it is a string
    bf16: dict[str, Any]


FRAMEWORKS = {
    "huggingface_trainer": Framework("transformers", "checkpoint-24", {"bf16": True, "use_cpu": True}),
    "accelerate_loop": Framework("accelerate", 1, {"mixed_precision": "bf16"}),
    "lightning_module": Framework("lightning", "epoch=1.ckpt", {"precision": "bf16-mixed"}),
    "timm_loop": Framework("timm", "checkpoint-1.pth.tar", {"dtype": torch.bfloat16}),
}


def declare_torchvision_ops() -> None:
    """So that timm can import a torchvision whose library does not load.

    PyPI's torchvision is linked with a torch that has CUDA. Beside another one it describes these
    two operators without having them, which is an error; timm uses neither.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")


def in_framework(example: str, folder: Path) -> dict[str, tuple[list[float], dict[str, Any]]]:
    framework = FRAMEWORKS[example]
    train = runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")["train"]
    runs = {}

    def run(name, optimizer, resumed=None, **arguments):
        if framework.package == "accelerate":  # one precision a process
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)
        checkpoint = framework.checkpoint
        if resumed is None:
            checkpoint = None
        elif isinstance(checkpoint, str):
            checkpoint = str(folder / resumed / checkpoint)
        where = folder / (resumed or name)
        where.mkdir(exist_ok=True)
        losses, model = train(optimizer, str(where), checkpoint, **arguments)
        runs[name] = losses, model.state_dict()

    run("AdamW", adamprox.AdamW)
    run("AdamW resumed", adamprox.AdamW, "AdamW")
    run("torch", torch.optim.AdamW)
    run("torch resumed with AdamW", adamprox.AdamW, "torch")
    run("bf16", adamprox.AdamProxL1, **framework.bf16)
    run("bf16 resumed", adamprox.AdamProxL1, "bf16", **framework.bf16)
    if example == "huggingface_trainer":
        trainer = train.__globals__["Trainer"]

        def with_own_groups(*args, optimizers, **kwargs):
            arguments = {"lr": 3e-3, "weight_decay": 0.1}
            return trainer(
                *args, **kwargs, optimizer_cls_and_kwargs=(type(optimizers[0]), arguments)
            )

        train.__globals__["Trainer"] = with_own_groups
        run("AdamW, Trainer's groups", adamprox.AdamW)
        run("torch, Trainer's groups", torch.optim.AdamW)
    return runs


if __name__ == "__main__":
    example, folder = sys.argv[1:]
    if FRAMEWORKS[example].package == "timm":
        declare_torchvision_ops()
    torch.save(in_framework(example, Path(folder)), Path(folder) / "runs.pt")
