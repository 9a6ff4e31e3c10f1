"""Every picture that a command draws can be read: labels, legends, lines, text, dots."""

import dataclasses
import math
from itertools import combinations

import pytest
import torch

import adamprox
from adamprox import plots
from adamprox.bench import picture, providers
from adamprox.bench.paper import (
    figures,
    networks,
    pictures,
    scaling,
    settings,
    store,
    taylor,
    training,
)
from adamprox.bench.paper.lab import Lab
from adamprox.bench.timing import COLD, WARM
from adamprox.reference import BINS

matplotlib = pytest.importorskip("matplotlib")
patches = pytest.importorskip("matplotlib.patches")


class Drawn:
    """A figure as it was when it was saved, with the boxes of all texts that were drawn."""

    def __init__(self, figure, monkeypatch):
        self.figure = figure
        self.texts = []
        draw = matplotlib.text.Text.draw

        def note(text, renderer):
            draw(text, renderer)
            if text.get_visible() and text.get_text().strip():
                self.texts.append((text, text.get_window_extent(renderer)))

        with monkeypatch.context() as patch:
            patch.setattr(matplotlib.text.Text, "draw", note)
            figure.draw_without_rendering()

    @property
    def axes(self):
        return [axes for axes in self.figure.axes if axes.axison]

    @property
    def plots(self):
        """Axes without colour bars."""
        return [axes for axes in self.axes if axes.get_label() != "<colorbar>"]

    @property
    def legends(self):
        return [axes.get_legend() for axes in self.axes if axes.get_legend() is not None]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, by the name of their file."""
    result = {}
    save = plots.save

    def note(figure, path):
        result[path.name] = None
        if path.suffix == ".png":  # an SVG is the same figure
            save(figure, path)
            result[path.name] = Drawn(figure, monkeypatch)

    monkeypatch.setattr(plots, "save", note)
    return result


def overlap(a, b):
    """By more than a pixel, which is less than the space around a letter."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    return width > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


def data_points(axes):
    """In pixels: of lines, and the corners of bars."""
    for line in axes.lines:
        yield from line.get_transform().transform(line.get_xydata())
    for patch in axes.patches:
        yield from patch.get_transform().transform(patch.get_path().vertices)


def check(drawn):
    for axes in drawn.axes:
        bar = axes.get_label() == "<colorbar>"
        assert axes.get_ylabel()
        assert bar or axes.get_xlabel()
    for (text, box), (other, other_box) in combinations(drawn.texts, 2):
        assert not overlap(box, other_box), (text, other)
    canvas = drawn.figure.bbox
    for text, box in drawn.texts:
        assert canvas.x0 - 1 <= box.x0 <= box.x1 <= canvas.x1 + 1, text
        assert canvas.y0 - 1 <= box.y0 <= box.y1 <= canvas.y1 + 1, text
        assert text.get_fontsize() >= 7
    assert drawn.figure.get_figwidth() == plots.WIDTH
    assert len({text.get_fontname() for text, _ in drawn.texts}) == 1
    for legend in drawn.legends:
        box, own = legend.get_window_extent(), [legend.get_title(), *legend.get_texts()]
        for axes in drawn.axes:
            assert not any(box.contains(*point) for point in data_points(axes))
        for text, other in drawn.texts:
            assert text in own or not overlap(box, other), text
        others = [other for other in drawn.legends if other is not legend]
        assert not any(overlap(box, other.get_window_extent()) for other in others)
    for axes in drawn.plots:
        check_lines(axes)
    images = [axes.images[0] for axes in drawn.plots if axes.images]
    assert len({image.get_clim() for image in images}) <= 1
    for image in images:
        assert image.axes.get_aspect() == 1
        assert image.colorbar or len(images) > 1


def check_lines(axes):
    series = {}
    for line in axes.lines:
        series.setdefault(line.get_label(), []).append(line)
    if len(series) > 1:
        assert {text.get_text() for text in axes.get_legend().get_texts()} >= series.keys()
    for (one, *_), (other, *_) in combinations(series.values(), 2):
        assert look(one) != look(other)
    for one, other in combinations(axes.lines, 2):
        if look(one) != look(other) and one.get_xydata().tolist() == other.get_xydata().tolist():
            below, above = sorted((one, other), key=lambda line: line.get_zorder())
            assert below.get_linewidth() > above.get_linewidth()
            assert above.get_linestyle() != "-"  # what is below is seen between
            few = len(one.get_xdata()) < 16
            assert few or one.get_markevery() != other.get_markevery()


def look(line):
    """What is told apart without colour."""
    return line.get_marker(), line.get_linestyle()


def check_dots(path):
    from PIL import Image

    with Image.open(path) as image:
        assert min(image.info["dpi"]) >= 149.9  # PNG has dots per metre
        assert image.width >= 8 * 150 - 1


# What `adamprox bench` draws.


def rows(names, device="A processor of some maker, model 1234"):
    """Of all kinds, for so many optimizers."""
    about = {"device": device, "threads": 64, "dtype": "bfloat16_float32"}
    about |= {"torch": "2.13.0+cu130", "date": "2030-01-01T00:00:00+00:00"}
    steps = [
        {
            **about,
            **{"model": model, "tensors": 400, "caches": caches, "name": name},
            "p50_us": 400 * (0.02 if index % 7 == 0 else 12.3456 / index),
            "host_in_step_us": 400 * 0.015 if index % 2 else None,
        }
        for model in picture.SMALL_TENSORS
        for caches in (COLD, WARM)
        for index, name in enumerate(names)
    ]
    sizes = [
        {
            **about,
            **{"elements": 2**k, "name": name, "copy_gb_per_s": 40.0},
            # Every other optimizer is as fast as its neighbour.
            "gb_per_s": min(2**k / 5000, 50) * (1 + index // 2),
        }
        for index, name in enumerate(names)
        for k in range(10, 25, 2)
    ]
    return sizes, steps


@pytest.mark.parametrize("names", [providers.SHORT, providers.NAMES], ids=["short", "all"])
@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)])
def test_the_picture_of_benchmarks(names, kinds, drawn, tmp_path):
    sizes, steps = rows(names)
    path = tmp_path / "cpu.png"
    picture.draw(path, sizes if kinds[0] else [], steps if kinds[1] else [])
    check(drawn["cpu.png"])
    check_dots(path)
    assert len(drawn["cpu.png"].axes) == sum(kinds)
    for axes in drawn["cpu.png"].axes:
        bars = [bar.get_window_extent() for bar in axes.patches]
        assert all(axes.bbox.x0 + 1 < bar.x1 < axes.bbox.x1 - 1 for bar in bars)
        for text in axes.texts:
            assert not any(overlap(text.get_window_extent(), bar) for bar in bars), text


def test_pictures_do_not_depend_on_the_settings_of_the_user(tmp_path):
    rest = rows(providers.SHORT)
    picture.draw(tmp_path / "a.png", *rest)
    theirs = {"font.size": 30, "figure.facecolor": "red", "savefig.dpi": 50}
    with matplotlib.rc_context(theirs):
        picture.draw(tmp_path / "b.png", *rest)
        assert all(matplotlib.rcParams[key] == value for key, value in theirs.items())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("span", [1.5, 4, 40, 900, 1e5, 1e8, 1e16])
def test_ticks_of_a_logarithmic_axis(span, monkeypatch):
    with plots.style():
        figure, ((axes,),) = plots.panels(1, 1)
        axes.plot([22, 22 * span])
        plots.log_ticks(axes)
        texts = Drawn(figure, monkeypatch).texts
    ticks = [(text, box) for text, box in texts if box.x1 < axes.bbox.x0]
    assert 2 <= len(ticks) <= 12
    assert not any(overlap(box, other) for (_, box), (_, other) in combinations(ticks, 2))


# What `adamprox paper` draws, of trainings that were not run.


def made_up(cell):
    """Some settings diverge, and the rules of a setting have the same curve."""
    good = math.exp(-abs(math.log10(cell.lr / 1.1e-3)) - 1e3 * cell.weight_decay)
    diverged = cell.lr >= 5e-3 and cell.weight_decay >= 1e-3 and cell.optimizer == "Adam"
    last = math.nan if diverged else 0.98 - good / 3
    losses = [(1 + 30 * math.exp(-k)) * (1 - good / 2) for k in range(cell.epochs)]
    errors = [max(0.9 - k / cell.epochs, last) for k in range(cell.epochs)]
    epochs = sorted({math.ceil(k * cell.epochs / training.HISTOGRAMS) for k in range(1, 7)})
    power = len(cell.network + cell.optimizer) % 3
    bins = [[(7 * index + epoch) ** power for index in range(BINS)] for epoch in epochs]
    bins[0][0], bins[0][-1] = 10**5, 10**4
    zeros = cell.weight_decay * 50 % 1
    pace = [-3 - k % 7 for k in range(20 + len(cell.optimizer))]
    lists = (losses, errors, epochs, bins)
    return training.Result(last, errors[-1], 2.0, zeros, 1.0, *lists, pace=pace)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    def fill(self, cells, *_):
        self._results.update({cell: made_up(cell) for cell in map(store.canonical, cells)})

    monkeypatch.setattr(store.Store, "fill", fill)
    monkeypatch.setattr(scaling, "STEPS", 1)
    monkeypatch.setattr(taylor, "STEPS", 2)
    cells = store.Store(tmp_path)
    yield Lab(settings.QUICK, cells, None, tmp_path)
    cells.close()


# Figures 9 to 12 are drawn as 7 and 8.
@pytest.mark.parametrize(
    ("number", "size"),
    [
        *((number, "quick") for number in (*"12345678", "mechanism", "sparsity")),
        *((number, "large") for number in "236"),
    ],
)
def test_the_figures_of_the_paper(number, size, lab, drawn, tmp_path):
    if size == "large":  # the longest name, and a grid that has been extended as often as may be
        names = (networks.DENSENET,)
        lrs = tuple(m * 10.0**k for k in range(-7, 0) for m in (1, 5))[1:]
        large = {"lrs": lrs, "networks": names, "batch_norm_networks": names}
        paper = dataclasses.replace(settings.paper(None), **large, section5_network=names[0])
        lab = lab._replace(settings=paper)
    with plots.style():
        figures.FIGURES[number](lab)
    more = {
        "2": ["advantage-bn"],
        "3": ["advantage", "concentration"],
        "4": ["figure-4-over-lambda"],
        "5": ["figure-5-beside", "taylor"],
        "6": ["figure-6-curves", "l1-path"],
    }
    names = {"mechanism": ["pace"], "sparsity": ["sparsity"]}.get(number, [f"figure-{number}"])
    names += more.get(number, [])
    assert drawn.keys() == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    for name in names:
        figure = drawn[f"{name}.png"]
        check(figure)
        check_dots(tmp_path / f"{name}.png")
        histograms = [axes for axes in figure.plots if axes.get_xlabel().startswith("|update|")]
        assert len({axes.get_ylim() for axes in histograms}) <= 1
        assert bool(histograms) == (name in ("figure-3", "figure-7", "figure-8"))
        for axes in histograms:
            check_outlines(axes)
        for axes in figure.plots:
            if axes.images:
                check_heatmap(axes)
    if number in "23456":
        bars = [axes for axes in drawn[f"figure-{number}.png"].axes if axes.get_xlabel() == ""]
        assert bars
        assert all("test error, %" in axes.get_ylabel() for axes in bars)


@pytest.mark.parametrize(("best", "low"), [(0.2, 20), (0.0, 0.1), (1.0, 45)])
def test_the_scale_of_errors_has_two_ends(best, low):
    grid = settings.QUICK.grid("ResNet-8", "AdamW")
    results = {cell: training.Result(test_error=best) for cell in grid.cells()}
    assert pictures.scale([grid], results) == (pytest.approx(low), 90)


def check_heatmap(axes):
    assert (axes.get_xlabel(), axes.get_ylabel()) == (r"$\alpha$", r"$\lambda$")
    best = torch.tensor(axes.images[0].get_array().filled(math.inf)).min().item()
    assert f"chosen: {best:.1f} %" in axes.get_title()
    (frame,) = axes.patches
    (x0, y0), (x1, y1) = frame.get_bbox().get_points()
    assert axes.images[0].get_array()[round((y0 + y1) / 2), round((x0 + x1) / 2)] == best


def check_bins(axes, low, high):
    """Bin 0 is everything below 2^-27, and the last one everything from 1 on."""
    ticks = dict(zip(axes.get_xticks(), axes.get_xticklabels(), strict=True))
    at = {bar: bar.get_x() + bar.get_width() / 2 for bar in (low, high)}
    assert ticks[at[low]].get_text() == "0 to $2^{-27}$"
    assert ticks[at[high]].get_text() == r"$\geq1$"
    assert ticks[-9].get_text() == "$2^{-9}$"


def check_outlines(axes):
    outlines = [patch for patch in axes.patches if isinstance(patch, patches.StepPatch)]
    low, high = [patch for patch in axes.patches if patch not in outlines][:2]
    check_bins(axes, low, high)
    assert len({outline.get_linestyle() for outline in outlines}) == len(outlines) >= 2
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [outline.get_label() for outline in outlines]
    for outline in outlines:
        values, edges, _ = outline.get_data()
        assert (len(values), edges[0], edges[-1]) == (BINS, -28, 1)
        assert sum(values) == pytest.approx(1)
        assert axes.get_ylim()[1] >= max(values)


def check_histogram(axes):
    low, *inner, high = axes.patches
    check_bins(axes, low, high)
    assert low.get_hatch()
    assert high.get_hatch()
    assert not any(bar.get_hatch() for bar in inner)
    bar = inner[17]  # [2^-10, 2^-9)
    assert (bar.get_x(), bar.get_x() + bar.get_width()) == (-10, -9)
    assert axes.get_ylim()[1] >= max(bar.get_height() for bar in axes.patches)


# What `UpdateStats.plot` draws.


@pytest.mark.parametrize("given", [False, True])
def test_the_histogram_of_updates(given, monkeypatch, tmp_path):
    param = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    optimizer = adamprox.AdamW([param], lr=0.5, betas=(0.0, 0.999), eps=1e-3)
    optimizer.track_updates()
    for scale in (0.0, 1.0):  # updates of 0, 1e-10, 0.6 and 1.4
        param.grad = scale * torch.tensor([0.0, 1e-13, 1e-3, 1e9])
        optimizer.step()
    axes = None
    if given:
        with plots.style():
            axes = plots.panels(1, 1)[1][0, 0]
    axes = optimizer.update_stats()[0].plot(axes)
    assert axes.patches[0].get_height() == 0.5  # zero is below 2^-27, too
    assert axes.patches[-1].get_height() == 0.25
    check_histogram(axes)
    axes.figure.savefig(tmp_path / "stats.png")
    check_dots(tmp_path / "stats.png")
    check(Drawn(axes.figure, monkeypatch))
