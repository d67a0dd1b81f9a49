"""DenseNet for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatmin.models.common import Chain, GlobalMean, check_counts, conv, he_normal


class Dense(nn.Module):
    """The input with `growth` channels more, made of it by BatchNorm, ReLU, 1x1, BatchNorm, ReLU, 3x3."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            conv(in_channels, 4 * growth, 1),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            conv(4 * growth, growth),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def transition(in_channels: int) -> nn.Sequential:
    """Half the channels, and half the image."""
    return nn.Sequential(
        nn.BatchNorm2d(in_channels), nn.ReLU(), conv(in_channels, in_channels // 2, 1), nn.AvgPool2d(2)
    )


class DenseNet(Chain):
    """DenseNet-BC with a 3x3 stem: blocks of layers that see all layers before them, by default DenseNet-121.

    For inputs (n, in_channels, h, w) of at least 8x8 with four blocks. A stem of 2 growth channels; between two blocks
    a 1x1 convolution halves the channels and a 2x2 mean the image; BatchNorm and ReLU before the mean over the image.
    Initialised by `he_normal`.

    DenseNet-121 has 6 956 298 parameters with 10 classes, 7 048 548 with 100.

    Differs from the paper: its networks for CIFAR have three equal blocks; this one, with ImageNet's four blocks and
    CIFAR's stem, is what projects that train "densenet121" on CIFAR have.

    Args:
        num_classes: logits.
        in_channels: of the images.
        growth: channels that a layer adds. Default: 32 (the paper, table 1).
        blocks: layers in each block. Default: (6, 12, 24, 16), which makes 121 (the paper, table 1).

    Raises:
        ValueError: counts below 1, or no blocks.

    Reference: Huang, Liu, van der Maaten & Weinberger, Densely Connected Convolutional Networks, CVPR 2017,
    https://arxiv.org/abs/1608.06993
    """

    def __init__(
        self, num_classes: int = 10, *, in_channels: int = 3, growth: int = 32, blocks: Sequence[int] = (6, 12, 24, 16)
    ) -> None:
        check_counts(num_classes=num_classes, in_channels=in_channels, growth=growth)
        check_counts(**{"len(blocks)": len(blocks)}, **{f"blocks[{k}]": count for k, count in enumerate(blocks)})
        channels = 2 * growth
        super().__init__()
        self.stem = conv(in_channels, channels)
        for k, count in enumerate(blocks):
            if k:
                self.add_module(f"transition{k}", transition(channels))
                channels //= 2
            layers = (Dense(channels + i * growth, growth) for i in range(count))
            self.add_module(f"block{k + 1}", nn.Sequential(*layers))
            channels += count * growth
        self.last = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.pool = GlobalMean()
        self.head = nn.Linear(channels, num_classes)
        he_normal(self)
