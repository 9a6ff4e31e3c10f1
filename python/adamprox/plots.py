"""What all pictures share: their style, how series are told apart, and the histogram of updates.

matplotlib is imported where it is used, since it comes with extras only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches: on a page of 800 pixels, text of 9 points is 12 pixels high
STYLE: dict[str, Any] = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "adamprox",
    "font.size": 9,
    **dict.fromkeys(("axes.titlesize", "figure.titlesize", "legend.title_fontsize"), 9),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 8),
    **dict.fromkeys(("legend.fontsize", "figure.labelsize"), 8),
    "legend.frameon": False,
    "legend.columnspacing": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# Their numbers have no common divisor: a marker and a line come together again after 33 series.
MARKERS = "os^Dv<>Pph*"
LINES = ("--", "-.", ":")  # but for the first series


def style() -> AbstractContextManager[None]:
    """The style of this package's pictures within it, whatever the user's own settings are."""
    import matplotlib.style

    return matplotlib.style.context(["default", STYLE])


def panels(rows: int, columns: int, height: float = 2.2, **options: Any) -> tuple[Figure, Any]:
    """A figure as wide as a page, and its axes: an array of two dimensions.

    Args:
        height: of a row, in inches.
        options: of ``Figure.subplots``.
    """
    # Not pyplot, whose figures look for a window system: only files are written.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * rows))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def columns(axes: Axes) -> int:
    """How many axes share the width of the page."""
    spec = axes.get_subplotspec()
    return 1 if spec is None else spec.get_gridspec().ncols


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG or an SVG, the same bytes from the same numbers."""
    changing = "Date" if path.suffix == ".svg" else "Software"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={changing: None})


def series(index: int, points: int = 1) -> dict[str, Any]:
    """How the line of a series is drawn, so that it can be told from others without colour.

    Lines may coincide: later ones are thinner, lie above and have gaps, and markers are hollow.
    Of many points, some six have a marker, and not the same ones in each series.
    """
    width = 1.9 / (1 + 0.18 * index)
    every = points // 6 + index // 4 if points >= 12 else 1
    return {
        "color": f"C{index % 10}",
        "linestyle": LINES[(index - 1) % len(LINES)] if index else "-",
        "linewidth": width,
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
        "markerfacecolor": "none",
        "markevery": (index * every // 4 % every, every),
        "zorder": 2 - width / 10,
    }


def legend(axes: Axes, title: str, columns: int = 2) -> None:
    """Above the axes, where it hides nothing, in place of their title; each label once."""
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    axes.legend(entries.values(), entries.keys(), **place, title=title, ncols=columns)


def log_ticks(axes: Axes, horizontal: bool = False) -> None:
    """Makes an axis, mostly the vertical one, logarithmic: plain numbers unless it is long."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis = axes.xaxis if horizontal else axes.yaxis
    (axes.set_xscale if horizontal else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    if high < 1e3 * low:
        subs = (1, 2, 5) if high >= 10 * low else (1, 2, 3, 4, 6, 8)  # three numbers, mostly
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def histogram(axes: Axes, bins: Sequence[int], title: str, color: str = "C0") -> None:
    """Draws the bins of :class:`adamprox.UpdateStats` as shares of what they hold together.

    The outer bins have no width of their own. They are hatched, and their ticks say what they hold.
    """
    edges = _bin_edges(axes, len(bins))
    bars = axes.bar(edges[:-1], _shares(bins), width=1.0, color=color, align="edge")
    for outer in (bars[0], bars[-1]):
        outer.set(facecolor="white", edgecolor=color, hatch="/////")
    axes.set_title(title)


def histograms(
    axes: Axes, bins: Mapping[str, Sequence[int]], styles: Mapping[str, Mapping[str, Any]]
) -> None:
    """Draws several of them over each other, as outlines; the outer bins are shaded.

    Args:
        styles: of each, as of :func:`series`.
    """
    names = ("color", "linestyle", "linewidth", "zorder")
    for label, counts in bins.items():
        edges = _bin_edges(axes, len(counts))
        style = {name: styles[label][name] for name in names}
        axes.stairs(_shares(counts), edges, label=label, baseline=None, **style)
        for outer in (0, len(counts) - 1):
            axes.axvspan(edges[outer], edges[outer + 1], color="0.93", zorder=0)


def _shares(bins: Sequence[int]) -> list[float]:
    total = max(sum(bins), 1)
    return [count / total for count in bins]


def _bin_edges(axes: Axes, count: int) -> list[int]:
    """Of the bins; labels the axes."""
    lowest = 2 - count  # -27
    edges = list(range(lowest - 1, 2))
    inner = range(lowest + 9, 0, 9) if columns(axes) < 4 else (-9,)  # all that has room
    labels = [f"0 to $2^{{{lowest}}}$", *(f"$2^{{{tick}}}$" for tick in inner), r"$\geq1$"]
    axes.set_xticks([lowest - 0.5, *inner, 0.5], labels)
    axes.set_xlabel(r"|update| / $\alpha$")
    axes.set_ylabel("share of updates")
    return edges
