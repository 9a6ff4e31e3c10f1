"""The models whose steps are timed: the shapes of their params, nothing else."""

from __future__ import annotations

from collections.abc import Callable

Shapes = list[tuple[int, ...]]


def gpt2(layers: int, width: int) -> Shapes:
    """Radford et al. 2019: token and position embeddings, blocks, final layer norm."""
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp: Shapes = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(50257, width), (1024, width)] + layers * (norm + attention + norm + mlp) + norm


def resnet_without_bn(depth: int) -> Shapes:
    """He et al. 2016 for CIFAR-10, 6n + 2 layers, shortcuts without params, no batch norm."""
    blocks = (depth - 2) // 6
    shapes: Shapes = [(16, 3, 3, 3), (16,)]
    width = 16
    for stage in (16, 32, 64):
        for _ in range(2 * blocks):
            shapes += [(stage, width, 3, 3), (stage,)]
            width = stage
    return [*shapes, (10, 64), (10,)]


MODELS: dict[str, Callable[[], Shapes]] = {
    "400 x 16": lambda: [(16,)] * 400,
    "ResNet-218 without BN": lambda: resnet_without_bn(218),
    "GPT-2 small": lambda: gpt2(12, 768),
    "one tensor of 16 M": lambda: [(1 << 24,)],
}
