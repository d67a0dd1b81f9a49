"""Wide ResNets."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from flatmin.models.common import Chain, GlobalMean, blocks_of, check_counts, check_dropout, conv, he_normal, stage


class PreActivated(nn.Module):
    """BatchNorm, ReLU, 3x3, BatchNorm, ReLU, dropout, 3x3, plus the input.

    If the number of channels or the size changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU())
        self.body = nn.Sequential(
            conv(in_channels, out_channels, stride=stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Dropout(dropout) if dropout else nn.Identity(),  # nn.Dropout(0) would still draw random numbers.
            conv(out_channels, out_channels),
        )
        same = in_channels == out_channels and stride == 1
        self.project = None if same else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.activate(x)
        shortcut = x if self.project is None else self.project(active)
        out: Tensor = self.body(active) + shortcut
        return out


class WideResNet(Chain):
    """Wide ResNet, WRN-depth-width: 6n + 4 layers in three stages with 16, 32 and 64 times `width` channels.

    Takes images (n, in_channels, h, w) of any size and returns logits (n, num_classes). The 3x3 stem has 16 channels.
    Each stage has n pre-activation blocks; the second and the third stage halve the image. BatchNorm and ReLU precede
    the mean over the image. Initialised by `he_normal`.

    Parameters with 10 classes: 28-10: 36 479 194 (36 536 884 with 100); 28-2: 1 467 610; 16-8: 10 961 370; 34-10:
    46 160 474.

    Args:
        depth: number of layers, 6n + 4.
        width: factor by which the number of channels is multiplied.
        num_classes: number of classes. Default 10.
        in_channels: number of channels of the images. Default 3.
        dropout: dropout probability between the two convolutions of a block. Default 0; the paper uses 0.3 in some
            tables.
        extra_block: build one more block per stage than `depth` says. The example script of a widely copied SAM
            repository builds its wide ResNets this way: its "WRN-28-10" is a WRN-34-10 with 46.16 M parameters. Use
            this option to reproduce results of that script. (The script also initialises the linear layer with zeros;
            this option does not.) Default False.

    Raises:
        ValueError: `depth` is not 6n + 4, a count is below 1, or `dropout` is outside [0, 1).

    Reference: Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016, https://arxiv.org/abs/1605.07146
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        dropout: float = 0.0,
        extra_block: bool = False,
    ) -> None:
        check_counts(width=width, num_classes=num_classes, in_channels=in_channels)
        check_dropout(dropout)
        n = blocks_of(depth, extra=4) + extra_block
        block = partial(PreActivated, dropout=dropout)
        channels = 64 * width
        super().__init__()
        self.stem = conv(in_channels, 16)
        self.stage1 = stage(block, 16, 16 * width, n, stride=1)
        self.stage2 = stage(block, 16 * width, 32 * width, n, stride=2)
        self.stage3 = stage(block, 32 * width, channels, n, stride=2)
        self.last = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.pool = GlobalMean()
        self.head = nn.Linear(channels, num_classes)
        he_normal(self)
