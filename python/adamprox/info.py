"""``adamprox info``: versions, backends and hardware, as a bug report needs them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from . import _C, __version__
from .backends import BACKENDS, Backend, requested
from .tables import table

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints what :func:`collect` finds."""
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print(table(_rows(facts)))
    return 0


def collect() -> dict[str, Any]:
    """Everything ``adamprox info`` tells, ready for JSON."""
    return {
        "adamprox": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "backends": {name: _backend(backend) for name, backend in BACKENDS.items()},
        "ADAMPROX_BACKEND": os.environ.get("ADAMPROX_BACKEND"),
        "cpu": {
            "compiler": _C.compiler,
            "instruction_set": _C.cpu_instruction_set(),
            "instruction_sets": _C.cpu_instruction_sets(),
            "threads": torch.get_num_threads(),
        },
        "torch_abi": _C.torch_abi,
        "cuda_architectures": _C.cuda_architectures.split(),
        "gpus": _gpus(),
    }


def _backend(backend: Backend) -> dict[str, Any]:
    reason = backend.why_not()
    if reason is None and backend is BACKENDS["cuda"]:
        reason = backend.why_not("cuda")  # asks the device, too
    return {"usable": reason is None, "reason": reason}


def _triton_version() -> str | None:
    try:
        return str(import_module("triton").__version__)
    except ImportError:
        return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    driver = _driver_version()
    gpus = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        gpus.append({"name": name, "compute_capability": f"{major}.{minor}", "driver": driver})
    return gpus


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return result.stdout.split()[0]  # a line a GPU, and they share the driver
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


_READING = {"fast": "from memory", "slow": "by calls of Python, which takes longer"}


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("adamprox", facts["adamprox"]),
        ("Python", facts["python"]),
        ("PyTorch", facts["torch"]),
        ("Triton", facts["triton"] or "not installed"),
    ]
    for name, backend in facts["backends"].items():
        rows.append((f"backend {name}", backend["reason"] or "usable"))
    rows.append(("ADAMPROX_BACKEND", _asked_for()))
    cpu = facts["cpu"]
    # In CMake's words: "90-real" is machine code, "90-virtual" PTX, "90" both.
    architectures = [
        name.replace("-real", "").replace("-virtual", " as PTX")
        if "-" in name
        else f"{name} with PTX"
        for name in facts["cuda_architectures"]
    ]
    rows += [
        ("compiled by", cpu["compiler"]),
        ("CPU instruction set", cpu["instruction_set"]),
        ("CPU threads", str(cpu["threads"])),
        ("CUDA architectures", ", ".join(architectures) or "none built"),
        ("reading of tensors", _READING[facts["torch_abi"]]),
    ]
    for index, gpu in enumerate(facts["gpus"]):
        capability, driver = gpu["compute_capability"], gpu["driver"] or "unknown"
        text = f"{gpu['name']}, compute capability {capability}, driver {driver}"
        rows.append((f"GPU {index}", text))
    if not facts["gpus"]:
        rows.append(("GPU", "none that PyTorch can use"))
    return rows


def _asked_for() -> str:
    try:
        return requested(None) or "not set: the best that can run"
    except (ValueError, RuntimeError) as error:  # what every step would say
        return str(error)
