"""Rows for people: in the terminal, and as the table of README.md."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from adamprox.tables import table

from .models import SHORT
from .providers import SHORT as SHORT_PROVIDERS
from .steps import HOST_BUDGET_US, HOST_BUDGET_US_PER_TENSOR

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Row = dict[str, Any]


def print_steps(rows: Sequence[Row]) -> None:
    """A block a model."""
    header = (
        *("", "caches", "us", "p20", "p80", "GB/s", "copy", "fused"),
        *("host", "a tensor", "in step", "extra MB"),
    )
    cells: list[tuple[str, ...]] = []
    for model, group in groupby(rows, key=lambda row: row["model"]):
        cells.append((model,))
        for row in group:
            extra = row["extra_bytes"]
            cells.append(
                (
                    f" {row['name']}",
                    row["caches"],
                    _digits(row["p50_us"]),
                    _digits(row["p20_us"]),
                    _digits(row["p80_us"]),
                    _format(row["gb_per_s"], ".1f"),
                    _format(row["share_of_copy"], ".0%"),
                    _format(row["times_as_fast_as_torch_fused"], ".2f"),
                    _digits(row["host_us"]) + (" !" if row["within_host_budget"] is False else ""),
                    _format(row["host_us_per_tensor"], ".2f"),
                    _digits(row["host_in_step_us"]),
                    _format(None if extra is None else extra / 1e6, ",.1f"),
                )
            )
    _print(
        *(cells, header, 2, "Steps: median, and 20 and 80 in a hundred"),
        "caches: cold with new grads, as in training, or warm. copy: GB/s as a share of a copy's."
        " fused: how many times as fast as torch fused. host: us of a step without its update,"
        " on as many tensors of one element, in warm caches. ! marks more than"
        f" {HOST_BUDGET_US_PER_TENSOR} us a tensor + {HOST_BUDGET_US:.0f} us. a tensor: host over"
        " the tensors. in step: host within the steps of this row.",
    )


def print_sizes(rows: Sequence[Row]) -> None:
    """Bandwidth by size and optimizer."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    cells = []
    for elements, group in groupby(rows, key=lambda row: row["elements"]):
        of_size = {row["name"]: row for row in group}
        achieved = (of_size[name]["gb_per_s"] for name in names)
        copied = of_size[names[0]]["copy_gb_per_s"]
        cells.append((f"{elements:,}", *(_format(value, ".1f") for value in (*achieved, copied))))
    _print(cells, ("elements of one tensor", *names, "copy"), 1, "GB/s")


def print_end_to_end(rows: Sequence[Row]) -> None:
    """A block a network."""
    cells: list[tuple[str, ...]] = []
    for network, group in groupby(rows, key=lambda row: row["network"]):
        cells.append((network,))
        for row in group:
            cells.append(
                (
                    f" {row['name']}",
                    f"{row['forward_backward_ms']:.2f}",
                    f"{row['optimizer_ms']:.3f}",
                    f"{row['share_of_step']:.1%}",
                )
            )
    _print(cells, ("", "forward + backward ms", "optimizer ms", "share of the step"), 1, "Training")


def print_memory(rows: Sequence[Row]) -> None:
    """How far a training step raises the peak."""
    cells = [
        (row["way"], *(f"{row[key] / 1e6:,.1f}" for key in ("grad_bytes", "peak_bytes")))
        for row in rows
    ]
    header = ("", "grads MB", "peak above params and states MB")
    _print(cells, header, 1, "Memory of a training step")


def print_names(models: Iterable[tuple[str, int, int]], optimizers: Mapping[str, str]) -> None:
    """What can be asked for; optimizers with whether they can run here."""
    cells = [(name, f"{tensors:,}", f"{elements:,}") for name, tensors, elements in models]
    _print(cells, ("model", "tensors", "elements"), 1)
    _print(list(optimizers.items()), ("optimizer", "here"), 2)


def _print(
    rows: Sequence[tuple[str, ...]],
    header: tuple[str, ...],
    texts: int,
    title: str = "",
    caption: str = "",
) -> None:
    print(table(rows, header, texts=texts, title=title, caption=caption), end="\n\n")


def markdown(runs: Mapping[str, Mapping[str, Row]]) -> str:
    """README's table of the rows that :func:`.records.newest` finds, for the short selection."""
    lines = [
        f"| model | {' | '.join(SHORT_PROVIDERS)} |",
        "|---" * (1 + len(SHORT_PROVIDERS)) + "|",
    ]
    for model in SHORT:
        cells = [model]
        for name in SHORT_PROVIDERS:
            row = runs[model][name]
            cell = f"{float(row['p50_us']):,.0f}"
            if name != SHORT_PROVIDERS[0]:
                cell += f" ({float(row['times_as_fast_as_torch_fused']):.2f})"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _format(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _digits(value: float | None) -> str:
    """Three at least."""
    return _format(value, ",.0f" if value is not None and value >= 100 else ".1f")
