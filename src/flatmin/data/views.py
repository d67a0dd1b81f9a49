"""Views that turn an image file into a square of bytes: `Centre` for evaluation, `RandomCrop` for training.

Needs Pillow.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flatmin.words import install

if TYPE_CHECKING:
    from PIL.Image import Image

_ATTEMPTS = 10


class ImageView(Protocol):
    """Interface of a view: turns an opened image into a square."""

    @property
    def size(self) -> int:
        """Side of the square in pixels."""

    def __call__(self, image: Image, draw: random.Random) -> Image:
        """Return the square. `draw` is the random generator of this file in this epoch."""


@dataclass(frozen=True)
class Centre:
    """Centre crop for evaluation: resize the shorter side to `resize`, then crop size x size pixels.

    Args:
        size: side of the result in pixels. Default 224.
        resize: length of the shorter side before the crop. Default None: size * 256 / 224, rounded, as is usual for
            ImageNet.

    Raises:
        ValueError: `size` is below 1, or `resize` is below `size`.
    """

    size: int = 224
    resize: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or (self.resize is not None and self.resize < self.size):
            raise ValueError(f"size must be at least 1 and resize at least size, got {self.size} and {self.resize}.")

    def __call__(self, image: Image, draw: random.Random) -> Image:
        width, height = image.size
        short = round(self.size * 256 / 224) if self.resize is None else self.resize
        # Crop in the coordinates of the file: this interpolates once and computes nothing outside the crop.
        side = min(width, height) * self.size / short
        left, top = (width - side) / 2, (height - side) / 2
        return _resized(image, (left, top, left + side, top + side), self.size)


@dataclass(frozen=True)
class RandomCrop:
    """Random resized crop for training: a random part of the image, resized to a square.

    The area of the part, as a share of the image, is uniform in `scale`. The logarithm of its aspect ratio (width over
    height) is uniform between the logarithms of `ratio`. A part that does not fit into the image is drawn again. After
    ten attempts, the largest centred part with an allowed aspect ratio is used. `flatmin.data.augment.Augment` does the
    mirroring.

    Args:
        size: side of the result in pixels. Default 224.
        scale: smallest and largest share of the area. Default (0.08, 1) (Szegedy et al. 2015).
        ratio: smallest and largest aspect ratio. Default (3/4, 4/3), from the same source.

    Raises:
        ValueError: `size` is below 1, or the bounds are out of range or not in order.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(
                "size must be at least 1, scale must be ascending in (0, 1] and ratio ascending and above 0, "
                f"got {self.size}, {self.scale} and {self.ratio}."
            )

    def __call__(self, image: Image, draw: random.Random) -> Image:
        return _resized(image, self.box(*image.size, draw), self.size)

    def box(self, width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the part in whole pixels.

        Each attempt draws area and aspect ratio; the accepted one also draws left and top. Only `random()` is used,
        because Python guarantees that its numbers are the same in all versions.
        """
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_ATTEMPTS):
            area = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * draw.random())
            ratio = math.exp(low + (high - low) * draw.random())
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left = int((width - w + 1) * draw.random())
                top = int((height - h + 1) * draw.random())
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


def read_image(
    path: str | os.PathLike[str], view: ImageView, *, seed: int = 0, epoch: int = 0, index: int = 0
) -> Tensor:
    """Read an image file as a square RGB image of bytes.

    8-bit grey images, palettes and transparency are converted to RGB. More than 8 bits per channel raise an error. The
    EXIF orientation is not applied, as in most published training code.

    Args:
        path: the file.
        view: `Centre` or `RandomCrop`.
        seed: seed of the view. What `RandomCrop` draws depends only on `seed`, `epoch` and `index`. Default 0.
        epoch: number of the epoch. Default 0.
        index: index of the file in its data set. Default 0.

    Returns:
        Shape (3, size, size), uint8.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        UnreadableError: the file cannot be read as an image.
    """
    planes = read_planes(path, view, seed=seed, epoch=epoch, index=index)
    return torch.frombuffer(bytearray(planes), dtype=torch.uint8).view(3, view.size, view.size)


def read_planes(
    path: str | os.PathLike[str], view: ImageView, *, seed: int = 0, epoch: int = 0, index: int = 0
) -> bytes:
    """Like `read_image`, but return bytes, channel after channel.

    Uses no torch operation, because each reading thread would then start torch's own threads.
    """
    images = pillow()
    draw = random.Random(f"{seed}/{epoch}/{index}")
    try:
        with images.open(path) as file:
            _check_depth(file)
            image = file.convert("RGB")
    except Exception as error:  # what a decoder raises on a broken file has no common type
        raise _unreadable(path, error) from error
    return b"".join(channel.tobytes() for channel in view(image, draw).split())


def check_header(path: str | os.PathLike[str]) -> None:
    """Raise UnreadableError unless the file has a valid image header. Truncated files are not detected."""
    try:
        with pillow().open(path) as file:
            _check_depth(file)
    except Exception as error:
        raise _unreadable(path, error) from error


class UnreadableError(ValueError):
    """Raised for a file that cannot be read as an image."""


def _unreadable(path: str | os.PathLike[str], error: Exception) -> UnreadableError:
    return UnreadableError(f"{path} cannot be read as an image: {error}; replace the file or remove it.")


def _check_depth(file: Image) -> None:
    if file.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels have more than 8 bits (mode {file.mode})")


def _resized(image: Image, box: tuple[float, float, float, float], size: int) -> Image:
    """Resize a part of the image to a square, with antialiased bilinear interpolation."""
    return image.resize((size, size), pillow().Resampling.BILINEAR, box=box)


def pillow() -> Any:
    """Import and return the module PIL.Image.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
    """
    try:
        import PIL.Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading image files needs Pillow: {install('vision')}.") from error
    return PIL.Image
