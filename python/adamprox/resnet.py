"""The paper's network: a residual network for small images, batch normalization removed or not.

He et al. (2016), section 4.2, with identity shortcuts (option A), and Kaiming He's normal
initialization, as in https://github.com/akamaster/pytorch_resnet_cifar10, which the paper used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


class Block(nn.Module):
    """Two 3x3 convolutions beside an identity shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.stride = stride
        self.channels_added = channels - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = (_norm(channels, batch_norm) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Of (batch, channels_in, height, width)."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        # Where the shape changes, the shortcut takes every second pixel and adds channels of zeros.
        shortcut = x[:, :, :: self.stride, :: self.stride]
        before = self.channels_added // 2
        after = self.channels_added - before
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, before, after)))


class ResNet(nn.Module):
    """A ResNet of ``6 n + 2`` layers, in three stages of ``n`` blocks.

    Args:
        layers: 20, 44, 56, 110 or 218 in the paper.
        classes: how many.
        channels_in: the images' channels.
        channels: of each stage; each but the first halves the height and width.
        batch_norm: after each convolution; without it they have no biases either.

    Raises:
        ValueError: ``layers`` is not ``6 n + 2``.
    """

    def __init__(
        self,
        layers: int,
        classes: int = 10,
        channels_in: int = 3,
        channels: Sequence[int] = (16, 32, 64),
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if layers < 8 or layers % 6 != 2:
            raise ValueError(f"Invalid number of layers: {layers}, expected 6 n + 2")
        self.conv = nn.Conv2d(channels_in, channels[0], 3, padding=1, bias=False)
        self.norm = _norm(channels[0], batch_norm)
        blocks = []
        width = channels[0]
        for stage, stage_width in enumerate(channels):
            for index in range((layers - 2) // 6):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Block(width, stage_width, stride, batch_norm))
                width = stage_width
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """The logits, (batch, classes)."""
        features: Tensor = self.blocks(F.relu(self.norm(self.conv(images))))
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
