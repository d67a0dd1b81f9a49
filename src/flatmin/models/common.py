"""What the networks share: layers, initialisation and checks.

No layer works in place, and none is without a second derivative: SAM's relatives and the measurements differentiate
twice. Averages over the image are plain means, whose backward pass is deterministic on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

Block = Callable[[int, int, int], nn.Module]  # from in_channels, out_channels and stride


def conv(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias, padded so that stride 1 keeps the size of the image."""
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


def stage(block: Block, in_channels: int, out_channels: int, count: int, stride: int) -> nn.Sequential:
    """`count` blocks in a row; the first one changes the channels and the size of the image."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(count - 1)))


class Chain(nn.Module):
    """Calls its parts one after the other, in the order in which they were set; the base of the networks here.

    No `nn.Sequential`, whose slices would call the constructors of its subclasses.
    """

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


class GlobalMean(nn.Module):
    """The mean over the image: (n, c, h, w) to (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Subsample(nn.Module):
    """Every `stride`-th row and column, from the first on."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride]

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class ZeroChannels(nn.Module):
    """Appends `extra` channels of zeros.

    Implementations differ in where the zeros go; that is a renumbering of the channels, and changes neither the set of
    functions nor the distribution of random initial weights.
    """

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        return f"extra={self.extra}"


def he_normal(model: nn.Module) -> None:
    """The initialisation of all convolutional networks here.

    Convolutions are normal with variance 2 / (kernel size * out_channels), which keeps the size of gradients through
    ReLU (He et al., Delving Deep into Rectifiers, ICCV 2015, eq. 14: "fan out"); the Torch code of the ResNet, wide
    ResNet, DenseNet and PyramidNet papers draws them so. Linear weights are uniform in +-1/sqrt(in_features), torch's
    and Torch7's own, and all biases zero. BatchNorm stays as torch makes it: weight 1, bias 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def small_normal(model: nn.Module, std: float = 0.02) -> None:
    """The initialisation of transformers.

    Everything but biases and LayerNorm, so also tokens and positions, is normal with deviation `std`, cut off at two
    deviations; biases are zero, LayerNorm stays as torch makes it: weight 1, bias 0 (Touvron et al., DeiT, ICML 2021;
    0.02 is BERT's).
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
    """The n of depth = 6 n + extra: three stages of n blocks with two convolutions each.

    Raises:
        ValueError: a depth of another form.
    """
    check_counts(depth=depth)
    n, rest = divmod(depth - extra, 6)
    if rest or n < 1:
        below = 6 * max(n, 1) + extra
        raise ValueError(f"depth must be 6n + {extra} with n >= 1, such as {below} or {below + 6}, got {depth}.")
    return n
