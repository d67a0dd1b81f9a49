"""The networks that costs are measured on: many small tensors, a transformer, a convolutional net with BatchNorm.

And the optimizer of all of them. Nothing here needs flatmin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BASES = ("default", "foreach", "fused")
LR, MOMENTUM = 1e-3, 0.9


def make_base(params: Any, kind: str) -> torch.optim.SGD:
    """SGD with momentum in one of torch's three implementations ("default": torch's choice for the device)."""
    flags = {} if kind == "default" else {kind: True}
    base = torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, **flags)
    if base.param_groups[0]["params"][0].is_meta:
        # torch refuses fused kernels on the meta device, where `launches` stands in for them.
        base._need_device_dtype_check_for_fused = False
    return base


class DeepMLP(nn.Module):
    """x <- x + 0.1 relu(W x + b), `layers` times, and a linear head: 2 layers + 2 tensors, where launches dominate."""

    def __init__(self, layers: int = 200, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, classes) for x of shape (batch, width)."""
        for layer in self.layers:
            x = x + 0.1 * F.relu(layer(x))
        return self.head(x)


class Block(nn.Module):
    """A pre-norm transformer block: 12 tensors."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of shape (batch, length, width) to the same shape."""
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class SmallViT(nn.Module):
    """A vision transformer with mean pooling for 32 x 32 images: 12 tensors a layer and 7 more."""

    def __init__(self, width: int, layers: int, heads: int = 3, patch: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, (32 // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, 10) for images of shape (batch, 3, 32, 32)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class SmallResidual(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm and a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps to feature maps, smaller by the stride."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 in its form for 32 x 32 images: 62 tensors, 20 BatchNorm layers; width 64 is the usual one."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks, inside = [], width
        for stage in range(4):
            outside = width * 2**stage
            blocks += [SmallResidual(inside, outside, 1 if stage == 0 else 2), SmallResidual(outside, outside, 1)]
            inside = outside
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, classes) for images of shape (batch, 3, 32, 32)."""
        return self.head(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


@dataclass(frozen=True)
class Net:
    """A network by name, with the batch that it is measured on.

    Args:
        name: what tables print.
        build: makes the module.
        shape: of one input.
        batch: number of inputs.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int

    def make(self, device: str = "cpu", batch: int | None = None) -> tuple[nn.Module, Tensor, Tensor]:
        """(module, inputs, targets): the same weights and data on every call."""
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
        count = batch or self.batch
        x = torch.randn(count, *self.shape, generator=generator)
        y = torch.randint(10, (count,), generator=generator)
        return model.to(device), x.to(device), y.to(device)


_IMAGE = (3, 32, 32)
NETS: dict[str, Net] = {
    net.name: net
    for net in (
        Net("mlp200", DeepMLP, (32,), 32),
        Net("mlp20", lambda: DeepMLP(layers=20), (32,), 32),
        Net("vit-d64", lambda: SmallViT(width=64, layers=2, heads=2), _IMAGE, 8),
        Net("vit-d64-12", lambda: SmallViT(width=64, layers=12, heads=2), _IMAGE, 8),
        Net("vit-d192", lambda: SmallViT(width=192, layers=6), _IMAGE, 8),
        Net("resnet18-w8", lambda: ResNet18(width=8), _IMAGE, 8),
        Net("resnet18-w64", ResNet18, _IMAGE, 128),
    )
}


class ResNet8(nn.Module):
    """One residual block each of width 16, 32 and 64, shortcuts by a 1 x 1 convolution: 77 562 weights."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 16, 3, 1, 1, bias=False), norm(16)
        self.blocks = nn.Sequential(*(_PlainResidual(i, o, norm) for i, o in ((16, 16), (16, 32), (32, 64))))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, 10) for images of shape (batch, 1, height, width)."""
        return self.head(self.blocks(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


class _PlainResidual(nn.Module):
    def __init__(self, inside: int, outside: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        stride = outside // inside
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = norm(outside), norm(outside)
        same = inside == outside
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))
