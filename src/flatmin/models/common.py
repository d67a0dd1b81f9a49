"""Layers, initialisation and checks that the networks share.

No layer works in place and every layer has a second derivative, because some methods and the curvature measurements
differentiate twice. Averages over the image are plain means, whose backward pass is deterministic on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

Block = Callable[[int, int, int], nn.Module]  # from in_channels, out_channels and stride


def conv(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias. Its padding keeps the size of the image at stride 1 (for an odd `size`)."""
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


def stage(block: Block, in_channels: int, out_channels: int, count: int, stride: int) -> nn.Sequential:
    """A sequence of `count` blocks. The first block changes the number of channels and the size of the image."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(count - 1)))


class Chain(nn.Module):
    """Base class of the networks: runs its children in the order in which they were assigned.

    Not an `nn.Sequential`, because slicing one calls the constructor of its subclass.
    """

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


class GlobalMean(nn.Module):
    """Global average pooling: the mean over height and width, (n, c, h, w) to (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def _subsampled(x: Tensor, stride: int) -> Tensor:
    if x.is_cpu and x.is_floating_point() and x.stride(1) == 1 and x.shape[1] > 1:
        # Channels last: the same values, with a gradient in the same format. That of a slice is not, and makes all
        # operations before it in the network slower.
        return F.avg_pool2d(x, 1, stride)
    return x[:, :, ::stride, ::stride]


torch.fx.wrap("_subsampled")  # its condition cannot be traced


class Subsample(nn.Module):
    """Keep every `stride`-th row and column, starting with the first."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return _subsampled(x, self.stride)

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class ZeroChannels(nn.Module):
    """Append `extra` channels of zeros: (n, c, h, w) to (n, c + extra, h, w).

    Implementations differ in where they put the zeros. This only renumbers the channels: the set of functions and the
    distribution of random initial weights stay the same.
    """

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        return f"extra={self.extra}"


def he_normal(model: nn.Module) -> None:
    """Initialise a convolutional network in place.

    - Convolution weights: normal with mean 0 and variance 2 / (kernel height * kernel width * out_channels), which
      preserves the size of gradients through ReLU (He et al., Delving Deep into Rectifiers, ICCV 2015, eq. 14;
      "fan out"). The Torch code of the ResNet, wide ResNet, DenseNet and PyramidNet papers does the same.
    - Linear weights: uniform in +-1/sqrt(in_features), the default of torch and Torch7.
    - Biases: zero.
    - BatchNorm: the default of torch, weight 1 and bias 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def small_normal(model: nn.Module, std: float = 0.02) -> None:
    """Initialise a transformer in place.

    - Weights, class token and positions: normal with mean 0 and standard deviation `std`, truncated at two standard
      deviations (Touvron et al., DeiT, ICML 2021; 0.02 is the value of BERT).
    - Biases: zero.
    - LayerNorm: the default of torch, weight 1 and bias 0.
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)


def check_counts(minimum: int = 1, **values: int) -> None:
    """Raise ValueError unless all values are integers of at least `minimum`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}.")


def check_dropout(dropout: float) -> None:
    """Raise ValueError unless the value is a probability below 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}.")


def blocks_of(depth: int, extra: int) -> int:
    """Return n for depth = 6n + extra: three stages of n blocks with two convolutions each.

    Raises:
        ValueError: `depth` is not of this form.
    """
    check_counts(depth=depth)
    n, rest = divmod(depth - extra, 6)
    if rest or n < 1:
        below = 6 * max(n, 1) + extra
        raise ValueError(f"depth must be 6n + {extra} with n >= 1, such as {below} or {below + 6}, got {depth}.")
    return n
