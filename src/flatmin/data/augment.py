"""Augmentation of whole batches of byte images, on the device of the images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from flatmin.data.images import Statistics, check_bytes

_DRAWS = 6


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random crop, horizontal flip, normalisation and cutout, in this order, as in the papers.

    Padding is black (byte 0, before normalisation). Cutout fills a square of side s = `cutout` with the mean colour (0,
    after normalisation). Its centre c can be any pixel, so the border may clip the square: it covers rows c - s // 2 to
    c - s // 2 + s - 1.

    Each call draws one array u of shape (6, n), uniform in [0, 1), from the generator, no matter which operations are
    enabled. With the same seed, two settings therefore differ only in the operations they enable. The rows of u are:

    - u[0], u[1]: first row and first column of the crop in the padded image, floor(u (2 crop + 1));
    - u[2]: the image is flipped if u < 1/2;
    - u[3]: the image has a cutout if u < cutout_p;
    - u[4], u[5]: row and column of the centre of the cutout, floor(u H) and floor(u W).

    A CPU generator gives the same images on every device.

    Args:
        crop: padding in pixels on each side, from which a crop of the original size is taken. 0: no crop. Default 4.
        flip: mirror each image with probability 1/2. Default True.
        cutout: side of the cutout in pixels. 0: no cutout. Default 16 (DeVries & Taylor 2017 for CIFAR-10; BiSAM and
            VaSSO).
        cutout_p: probability of a cutout. Default 0.5, from the code of BiSAM and VaSSO (DeVries & Taylor: 1).

    Raises:
        ValueError: a size is negative, or the probability is outside [0, 1].

    Examples:
        >>> from flatmin.data.images import CIFAR10
        >>> x = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> Augment()(x, CIFAR10, torch.Generator().manual_seed(0)).shape
        torch.Size([8, 3, 32, 32])
    """

    crop: int = 4
    flip: bool = True
    cutout: int = 16
    cutout_p: float = 0.5

    def __post_init__(self) -> None:
        if self.crop < 0 or self.cutout < 0:
            raise ValueError(f"crop and cutout must be at least 0, got {self.crop} and {self.cutout}.")
        if not 0 <= self.cutout_p <= 1:
            raise ValueError(f"cutout_p must be a probability in [0, 1], got {self.cutout_p!r}.")

    def __call__(
        self, x: Tensor, statistics: Statistics, generator: torch.Generator, *, channels_last: bool = False
    ) -> Tensor:
        """Augment and normalise a batch: `apply` with the array of `draw`.

        Args:
            x: images, shape (n, C, H, W), uint8. Not modified.
            statistics: statistics of the training part, C channels.
            generator: source of all random numbers.
            channels_last: return the result in channels-last memory format. Its values are the same. Default False.

        Returns:
            Shape (n, C, H, W), float32.

        Raises:
            ValueError: the images have another dtype or shape.
        """
        return self.apply(x, statistics, self.draw(len(x), generator), channels_last=channels_last)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw the array u for n images, shape (6, n), on the device of the generator."""
        return torch.rand(_DRAWS, n, generator=generator, device=generator.device)

    def apply(self, x: Tensor, statistics: Statistics, u: Tensor, *, channels_last: bool = False) -> Tensor:
        """Augment and normalise a batch with a given array u.

        Args:
            x: see `__call__`.
            statistics: see `__call__`.
            u: from `draw`, or columns of it, shape (6, n).
            channels_last: see `__call__`.

        Returns:
            Shape (n, C, H, W), float32.

        Raises:
            ValueError: the images have another dtype or shape.
        """
        check_bytes(x)
        # non_blocking is safe: u is in pageable memory, which is staged before the call returns.
        u = u.to(x.device, non_blocking=True)
        if self.crop or self.flip:
            x = self._moved(x, u)
        out = normalise(x, statistics, channels_last=channels_last)
        if self.cutout and self.cutout_p:
            out.mul_(self._kept(u, x.shape[2], x.shape[3]))
        return out

    def _moved(self, x: Tensor, u: Tensor) -> Tensor:
        """Crop and flip as one gather."""
        n, channels, height, width = x.shape
        rows = torch.arange(height, device=x.device).expand(n, -1)
        columns = torch.arange(width, device=x.device).expand(n, -1)
        if self.flip:
            # |0 - j| = j and |(W - 1) - j| is the mirrored column.
            columns = ((u[2] < 0.5).mul(width - 1).unsqueeze(1) - columns).abs_()
        if self.crop:
            # In float32 u m < m for u < 1: m 2^-24 is more than half a step of the numbers just below m.
            first = (u[:2] * (2 * self.crop + 1)).long().unsqueeze(2)
            rows, columns = rows + first[0], columns + first[1]
            x = F.pad(x, (self.crop,) * 4)
        index = (rows * x.shape[3]).unsqueeze(2) + columns.unsqueeze(1)
        index = index.view(n, 1, height * width).expand(-1, channels, -1)
        return x.flatten(2).gather(2, index).view(n, channels, height, width)

    def _kept(self, u: Tensor, height: int, width: int) -> Tensor:
        """Mask of the pixels outside the square, shape (n, 1, H, W)."""
        rows = self._outside(u[4], height) | (u[3] >= self.cutout_p).unsqueeze(1)
        return (rows.unsqueeze(2) | self._outside(u[5], width).unsqueeze(1)).unsqueeze(1)

    def _outside(self, u: Tensor, size: int) -> Tensor:
        """Mask of the lines outside the square, shape (n, size): those with |line + shift - centre| >= cutout / 2."""
        shift = 0.0 if self.cutout % 2 else 0.5
        lines = torch.arange(size, device=u.device) + shift
        return (lines - (u * size).floor_().unsqueeze(1)).abs_() >= self.cutout / 2


def normalise(x: Tensor, statistics: Statistics, *, channels_last: bool = False) -> Tensor:
    """Normalise byte images: (x - 255 mean) * (1 / (255 std)), which is (x / 255 - mean) / std up to rounding.

    Args:
        x: images, shape (n, C, H, W), uint8.
        statistics: statistics with C channels.
        channels_last: return the result in channels-last memory format. Its values are the same. Default False.

    Returns:
        Shape (n, C, H, W), float32.

    Raises:
        ValueError: the images have another dtype, shape or number of channels.
    """
    check_bytes(x)
    if x.shape[1] != len(statistics.mean):
        raise ValueError(
            f"the statistics have {len(statistics.mean)} channels, but the images have {x.shape[1]}; "
            "compute the statistics with Statistics.of(train images)."
        )
    shift, scale = _constants(statistics, x.device)
    # Change the layout while the values are bytes: this moves a quarter of the memory.
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return x.to(torch.float32).sub_(shift).mul_(scale)


@lru_cache(maxsize=32)
def _constants(statistics: Statistics, device: torch.device) -> tuple[Tensor, Tensor]:
    """255 mean and 1 / (255 std), shape (C, 1, 1). Cached, because a copy to the device would synchronise."""
    shift = [255 * mean for mean in statistics.mean]
    scale = [1 / (255 * std) for std in statistics.std]
    return (
        torch.tensor(shift, dtype=torch.float32).view(-1, 1, 1).to(device),
        torch.tensor(scale, dtype=torch.float32).view(-1, 1, 1).to(device),
    )
