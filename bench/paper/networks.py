"""The paper's networks by name; batch normalization (BN) can be removed from each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from adamprox.resnet import Block, ResNet

from . import user_code

if TYPE_CHECKING:
    from collections.abc import Callable

DENSENET = "DenseNet-BC-100"


class Layer(nn.Module):
    """BN, rectifier, convolution: a DenseNet's order."""

    def __init__(self, channels_in: int, channels: int, kernel: int, batch_norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels_in) if batch_norm else nn.Identity()
        self.conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of (batch, channels_in, height, width)."""
        y: Tensor = self.conv(F.relu(self.norm(x)))
        return y


class DenseNet(nn.Module):
    """DenseNet-BC: Huang et al. (2017), three blocks of bottlenecks, compression by a half.

    Initialized as the paper's is: normal, of variance 2 over the outputs' fan.

    Args:
        layers: ``6 n + 4``, for ``n`` bottlenecks a block.
        classes: how many.
        channels_in: the images' channels.
        growth: channels that a bottleneck adds; the first convolution has twice as many.
        batch_norm: before each rectifier.

    Raises:
        ValueError: ``layers`` is not ``6 n + 4``.
    """

    def __init__(
        self,
        layers: int = 100,
        classes: int = 100,
        channels_in: int = 3,
        growth: int = 12,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if layers < 10 or layers % 6 != 4:
            raise ValueError(f"Invalid number of layers: {layers}, expected 6 n + 4")
        channels = 2 * growth
        self.conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for block in range(3):
            if block > 0:
                self.transitions.append(Layer(channels, channels // 2, 1, batch_norm))
                channels //= 2
            bottlenecks = nn.ModuleList()
            for _ in range((layers - 4) // 6):
                narrow = Layer(channels, 4 * growth, 1, batch_norm)
                bottlenecks.append(nn.Sequential(narrow, Layer(4 * growth, growth, 3, batch_norm)))
                channels += growth
            self.blocks.append(bottlenecks)
        self.norm = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
        self.linear = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size)
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, images: Tensor) -> Tensor:
        """The logits, (batch, classes)."""
        x: Tensor = self.conv(images)
        for index, bottlenecks in enumerate(self.blocks):
            if index > 0:
                x = F.avg_pool2d(self.transitions[index - 1](x), 2)
            for bottleneck in bottlenecks.children():
                x = torch.cat((x, bottleneck(x)), dim=1)
        logits: Tensor = self.linear(F.relu(self.norm(x)).mean(dim=(2, 3)))
        return logits


class TanhNetwork(nn.Sequential):
    """Fully connected, deep, smooth, without normalization.

    No gradient in it is exactly zero, as those of dead rectifiers are, so ``eps`` may be 0.
    """

    def __init__(self, layers: int, inputs: int = 64, classes: int = 10, width: int = 32) -> None:
        widths = [inputs, *(layers - 1) * [width], classes]
        modules: list[nn.Module] = [nn.Flatten()]
        for index in range(layers):
            modules += [nn.Linear(widths[index], widths[index + 1]), nn.Tanh()]
        super().__init__(*modules[:-1])


STARTS = ("he", "scaled")


def make(
    name: str,
    classes: int,
    channels_in: int,
    batch_norm: bool,
    width: int = 16,
    start: str = "he",
) -> nn.Module:
    """A network by its name, from torch's random numbers.

    Args:
        name: ``ResNet-L``, ``DenseNet-BC-L``, or ``package.module:function``, which is called.
        width: a ResNet's channels in its first stage, 16 in the paper; a DenseNet's growth is
            three quarters of it, 12 in the paper.
        start: ``"he"``, the paper's, by which each block of a ResNet without BN doubles the
            variance; or ``"scaled"``, in the way of Fixup (Zhang et al. 2019): the last convolution
            of each of L blocks is divided by the root of L, so that the variance stays below a
            constant times the first one. At 0, as in Fixup, channels whose shortcut is padded with
            zeros would never learn, since these networks have no biases.

    Raises:
        ValueError: there is no such network, or no such function.
    """
    if user_code.is_name(name):
        return user_code.model(name, width)
    kind, _, layers = name.rpartition("-")
    makers: dict[str, Callable[[int], nn.Module]] = {
        "ResNet": lambda depth: ResNet(
            depth, classes, channels_in, (width, 2 * width, 4 * width), batch_norm
        ),
        "DenseNet-BC": lambda depth: DenseNet(
            depth, classes, channels_in, 3 * width // 4, batch_norm
        ),
    }
    if kind not in makers or not layers.isdecimal():
        raise ValueError(f"Invalid network: {name!r}, expected ResNet-L or DenseNet-BC-L")
    network = makers[kind](int(layers))
    if start == "scaled":
        if not isinstance(network, ResNet):
            raise ValueError(f"Invalid start: {start!r} of {name}, which is no ResNet")
        _scale(network)
    elif start not in STARTS:
        raise ValueError(f"Invalid start: {start!r}, expected one of {', '.join(STARTS)}")
    return network


@torch.no_grad()
def _scale(network: ResNet) -> None:
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    for block in blocks:
        block.conv2.weight /= math.sqrt(len(blocks))
