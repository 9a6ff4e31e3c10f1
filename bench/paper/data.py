"""Images: CIFAR's and MNIST's archives where the user has them, scikit-learn's digits anywhere.

Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from . import idx, user_code

if TYPE_CHECKING:
    from pathlib import Path

PADDING = 4  # of the augmentation, on each side


class Archive(NamedTuple):
    """An archive as https://www.cs.toronto.edu/~kriz/cifar.html publishes it."""

    file: str
    folder: str  # that it unpacks to
    md5: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: bytes
    classes: int

    @property
    def url(self) -> str:
        """Where it is to be had."""
        return f"https://www.cs.toronto.edu/~kriz/{self.file}"


ARCHIVES = {
    "cifar10": Archive(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        "c58f30108f718f92721af3b95e74349a",
        tuple(f"data_batch_{index}" for index in range(1, 6)),
        ("test_batch",),
        b"labels",
        10,
    ),
    "cifar100": Archive(
        "cifar-100-python.tar.gz",
        "cifar-100-python",
        "eb9058c3a382ffc7106e4002c42a8d85",
        ("train",),
        ("test",),
        b"fine_labels",
        100,
    ),
}


class Images(NamedTuple):
    """Images, (count, channels, size, size), float32 of mean 0 and variance 1 a channel.

    Means and variances are those of the training images; ``padding`` is what a pixel of value 0
    became, a number a channel.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    padding: Tensor
    classes: int
    mirrored: bool  # whether a mirror image shows the same: not of a digit
    augmented: bool = True
    validation: Tensor = torch.zeros(0)
    validation_labels: Tensor = torch.zeros(0, dtype=torch.int64)


def name_of(path: Path) -> str:
    """What the images in a folder are called: after the folder itself, if they are MNIST's."""
    return path.absolute().name if idx.is_archive(path) else "cifar"


def load(name: str, size: int = 32, path: Path | None = None) -> Images:
    """Reads a data set.

    Args:
        name: ``digits``, ``cifar10``, ``cifar100``, any name of an archive in MNIST's format, or
            ``package.module:function``, which is called and returns four tensors; these are used as
            they are, without augmentation.
        size: height and width that images are scaled to: digits bilinearly, those of MNIST's format
            as means over areas. CIFAR's are 32.
        path: a CIFAR archive, or the folder it lies in; of MNIST's format, the folder.

    Raises:
        FileNotFoundError: there is no archive; the message says where it is to be had.
        ValueError: it is another one than the official one, ``size`` is not CIFAR's, or a function
            is not there or returns something else.
    """
    if name == "digits":
        return _digits(size)
    if user_code.is_name(name):
        train, train_labels, test, test_labels = user_code.images(name)
        classes = int(train_labels.max()) + 1
        none = torch.zeros(0)
        return Images(train, train_labels, test, test_labels, none, classes, False, augmented=False)
    if name not in ARCHIVES:
        return _idx(name, size, path)
    if size != 32:
        raise ValueError(f"Invalid size: {size}, {name}'s images are 32 x 32")
    archive = ARCHIVES[name]
    if path is not None and path.is_dir():
        path = path / archive.file
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"{name}: no {archive.file} at {path}; please download {archive.url} "
            f"(md5 {archive.md5}) and give its path, or its folder's, as --data"
        )
    return _cifar(archive, path)


def split(images: Images, train: int, validation: int) -> Images:
    """Some of the training images, drawn once for all: ``train`` of them, or the rest if it is 0.

    Raises:
        ValueError: there are not so many.
    """
    count = len(images.train)
    if train + validation > count:
        raise ValueError(f"{count} training images are no {train} and {validation} to validate")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    kept, held_out = order[: train or count - validation], order[count - validation :]
    return images._replace(
        train=images.train[kept],
        train_labels=images.train_labels[kept],
        validation=images.train[held_out],
        validation_labels=images.train_labels[held_out],
    )


def augment(images: Tensor, padding: Tensor, mirrored: bool, random: torch.Generator) -> Tensor:
    """The paper's section 4: padded by 4 pixels a side, cropped at random, or mirrored and so.

    On images that are smaller than 32 x 32, the padding is smaller in proportion.

    Args:
        images: (count, channels, size, size).
        padding: the value of a padded pixel, a number a channel.
        mirrored: whether every other image is, at random.
        random: a generator of the CPU's: the same draws on every device.
    """
    count, _, size, _ = images.shape
    pad = max(1, PADDING * size // 32)
    shifted = images - padding.view(1, -1, 1, 1)
    padded = F.pad(shifted, (pad, pad, pad, pad)) + padding.view(1, -1, 1, 1)
    tops, lefts = torch.randint(2 * pad + 1, (2, count, 1), generator=random)
    rows, columns = tops + torch.arange(size), lefts + torch.arange(size)
    if mirrored:
        flips = torch.rand(count, 1, generator=random) < 0.5
        columns = torch.where(flips, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    index = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _digits(size: int) -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=0)
    train, test = (torch.as_tensor(p, dtype=torch.float32).view(-1, 1, 8, 8) for p in parts[:2])
    if size != 8:
        train, test = (F.interpolate(t, (size, size), mode="bilinear") for t in (train, test))
    train_labels, test_labels = (torch.as_tensor(p, dtype=torch.int64) for p in parts[2:])
    return _normalized(train, train_labels, test, test_labels, classes=10, mirrored=False)


def _idx(name: str, size: int, folder: Path | None) -> Images:
    if folder is None:
        raise FileNotFoundError(f"{name}: please give the folder of its files as --data")
    pixels, train_labels, test_pixels, test_labels = idx.read_archive(folder)
    train, test = (
        F.adaptive_avg_pool2d(images.float().unsqueeze(1), size) for images in (pixels, test_pixels)
    )
    classes = int(train_labels.max()) + 1
    mirrored = "fashion" in name  # clothes may be
    return _normalized(train, train_labels, test, test_labels, classes, mirrored)


def _cifar(archive: Archive, path: Path) -> Images:
    data = path.read_bytes()
    if (md5 := hashlib.md5(data, usedforsecurity=False).hexdigest()) != archive.md5:
        raise ValueError(
            f"{path}: its md5 is {md5}, the official archive's {archive.md5}: it is incomplete or "
            f"another one; please download {archive.url} again"
        )
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        train, test = (
            [_read_batch(tar, archive, name) for name in names]
            for names in (archive.train, archive.test)
        )
    (train_pixels, train_labels), (test_pixels, test_labels) = (
        map(torch.cat, zip(*batches, strict=True)) for batches in (train, test)
    )
    return _normalized(
        train_pixels, train_labels, test_pixels, test_labels, archive.classes, mirrored=True
    )


def _read_batch(tar: tarfile.TarFile, archive: Archive, name: str) -> tuple[Tensor, Tensor]:
    try:
        file = tar.extractfile(f"{archive.folder}/{name}")
    except KeyError:
        file = None
    if file is None:
        raise ValueError(f"{archive.file} has no {archive.folder}/{name}")
    batch: dict[bytes, Any] = pickle.load(
        file, encoding="bytes"
    )  # its checksum is the official one
    pixels = torch.as_tensor(batch[b"data"]).view(-1, 3, 32, 32).float()
    return pixels, torch.as_tensor(batch[archive.labels])


def _normalized(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int,
    mirrored: bool,
) -> Images:  # fmt: skip
    std, mean = torch.std_mean(train, dim=(0, 2, 3), keepdim=True, correction=0)
    train, test = (train - mean) / std, (test - mean) / std
    padding = (-mean / std).flatten()
    return Images(train, train_labels, test, test_labels, padding, classes, mirrored)
