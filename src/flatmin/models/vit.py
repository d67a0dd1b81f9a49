"""A small vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatmin.models.common import Chain, check_counts, small_normal


class Attention(nn.Module):
    """Multi-head self-attention, (n, tokens, width) to (n, tokens, width).

    Not torch's fused kernels, because they have no second derivative. With few tokens they would save little.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts: Tensor = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # n, tokens, 3, heads, width of a head
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), where mlp is two linear layers with GELU between them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        out: Tensor = x + self.mlp(x)
        return out


class Tokens(nn.Module):
    """A class token and one token per patch, plus learned positions: (n, c, h, w) to (n, 1 + patches, width)."""

    def __init__(self, in_channels: int, image_size: int, patch: int, width: int) -> None:
        super().__init__()
        self.size = image_size
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        size, got = self.size, tuple(x.shape[2:])
        if got != (size, size):  # Otherwise some other sizes would pass, and lose their last rows.
            raise ValueError(f"images must be {size}x{size}, the image_size of this ViT, got {got}.")
        patches = self.embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions


class First(nn.Module):
    """Select the class token: (n, tokens, width) to (n, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class ViT(Chain):
    """A pre-norm vision transformer with learned positions and a class token, by default for CIFAR.

    Takes images (n, in_channels, image_size, image_size) and returns logits (n, num_classes). The MLP of each layer has
    4 * width hidden units with GELU. A LayerNorm follows the last layer. There is no dropout and no BatchNorm.
    Initialised by `small_normal`.

    It has 2 693 578 parameters with 10 classes and 2 710 948 with 100. The papers train ViT-S and ViT-B on larger
    images. This smaller size can be trained from scratch on small images.

    Difference from the paper: the paper's code initialises the head with zeros and the other weights by Glorot's rule.

    Args:
        num_classes: number of classes. Default 10.
        in_channels: number of channels of the images. Default 3.
        image_size: height and width of the images, a multiple of `patch`. Default 32.
        patch: height and width of a patch. Default 4, which gives 64 patches for a 32x32 image.
        depth: number of layers. Default 6, half of ViT-Ti.
        width: length of a token, a multiple of `heads`. Default 192, as in ViT-Ti (Touvron et al., DeiT, ICML 2021).
        heads: number of attention heads. Default 3, as in ViT-Ti.

    Raises:
        ValueError: a count is below 1, or `image_size` or `width` is not divisible. When called: images of another
            size.

    Reference: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, https://arxiv.org/abs/2010.11929
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        image_size: int = 32,
        patch: int = 4,
        depth: int = 6,
        width: int = 192,
        heads: int = 3,
    ) -> None:
        check_counts(num_classes=num_classes, in_channels=in_channels, image_size=image_size, patch=patch)
        check_counts(depth=depth, width=width, heads=heads)
        if image_size % patch:
            raise ValueError(f"image_size must be a multiple of patch={patch}, got {image_size}.")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads={heads}, got {width}.")
        super().__init__()
        self.tokens = Tokens(in_channels, image_size, patch, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.first = First()
        self.head = nn.Linear(width, num_classes)
        small_normal(self)
