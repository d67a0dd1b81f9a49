"""Image files in one folder per class: ImageNet, Tiny-ImageNet, and data of one's own. Needs Pillow.

`scan_folder` lists the files, a `Centre` or `RandomCrop` says how one file becomes a square of bytes, and `FileLoader`
makes batches with worker processes. What a batch holds depends on the seed and the epoch alone, not on the number of
workers.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flatmin.data.base import Split

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")

_ATTEMPTS = 10


@dataclass(frozen=True)
class Files:
    """Image files with their labels.

    Args:
        root: the folder.
        classes: names in alphabetical order; the position is the label.
        paths: of the files, relative to the root, class by class and in alphabetical order within each.
        labels: one per file.
    """

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def counts(self) -> dict[str, int]:
        """Files of each class."""
        counts = dict.fromkeys(self.classes, 0)
        for label in self.labels:
            counts[self.classes[label]] += 1
        return counts


def scan_folder(root: str | os.PathLike[str], *, classes: Sequence[str] | None = None) -> Files:
    """The image files of root/CLASS/, subfolders included, as in ImageNet's and Tiny-ImageNet's `train`.

    Files with other endings than `SUFFIXES` and names that begin with a dot are passed over.

    Args:
        root: one folder per class.
        classes: those of the training part, so that a validation part gets the same labels. Default: the folders'.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class, a class without images, or a folder that is none of `classes`.
    """
    root = _folder(root)
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ValueError(f"{root} holds no folders; expected one folder of images per class.")
    known = tuple(sorted(found if classes is None else classes))
    for name in found:
        if name not in known:
            raise ValueError(f"{root / name} is none of the {len(known)} classes of the training part; remove it.")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(known):
        own = _images_below(root, name)
        if not own:
            raise ValueError(
                f"{root / name} holds no images, expected files that end in {', '.join(SUFFIXES)}; add some or remove "
                "the class."
            )
        paths += own
        labels += [label] * len(own)
    return Files(root, known, tuple(paths), tuple(labels))


def scan_annotated(root: str | os.PathLike[str], *, classes: Sequence[str]) -> Files:
    """The files of Tiny-ImageNet's `val`: root/images/, with the class of each in root/val_annotations.txt.

    A line there is the file's name and its class, and four numbers of a bounding box that are not read, between tabs.

    Args:
        root: holds `images` and `val_annotations.txt`.
        classes: those of the training part.

    Raises:
        FileNotFoundError: the list, or a file that it names, is missing.
        ValueError: a line of another form, or a class that is none of `classes`.
    """
    root = _folder(root)
    table = root / "val_annotations.txt"
    if not table.is_file():
        raise FileNotFoundError(
            f"{table} is missing; name the val folder of Tiny-ImageNet, or use scan_folder for one folder per class."
        )
    known = tuple(sorted(classes))
    label_of = {name: label for label, name in enumerate(known)}
    there = set(os.listdir(_folder(root / "images")))
    rows = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise ValueError(f"{table}, line {number}: expected a file and its class between tabs, got {line!r}.")
        file, name = fields[0], fields[1].strip()
        if name not in label_of:
            raise ValueError(
                f"{table}, line {number}: {name!r} is none of the {len(known)} classes of the training part."
            )
        if file not in there:
            raise FileNotFoundError(
                f"{table}, line {number}: {root / 'images' / file} is missing; unpack the data again."
            )
        rows.append((label_of[name], f"images/{file}"))
    if not rows:
        raise ValueError(f"{table} is empty; unpack the data again.")
    rows.sort()
    return Files(root, known, tuple(path for _, path in rows), tuple(label for label, _ in rows))


class View(Protocol):
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


def read_image(path: str | os.PathLike[str], view: View, *, seed: int = 0, epoch: int = 0, index: int = 0) -> Tensor:
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
        ValueError: the file cannot be read as an image.
    """
    pillow = _pillow()
    draw = random.Random(f"{seed}/{epoch}/{index}")
    try:
        with pillow.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are of more than 8 bits (mode {file.mode})")
            image = file.convert("RGB")
    except Exception as error:  # what a decoder raises on a broken file has no common type
        raise _UnreadableError(f"{path} cannot be read as an image: {error}; replace the file or remove it.") from error
    square = view(image, draw)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(view.size, view.size, 3).permute(2, 0, 1).contiguous()


class FileLoader:
    """Batches of image files as bytes, read by worker processes that live from epoch to epoch.

    Order and crops depend on (seed, epoch) alone: the batches are the same for any number of workers, and an epoch
    can be read again or alone, but not two of them at the same time. The global random state is not used.

    Args:
        files: from `scan_folder` or `scan_annotated`.
        view: `RandomCrop` for training, `Centre` for evaluation.
        batch_size: images in a batch; the last one of an epoch may be smaller.
        shuffle: a new order every epoch. Default True; else the order of `files`.
        drop_last: leave out a last batch that is smaller. Default False.
        workers: processes; 0 reads in this one. Default 0.
        pin_memory: put batches where a copy to a CUDA device need not wait. Default False.
        seed: of order and crops. Default 0.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: a batch size below 1, a negative number of workers, or no batch at all.

    Example::

        files = scan_folder("imagenet/train")
        loader = FileLoader(files, RandomCrop(224), batch_size=256, workers=8)
        for epoch in range(90):
            for x, y in loader.epoch(epoch):
                x = augment(x.to(device), statistics, generator)  # Augment(crop=0, cutout=0): mirror, normalise
    """

    def __init__(
        self,
        files: Files,
        view: View,
        *,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        _pillow()
        if batch_size < 1 or workers < 0:
            raise ValueError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {workers}.")
        if not len(files) or (drop_last and batch_size > len(files)):
            raise ValueError(
                f"{files.root} has {len(files)} images, which make no batch of {batch_size}; use a smaller batch_size."
            )
        self.files, self.view = files, view
        self._order = _Order(len(files), batch_size, shuffle, drop_last, seed)
        self._loader: DataLoader[Any] = DataLoader(
            _Reader(files, view, seed),
            batch_sampler=self._order,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            # Its own generator: without one, every epoch would take a number from the global one.
            generator=torch.Generator().manual_seed(seed),
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._order)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: x of shape (b, 3, size, size), uint8, and y of shape (b,), int64.

        Raises:
            ValueError: a file cannot be read as an image.
        """
        self._order.epoch = number
        for batch in self._loader:
            if isinstance(batch, str):
                raise ValueError(batch)
            yield batch


def load_files(files: Files, view: View, *, workers: int = 0, seed: int = 0) -> Split:
    """Every image as epoch 0 of the seed has it, in the order of `files`, in memory: n * 3 * size^2 bytes.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: no files, or one that cannot be read as an image.
    """
    loader = FileLoader(files, view, batch_size=64, shuffle=False, workers=workers, seed=seed)
    x = torch.empty(len(files), 3, view.size, view.size, dtype=torch.uint8)
    for k, (part, _) in enumerate(loader.epoch(0)):
        x[64 * k : 64 * k + len(part)] = part
    return Split(x, torch.tensor(files.labels, dtype=torch.int64))


class _UnreadableError(ValueError):
    """A file that no decoder reads."""


class _Order:
    """Batches of (epoch, index): the epoch travels with the index, so workers that live on need not be told."""

    def __init__(self, n: int, batch_size: int, shuffle: bool, drop_last: bool, seed: int) -> None:
        self.n, self.batch_size, self.shuffle, self.drop_last, self.seed = n, batch_size, shuffle, drop_last, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(range(self.n))
        if self.shuffle:
            state = random.Random(f"{self.seed}/{self.epoch}").getrandbits(63)
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(state)).tolist()
        epoch = self.epoch
        for k in range(len(self)):
            yield [(epoch, index) for index in order[k * self.batch_size : (k + 1) * self.batch_size]]


class _Reader(Dataset["tuple[Tensor, int] | str"]):
    """One image and its label, or why there is none: an exception would reach the user as a worker's traceback."""

    def __init__(self, files: Files, view: View, seed: int) -> None:
        self.files, self.view, self.seed = files, view, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        epoch, index = key
        path = self.files.root / self.files.paths[index]
        try:
            return read_image(path, self.view, seed=self.seed, epoch=epoch, index=index), self.files.labels[index]
        except _UnreadableError as error:
            return str(error)


def _collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    images, labels = [], []
    for item in items:
        if isinstance(item, str):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


def _resized(image: Image, box: tuple[float, float, float, float], size: int) -> Image:
    """A part of the image as a square, bilinear with the area of a pixel taken into account (antialiased)."""
    return image.resize((size, size), _pillow().Resampling.BILINEAR, box=box)


def _pillow() -> Any:
    try:
        import PIL.Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('reading image files needs Pillow: pip install "flatmin[vision]".') from error
    return PIL.Image


def _folder(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}; name the one with the unpacked images.")
    return path


def _images_below(root: Path, name: str) -> list[str]:
    """Image files below root/name, relative to the root, in alphabetical order."""
    found = []
    for place, folders, files in os.walk(root / name):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        below = Path(place).relative_to(root)
        for file in files:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                found.append((below / file).as_posix())
    return sorted(found)
