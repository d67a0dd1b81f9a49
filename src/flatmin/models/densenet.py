"""DenseNet for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatmin.models.common import Chain, GlobalMean, check_counts, conv, he_normal


class Dense(nn.Module):
    """Append `growth` channels, computed from the input by BatchNorm, ReLU, 1x1, BatchNorm, ReLU, 3x3."""

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
    """Halve the number of channels and the height and width of the image."""
    return nn.Sequential(
        nn.BatchNorm2d(in_channels), nn.ReLU(), conv(in_channels, in_channels // 2, 1), nn.AvgPool2d(2)
    )


class DenseNet(Chain):
    """DenseNet-BC with a 3x3 stem, by default DenseNet-121: each layer takes all earlier layers of its block as input.

    Takes images (n, in_channels, h, w), with four blocks of at least 8x8 pixels, and returns logits (n, num_classes).
    The stem has 2 * growth channels. Between two blocks, a 1x1 convolution halves the channels and a 2x2 mean halves
    the image. BatchNorm and ReLU precede the mean over the image. Initialised by `he_normal`.

    DenseNet-121 has 6 956 298 parameters with 10 classes and 7 048 548 with 100.

    Difference from the paper: its networks for CIFAR have three equal blocks. This one has the four blocks of the
    ImageNet network and the stem of the CIFAR network, as in projects that train "densenet121" on CIFAR.

    Args:
        num_classes: number of classes. Default 10.
        in_channels: number of channels of the images. Default 3.
        growth: number of channels that each layer adds. Default 32 (table 1 of the paper).
        blocks: number of layers in each block. Default (6, 12, 24, 16), which gives 121 layers (table 1 of the paper).

    Raises:
        ValueError: a count is below 1, or `blocks` is empty.

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
