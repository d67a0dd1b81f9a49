"""VGG networks with BatchNorm."""

from __future__ import annotations

from torch import nn

from flatmin.models.common import Chain, GlobalMean, check_counts, check_dropout, he_normal

# depth -> 3x3 convolutions before each of the five poolings (configurations A, B, D and E in table 1 of the paper)
CONVS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(Chain):
    """VGG with BatchNorm: five groups of 3x3 convolutions, each followed by 2x2 max pooling, and three linear layers.

    Takes images (n, in_channels, h, w) of at least 32x32 and returns logits (n, num_classes). The last features are
    averaged over the image, which is one pixel for 32x32 images. The groups have 64, 128, 256, 512 and 512 channels.
    Convolutions have a bias, as in the paper, although BatchNorm cancels it. Initialised by `he_normal`.

    Parameters with 10 classes: 11: 9 756 426; 13: 9 941 322; 16: 15 253 578; 19: 20 565 834. With hidden=4096: 11:
    28 149 514; 13: 28 334 410; 16: 33 646 666; 19: 38 958 922.

    Differences from the paper: BatchNorm (Ioffe & Szegedy, ICML 2015), and the first linear layer has 512 inputs
    instead of 25 088.

    Args:
        depth: number of layers with weights: 11, 13, 16 or 19.
        num_classes: number of classes. Default 10.
        in_channels: number of channels of the images. Default 3.
        hidden: width of the two hidden linear layers. Default 512, which is common for CIFAR; the paper uses 4096.
        dropout: dropout probability after each hidden linear layer. Default 0.5 (section 3.1 of the paper).
        width: number of channels of the first group. Default 64.

    Raises:
        ValueError: `depth` is not one of these, a count is below 1, or `dropout` is outside [0, 1).

    Reference: Simonyan & Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015,
    https://arxiv.org/abs/1409.1556
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        hidden: int = 512,
        dropout: float = 0.5,
        width: int = 64,
    ) -> None:
        check_counts(num_classes=num_classes, in_channels=in_channels, hidden=hidden, width=width)
        check_dropout(dropout)
        if depth not in CONVS:
            raise ValueError(f"depth must be one of {', '.join(map(str, CONVS))}, got {depth!r}.")
        super().__init__()
        channels = in_channels
        for k, count in enumerate(CONVS[depth]):
            out_channels = width * min(2**k, 8)
            group = nn.Sequential()
            for _ in range(count):
                group.extend([nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()])
                channels = out_channels
            self.add_module(f"group{k + 1}", group.append(nn.MaxPool2d(2)))
        self.pool = GlobalMean()
        self.hidden = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout),
        )  # fmt: skip
        self.head = nn.Linear(hidden, num_classes)
        he_normal(self)
