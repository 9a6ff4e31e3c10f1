"""Archives in MNIST's format, IDX: MNIST itself, Fashion-MNIST, and others of these four files."""

from __future__ import annotations

import gzip
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

UNSIGNED_BYTES = 8  # the only type that such archives have


class Files(NamedTuple):
    """The names of an archive's files, which may end in ``.gz``."""

    train: str = "train-images-idx3-ubyte"
    train_labels: str = "train-labels-idx1-ubyte"
    test: str = "t10k-images-idx3-ubyte"
    test_labels: str = "t10k-labels-idx1-ubyte"


FILES = Files()


def is_archive(folder: Path) -> bool:
    """Whether the folder has the images to train on."""
    return _find(folder, FILES.train) is not None


def read_archive(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, then those to test on.

    Args:
        folder: where the four files are.

    Returns:
        Images, uint8 of (count, height, width), and labels, int64 of (count,), twice.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or there are not as many labels as images.
    """
    paths = [_find(folder, name) for name in FILES]
    for name, path in zip(FILES, paths, strict=True):
        if path is None:
            raise FileNotFoundError(f"no {name} or {name}.gz in {folder}")
    tensors = [read(path) for path in paths if path is not None]
    for index in (0, 2):
        images, labels = tensors[index : index + 2]
        if images.dim() != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{paths[index]}: images are {tuple(images.shape)}, their labels "
                f"{tuple(labels.shape)}; expected (count, height, width) and (count,)"
            )
    return tensors[0], tensors[1].long(), tensors[2], tensors[3].long()


def read(path: Path) -> Tensor:
    """A file as uint8, of the shape that its head says.

    The head is two zero bytes, the type, the number of dims, and each size as a big-endian uint32.

    Raises:
        ValueError: it is no such file, is cut off, or has another type.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError) as error:
            raise ValueError(f"{path}: {error}") from error
    if len(content) < 4 or content[:3] != bytes((0, 0, UNSIGNED_BYTES)):
        raise ValueError(f"{path}: it is no IDX file of unsigned bytes")
    dims = content[3]
    head = 4 + 4 * dims
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, head, 4)]
    if len(content) != head + math.prod(sizes):
        raise ValueError(
            f"{path}: it has {len(content)} bytes, and its head says {head + math.prod(sizes)}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=head).view(sizes)


def _find(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None
