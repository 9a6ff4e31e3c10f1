"""Times `step()` of adamprox beside torch.optim.AdamW's, interleaved in one process.

Prints a table, and with --csv appends rows with their provenance. The ratios are what to keep: on a
shared machine a time means little, and its neighbour in the same round a lot.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import adamprox
from models import MODELS

Optimizers = dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]

TORCH: Optimizers = {
    "torch fused": lambda params: torch.optim.AdamW(params, fused=True),
    "torch foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "torch for-loop": lambda params: torch.optim.AdamW(params, foreach=False),
}
OURS: Optimizers = {
    name: getattr(adamprox, name) for name in ("AdamW", "AdamProx", "AdamProxL1", "AdamProxL2")
}
BASELINE = "torch fused"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="M")
    parser.add_argument("--optimizers", nargs="+", choices=[*TORCH, *OURS], metavar="O",
                        default=["torch fused", *OURS])  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=8.0, help="to spend on each model")
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    for model in args.models:
        times = measure(model, args)
        baseline = statistics.median(times.get(BASELINE, [math.nan]))
        for name, seconds in times.items():
            p20, p50, p80 = (1e6 * percentile(seconds, q) for q in (0.2, 0.5, 0.8))
            rows.append(
                {
                    "model": model,
                    "optimizer": name,
                    "p20_us": round(p20, 1),
                    "p50_us": round(p50, 1),
                    "p80_us": round(p80, 1),
                    "times_as_fast_as_torch_fused": round(1e6 * baseline / p50, 2),
                    "steps": len(seconds),
                }
            )
    print_table(rows)
    if args.csv:
        append_csv(args.csv, [{**row, **provenance(args)} for row in rows])


def measure(model: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step by optimizer, one step each in turns; the first few do not count."""
    optimizers = {}
    for name in args.optimizers:
        params = [
            torch.nn.Parameter(
                torch.zeros(shape, device=args.device, dtype=getattr(torch, args.dtype))
            )
            for shape in MODELS[model]()
        ]
        for param in params:
            param.grad = torch.randn_like(param)
        optimizers[name] = (TORCH | OURS)[name](params)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    warm_up = 3
    end = math.inf
    with tqdm(total=args.seconds, desc=model, unit="s", bar_format="{l_bar}{bar}| {desc}") as bar:
        for turn in range(10_000):
            if turn == warm_up:
                end = time.perf_counter() + args.seconds
            for name, optimizer in optimizers.items():
                times[name].append(time_of(optimizer, args.device))
            now = time.perf_counter()
            if end < math.inf:
                bar.update(min(args.seconds, args.seconds - (end - now)) - bar.n)
            if now > end:
                break
    return {name: seconds[warm_up:] for name, seconds in times.items()}


def time_of(optimizer: torch.optim.Optimizer, device: str) -> float:
    """The wall-clock seconds of one step, until the device is done with it."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def percentile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def print_table(rows: list[dict[str, object]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for row in rows:
            print("\t".join(map(str, row.values())))
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)


def provenance(args: argparse.Namespace) -> dict[str, object]:
    cuda = args.device.startswith("cuda")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": args.threads,
        "instruction_set": adamprox._C.cpu_instruction_set(),
        "adamprox": adamprox.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def append_csv(path: Path, rows: list[dict[str, object]]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
