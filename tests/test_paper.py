"""The paper's experiments: what they are made of, and the paper's claims where they are exact."""

import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import math
import os
import pickle
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad

import adamprox
from adamprox import plots
from adamprox.__main__ import main
from adamprox.bench.paper import (
    adagrad,
    claims,
    data,
    figures,
    further,
    grids,
    histograms,
    idx,
    intervals,
    networks,
    page,
    pairs,
    quadratics,
    ranks,
    scaling,
    settings,
    sparsifying,
    store,
    taylor,
    theory,
    training,
)
from adamprox.bench.paper.lab import Lab
from adamprox.reference import BINS

CPU = torch.device("cpu")
PAGE = Path(__file__).parent.parent / "bench/paper/README.md"
TINY = training.Cell("digits", 8, "ResNet-8", 4, False, "AdamW", 1e-3, 1e-3, epochs=1, batch=256)


# He et al. (2016), table 6, and the implementation that the paper used: 0.27, 0.66, 0.85, 1.7 and
# 3.5 M; Huang et al. (2017), table 2: 0.8 M.
@pytest.mark.parametrize(
    ("name", "with_norm", "without"),
    [
        ("ResNet-20", 269_722, 268_346),
        ("ResNet-44", 658_586, 655_418),
        ("ResNet-56", 853_018, 848_954),
        ("ResNet-110", 1_727_962, 1_719_866),
        ("ResNet-218", 3_477_850, 3_461_690),
        ("DenseNet-BC-100", 800_032, 776_044),
    ],
)
def test_networks_are_of_the_published_size(name, with_norm, without):
    classes = 100 if name == networks.DENSENET else 10
    for batch_norm, expected in ((True, with_norm), (False, without)):
        model = networks.make(name, classes, 3, batch_norm)
        assert sum(param.numel() for param in model.parameters()) == expected
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert bool(norms) == batch_norm


@pytest.mark.parametrize("name", ["ResNet-8", "DenseNet-BC-10"])
def test_every_param_of_a_network_is_used(name):
    model = networks.make(name, 10, 1, True, width=4)
    model(torch.randn(2, 1, 8, 8)).square().sum().backward()
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("name", ["ResNet", "VGG-16", "ResNet-21", "DenseNet-BC-99"])
def test_other_networks_are_refused(name):
    with pytest.raises(ValueError, match=r"Invalid (network|number of layers)"):
        networks.make(name, 10, 1, False)


def write_archive(folder, name, monkeypatch, per_batch=3):
    """A small archive in CIFAR's format, which is taken for the official one."""
    archive = data.ARCHIVES[name]
    random = torch.Generator().manual_seed(0)
    pixels, labels = [], []
    path = folder / archive.file
    with tarfile.open(path, "w:gz") as tar:
        for index, batch in enumerate((*archive.train, *archive.test)):
            values = torch.randint(256, (per_batch, 3 * 32 * 32), generator=random)
            values = values.to(torch.uint8)
            numbers = [(index + k) % archive.classes for k in range(per_batch)]
            pickled = pickle.dumps({b"data": values.numpy(), archive.labels: numbers})
            info = tarfile.TarInfo(f"{archive.folder}/{batch}")
            info.size = len(pickled)
            tar.addfile(info, io.BytesIO(pickled))
            pixels.append(values)
            labels += numbers
    official = archive._replace(md5=hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setitem(data.ARCHIVES, name, official)
    return path, torch.cat(pixels).view(-1, 3, 32, 32), labels


@pytest.mark.parametrize("name", data.ARCHIVES)
def test_cifar_archives_are_read_and_normalized(name, tmp_path, monkeypatch):
    path, pixels, labels = write_archive(tmp_path, name, monkeypatch)
    images = data.load(name, path=tmp_path)
    count = 3 * len(data.ARCHIVES[name].train)
    assert images.train.shape == (count, 3, 32, 32)
    assert images.train_labels.tolist() == labels[:count]
    assert images.test_labels.tolist() == labels[count:]
    mean, std = images.train.mean(dim=(0, 2, 3)), images.train.std(dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(3), atol=1e-3, rtol=0)
    # The test images are normalized by the training images' numbers.
    means = pixels[:count].double().mean(dim=(0, 2, 3))
    deviations = pixels[:count].double().std(dim=(0, 2, 3), correction=0)
    expected = (pixels[count:] - means.view(3, 1, 1)) / deviations.view(3, 1, 1)
    torch.testing.assert_close(images.test, expected.float(), atol=1e-5, rtol=0)
    assert images.classes == data.ARCHIVES[name].classes
    assert images.mirrored
    assert torch.equal(data.load(name, path=path).train, images.train)


def test_another_archive_is_refused(tmp_path, monkeypatch):
    path, *_ = write_archive(tmp_path, "cifar10", monkeypatch)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"its md5 is \w{32}, the official archive's \w{32}"):
        data.load("cifar10", path=tmp_path)


@pytest.mark.parametrize("path", [None, "."])
def test_a_missing_archive_is_named_with_its_place(path, tmp_path):
    path = None if path is None else tmp_path
    with pytest.raises(FileNotFoundError, match=r"https://\S+/cifar-100-python.tar.gz \(md5 "):
        data.load("cifar100", path=path)


def write_idx(folder, gz=False, per_part=(5, 3), labels=None):
    """The four files of MNIST's format, with their contents."""
    folder.mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(0)
    tensors = []
    for count in per_part:
        images = torch.randint(256, (count, 28, 28), generator=random, dtype=torch.uint8)
        tensors += [images, torch.arange(labels or count, dtype=torch.uint8) % 3]
    for name, tensor in zip(idx.FILES, tensors, strict=True):
        head = bytes((0, 0, 8, tensor.dim()))
        sizes = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
        content = head + sizes + tensor.numpy().tobytes()
        file = folder / (f"{name}.gz" if gz else name)
        file.write_bytes(gzip.compress(content) if gz else content)
    return tensors


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_archives_are_read_pooled_and_normalized(name, gz, tmp_path):
    folder = tmp_path / name
    pixels, labels, test_pixels, test_labels = write_idx(folder, gz)
    assert data.name_of(folder) == name
    images = data.load(name, 14, folder)
    # Each pixel is the mean of four.
    pooled = pixels.double().view(5, 14, 2, 14, 2).mean(dim=(2, 4))
    test_pooled = test_pixels.double().view(3, 14, 2, 14, 2).mean(dim=(2, 4))
    mean, std = pooled.mean(), pooled.std(correction=0)
    expected = ((pooled - mean) / std, (test_pooled - mean) / std)
    torch.testing.assert_close(images.train, expected[0].float().unsqueeze(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.test, expected[1].float().unsqueeze(1), atol=1e-5, rtol=0)
    assert images.train_labels.tolist() == labels.tolist()
    assert images.test_labels.tolist() == test_labels.tolist()
    assert images.classes == 3
    assert images.mirrored == (name == "fashion-mnist")


def cut_off(folder):
    file = folder / idx.FILES.test
    file.write_bytes(file.read_bytes()[:-1])


def of_another_type(folder):
    file = folder / idx.FILES.train_labels
    file.write_bytes(bytes((0, 0, 13)) + file.read_bytes()[3:])


def no_gz(folder):
    (folder / idx.FILES.train).rename(folder / f"{idx.FILES.train}.gz")


def without_a_file(folder):
    (folder / idx.FILES.test_labels).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "it has 2367 bytes, and its head says 2368"),
        (of_another_type, "it is no IDX file of unsigned bytes"),
        (no_gz, "Not a gzipped file"),
        (without_a_file, "no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz in"),
        (
            lambda folder: write_idx(folder, labels=4),
            r"images are \(5, 28, 28\), their labels \(4,\)",
        ),
    ],
)
def test_a_damaged_idx_archive_is_refused(damage, message, tmp_path):
    write_idx(tmp_path)
    damage(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        data.load("mnist", 14, tmp_path)


def test_digits_are_scaled():
    small, large = data.load("digits", 8), data.load("digits", 32)
    assert small.train.shape == (1347, 1, 8, 8)
    assert large.test.shape == (450, 1, 32, 32)
    assert torch.equal(small.train_labels, large.train_labels)
    assert not large.mirrored
    assert large.train.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_augmented_images_are_crops_of_padded_ones():
    images = torch.arange(1.0, 1 + 6 * 2 * 32 * 32).view(6, 2, 32, 32)
    padding = torch.tensor([-1.0, -2.0])
    random = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(8):
        result = data.augment(images, padding, True, random)
        assert result.shape == images.shape
        for image, augmented in zip(images, result, strict=True):
            channels = zip(image, padding.tolist(), strict=True)
            padded = torch.stack([pad(c, (4, 4, 4, 4), value=value) for c, value in channels])
            crops = {
                (top, left, mirrored): crop.flip(2) if mirrored else crop
                for top in range(9)
                for left in range(9)
                for crop in [padded[:, top : top + 32, left : left + 32]]
                for mirrored in (False, True)
            }
            found = [key for key, crop in crops.items() if torch.equal(crop, augmented)]
            assert len(found) == 1
            seen.update(found)
    assert {mirrored for *_, mirrored in seen} == {False, True}
    assert len(seen) > 30
    unmirrored = data.augment(images, padding, False, random)
    assert (unmirrored[..., 4:-4, 4:-4].diff(dim=-1) == 1).all()


def test_a_histogram_is_that_of_the_states():
    """As the authors' code takes it: all params' ``mhat / (sqrt(vhat) + eps)``, from the states."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).double()) for n in (900, 60)]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.25}]
    optimizer = adamprox.AdamW(groups, lr=2.0**-8, eps=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.track_updates()
    for _ in range(4):
        for param in params:
            octaves = -30 * torch.rand(param.shape, generator=generator, dtype=torch.float64)
            param.grad = torch.exp2(octaves)
        optimizer.step()
        schedule.step()
    magnitudes = []
    for param in params:
        state = optimizer.state[param]
        first = state["exp_avg"] / (1 - 0.9**4)
        second = state["exp_avg_sq"] / (1 - 0.999**4)
        magnitudes.append(0.125 * first / (second.sqrt() + 1e-3))  # the schedule's share of it
    edges = torch.exp2(torch.arange(2 - BINS, 1).double())
    bins = torch.bucketize(torch.cat(magnitudes), edges, right=True)
    expected = torch.bincount(bins, minlength=BINS)
    assert (expected > 0).sum() > 10
    assert torch.equal(histograms.update_histogram(optimizer), expected)


def test_quartiles_of_a_histogram():
    counts = [0] * BINS
    counts[1], counts[2] = 100, 100  # [2^-27, 2^-26) and [2^-26, 2^-25)
    assert histograms.interquartile_range(counts) == 1
    assert histograms.interquartile_range([10] + 27 * [0] + [10]) == 27
    assert math.isnan(histograms.interquartile_range([0] * BINS))


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "AdamProx", "AdamProxL1", "AdamProxL2"])
def test_cells_are_repeatable_and_without_decay_all_the_same(optimizer):
    cell = dataclasses.replace(TINY, optimizer=optimizer, weight_decay=0.0)
    result = training.train(cell, CPU)
    reference = training.train(store.canonical(cell), CPU)
    assert result.train_losses == reference.train_losses
    assert result.histograms == reference.histograms
    params = sum(p.numel() for p in networks.make("ResNet-8", 10, 1, False, 4).parameters())
    assert [sum(counts) for counts in result.histograms] == [params]
    decayed = training.train(dataclasses.replace(cell, weight_decay=0.1), CPU)
    assert decayed.train_losses != reference.train_losses


def test_a_training_that_diverges_ends_and_says_so():
    cell = dataclasses.replace(TINY, optimizer="SGD", lr=1e30, epochs=3)
    result = training.train(cell, CPU)
    assert math.isnan(result.train_loss)
    assert len(result.train_losses) < 3
    assert 0.5 < result.test_error <= 1


def test_images_are_held_out_once_for_all():
    images = data.load("digits", 8)
    some = data.split(images, 300, 200)
    assert (len(some.train), len(some.validation)) == (300, 200)
    rest = data.split(images, 0, 200)
    assert len(rest.train) == len(images.train) - 200
    assert torch.equal(rest.validation, some.validation)
    assert torch.equal(rest.train[:300], some.train)
    both = torch.cat((rest.train, rest.validation)).flatten(1)
    assert torch.equal(
        both.sum(dim=1).sort().values, images.train.flatten(1).sum(dim=1).sort().values
    )
    with pytest.raises(ValueError, match="1347 training images are no 1300 and 200 to validate"):
        data.split(images, 1300, 200)


def test_a_training_with_images_held_out():
    cell = dataclasses.replace(TINY, train_images=500, validation=300, epochs=14)
    result = training.train(cell, CPU)
    right = intervals.unpacked(result.correct)
    assert len(right) == 450
    assert 1 - right.double().mean().item() == pytest.approx(result.test_error)
    assert 0 < result.validation_error < 1
    assert result.curve_epochs == [2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14]
    assert len(result.train_losses) == len(result.test_errors) == 12
    assert result.train_losses[-1] < result.train_losses[0]
    assert result.histogram_epochs == [3, 5, 7, 10, 12, 14]
    assert len(result.pace) == len(list(networks.make("ResNet-8", 10, 1, False, 4).parameters()))
    assert all(-28 < median < 1 for median in result.pace)


def test_a_shrunk_training_without_decay_is_adamw():
    """Adam and a multiplication are equation (4), but for rounding."""
    cell = dataclasses.replace(TINY, optimizer="AdamW", weight_decay=1e-2, epochs=1)
    of_adamw = training.train(cell, CPU)
    shrunk = dataclasses.replace(cell, optimizer="Adam", weight_decay=0.0, shrinkage=1e-2)
    assert training.train(shrunk, CPU).train_loss == pytest.approx(of_adamw.train_loss, rel=1e-3)
    plain = dataclasses.replace(shrunk, shrinkage=0.0)
    assert training.train(plain, CPU).train_loss != pytest.approx(of_adamw.train_loss, rel=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        ("AdamW", {}),
        ("Adam", {"weight_decay": 0.0, "l1": 1e-3}),
        ("AdamProxL1", {"weight_decay": 1e-4}),
        ("AdamProxL1", {"weight_decay": 1e-5, "options": "metric=adam"}),
        ("AdamProxL1", {"weight_decay": 1e-4, "options": "l2=1e-3"}),
    ],
)
def test_a_training_ends_with_the_zeros_that_are_asked_for(optimizer, changes):
    cell = dataclasses.replace(
        TINY, optimizer=optimizer, batch=16, epochs=10, sparsity=0.7, **changes
    )
    result = training.train(cell, CPU)
    assert result.zeros == pytest.approx(0.7, abs=0.01)
    assert result.train_loss < result.train_losses[5]  # 60 % of the epochs sparsify
    assert len(result.histograms) == training.HISTOGRAMS


@pytest.mark.parametrize("steps", [5, 10, 16])
def test_pruning_follows_the_cubic_ramp(steps):
    model = torch.nn.Linear(20, 10, bias=False)
    optimizer = adamprox.AdamW(model.parameters(), lr=1e-3)
    sparsifying.begin(model, optimizer, 0.8, 20)  # the ramp ends after 16 of the steps
    for _ in range(steps):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    expected = 0.8 * (1 - (1 - steps / 16) ** 3)
    assert (model.weight == 0).sum().item() == round(expected * 200)


def test_a_strength_that_makes_all_zero_is_no_news():
    cell = dataclasses.replace(TINY, optimizer="AdamProxL1", weight_decay=10.0, epochs=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert training.train(cell, CPU).zeros > 0.9


def test_an_l1_term_of_the_loss_adds_its_subgradient():
    """One step of SGD: weights move by the learning rate times its sign, too."""

    def weights(l1):
        cell = dataclasses.replace(TINY, optimizer="SGD", lr=0.125, batch=450)
        images = training._images("digits", 8, 450, 0, None, CPU)
        model, optimizer = training._make(cell, images, CPU)
        before = [w.detach().clone() for w in model.parameters()]
        random = torch.Generator().manual_seed(0)
        training._train_epoch(cell, model, optimizer, images, random, l1)
        return before, [w.detach() for w in model.parameters()]

    before, plain = weights(0.0)
    _, ours = weights(2.0**-8)
    for w, p, o in zip(before, plain, ours, strict=True):
        torch.testing.assert_close(p - o, 2.0**-11 * w.sign(), rtol=1e-2, atol=1e-6)


def test_without_bn_several_ranks_train_as_one():
    """The parts of a batch have its gradient together. But BN's statistics are of a part alone."""
    errors = {}
    for batch_norm in (False, True):
        cell = dataclasses.replace(
            TINY, batch_norm=batch_norm, lr=1e-2, batch=64, train_images=640, epochs=2
        )
        one, two = (training.train(dataclasses.replace(cell, ranks=ranks), CPU) for ranks in (1, 2))
        errors[batch_norm] = abs(one.train_loss - two.train_loss) / one.train_loss
        assert len(two.histograms) == 2
    assert errors[False] < 1e-5
    assert errors[True] > 1e-2


@pytest.mark.parametrize(("count", "expected"), [(8, [4, 5]), (11, [4, 5]), (3, [0, 1, 2])])
def test_parts_of_a_batch_are_never_empty(count, expected, monkeypatch):
    for name, value in (("is_initialized", True), ("get_world_size", 4), ("get_rank", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert ranks.part(torch.arange(count)).tolist() == expected


def test_scale_freeness_is_judged_row_by_row():
    kept = [("SGD", "none", False), ("Adam", "none", True), ("Adam", "coupled, (2)", False)]
    kept += [("Adam", "proximal, equation (3)", True), ("SGD", "proximal, M_t of AdaGrad", False)]
    names = ("direction", "decay", "scale_free")
    rows = [dict(zip(names, map(str, row), strict=True)) for row in kept]
    assert claims.scale_free(rows)[1] == "shown"
    rows[3]["scale_free"] = "False"
    assert claims.scale_free(rows)[1] == "in part"


def test_options_are_arguments():
    assert training.options("metric=adam l2=1e-3 block=row") == {
        "metric": "adam",
        "l2": 1e-3,
        "block": "row",
    }
    cell = dataclasses.replace(TINY, optimizer="AdamProxL2", options="block=group")
    model = networks.make("ResNet-8", 10, 1, False, 4)
    assert training.make_optimizer(cell, model).param_groups[0]["block"] == "group"


def test_a_scaled_start_keeps_the_variance_and_all_channels_alive():
    """He's start doubles it with each of the nine blocks; a stage's new channels start at zero."""
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    grown = {}
    for start in ("he", "scaled"):
        torch.manual_seed(0)
        network = networks.make("ResNet-56", 10, 1, False, 16, start=start)
        first = network.conv(x).relu()
        features = network.blocks(first)
        grown[start] = (features.square().mean() / first.square().mean()).item()
        features.square().mean().backward()
        assert all(param.grad.any() for param in network.blocks.parameters())
    assert grown["scaled"] < math.e
    assert grown["he"] > 1e3 * grown["scaled"]
    with pytest.raises(ValueError, match="Invalid start: 'none'"):
        networks.make("ResNet-20", 10, 1, False, 4, start="none")
    with pytest.raises(ValueError, match="which is no ResNet"):
        networks.make("DenseNet-BC-10", 10, 1, False, 4, start="scaled")


def test_the_best_setting_is_chosen_by_what_was_held_out(tmp_path):
    cells = store.Store(tmp_path)
    cells.close()
    grid = grids.Grid(dataclasses.replace(TINY, validation=100), [0.1, 0.2], [0.1])
    for lr, validation_error, test_error in ((0.1, 0.3, 0.2), (0.2, 0.2, 0.3)):
        result = training.Result(0.1, test_error, validation_error=validation_error)
        cells._results[grid.cell(lr, 0.1)] = result
    assert grid.best(cells).lr == 0.2


def test_an_interval_is_students():
    low, high = intervals.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # 2.776 is the 97.5 % quantile for four degrees of freedom, in any table.
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert (low, high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    assert all(map(math.isnan, intervals.interval([1.0])))
    assert all(map(math.isnan, intervals.interval([1.0, math.nan])))


def test_a_difference_is_paired():
    def result(*right):
        bits = torch.tensor(right, dtype=torch.bool)
        error = 1 - bits.double().mean().item()
        return training.Result(test_error=error, correct=intervals.packed(bits))

    first = [result(1, 0, 0, 0), result(1, 1, 0, 0)]
    second = [result(1, 1, 1, 0), result(0, 1, 1, 1)]
    row = intervals.difference(first, second)
    assert row.mean == pytest.approx((0.5 + 0.25) / 2)
    assert row.low < row.mean < row.high
    assert (row.first_better, row.second_better) == (0, 0)  # of two and three pictures
    many = [(0,) * 6 + (1,) * 4, (1,) * 6 + (1,) * 4]  # six to none: 2 / 2^6 = 0.03
    row = intervals.difference(*([result(*right)] for right in many))
    assert (row.first_better, row.second_better) == (0, 1)
    row = intervals.difference(*([result(*right)] for right in many[::-1]))
    assert (row.first_better, row.second_better) == (1, 0)
    row = intervals.difference(*([result(*right[1:])] for right in many))  # five: 0.06
    assert (row.first_better, row.second_better) == (0, 0)


def test_how_much_faster_one_trains():
    def results(*losses):
        return [training.Result(train_losses=list(each)) for each in losses]

    first = results([8.0, 2.0], [4.0, 4.0])
    ratio, low, high = intervals.loss_ratio(first, results([2.0, 0.5], [1.0, 1.0]))
    assert (ratio, low, high) == pytest.approx((0.25, 0.25, 0.25))
    ratio, low, high = intervals.loss_ratio(first, results([4.0, 1.0], [1.0, 1.0]))
    assert ratio == pytest.approx(math.sqrt(0.125))
    assert low < 0.25 < 0.5 < high
    diverged = intervals.loss_ratio(first, results([4.0, math.nan], [1.0, 1.0]))
    assert all(map(math.isnan, diverged))


def test_what_depth_adds_is_a_slope_with_its_interval():
    def results(*errors):
        return [training.Result(test_error=error) for error in errors]

    first = [results(0.2, 0.2), results(0.3, 0.3), results(0.4, 0.4)]
    second = [results(0.2, 0.1), results(0.2, 0.1), results(0.2, 0.1)]
    slopes = intervals.slope([3.0, 4.0, 5.0], first, second)
    assert slopes == pytest.approx((0.1, 0.1, 0.1))  # both seeds gain a tenth a step
    second[2] = results(0.4, 0.1)
    mean, low, high = intervals.slope([3.0, 4.0, 5.0], first, second)
    assert mean == pytest.approx(0.05)
    assert low < 0 < high


def fake_store(tmp_path, error):
    """A store whose results come from a function of lr and weight decay."""
    cells = store.Store(tmp_path)
    cells.close()  # nothing is written

    def fill(missing, machine, title):
        for cell in map(store.canonical, missing):
            value = error(cell.lr, cell.weight_decay)
            cells._results[cell] = training.Result(value, value)

    cells.fill = fill
    return cells


def fake_trainings(monkeypatch, result):
    """Every store has the results that this function of a cell returns."""

    def fill(self, cells, *_):
        self._results.update({cell: result(cell) for cell in map(store.canonical, cells)})

    monkeypatch.setattr(store.Store, "fill", fill)


def draw(names, of_settings, folder):
    lab = Lab(of_settings, store.Store(folder), None, folder)
    with plots.style():
        for name in names:
            figures.FIGURES[name](lab)
    lab.store.close()


def table_of(folder, name):
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_differences_have_the_sign_of_what_adamw_gains(tmp_path, monkeypatch):
    """The deeper, the more; without decay it is worse. The seed that selects has no say."""
    layers = {"ResNet-8": 3, "ResNet-20": 4}

    def result(cell):
        error = 0.1 + (cell.weight_decay == 0) * 0.01
        if cell.optimizer == "Adam":
            error += 0.1 * layers[cell.network]
        error += 0.5 * (cell.ranks > 1)
        if cell.seed == 0:
            error = 0.1 + abs(cell.weight_decay - 1e-3)
        losses = [2.0 if cell.optimizer == "Adam" else 1.0]
        bins = [0] * BINS
        bins[5] = bins[9 if cell.optimizer == "Adam" else 6] = 1
        return training.Result(
            losses[0], error, train_losses=losses, validation_error=error,
            histograms=[bins], histogram_epochs=[1], curve_epochs=[1], test_errors=[error],
            iqr=histograms.interquartile_range(bins), pace=[-3.0],
        )  # fmt: skip

    fake_trainings(monkeypatch, result)
    small = dataclasses.replace(
        settings.QUICK, networks=tuple(layers), batch_norm_networks=tuple(layers), validation=9,
        mechanism_networks=tuple(layers), section5_network="ResNet-20", ranks=(1, 2),
    )  # fmt: skip
    draw(("2", "3", "mechanism", "distributed"), small, tmp_path)
    table = functools.partial(table_of, tmp_path)
    for name in ("advantage", "advantage-bn"):
        rows = table(name)
        assert [row["seeds"] for row in rows] == ["2", "2"]
        assert [float(row["mean"]) for row in rows] == pytest.approx([0.3, 0.4])
        assert [float(row["loss_ratio"]) for row in rows] == pytest.approx([0.5, 0.5])
    [row] = table("advantage-by-depth")  # of two networks there is no slope without the deepest
    assert float(row["mean"]) == pytest.approx(0.1 / math.log2(20 / 8))
    assert all(float(row["mean"]) > 0 for row in table("concentration"))
    decays = [float(row["mean"]) for row in table("without-decay")]
    assert decays == pytest.approx([-0.29, 0.01, -0.39, 0.01])  # without decay both are AdamW
    gains = {(row["network"], row["control"]): float(row["gain"]) for row in table("mechanism")}
    assert gains["ResNet-20", "Adam-l2"] == pytest.approx(0.4)
    assert gains["ResNet-20", "neither"] == pytest.approx(0.01)
    assert gains["ResNet-20", "AdamW"] == gains["ResNet-20", "AdamW, scaled start"] == 0
    assert gains["ResNet-20", "Adam-l2, scaled start"] == pytest.approx(0.4)
    of_ranks = {(row["optimizer"], row["ranks"]): row for row in table("distributed")}
    assert float(of_ranks["AdamW", "2"]["cost_mean"]) == pytest.approx(0.5)
    assert float(of_ranks["AdamW", "2"]["gain_mean"]) == pytest.approx(0.4)
    assert float(of_ranks["Adam-l2", "2"]["gain_mean"]) == 0


@pytest.mark.parametrize("decays", [(0.0, 1e-4, 1e-3, 1e-2, 0.1), (0.0, 1e-3)])
def test_how_far_a_factor_moves_errors(decays, tmp_path, monkeypatch):
    """Adam-l2's are of lambda / c, AdamW's of neither. The seed that selects has no say."""

    def result(cell):
        error = 0.1 + (cell.optimizer == "Adam") * 3 * cell.weight_decay / cell.loss_factor
        error = 0.9 - cell.lr if cell.seed == 0 else error
        return training.Result(error, error, validation_error=error)

    fake_trainings(monkeypatch, result)
    monkeypatch.setattr(scaling, "STEPS", 2)
    small = dataclasses.replace(settings.QUICK, validation=9, scaled_weight_decays=decays)
    draw(["4"], small, tmp_path)
    farther = 3 * statistics.mean(decays[1:])
    nothing = 0 if len(decays) > 2 else math.nan  # a single lambda has no point over lambda / c
    moved = [float(row["moved_mean"]) for row in table_of(tmp_path, "figure-4-over-lambda")]
    expected = [0.9 * farther, 0.99 * farther, nothing, nothing, 0, 0]
    assert moved == pytest.approx(expected, nan_ok=True)
    rows = {row.pop("than"): row for row in table_of(tmp_path, "figure-4-moved")}
    mean = 0.945 * farther
    expected = {"Adam-l2 over lambda / c": mean - nothing, "AdamW over lambda": mean}
    assert rows.keys() == expected.keys()
    for than, row in rows.items():
        values = [float(row[name]) for name in ("mean", "low", "high")]
        assert values == pytest.approx([expected[than]] * 3, nan_ok=True)


def test_the_gain_by_depth_is_told_without_each_network(tmp_path):
    gains = {"ResNet-8": 0.0, "ResNet-16": 0.1, "ResNet-32": 0.5, "ResNet-64": 0.5}
    bests = {
        (network, name): [training.Result(1.0, 0.2 + gain * (name == "Adam"))] * 2
        for network, gain in gains.items()
        for name in settings.PAIR
    }
    pairs.by_depth(Lab(settings.QUICK, None, None, tmp_path), {key: [] for key in gains}, bests)
    rows = table_of(tmp_path, "advantage-by-depth")
    slopes = {row["networks"]: float(row["mean"]) for row in rows}
    assert slopes == pytest.approx(
        {
            "of all": 0.19,
            "without ResNet-8": 0.2,
            "without ResNet-16": 2.5 / 14,
            "without ResNet-32": 2.4 / 14,
            "without ResNet-64": 0.25,
            "without ResNet-32 and ResNet-64": 0.1,
        }
    )


def test_the_study_tells_other_seeds_than_the_one_that_selects(tmp_path):
    write_idx(tmp_path / "mnist")
    study = settings.study(tmp_path / "mnist")
    assert study.reported == (1, 2, 3, 4, 5)
    assert study.paired == tuple(range(1, 21))
    assert settings.QUICK.paired == settings.QUICK.seeds
    assert study.validation > 0
    assert study.cell("ResNet-8", "AdamW").seed == 0
    assert settings.QUICK.reported == settings.QUICK.seeds


def test_grids_are_extended_until_the_best_is_inside(tmp_path):
    cells = fake_store(tmp_path, lambda lr, wd: abs(math.log10(lr / 2e-2)) + abs(wd - 5e-3))
    grid = grids.Grid(TINY, [1e-4, 1e-3], [0.0, 1e-3])
    grids.search([grid], cells, None, "", extensions=9)
    assert grid.lrs == [1e-4, 1e-3, 5e-3, 1e-2, 5e-2]
    assert grid.weight_decays == [0.0, 1e-3, 5e-3, 1e-2]
    best = grid.best(cells)
    assert (best.lr, best.weight_decay) == (1e-2, 5e-3)
    assert grid.on_border(cells) == []


def test_extensions_are_limited_and_the_border_is_told(tmp_path):
    cells = fake_store(tmp_path, lambda lr, wd: lr + wd)
    grid = grids.Grid(TINY, [1e-3, 1e-2], [0.0, 1e-3])
    grids.search([grid], cells, None, "", extensions=1)
    assert grid.lrs == [5e-4, 1e-3, 1e-2]
    assert grid.on_border(cells) == ["lr below 0.0005"]


@pytest.mark.parametrize(
    ("value", "up", "expected"),
    [(1e-3, True, 5e-3), (5e-3, True, 1e-2), (2e-3, True, 5e-3), (1e-3, False, 5e-4),
     (5e-3, False, 1e-3), (2e-3, False, 1e-3), (0.1, True, 0.5), (0.5, False, 0.1)],
)  # fmt: skip
def test_neighbours_on_the_scale(value, up, expected):
    assert grids.neighbour(value, up) == expected


def test_finished_cells_are_read_as_they_were_written(tmp_path):
    cells = store.Store(tmp_path)
    other = dataclasses.replace(TINY, optimizer="AdamProxL1", batch_norm=True, lr=0.1 + 0.2)
    held_out = dataclasses.replace(TINY, validation=100)
    cells.fill([TINY, other, TINY, held_out], store.Machine(CPU, 1), "")
    results = {cell: cells[cell] for cell in (TINY, other, held_out)}
    with pytest.raises(RuntimeError, match="another run writes to"):
        store.Store(tmp_path)
    cells.close()
    again = store.Store(tmp_path)
    assert len(again) == 3
    for cell, result in results.items():
        assert repr(again[cell]) == repr(result)  # NaN is not NaN
    assert again[held_out].correct
    again.close()


def test_a_store_without_the_newest_columns_is_read(tmp_path):
    """As the files that were written before there was anything to hold out."""
    cells = store.Store(tmp_path)
    cells.fill([TINY], store.Machine(CPU, 1), "")
    result = cells[TINY]
    cells.close()
    with cells.file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    newest = {"train_images", "validation", "validation_error", "curve_epochs", "pace", "correct"}
    newest |= {"shrinkage", "start"}
    with cells.file.open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name not in newest])
        writer.writeheader()
        writer.writerows({k: v for k, v in row.items() if k not in newest} for row in rows)
    again = store.Store(tmp_path)
    assert repr(again[TINY]) == repr(dataclasses.replace(result, curve_epochs=[], pace=[]))
    again.close()


def test_a_store_of_other_columns_is_refused(tmp_path):
    (tmp_path / "cells.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns"):
        store.Store(tmp_path)


GRID = """
import sys
import dataclasses
import pathlib
import torch
from adamprox.bench.paper import store
from adamprox.bench.paper.training import Cell

if __name__ == "__main__":
    cell = Cell("digits", 8, "ResNet-8", 4, False, "AdamW", 1e-3, 1e-3, epochs=1, batch=256)
    cells = [dataclasses.replace(cell, seed=seed) for seed in range(int(sys.argv[2]))]
    found = store.Store(pathlib.Path(sys.argv[1]))
    print(len(found), "found", flush=True)
    found.fill(cells, store.Machine(torch.device("cpu"), int(sys.argv[3])), "")
"""


def test_a_killed_grid_goes_on(tmp_path):
    """Killed with its two workers, it goes on without any."""
    script = tmp_path / "grid.py"
    script.write_text(GRID)
    out = tmp_path / "out"
    file = out / "cells.csv"

    def rows():
        with file.open(newline="") as opened:
            return list(csv.reader(opened))[1:]

    command = [sys.executable, str(script), str(out)]
    with subprocess.Popen([*command, "1000", "2"], stderr=subprocess.DEVNULL) as running:
        while not file.exists() or len(rows()) < 2:
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
    before = rows()
    total = len(before) + 2
    again = subprocess.run([*command, str(total), "1"], capture_output=True, text=True)
    assert again.stdout == f"{len(before)} found\n", again.stderr
    after = rows()
    assert after[: len(before)] == before
    assert len(after) == len({tuple(row[:13]) for row in after}) >= total


def test_corollary_1_to_the_bit():
    for dtype in (torch.float32, torch.float64):
        for decay in (0.0, 0.5):
            paths = [
                quadratics.adamw(quadratics.hessian_of(number, dtype), 0.1, 50, decay)
                for number in (1.0, 2.0**17, 2.0**-20)
            ]
            assert torch.equal(paths[0], paths[1])
            assert torch.equal(paths[0], paths[2])
    of_1e5 = quadratics.adamw(quadratics.hessian_of(1e5), 0.1, 50)
    unscaled = quadratics.adamw(quadratics.hessian_of(1.0), 0.1, 50)
    torch.testing.assert_close(of_1e5, unscaled, atol=1e-13, rtol=0)
    descents = [
        quadratics.gradient_descent(quadratics.hessian_of(number), 1e-5, 50)
        for number in (1.0, 1e5)
    ]
    assert (descents[0] - descents[1]).abs().max() > 0.1


def test_proximal_updates_keep_a_direction_scale_free():
    """SGD's is not; coupled decay and the metric of AdaGrad take it away from the others."""
    free = {(row.direction, row.decay) for row in theory.scale_freeness() if row.scale_free}
    none, _, proximal, _ = theory.DECAYS
    assert free == {(name, decay) for name in ("AdaGrad", "Adam") for decay in (none, proximal)}


def test_directions_of_equation_2_are_those_of_torch():
    """Without decay; AdaGrad with ``eps = 0``. Adam's is this package's own."""
    start = torch.tensor(theory.START, dtype=torch.float64)
    gradient = theory.gradient_of(torch.tensor(theory.SCALES))
    makers = {
        "SGD": lambda p: torch.optim.SGD(p, theory.ETA),
        "AdaGrad": lambda p: torch.optim.Adagrad(p, theory.ETA, eps=0.0),
    }
    for name, make in makers.items():
        param = torch.nn.Parameter(start.clone())
        optimizer = make([param])
        for _ in range(20):
            param.grad = gradient(param.detach())
            optimizer.step()
        direction = theory.DIRECTIONS[name]()
        iterates = theory.path(direction, "none", gradient, start, steps=20)
        torch.testing.assert_close(param.detach(), iterates[-1], rtol=1e-12, atol=0)


def test_theorem_1_beyond_quadratics():
    rows = theory.theorem_1()
    of_adagrad = {row.distance for row in rows if row.algorithm == "AdaGrad"}
    assert len(of_adagrad) == 1
    of_sgd = [row.distance for row in rows if row.algorithm == "SGD"]
    assert of_sgd == sorted(of_sgd)
    assert of_sgd[0] < 1e-6 < 1 < of_sgd[-1]


def test_what_a_proximal_decay_allows_depends_on_the_gradient_alone():
    for row in theory.stability():
        at_the_end = row.theory == math.inf and row.largest_eta == 2**6
        assert at_the_end or row.largest_eta < row.theory < row.largest_eta * 2 ** (1 / 8 + 1e-9)


def test_a_condition_number_matters_to_adagrad_where_the_hessian_is_rotated():
    rows = theory.rotation()
    assert len({row.distance for row in rows if row.hessian == "diagonal"}) == 1
    rotated = [row.distance for row in rows if row.hessian == "rotated"]
    assert rotated == sorted(rotated)
    assert rotated[-1] > 10 * rotated[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [2.0**-5, 8.0, 128.0])
def test_figure_4_as_a_law(factor, dtype):
    """Adam-l2 with eps = 0 on ``c * loss`` and ``c * lambda`` is Adam-l2 on the loss."""
    original, same, other = (
        scaling.train("Adam", dtype, c, 60, weight_decay=decay * scaling.WEIGHT_DECAY)
        for c, decay in ((1.0, 1.0), (factor, factor), (factor, 1.0))
    )
    assert same == original
    assert other != original
    # AdamW needs no other lambda.
    original, same, other = (
        scaling.train("AdamW", dtype, c, 60, weight_decay=decay * scaling.WEIGHT_DECAY)
        for c, decay in ((1.0, 1.0), (factor, 1.0), (factor, factor))
    )
    assert same == original
    assert other != original


def test_the_remainder_of_taylor_has_slope_2_in_eta_and_1_in_lambda():
    points = taylor.distances("eta", steps=30)
    slope = taylor.slope([p.eta for p in points], [p.distance for p in points])
    assert slope == pytest.approx(2, abs=0.1)
    points = taylor.distances("weight_decay", steps=30)
    slope = taylor.slope([p.weight_decay for p in points], [p.distance for p in points])
    assert slope == pytest.approx(1, abs=0.1)
    assert taylor.slope([1.0, 2.0, 4.0], [3.0, 24.0, 192.0]) == pytest.approx(3)


def test_a_factor_of_the_loss_moves_adam_l2_alone():
    curves = scaling.curves(steps=10)
    original = {(c.optimizer, c.dtype): c for c in curves if c.factor == 1}
    for curve in curves:
        moved = scaling.deviation(curve, original[curve.optimizer, curve.dtype])
        if curve.optimizer == "Adam" and curve.factor != 1:
            assert moved > 1e-4
        elif math.log2(curve.factor).is_integer():
            assert moved == 0
        else:
            assert moved < (1e-5 if curve.dtype == "float32" else 1e-12)


@pytest.mark.parametrize("condition_number", [1.0, 1e2])
def test_theorem_3_holds_in_every_round(condition_number):
    for each in adagrad.adagrad_with_restarts(condition_number, rounds=2):
        assert each.inside
        assert 0 < each.distance <= each.bound
        assert each.bound * 4**each.round < 1
        assert 0 < each.regret_share <= 1
        assert each.steps == 32 * each.dimensions * condition_number


def test_algorithm_2_written_out():
    problems = adagrad.quadratics(10.0, 3)
    start = torch.zeros_like(problems.minimizers)
    run = adagrad.adagrad(problems, start, radius=0.3, eta=0.2, steps=25)
    x, squares, total, regret = start.clone(), 0.0, 0.0, 0.0
    for _ in range(25):
        difference = x - problems.minimizers
        gradient = torch.einsum("pij,pj->pi", problems.hessians, difference)
        squares = squares + gradient**2
        total = total + x
        regret = regret + 0.5 * (gradient * difference).sum(dim=1)
        x = (x - 0.2 / squares.sqrt() * gradient).clamp(-0.3, 0.3)
    torch.testing.assert_close(run.mean, total / 25)
    torch.testing.assert_close(run.regret, regret)
    torch.testing.assert_close(run.bound, (2 * 3 * 0.6**2 * squares.sum(dim=1)).sqrt())
    assert problems.hessians[1].count_nonzero() == 3  # a diagonal one
    eigenvalues = torch.linalg.eigvalsh(problems.hessians)
    torch.testing.assert_close(
        eigenvalues[:, -1] / eigenvalues[:, 0], torch.full((6,), 10.0).double()
    )


@pytest.fixture
def _tiny(monkeypatch):
    tiny = dataclasses.replace(
        settings.QUICK,
        widths=(4,),
        epochs=2,
        batch=512,
        batch_norm_networks=("ResNet-8",),
        networks=("ResNet-8", "ResNet-14"),
        scaled_network="ResNet-8",
        taylor_networks=("ResNet-8",),
        section5_network="ResNet-8",
        mechanism_networks=("ResNet-8", "ResNet-14"),
        histogram_networks=dict.fromkeys(range(7, 13), "ResNet-8"),
        sgd_network="ResNet-8",
        sgd_epochs=1,
        lrs=(1e-3,),
        weight_decays=(0.0, 1e-3),
        coupled_weight_decays=(0.0, 1e-3),
        scaled_weight_decays=(0.0, 1e-3),
        ranks=(1,),  # others are processes, which take seconds to start
        distributed_epochs=1,
        distributed_batch=64,
        l1_weight_decays=(0.0, 1e-5),
        l2_weight_decays=(0.0, 1e-3),
        extensions=0,
        rounds=1,
    )
    monkeypatch.setattr(settings, "QUICK", tiny)
    monkeypatch.setattr(adagrad, "DIMENSIONS", {1.0: 2})
    monkeypatch.setattr(scaling, "STEPS", 2)
    monkeypatch.setattr(taylor, "STEPS", 2)
    fewer = {
        name: (further.SPARSIFIERS[name][0], (0.5,)) for name in ("AdamProxL1", "l1 in the loss")
    }
    monkeypatch.setattr(further, "SPARSIFIERS", fewer)


@pytest.mark.usefixtures("_tiny")
def test_command_makes_every_figure_and_repeats_nothing(tmp_path, capsys, monkeypatch):
    command = [
        "paper",
        "all",
        "--quick",
        "--out",
        str(tmp_path),
        "--jobs",
        "1",
        "--seeds",
        "0",
        "1",
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    numbers = range(1, 13)
    names = {f"figure-{number}" for number in numbers} | {"taylor", "advantage", "pace"}
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (tmp_path / f"{name}.svg").read_bytes()
    names |= {
        "advantage-bn",
        "figure-4-over-lambda",
        "figure-5-beside",
        "sparsity",
        "concentration",
    }
    tables = {
        "distributed",
        "figure-4-moved",
        "without-decay",
        "advantage-by-depth",
        "figure-5-seeds",
        "decoupling",
        "section-5",
        "corollary-1",
        "loss-factor",
        "l1-path",
        "theorem-3",
        "sgd",
        "scale-freeness",
    }
    tables |= {"theorem-1", "stability", "rotation", "mechanism"}
    for name in {*names, *tables} - {"pace"}:
        assert table_of(tmp_path, name)
    assert all(f"Figure {number}" in out for number in numbers)
    rows = table_of(tmp_path, "figure-3")
    assert [(row["network"], row["optimizer"]) for row in rows] == [
        (network, name) for network in ("ResNet-8", "ResNet-14") for name in ("Adam-l2", "AdamW")
    ]
    assert {row["seeds"] for row in rows} == {"2"}
    finished = (tmp_path / "cells.csv").read_bytes()

    def refuse(*args):
        raise AssertionError("a finished cell was trained again")

    monkeypatch.setattr(store, "train", refuse)
    command[1:2] = ["3", "6", "12"]
    assert main(command) == 0
    assert "\n0 trainings in " in capsys.readouterr().out
    assert (tmp_path / "cells.csv").read_bytes() == finished


def test_published_settings_alone(tmp_path, monkeypatch):
    write_archive(tmp_path, "cifar10", monkeypatch)
    small = {("ResNet-8", *key[1:]): value for key, value in settings.PUBLISHED.items()}
    monkeypatch.setattr(settings, "PUBLISHED", small)
    out = tmp_path / "out"
    of_paper = settings.paper
    monkeypatch.setattr(
        settings,
        "paper",
        lambda path: dataclasses.replace(of_paper(path), widths=(4,), scaled_network="ResNet-8"),
    )
    command = ["paper", "3", "4", "--published", "--data", str(tmp_path), "--epochs", "1"]
    assert main([*command, "--out", str(out), "--jobs", "1", "--seeds", "0", "1"]) == 0
    with (out / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    trained = {
        (r["network"], r["optimizer"], float(r["loss_factor"])): (
            float(r["lr"]),
            float(r["weight_decay"]),
        )
        for r in rows
    }
    assert trained == small
    assert {row["seed"] for row in rows} == {"0", "1"}


USERS_OWN = """
import torch


def network(width=8):
    hidden, out = torch.nn.Linear(6, width), torch.nn.Linear(width, 3)
    return torch.nn.Sequential(torch.nn.Flatten(), hidden, torch.nn.Tanh(), out)


def images():
    inputs = torch.randn(90, 2, 3, generator=torch.Generator().manual_seed(0))
    labels = inputs.sum(dim=2).argmax(dim=1) + (inputs[:, 0, 0] > 1)
    return inputs[:60], labels[:60], inputs[60:], labels[60:]


class Network(torch.nn.Linear):
    def __init__(self, *, width):
        super().__init__(width, 3)


not_a_function = 1


def no_network():
    return 1
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_package.py").write_text(USERS_OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield
    sys.modules.pop("my_package", None)


@pytest.mark.usefixtures("_tiny", "own_module")
def test_a_model_and_data_of_the_users_own():
    command = ["paper", "3", "--quick", "--model", "my_package:network", "--jobs", "1"]
    command += ["--dataset", "my_package:images", "--seeds", "0", "1", "--lrs", "0.01", "0.003"]
    command += ["--weight-decays", "0", "0.1", "--widths", "4", "8", "--epochs", "3"]
    command += ["--optimizers", "Adam", "AdamW", "AdamProxL1", "--out", "out"]
    assert main(command) == 0
    with Path("out/figure-3.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    named = [f"my_package:network, width {width}" for width in (4, 8)]
    optimizers = ("Adam-l2", "AdamW", "AdamProxL1")
    expected = [(network, optimizer) for network in named for optimizer in optimizers]
    assert [(row["network"], row["optimizer"]) for row in rows] == expected
    with Path("out/cells.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert {cell["width"] for cell in cells} == {"4", "8"}
    assert {float(cell["lr"]) for cell in cells} == {0.01, 0.003}
    assert {float(cell["weight_decay"]) for cell in cells} == {0.0, 0.1}
    assert all(0 < float(cell["train_loss"]) < 2 for cell in cells)


def test_the_example_of_the_page(tmp_path, monkeypatch):
    page = PAGE.read_text()
    module, command = (
        re.search(rf"<!-- own: {name} -->\n```\w+\n(.*?)```", page, re.DOTALL)[1]
        for name in ("module", "command")
    )
    (tmp_path / "my_package.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    _, *args = shlex.split(command.replace("\\\n", ""))
    try:
        assert main([*args, "--jobs", "1", "--seeds", "0", "--out", "out"]) == 0
    finally:
        sys.modules.pop("my_package", None)
    with Path("out/figure-3.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert all(float(row["test_error"]) < 0.1 for row in rows)


@pytest.mark.usefixtures("own_module")
def test_a_class_may_make_the_model():
    assert networks.make("my_package:Network", 3, 1, False, width=7).in_features == 7


@pytest.mark.usefixtures("_tiny", "own_module")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nowhere:network"], "nowhere:network: No module named 'nowhere'"),
        (["--model", "my_package:nothing"], "has no attribute 'nothing'; expected package.module:"),
        (["--model", "my_package:not_a_function"], "not_a_function: it is no function"),
        (["--model", "my_package:no_network"], "it made no torch.nn.Module, but int"),
        (["--model", "my_package.network"], "Invalid network: 'my_package.network'"),
        (["--dataset", "my_package:no_network"], "it returned no four tensors"),
        (["--dataset", "my_package:network"], "it returned no four tensors"),
    ],
)
def test_what_is_wrong_with_a_users_own_is_told(args, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["paper", "3", "--quick", *args])
    assert message in str(error.value)
    assert "Traceback" not in capsys.readouterr().err


def rows_of(*differences):
    return [
        dict(zip(("network", "mean", "low", "high"), ("A", *map(str, each)), strict=True))
        for each in differences
    ]


def with_values(rows, **values):
    return [{**row, **values} for row in rows]


def of_mechanism(adam, shrunk):
    controls = {"Adam-l2": adam, "Adam-l2, shrunk as AdamW": shrunk, "neither": NOISE}
    controls["Adam-l2, scaled start"] = NOISE
    return [
        {
            "network": "A",
            "control": control,
            "lambda": "0.001",
            **dict(zip(("gain", "low", "high"), each, strict=True)),
        }
        for control, each in controls.items()
    ]


def of_spreads(adam, adamw):
    return [
        {"network": f"ResNet-{i}", "Adam-l2": str(a), "AdamW": str(b), "no_decay": "1"}
        for i, (a, b) in enumerate(zip(adam, adamw, strict=True))
    ]


def of_ratio(low, high):
    return with_values(rows_of(NONE), loss_ratio="0.9", loss_ratio_low=low, loss_ratio_high=high)


def of_decoupling(adam, adamw):
    pair = (("Adam-l2", adam), ("AdamW", adamw))
    return [{"network": "A", "optimizer": name, "lost_mean": str(lost)} for name, lost in pair]


def of_sparsity(zeros, gain):
    return [
        {"training": name, "zeros": zeros, **dict(zip(("gain", "low", "high"), each, strict=True))}
        for name, each in (("AdamProxL1", gain), ("dense", GOOD))
    ]


def of_ranks(cost, cost_with_bn, gain):
    rows = []
    for batch_norm, costs in (("False", cost), ("True", cost_with_bn)):
        row = {"batch_norm": batch_norm, "optimizer": "AdamW", "ranks": "4"}
        for prefix, each in (("cost_", costs), ("gain_", gain)):
            row |= {
                f"{prefix}{key}": x for key, x in zip(("mean", "low", "high"), each, strict=True)
            }
        rows.append(row)
    return rows


def of_sgd(*losses):
    return [
        {"batch_norm": norm, "lr": str(k * 1e-10), "loss": loss}
        for k, loss in enumerate(losses)
        for norm in ("False", "True")
    ]


def of_corollary(same_bits, difference):
    row = {"same_bits": same_bits, "largest_difference": difference, "dtype": "float32"}
    return [{**row, "condition_number": "131072.0"}, {**row, "condition_number": "100000"}]


def of_factors(adamw, adam):
    pair = (("AdamW", adamw), ("Adam-l2", adam))
    key = "largest_relative_difference"
    return [{"optimizer": name, "factor": "128", key: moved} for name, moved in pair]


def of_gains(*networks):
    return [
        {**row, "low_inner": row["low"], "high_inner": row["high"], "gain_low": str(gain)}
        for spread, gain in networks
        for row in rows_of(spread)
    ]


def of_descent(well, ill):
    rows = [{"algorithm": "GD", "condition_number": k, "last_distance": d}
            for k, d in (("1.0", well), ("1e5", ill))]  # fmt: skip
    return [*rows, {"algorithm": "AdamW", "condition_number": "1e9", "last_distance": "9"}]


def of_step_sizes(coupled, proximal):
    return [
        {"decay": f"{name}, equation", "weight_decay": str(k), "largest_eta": str(eta)}
        for name, etas in (("coupled", coupled), ("proximal", proximal))
        for k, eta in enumerate(etas)
    ]


def of_theorem_1(adagrad, descent):
    pair = (("AdaGrad", adagrad), ("SGD", descent))
    return [{"algorithm": name, "distance": str(distance)} for name, distance in pair]


NONE, GOOD, BAD = (0.001, -0.002, 0.004), (0.05, 0.03, 0.07), (-0.05, -0.07, -0.03)
NOISE, FAR = (0.02, -0.03, 0.07), (0.05, 0.001, 0.1)
ONE_SEED = (0.02, math.nan, math.nan)
DECAYS, NO_DECAY = ({"optimizer": "AdamProxL2", "lambda": text} for text in "10")


@pytest.mark.parametrize(
    ("judge", "rows", "verdict"),
    [
        ("par_with_bn", rows_of(NONE, NONE), "shown"),
        ("par_with_bn", rows_of(NONE, NOISE), "in part"),
        ("par_with_bn", rows_of(NOISE, NOISE), "undecided"),
        ("par_with_bn", rows_of(GOOD), "contrary"),
        ("par_with_bn", rows_of(GOOD, NOISE), "contrary"),
        ("smaller_error", rows_of(GOOD, GOOD), "shown"),
        ("smaller_error", rows_of(NOISE), "undecided"),
        ("smaller_error", rows_of(ONE_SEED), "undecided"),
        ("smaller_error", rows_of((0.0, 0.0, 0.0)), "undecided"),  # one setting for both
        ("smaller_error", rows_of(GOOD, BAD), "in part"),
        ("smaller_error", rows_of(BAD), "contrary"),
        ("more_so_deeper", with_values(rows_of(GOOD, GOOD), networks="A"), "shown"),
        ("more_so_deeper", with_values(rows_of(GOOD, NOISE), networks="A"), "in part"),
        ("more_so_deeper", with_values(rows_of(NOISE, NOISE), networks="A"), "undecided"),
        ("more_so_deeper", with_values(rows_of(BAD, BAD), networks="A"), "contrary"),
        ("where_concentrated", of_gains((GOOD, 0.1), (BAD, -0.1)), "shown"),
        ("where_concentrated", of_gains((GOOD, 0.1), (BAD, 0.1)), "in part"),
        ("where_concentrated", of_gains((BAD, 0.1)), "contrary"),
        ("where_concentrated", of_gains((BAD, -0.1)), "undecided"),
        ("descent_depends", of_descent("0.0", "1.5"), "shown"),
        ("descent_depends", of_descent("0.1", "0.1"), "contrary"),
        ("step_sizes", of_step_sizes((1.8, 1.0), (1.8, 4.0)), "shown"),
        ("step_sizes", of_step_sizes((1.8, 1.8), (1.8, 1.0)), "contrary"),
        ("concentrated", with_values(rows_of(GOOD), low_inner="1", high_inner="2"), "shown"),
        ("concentrated", with_values(rows_of(GOOD), low_inner="-1", high_inner="2"), "undecided"),
        ("concentrated", with_values(rows_of(BAD), low_inner="-2", high_inner="-1"), "contrary"),
        ("dispersed_with_depth", of_spreads((2, 3, 5), (2, 2, 3)), "shown"),
        ("dispersed_with_depth", of_spreads((2, 3, 5), (2, 2, 4)), "in part"),
        ("dispersed_with_depth", of_spreads((5, 3, 2), (2, 2, 4)), "contrary"),
        ("no_decay_with_bn", with_values(rows_of(GOOD), **NO_DECAY), "shown"),
        ("no_decay_with_bn", with_values(rows_of(GOOD), **DECAYS), "contrary"),
        ("no_decay_with_bn", with_values(rows_of(NONE), **DECAYS), "shown"),
        ("no_decay_with_bn", with_values(rows_of((0.008, 0.006, 0.009)), **DECAYS), "contrary"),
        ("no_decay_with_bn", with_values(rows_of(NOISE), **DECAYS), "undecided"),
        ("l2_on_a_par", with_values(rows_of(BAD), **DECAYS), "shown"),
        ("l2_on_a_par", with_values(rows_of(GOOD), **DECAYS), "contrary"),
        ("l2_on_a_par", with_values(rows_of(NONE), **NO_DECAY), "undecided"),
        ("scale_freeness_carries_it", of_mechanism(GOOD, GOOD), "shown"),
        ("scale_freeness_carries_it", of_mechanism(GOOD, FAR), "undecided"),
        ("scale_freeness_carries_it", of_mechanism(GOOD, (0.3, 0.2, 0.4)), "undecided"),
        ("scale_freeness_carries_it", of_mechanism(GOOD, NONE), "contrary"),
        ("scale_freeness_carries_it", of_mechanism(GOOD, NOISE), "undecided"),
        ("scale_freeness_carries_it", of_mechanism(NOISE, GOOD), "undecided"),
        ("factor_of_the_loss", with_values(rows_of(GOOD, GOOD), than="A"), "shown"),
        ("factor_of_the_loss", with_values(rows_of(GOOD, NOISE), than="A"), "in part"),
        ("factor_of_the_loss", with_values(rows_of(NOISE, NOISE), than="A"), "undecided"),
        ("factor_of_the_loss", with_values(rows_of(BAD, BAD), than="A"), "contrary"),
        ("trains_faster", of_ratio("0.8", "0.95"), "shown"),
        ("trains_faster", of_ratio("0.8", "1.05"), "undecided"),
        ("trains_faster", of_ratio("1.1", "1.2"), "contrary"),
        ("decoupled", of_decoupling(0.05, 0.01), "shown"),
        ("decoupled", of_decoupling(0.01, 0.05), "contrary"),
        ("decoupled", of_decoupling(0.03, 0.01), "undecided"),
        ("adamprox_like_adamw", rows_of(NONE), "shown"),
        ("adamprox_like_adamw", rows_of(BAD), "contrary"),
        ("l1_makes_zeros", of_sparsity("0.8", NONE), "shown"),
        ("l1_makes_zeros", of_sparsity("0.8", BAD), "contrary"),
        ("l1_makes_zeros", of_sparsity("0.4", NONE), "contrary"),
        ("without_bn_on_ranks", of_ranks(NONE, GOOD, GOOD), "shown"),
        ("without_bn_on_ranks", of_ranks(GOOD, NOISE, BAD), "contrary"),
        ("without_bn_on_ranks", of_ranks(NONE, GOOD, NOISE), "in part"),
        ("sgd_diverges", of_sgd("2.0", "nan", "nan"), "shown"),
        ("sgd_diverges", of_sgd("2.0", "9.0", "nan"), "shown"),
        ("sgd_diverges", of_sgd("2.0", "2.0", "nan"), "contrary"),
        ("sgd_diverges", of_sgd("2.0", "1.9", "3.0"), "contrary"),
        ("corollary_1", of_corollary("True", "1e-7"), "shown"),
        ("corollary_1", of_corollary("False", "1e-7"), "in part"),
        ("corollary_1", of_corollary("False", "1e-5"), "contrary"),
        ("eps_0", of_factors("0.0", "0.4"), "shown"),
        ("eps_0", of_factors("1e-7", "0.0"), "contrary"),
        ("theorem_1", of_theorem_1(0.0, 2.0), "shown"),
        ("theorem_1", of_theorem_1(2.0, 0.0), "contrary"),
        ("theorem_2", [{"regret_share": "0.2"}, {"regret_share": "1"}], "shown"),
        ("theorem_2", [{"regret_share": "0.2"}, {"regret_share": "1.1"}], "contrary"),
        ("theorem_3", [{"holds": "True"}], "shown"),
        ("theorem_3", [{"holds": "True"}, {"holds": "False"}], "in part"),
    ],
)
def test_verdicts(judge, rows, verdict):
    assert getattr(claims, judge)(rows)[1] == verdict


def test_claims_are_judged_by_the_tables_that_are_there(tmp_path):
    assert {row["verdict"] for row in claims.judged(tmp_path)} == {"not tested"}
    with (tmp_path / "taylor.csv").open("w") as file:
        file.write("over,slope_of_all\neta,2.04\nlambda,0.995\n")
    (row,) = [row for row in claims.judged(tmp_path) if row["verdict"] != "not tested"]
    assert (row["verdict"], row["measured"]) == ("shown", "eta^2.04, lambda^0.99")
    (tmp_path / "taylor.csv").write_text("over,slope_of_all\neta,1\nlambda,1\n")
    assert "in part" in {row["verdict"] for row in claims.judged(tmp_path)}


def test_the_page_has_the_tables_of_its_csv():
    text = PAGE.read_text()
    assert page.refresh(text, PAGE.parent / "results") == text
    assert text.count("<!-- table: ") == text.count("<!-- end -->") > 3
    for name in re.findall(r"\]\((results/\S+?)\)", text):
        assert (PAGE.parent / name).is_file()


def test_the_pages_verdicts_are_those_of_its_tables():
    with (PAGE.parent / "results/claims.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == claims.judged(PAGE.parent / "results")


def test_tables_of_a_page(tmp_path):
    (tmp_path / "t.csv").write_text(
        "network,seeds,a,a_min,a_max\nR,3,0.25,0.12345,0.5\nS,1,1,1,1\n"
    )
    text = "x\n<!-- table: t columns: network, a -->\nold\n<!-- end -->\ny\n"
    table = "| network | a |\n|---|---|\n| R | 0.25 (0.123 .. 0.5) |\n| S | 1 |\n"
    assert page.refresh(text, tmp_path) == text.replace("old\n", table)
    with pytest.raises(FileNotFoundError):
        page.refresh(text.replace(" t ", " u "), tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["13"], "argument FIGURE: invalid choice: '13'"),
        ([], "argument FIGURE: none is given"),
        (["1", "--jobs", "0"], "argument --jobs: '0' is not a positive int"),
        (["1", "--device", "abacus"], "argument --device: 'abacus' cannot be used: "),
        (["3", "--quick", "--data", "."], "argument --data: --quick trains on digits"),
        (["3", "--data", "nowhere"], "please download https://"),
        (["3", "--study", "cpu"], "argument --study: it needs --data"),
        (
            ["3", "--study", "cpu", "--data", ".", "--seeds", "7"],
            "--seeds: 7: a study needs another",
        ),
        (["2", "--published", "--data", "."], "argument --published: only figures 3 and 4"),
        (["3", "--published"], "argument --published: it needs --data"),
        (["2", "--widths", "4"], "argument --widths: only figure 3 takes it"),
        (["3", "--weight-decays", "-1"], "'-1' is not a number of 0 or more"),
        (["3", "--optimizers", "SGD"], "argument --optimizers: invalid choice: 'SGD'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_names_what_is_wrong(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["paper", *args, "--out", str(tmp_path / "out")])
    assert message in (capsys.readouterr().err + str(end.value))
    assert not os.path.exists(tmp_path / "out" / "cells.csv")


def test_help_describes_every_figure(capsys):
    with pytest.raises(SystemExit):
        main(["paper", "--help"])
    out = capsys.readouterr().out
    assert {line.split()[0] for line in out.splitlines() if line.startswith("  ")} >= {
        *(name for name in figures.FIGURES if not name.isdecimal() or int(name) < 8)
    }
    options = [line for line in out.splitlines() if re.match("  --[a-z-]+ ", line)]
    without = {"--quick", "--study", "--published", "--page", "--model", "--dataset"}
    told = " ".join(out.split()).count("(default: ")
    assert told == len(options) - len(without)
