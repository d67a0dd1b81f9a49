"""ResNets of four stages, with a stem for small images or the stem of the paper."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from flatmin.models.common import Block, Chain, GlobalMean, check_counts, conv, he_normal, stage


class Residual(nn.Module):
    """relu(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def two_convs(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """The body of a basic block: two 3x3 convolutions with BatchNorm, and a ReLU between them."""
    return nn.Sequential(
        conv(in_channels, out_channels, stride=stride),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        conv(out_channels, out_channels),
        nn.BatchNorm2d(out_channels),
    )


def basic(in_channels: int, out_channels: int, stride: int) -> Residual:
    """The basic block, for depths 18 and 34."""
    return Residual(two_convs(in_channels, out_channels, stride), _projection(in_channels, out_channels, stride))


def bottleneck(in_channels: int, out_channels: int, stride: int) -> Residual:
    """The bottleneck block, for depths of 50 and more: 1x1 to a quarter of the channels, 3x3, 1x1 to all channels."""
    inner = out_channels // 4
    body = nn.Sequential(
        conv(in_channels, inner, 1),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        conv(inner, inner, stride=stride),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        conv(inner, out_channels, 1),
        nn.BatchNorm2d(out_channels),
    )
    return Residual(body, _projection(in_channels, out_channels, stride))


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


# depth -> block, its output channels divided by the width of the stage, blocks per stage (table 1 of the paper)
LAYERS: dict[int, tuple[Block, int, tuple[int, int, int, int]]] = {
    18: (basic, 1, (2, 2, 2, 2)),
    34: (basic, 1, (3, 4, 6, 3)),
    50: (bottleneck, 4, (3, 4, 6, 3)),
    101: (bottleneck, 4, (3, 4, 23, 3)),
    152: (bottleneck, 4, (3, 8, 36, 3)),
}


STEMS = {"small": (3, 1), "imagenet": (7, 2)}  # size and stride of the convolution


class ResNet(Chain):
    """ResNet: a stem, by default for small images (3x3, stride 1, no pooling), and four stages of residual blocks.

    Takes images (n, in_channels, h, w) of any size and returns logits (n, num_classes). The stages have 64, 128, 256
    and 512 channels, times 4 with bottleneck blocks. All but the first halve the image. Where the shape changes, the
    shortcut is a 1x1 convolution with BatchNorm (option B of the paper). Initialised by `he_normal`.

    Parameters with 10 and 100 classes: 18: 11 173 962 and 11 220 132; 34: 21 282 122 and 21 328 292; 50: 23 520 842 and
    23 705 252; 101: 42 512 970 and 42 697 380; 152: 58 156 618 and 58 341 028. With 1000 classes and the paper's stem:
    18: 11 689 512; 50: 25 557 032.

    Differences from the paper: the small stem, and the stride of a bottleneck block is in its 3x3 convolution, as in
    most later code.

    Args:
        depth: number of layers: 18, 34, 50, 101 or 152.
        num_classes: number of classes. Default 10.
        in_channels: number of channels of the images. Default 3.
        max_pool: add a 3x3 max pooling of stride 2 after the stem. It reduces the work to a quarter and changes the
            results. Of the projects that report ResNets with this stem, one uses it. Default False.
        width: number of channels of the first stage. Default 64.
        stem: "small", or "imagenet" for the stem of the paper: a 7x7 convolution of stride 2 and the max pooling, for
            images of about 224x224. Default "small".

    Raises:
        ValueError: an unknown `depth` or `stem`, or a count is below 1.

    Reference: He, Zhang, Ren & Sun, Deep Residual Learning for Image Recognition, CVPR 2016,
    https://arxiv.org/abs/1512.03385
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        max_pool: bool = False,
        width: int = 64,
        stem: str = "small",
    ) -> None:
        check_counts(num_classes=num_classes, in_channels=in_channels, width=width)
        if depth not in LAYERS:
            raise ValueError(f"depth must be one of {', '.join(map(str, LAYERS))}, got {depth!r}.")
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}.")
        block, expansion, counts = LAYERS[depth]
        super().__init__()
        self.stem = nn.Sequential(conv(in_channels, width, *STEMS[stem]), nn.BatchNorm2d(width), nn.ReLU())
        if max_pool or stem == "imagenet":
            self.stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        channels = width
        for k, count in enumerate(counts):
            out_channels = width * 2**k * expansion
            self.add_module(f"stage{k + 1}", stage(block, channels, out_channels, count, stride=1 if k == 0 else 2))
            channels = out_channels
        self.pool = GlobalMean()
        self.head = nn.Linear(channels, num_classes)
        he_normal(self)
