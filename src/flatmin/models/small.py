"""Two small networks without BatchNorm, by default for 8x8 images. Their curvature depends on the weights alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from flatmin.models.common import check_counts


def conv(num_classes: int = 10, *, in_channels: int = 1, image_size: int = 8) -> nn.Module:
    """Two 3x3 convolutions with 16 and 32 channels, 2x2 max pooling, and a hidden layer of 64 units.

    Takes images (n, in_channels, image_size, image_size), by default (n, 1, 8, 8), and returns logits (n, num_classes).
    The default network has 38 282 parameters. Initialised by torch's defaults.

    Args:
        num_classes: number of classes. Default 10.
        in_channels: number of channels of the images. Default 1.
        image_size: height and width of the images, at least 2. Default 8.

    Raises:
        ValueError: a count is below 1, or `image_size` is below 2.
    """
    check_counts(num_classes=num_classes, in_channels=in_channels)
    check_counts(2, image_size=image_size)
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (image_size // 2) ** 2, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def mlp(num_classes: int = 10, *, in_channels: int = 1, image_size: int = 8) -> nn.Module:
    """A multilayer perceptron with two hidden layers of 64 units.

    Takes inputs with in_channels * image_size^2 values per sample, by default 64, such as (n, 1, 8, 8), and returns
    logits (n, num_classes). The default network has 8970 parameters. Initialised by torch's defaults.

    Args:
        num_classes: number of classes. Default 10.
        in_channels: number of channels of the images. Default 1.
        image_size: height and width of the images. Default 8.

    Raises:
        ValueError: a count is below 1.
    """
    check_counts(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_channels * image_size**2, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


MODELS: dict[str, Callable[..., nn.Module]] = {"conv": conv, "mlp": mlp}
