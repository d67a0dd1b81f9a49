"""Two small networks for 8x8 images, without BatchNorm, so that curvature is a function of the weights alone."""

from __future__ import annotations

from torch import nn


def conv(num_classes: int = 10) -> nn.Module:
    """3x3 convolutions of 16 and 32 channels, 2x2 max pooling, a hidden layer of 64; for inputs (n, 1, 8, 8).

    38 282 parameters with 10 classes.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def mlp(num_classes: int = 10) -> nn.Module:
    """Two hidden layers of 64; for inputs with 64 values, such as (n, 1, 8, 8).

    8970 parameters with 10 classes.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


MODELS = {"conv": conv, "mlp": mlp}
