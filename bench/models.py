"""The models whose steps are timed: the shapes of their params and their param groups."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

Shapes = list[tuple[int, ...]]


class Model(NamedTuple):
    """What an optimizer sees of a model."""

    shapes: Shapes
    groups: int = 1

    @property
    def numel(self) -> int:
        """Elements of all params."""
        return sum(map(math.prod, self.shapes))

    def params(self, device: torch.device, dtype: torch.dtype) -> list[torch.nn.Parameter]:
        """New params; their values do not matter to the time."""
        zeros = (torch.zeros(shape, device=device, dtype=dtype) for shape in self.shapes)
        return [torch.nn.Parameter(tensor) for tensor in zeros]

    def param_groups(self, params: list[torch.nn.Parameter], lr: float) -> list[dict[str, object]]:
        """The params dealt out to the groups; no two share a lr, so that none can be merged."""
        deal = (params[first :: self.groups] for first in range(self.groups))
        return [{"params": group, "lr": lr * 0.999**i} for i, group in enumerate(deal)]


def resnet50() -> Shapes:
    """He et al. 2016, table 1: bottlenecks with batch norm, for ImageNet."""
    shapes: Shapes = [(64, 3, 7, 7), *_norm(64)]
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), *_norm(width)]
            shapes += [(width, width, 3, 3), *_norm(width)]
            shapes += [(4 * width, width, 1, 1), *_norm(4 * width)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), *_norm(4 * width)]
            channels = 4 * width
    return [*shapes, *_linear(channels, 1000)]


def resnet_without_bn(depth: int) -> Shapes:
    """He et al. 2016 for CIFAR-10, 6n + 2 layers, shortcuts without params, no batch norm."""
    blocks = (depth - 2) // 6
    shapes: Shapes = [(16, 3, 3, 3), (16,)]
    width = 16
    for stage in (16, 32, 64):
        for _ in range(2 * blocks):
            shapes += [(stage, width, 3, 3), (stage,)]
            width = stage
    return [*shapes, *_linear(64, 10)]


def densenet_bc(depth: int, growth: int, classes: int) -> Shapes:
    """Huang et al. 2017 for CIFAR: three blocks of bottlenecks, compression by half between."""
    channels = 2 * growth
    shapes: Shapes = [(channels, 3, 3, 3)]
    for block in range(3):
        for _ in range((depth - 4) // 6):
            shapes += [*_norm(channels), (4 * growth, channels, 1, 1)]
            shapes += [*_norm(4 * growth), (growth, 4 * growth, 3, 3)]
            channels += growth
        if block < 2:
            shapes += [*_norm(channels), (channels // 2, channels, 1, 1)]
            channels //= 2
    return [*shapes, *_norm(channels), *_linear(channels, classes)]


def vit(layers: int, width: int, patch: int, image: int, classes: int) -> Shapes:
    """Dosovitskiy et al. 2021: class token, positions, patches, blocks, final norm, head."""
    tokens = (image // patch) ** 2 + 1
    embedding: Shapes = [(1, 1, width), (1, tokens, width), (width, 3, patch, patch), (width,)]
    return [*embedding, *_transformer(layers, width), *_linear(width, classes)]


def gpt2(layers: int, width: int) -> Shapes:
    """Radford et al. 2019: token and position embeddings, blocks, final norm; the head is tied."""
    return [(50257, width), (1024, width), *_transformer(layers, width)]


def llama(
    layers: int, width: int, hidden: int, kv_width: int, vocabulary: int, tied: bool
) -> Shapes:
    """Touvron et al. 2023: gated feed-forward, no biases; ``kv_width`` is of keys and values."""
    attention: Shapes = [(width, width), (kv_width, width), (kv_width, width), (width, width)]
    feed_forward: Shapes = [(hidden, width), (hidden, width), (width, hidden)]
    norms: Shapes = [(width,), (width,)]
    head: Shapes = [] if tied else [(vocabulary, width)]
    return [(vocabulary, width), *layers * (attention + feed_forward + norms), (width,), *head]


def _norm(width: int) -> Shapes:
    return [(width,), (width,)]


def _linear(width_in: int, width: int) -> Shapes:
    return [(width, width_in), (width,)]


def _transformer(layers: int, width: int) -> Shapes:
    """Blocks with biases, queries, keys and values in one matrix, and the norm after the last."""
    attention = _linear(width, 3 * width) + _linear(width, width)
    mlp = _linear(width, 4 * width) + _linear(4 * width, width)
    return layers * (_norm(width) + attention + _norm(width) + mlp) + _norm(width)


# By number of elements. The small ones are bound by host time, the large ones by memory.
MODELS: dict[str, Model] = {
    "400 x 16": Model([(16,)] * 400),
    "465 groups": Model([(64,)] * 465, groups=465),
    "10000 x 64": Model([(64,)] * 10_000),
    "1000 x 1024": Model([(1024,)] * 1000),
    "DenseNet-BC-100": Model(densenet_bc(100, growth=12, classes=100)),
    "ResNet-218 without BN": Model(resnet_without_bn(218)),
    "one tensor of 16 M": Model([(1 << 24,)]),
    "ResNet-50": Model(resnet50()),
    "ViT-B/16": Model(vit(layers=12, width=768, patch=16, image=224, classes=1000)),
    "GPT-2 small": Model(gpt2(layers=12, width=768)),
    "10 x 16 M": Model([(1 << 24,)] * 10),
    "Llama 1B": Model(llama(16, 2048, 8192, 512, vocabulary=128_256, tied=True)),
    "GPT-2 XL": Model(gpt2(layers=48, width=1600)),
    "Llama 7B": Model(llama(32, 4096, 11_008, 4096, vocabulary=32_000, tied=False)),
}
SHORT = ("400 x 16", "465 groups", "ResNet-218 without BN", "GPT-2 small", "one tensor of 16 M")

# For achieved bandwidth against size.
SIZES: dict[str, Model] = {
    f"one tensor of 2^{power}": Model([(1 << power,)]) for power in range(10, 29, 2)
}
LARGEST_ON_CPU = 1 << 24
