"""ResNets of three stages, the CIFAR networks of the ResNet paper."""

from __future__ import annotations

from torch import nn

from flatmin.models.common import (
    Chain,
    GlobalMean,
    Subsample,
    ZeroChannels,
    blocks_of,
    check_counts,
    conv,
    he_normal,
    stage,
)
from flatmin.models.resnet import Residual, two_convs


def option_a(in_channels: int, out_channels: int, stride: int) -> Residual:
    """A basic block whose shortcut has no parameters: it keeps every `stride`-th pixel and adds channels of zeros."""
    same = in_channels == out_channels and stride == 1
    shortcut = nn.Identity() if same else nn.Sequential(Subsample(stride), ZeroChannels(out_channels - in_channels))
    return Residual(two_convs(in_channels, out_channels, stride), shortcut)


class CifarResNet(Chain):
    """The small ResNet for CIFAR: 6n + 2 layers with 16, 32 and 64 channels and shortcuts without parameters.

    Takes images (n, in_channels, h, w) of any size and returns logits (n, num_classes). It has a 3x3 stem, three stages
    of n basic blocks (the second and the third halve the image), the mean over the image, and one linear layer.
    Initialised by `he_normal`.

    Parameters with 10 classes: 8: 75 290; 20: 269 722; 32: 464 154; 44: 658 586; 56: 853 018; 110: 1 727 962.

    Args:
        depth: number of layers, 6n + 2.
        num_classes: number of classes. Default 10.
        in_channels: number of channels of the images. Default 3.
        width: number of channels of the first stage. Default 16.

    Raises:
        ValueError: `depth` is not 6n + 2, or a count is below 1.

    Reference: He, Zhang, Ren & Sun, Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2,
    https://arxiv.org/abs/1512.03385
    """

    def __init__(self, depth: int, num_classes: int = 10, *, in_channels: int = 3, width: int = 16) -> None:
        check_counts(num_classes=num_classes, in_channels=in_channels, width=width)
        n = blocks_of(depth, extra=2)
        super().__init__()
        self.stem = nn.Sequential(conv(in_channels, width), nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = stage(option_a, width, width, n, stride=1)
        self.stage2 = stage(option_a, width, 2 * width, n, stride=2)
        self.stage3 = stage(option_a, 2 * width, 4 * width, n, stride=2)
        self.pool = GlobalMean()
        self.head = nn.Linear(4 * width, num_classes)
        he_normal(self)
