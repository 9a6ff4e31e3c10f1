"""Rows for people: in the terminal, and as the table of README.md."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from .models import SHORT
from .providers import SHORT as SHORT_PROVIDERS
from .steps import HOST_BUDGET_US, HOST_BUDGET_US_PER_TENSOR

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.table import Table

Row = dict[str, Any]


def print_steps(rows: Sequence[Row]) -> None:
    """A block a model."""
    table = _table(
        "Steps: median, and 20 and 80 in a hundred",
        (
            "",
            "caches",
            "us",
            "p20",
            "p80",
            "GB/s",
            "copy",
            "fused",
            "host",
            "a tensor",
            "in step",
            "extra MB",
        ),
        "caches: cold, as in training, with new grads, or warm; copy: GB/s as a share of a copy's;"
        " fused: times as fast as torch fused; host: us without the update, in warm caches on as"
        " many tensors of one element, and a tensor, and in these steps, ! above"
        f" {HOST_BUDGET_US_PER_TENSOR} us a tensor + {HOST_BUDGET_US:.0f} us",
    )
    for model, group in groupby(rows, key=lambda row: row["model"]):
        table.add_section()
        table.add_row(f"[bold]{model}")
        for row in group:
            extra = row["extra_bytes"]
            table.add_row(
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
    _print(table)


def print_sizes(rows: Sequence[Row]) -> None:
    """Bandwidth by size and optimizer."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    table = _table("GB/s", ("elements of one tensor", *names, "copy"))
    for elements, group in groupby(rows, key=lambda row: row["elements"]):
        of_size = {row["name"]: row for row in group}
        achieved = (of_size[name]["gb_per_s"] for name in names)
        copied = of_size[names[0]]["copy_gb_per_s"]
        table.add_row(f"{elements:,}", *(_format(value, ".1f") for value in (*achieved, copied)))
    _print(table)


def print_end_to_end(rows: Sequence[Row]) -> None:
    """A block a network."""
    headings = ("", "forward + backward ms", "optimizer ms", "share of the step")
    table = _table("Training", headings)
    for network, group in groupby(rows, key=lambda row: row["network"]):
        table.add_section()
        table.add_row(f"[bold]{network}")
        for row in group:
            table.add_row(
                f" {row['name']}",
                f"{row['forward_backward_ms']:.2f}",
                f"{row['optimizer_ms']:.3f}",
                f"{row['share_of_step']:.1%}",
            )
    _print(table)


def print_memory(rows: Sequence[Row]) -> None:
    """How far a training step raises the peak."""
    headings = ("", "grads MB", "peak above params and states MB")
    table = _table("Memory of a training step", headings)
    for row in rows:
        megabytes = (f"{row[key] / 1e6:,.1f}" for key in ("grad_bytes", "peak_bytes"))
        table.add_row(row["way"], *megabytes)
    _print(table)


def print_names(models: Iterable[tuple[str, int, int]], optimizers: Mapping[str, str]) -> None:
    """What can be asked for; optimizers with whether they can run here."""
    table = _table(None, ("model", "tensors", "elements"))
    for name, tensors, elements in models:
        table.add_row(name, f"{tensors:,}", f"{elements:,}")
    _print(table)
    table = _table(None, ("optimizer", "here"))
    table.columns[1].justify = "left"
    for name, reason in optimizers.items():
        table.add_row(name, reason)
    _print(table)


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


def _table(title: str | None, headings: Sequence[str], caption: str | None = None) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    console.width = max(console.width, 120)  # columns that are too narrow would say less
    console.print(table)
