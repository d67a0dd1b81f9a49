"""Wide ResNets."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from flatmin.models.common import Chain, GlobalMean, blocks_of, check_counts, check_dropout, conv, he_normal, stage


class PreActivated(nn.Module):
    """BatchNorm, ReLU, 3x3, BatchNorm, ReLU, dropout, 3x3, plus the input.

    Where the channels change, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU())
        self.body = nn.Sequential(
            conv(in_channels, out_channels, stride=stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Dropout(dropout) if dropout else nn.Identity(),  # a dropout of 0 would draw random numbers
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
    """WRN-depth-width: 6n + 4 layers, three stages of n pre-activated blocks, 16, 32 and 64 channels times `width`.

    For inputs (n, in_channels, h, w) of any size. A 3x3 stem of 16 channels; the second and third stage halve the
    image; BatchNorm and ReLU before the mean over the image. Initialised by `he_normal`.

    Parameters with 10 classes: 28-10: 36 479 194 (36 536 884 with 100); 28-2: 1 467 610; 16-8: 10 961 370; 34-10:
    46 160 474.

    Args:
        depth: 6n + 4.
        width: factor of the channels.
        num_classes: logits.
        in_channels: of the images.
        dropout: probability between the two convolutions of a block. Default: 0; the paper has 0.3 in some tables.
        extra_block: one block more in each stage than the depth says. The example script of a widely copied SAM
            repository builds its wide ResNets so: its "WRN-28-10" is a WRN-34-10, with 46.16 M parameters. To have the
            networks of results made with it. (Its linear layer starts at zero, which this option leaves alone.)

    Raises:
        ValueError: a depth of another form, counts below 1, or a dropout outside [0, 1).

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
