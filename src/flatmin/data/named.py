"""The table of data sets: every name, how it is read, and which classes are easily confused.

A new data set is one reader and one line here; the trainer, the command line and the docs go through the table.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from flatmin.data import cifar, digits, idx
from flatmin.data.augment import Augment
from flatmin.data.base import HELD, Data, Split
from flatmin.data.folder import Files, scan_annotated, scan_folder
from flatmin.data.images import IMAGENET
from flatmin.data.loader import load_files
from flatmin.data.noise import CIFAR10_CONFUSIONS, CIFAR100_CONFUSIONS
from flatmin.data.official import three_parts
from flatmin.data.streamed import FileImages
from flatmin.data.views import Centre
from flatmin.words import suggest

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a data set is to be read.

    Args:
        folder: where the files are, for sets that are files.
        validation: share of the official training part for validation; None: train on all of it and validate on the
            test part. Sets with a validation part of their own keep it.
        split_seed: of the drawn validation part.
        image_size: side of the images, for folders of image files; None: the set's own.
        workers: processes that read image files, and threads where they are read for evaluation.
        download: get what is missing, where that is possible.
        progress: called with the bytes so far and in all while something is downloaded.
    """

    folder: str | os.PathLike[str] = "data"
    validation: float | None = 0.1
    split_seed: int = 42
    image_size: int | None = None
    workers: int = 0
    download: bool = False
    progress: Progress | None = None


@dataclass(frozen=True)
class Known:
    """A data set of the table.

    Args:
        read: its reader.
        confusions: each class to the one it is taken for, for asymmetric noise.
        downloads: whether the reader can get what is missing.
        train: samples of the official training part, before a validation part is taken from it; None: see the data.
        shape: of an image as it is read without `image_size`, (C, H, W); None: see the data.
        classes: K; None: see the data.
    """

    read: Callable[[Reading], Data]
    confusions: Mapping[int, int] | None = None
    downloads: bool = False
    train: int | None = None
    shape: tuple[int, int, int] | None = None
    classes: int | None = None


def _digits(reading: Reading) -> Data:
    found = digits.load_digits(split_seed=reading.split_seed)
    if reading.validation is None:
        raise ValueError("the digits have a validation part of their own; train_on_val is for official releases.")
    return found


def _cifar(name: str, coarse: bool, reading: Reading) -> Data:
    return cifar.load_cifar(
        name,
        reading.folder,
        coarse=coarse,
        validation=reading.validation,
        split_seed=reading.split_seed,
        download=reading.download,
        progress=reading.progress,
    )


def _idx(name: str, augment: Augment | None, reading: Reading) -> Data:
    own = Path(reading.folder) / name
    return idx.load_idx(
        own if own.is_dir() else reading.folder,
        name=name,
        validation=reading.validation,
        split_seed=reading.split_seed,
        augment=augment,
    )


def _tiny_imagenet(reading: Reading) -> Data:
    """Its `val` is the test part, as its `test` has no labels."""
    root = _root(reading, "tiny-imagenet-200")
    files = scan_folder(root / "train")
    train = _bytes(files, reading, 64)
    test = _bytes(scan_annotated(root / "val", classes=files.classes), reading, 64)
    return _drawn(train, test, len(files.classes), "tiny-imagenet", reading)


def _imagenet(reading: Reading) -> Data:
    """ILSVRC 2012 with one folder per class in `train` and `val`, whose images are the test part; read when needed."""
    root = _root(reading, "imagenet")
    files = scan_folder(root / "train")
    test = scan_folder(root / "val", classes=files.classes)
    return _drawn(_files(files, reading, 224), _files(test, reading, 224), len(files.classes), "imagenet", reading)


def _sorted(name: str, reading: Reading) -> Data:
    """Folders `train` and `test` with one folder per class, read when needed."""
    root = _root(reading, name)
    files = scan_folder(root / "train")
    test = scan_folder(root / "test", classes=files.classes)
    return _drawn(_files(files, reading, 224), _files(test, reading, 224), len(files.classes), name, reading)


def _images(reading: Reading) -> Data:
    """Folders `train` and `test` or `val`, one folder per class in each; with both, `val` is for validation.

    Squares of 64 pixels or `image_size`. Up to 4 GiB of them in all are read once, the middle of each file, kept in
    memory, normalised with the statistics of the training part, and moved by an eighth of the side for training.
    More stay files that are read again every epoch, as ImageNet's: random parts for training, the middle after a
    resize to 256/224 of the side for evaluation, normalised with ImageNet's statistics.
    """
    root = Path(reading.folder)
    files = scan_folder(root / "train")
    others = [name for name in ("val", "test") if (root / name).is_dir()]
    if not others:
        raise FileNotFoundError(
            f"{root} has neither a folder `test` nor `val` beside `train`; expected one folder per class in them."
        )
    found = [files, *(scan_folder(root / name, classes=files.classes) for name in others)]
    side = reading.image_size or 64
    read = _bytes if 3 * side**2 * sum(map(len, found)) <= HELD else _files
    train, *rest = [read(part, reading, side) for part in found]
    data = _drawn(train, rest[-1], len(files.classes), root.resolve().name, reading)
    # A validation part of its own leaves the training part whole.
    whole = len(rest) == 1 or reading.validation is None
    return data if whole else dataclasses.replace(data, train=train, val=rest[0])


def _root(reading: Reading, name: str) -> Path:
    own = Path(reading.folder) / name
    return own if own.is_dir() else Path(reading.folder)


def _bytes(files: Files, reading: Reading, size: int) -> Split:
    """The images in memory."""
    side = reading.image_size or size
    return load_files(files, Centre(side, resize=side), workers=reading.workers)


def _files(files: Files, reading: Reading, size: int) -> Split:
    """The images as files."""
    x = FileImages(files, Centre(reading.image_size or size), workers=reading.workers)
    return Split(x, torch.tensor(files.labels, dtype=torch.int64))


def _drawn(train: Split, test: Split, classes: int, name: str, reading: Reading) -> Data:
    streamed = isinstance(train.x, FileImages)
    return three_parts(
        train,
        test,
        num_classes=classes,
        name=name,
        validation=reading.validation,
        split_seed=reading.split_seed,
        statistics=IMAGENET if streamed else None,
        # Random parts are cut where the file is read.
        augment=Augment(crop=0 if streamed else train.x.shape[2] // 8, cutout=0),
    )


_RGB, _GREY = (3, 32, 32), (1, 28, 28)

DATASETS: dict[str, Known] = {
    "digits": Known(_digits),
    "cifar10": Known(partial(_cifar, "cifar10", False), CIFAR10_CONFUSIONS, True, 50_000, _RGB, 10),
    "cifar100": Known(partial(_cifar, "cifar100", False), CIFAR100_CONFUSIONS, True, 50_000, _RGB, 100),
    "cifar100-coarse": Known(partial(_cifar, "cifar100", True), None, True, 50_000, _RGB, 20),
    "mnist": Known(partial(_idx, "mnist", None), train=60_000, shape=_GREY, classes=10),
    "fashion-mnist": Known(
        partial(_idx, "fashion-mnist", Augment(crop=2, cutout=0)), train=60_000, shape=_GREY, classes=10
    ),
    "tiny-imagenet": Known(_tiny_imagenet, train=100_000, shape=(3, 64, 64), classes=200),
    "imagenet": Known(_imagenet, train=1_281_167, shape=(3, 224, 224), classes=1000),
    "flowers102": Known(partial(_sorted, "flowers102"), train=2040, shape=(3, 224, 224), classes=102),
    "pets": Known(partial(_sorted, "pets"), train=3680, shape=(3, 224, 224), classes=37),
    "images": Known(_images),
}


def read_named(name: str, reading: Reading) -> Data:
    """A data set of the table.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError, ValueError, ModuleNotFoundError, OSError: what its reader raises.
    """
    if name not in DATASETS:
        raise ValueError(
            f"unknown data {name!r}{suggest(name, DATASETS)} (data: {', '.join(DATASETS)}, or package.module:function)"
        )
    return DATASETS[name].read(reading)
