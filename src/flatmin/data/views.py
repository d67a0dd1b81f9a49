"""How an image file becomes a square of bytes: `Centre` for evaluation, `RandomCrop` for training. Needs Pillow."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

_ATTEMPTS = 10


class ImageView(Protocol):
    """How an opened image becomes a square; `draw` is the file's own generator of this epoch."""

    @property
    def size(self) -> int:
        """Side of the square in pixels."""

    def __call__(self, image: Image, draw: random.Random) -> Image:
        """The square."""


@dataclass(frozen=True)
class Centre:
    """The middle of the image, for evaluation: the shorter side becomes `resize`, then size x size is cut.

    Args:
        size: side of the result. Default 224.
        resize: length of the shorter side before the cut. Default size * 256 / 224, rounded, as usual for ImageNet.

    Raises:
        ValueError: sizes below 1, or a cut larger than the image.
    """

    size: int = 224
    resize: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or (self.resize is not None and self.resize < self.size):
            raise ValueError(f"size must be at least 1 and resize at least size, got {self.size} and {self.resize}.")

    def __call__(self, image: Image, draw: random.Random) -> Image:
        width, height = image.size
        short = round(self.size * 256 / 224) if self.resize is None else self.resize
        # The cut in the coordinates of the file: one interpolation, and nothing outside the cut is computed.
        side = min(width, height) * self.size / short
        left, top = (width - side) / 2, (height - side) / 2
        return _resized(image, (left, top, left + side, top + side), self.size)


@dataclass(frozen=True)
class RandomCrop:
    """A random part of the image, stretched to a square, for training.

    The part's area is uniform in `scale` times that of the image and the logarithm of its ratio of width to height
    uniform in that of `ratio`; a part that does not fit is drawn again, up to ten times, then the largest part in
    the middle with an allowed ratio is taken. Mirroring is left to `flatmin.data.augment.Augment`.

    Args:
        size: side of the result. Default 224.
        scale: smallest and largest share of the area. Default (0.08, 1) (Szegedy et al. 2015).
        ratio: smallest and largest ratio. Default (3/4, 4/3), from the same source.

    Raises:
        ValueError: a size below 1, or bounds that are not in order.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(
                "size must be at least 1, scale ascend within (0, 1] and ratio ascend above 0, "
                f"got {self.size}, {self.scale} and {self.ratio}."
            )

    def __call__(self, image: Image, draw: random.Random) -> Image:
        return _resized(image, self.box(*image.size, draw), self.size)

    def box(self, width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the part in whole pixels.

        Each attempt takes area and ratio from `draw`, the last one left and top as well. Only `random()` is called,
        whose numbers Python keeps from version to version.
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
    """One image file as a square of bytes, in red, green and blue.

    Grey images of 8 bits, palettes and transparency are converted, deeper pixels refused; a rotation in the file's
    notes (EXIF) is not applied, as in most published training code.

    Args:
        path: the file.
        view: `Centre` or `RandomCrop`.
        seed: what `RandomCrop` draws depends on this and the next two alone. Default 0.
        epoch: default 0.
        index: of the file in its data set. Default 0.

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
    """The bytes of `read_image`, channel after channel.

    No operation of torch, whose own threads would be as many again for each thread that reads.
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
    """Raise UnreadableError unless a file begins like an image; whether it is whole only reading it tells."""
    try:
        with pillow().open(path) as file:
            _check_depth(file)
    except Exception as error:
        raise _unreadable(path, error) from error


class UnreadableError(ValueError):
    """A file that no decoder reads."""


def _unreadable(path: str | os.PathLike[str], error: Exception) -> UnreadableError:
    return UnreadableError(f"{path} cannot be read as an image: {error}; replace the file or remove it.")


def _check_depth(file: Image) -> None:
    if file.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels are of more than 8 bits (mode {file.mode})")


def _resized(image: Image, box: tuple[float, float, float, float], size: int) -> Image:
    """A part of the image as a square, bilinear with the area of a pixel taken into account (antialiased)."""
    return image.resize((size, size), pillow().Resampling.BILINEAR, box=box)


def pillow() -> Any:
    """The module PIL.Image.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
    """
    try:
        import PIL.Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading image files needs Pillow: pip install '.[vision]' in a clone of flatmin."
        ) from error
    return PIL.Image
