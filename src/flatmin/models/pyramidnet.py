"""PyramidNet: the number of channels grows with every block."""

from __future__ import annotations

from torch import Tensor, nn

from flatmin.models.common import Chain, GlobalMean, ZeroChannels, blocks_of, check_counts, conv, he_normal


class Pyramidal(nn.Module):
    """BatchNorm, 3x3, BatchNorm, ReLU, 3x3, BatchNorm, plus the input.

    In the shortcut, the input is averaged over 2x2 if the stride is 2, and the added channels are zeros.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            conv(in_channels, out_channels, stride=stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            conv(out_channels, out_channels),
            nn.BatchNorm2d(out_channels),
        )
        # ceil_mode: for an odd size, the pooling must round as the convolution does.
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity(),
            ZeroChannels(out_channels - in_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) + self.shortcut(x)
        return out


class PyramidNet(Chain):
    """PyramidNet of basic blocks: 6n + 2 layers whose channels grow evenly from 16 to 16 + alpha.

    Takes images (n, in_channels, h, w) of any size and returns logits (n, num_classes). It has a 3x3 stem with
    BatchNorm, three stages of n blocks (the second and the third halve the image), then BatchNorm, ReLU and the mean
    over the image. Block k of N = 3n has 16 + floor(alpha k / N) channels. Initialised by `he_normal`.

    Depth 110 with alpha = 270 (5 more channels per block) has 28 485 477 parameters with 10 classes and 28 511 307 with
    100. The paper states 28.3 M.

    Difference from the paper: the paper rounds down after each block, so it ends below 16 + alpha if alpha / N is not
    an integer.

    Args:
        depth: number of layers, 6n + 2. Default 110.
        alpha: number of channels by which the last block exceeds the stem. Default 270.
        num_classes: number of classes. Default 10.
        in_channels: number of channels of the images. Default 3.

    Raises:
        ValueError: `depth` is not 6n + 2, a count is below 1, or `alpha` is negative.

    Reference: Han, Kim & Kim, Deep Pyramidal Residual Networks, CVPR 2017, https://arxiv.org/abs/1610.02915
    """

    def __init__(self, depth: int = 110, alpha: int = 270, num_classes: int = 10, *, in_channels: int = 3) -> None:
        check_counts(num_classes=num_classes, in_channels=in_channels)
        check_counts(0, alpha=alpha)
        n = blocks_of(depth, extra=2)
        channels = [16 + alpha * k // (3 * n) for k in range(3 * n + 1)]
        super().__init__()
        self.stem = nn.Sequential(conv(in_channels, 16), nn.BatchNorm2d(16))
        for s in range(3):
            blocks = nn.Sequential()
            for k in range(s * n, (s + 1) * n):
                blocks.append(Pyramidal(channels[k], channels[k + 1], stride=2 if s and k == s * n else 1))
            self.add_module(f"stage{s + 1}", blocks)
        self.last = nn.Sequential(nn.BatchNorm2d(channels[-1]), nn.ReLU())
        self.pool = GlobalMean()
        self.head = nn.Linear(channels[-1], num_classes)
        he_normal(self)
