"""The table of data sets: each name, its reader, and which classes are easily confused.

To add a data set, write a reader and add one line here. The trainer, the command line and the docs use this table.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from flatmin.data import cifar, digits, idx
from flatmin.data.augment import Augment
from flatmin.data.dataset import HELD, Data, Split
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
    """Options for reading a data set.

    Args:
        folder: folder with the files, for data sets that are read from files. Default "data".
        validation: share of the official training part used for validation. None: train on the whole training part and
            validate on the test part. Data sets with their own validation part keep it. Default 0.1.
        split_seed: seed with which the validation part is drawn. Default 42.
        image_size: height and width of the images, for folders of image files. Default None: the size of the data set.
        workers: number of processes that read image files for training, and of threads that read them for evaluation.
            Default 0: no further process or thread.
        download: download missing files, where the reader supports it. Default False.
        progress: called during a download with the bytes so far and the total number of bytes. Default None.
    """

    folder: str | os.PathLike[str] = "data"
    validation: float | None = 0.1
    split_seed: int = 42
    image_size: int | None = None
    workers: int = 0
    download: bool = False
    progress: Progress | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """An entry of the table of data sets.

    Args:
        read: function that reads the data set.
        scan: function that lists the image files of each part, for data sets that are folders of images.
        shipped: whether the data set is part of a Python package and so the same for every user.
        confusions: maps each class to the class it is confused with, for asymmetric label noise.
        downloads: whether the reader can download missing files.
        train: size of the official training part, before a validation part is taken from it. None: known only after
            reading.
        shape: shape of an image read without `image_size`, (C, H, W). None: known only after reading.
        classes: number of classes, K. None: known only after reading.
    """

    read: Callable[[Reading], Data]
    scan: Callable[[Reading], list[Files]] | None = field(default=None, kw_only=True)
    shipped: bool = field(default=False, kw_only=True)
    confusions: Mapping[int, int] | None = None
    downloads: bool = False
    train: int | None = None
    shape: tuple[int, int, int] | None = None
    classes: int | None = None


def _digits(reading: Reading) -> Data:
    loaded = digits.load_digits(split_seed=reading.split_seed)
    if reading.validation is None:
        raise ValueError(
            "the digits data set has its own validation part, so train_on_val cannot be used with it; leave it out."
        )
    return loaded


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


def _scan_tiny_imagenet(reading: Reading) -> list[Files]:
    root = _root(reading, "tiny-imagenet-200")
    files = scan_folder(root / "train")
    return [files, scan_annotated(root / "val", classes=files.classes)]


def _tiny_imagenet(reading: Reading) -> Data:
    """Tiny-ImageNet. Its `val` folder is the test part, because its `test` folder has no labels."""
    files = _scan_tiny_imagenet(reading)
    train, test = (_bytes(part, reading, 64) for part in files)
    return _drawn(train, test, files, "tiny-imagenet", reading)


def _scan_sorted(name: str, test: str, reading: Reading) -> list[Files]:
    root = _root(reading, name)
    files = scan_folder(root / "train")
    return [files, scan_folder(root / test, classes=files.classes)]


def _sorted(name: str, test: str, reading: Reading) -> Data:
    """Folders `train` and `test` (a name), with one folder per class in each; images are read on demand.

    The test folder of ILSVRC 2012 is `val`.
    """
    files = _scan_sorted(name, test, reading)
    parts = [_files(part, reading, 224) for part in files]
    return _drawn(parts[0], parts[1], files, name, reading)


def _scan_images(reading: Reading) -> list[Files]:
    root = Path(reading.folder)
    files = scan_folder(root / "train")
    others = [name for name in ("val", "test") if (root / name).is_dir()]
    if not others:
        raise FileNotFoundError(
            f"{root} has neither a `test` nor a `val` folder beside `train`; add one, with one folder per class in it."
        )
    return [files, *(scan_folder(root / name, classes=files.classes) for name in others)]


def _images(reading: Reading) -> Data:
    """Folders `train` and `test` or `val`, with one folder per class in each. With both, `val` is for validation.

    Images become squares of `image_size` pixels (default 64). If all images together take at most 4 GiB, the centre
    square of each file is read once and kept in memory. Images are then normalised with the statistics of the training
    part, and training crops are shifted by up to an eighth of the side. Larger data sets are read from the files in
    every epoch, as ImageNet is: random crops for training, the centre crop after a resize to 256/224 of the side for
    evaluation, both normalised with ImageNet's statistics.
    """
    scanned = _scan_images(reading)
    side = reading.image_size or 64
    read = _bytes if 3 * side**2 * sum(map(len, scanned)) <= HELD else _files
    train, *rest = [read(part, reading, side) for part in scanned]
    data = _drawn(train, rest[-1], scanned, Path(reading.folder).resolve().name, reading)
    # With a `val` folder, nothing is taken from the training part.
    whole = len(rest) == 1 or reading.validation is None
    return data if whole else dataclasses.replace(data, train=train, val=rest[0])


def _root(reading: Reading, name: str) -> Path:
    own = Path(reading.folder) / name
    return own if own.is_dir() else Path(reading.folder)


def _bytes(files: Files, reading: Reading, size: int) -> Split:
    """The images of the files, in memory."""
    side = reading.image_size or size
    return load_files(files, Centre(side, resize=side), workers=reading.workers)


def _files(files: Files, reading: Reading, size: int) -> Split:
    """The images of the files, read on demand."""
    x = FileImages(files, Centre(reading.image_size or size), workers=reading.workers)
    return Split(x, torch.tensor(files.labels, dtype=torch.int64))


def _drawn(train: Split, test: Split, files: Sequence[Files], name: str, reading: Reading) -> Data:
    streamed = isinstance(train.x, FileImages)
    data = three_parts(
        train,
        test,
        num_classes=len(files[0].classes),
        name=name,
        validation=reading.validation,
        split_seed=reading.split_seed,
        statistics=IMAGENET if streamed else None,
        # Streamed images are cropped when the file is read.
        augment=Augment(crop=0 if streamed else train.x.shape[2] // 8, cutout=0),
    )
    return dataclasses.replace(data, notes=tuple(note for part in files for note in part.notes))


def _folders(name: str, test: str, train: int, classes: int) -> DatasetInfo:
    read, scan = partial(_sorted, name, test), partial(_scan_sorted, name, test)
    return DatasetInfo(read, scan=scan, train=train, shape=(3, 224, 224), classes=classes)


_RGB, _GREY = (3, 32, 32), (1, 28, 28)

DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo(_digits, shipped=True),
    "cifar10": DatasetInfo(partial(_cifar, "cifar10", False), CIFAR10_CONFUSIONS, True, 50_000, _RGB, 10),
    "cifar100": DatasetInfo(partial(_cifar, "cifar100", False), CIFAR100_CONFUSIONS, True, 50_000, _RGB, 100),
    "cifar100-coarse": DatasetInfo(partial(_cifar, "cifar100", True), None, True, 50_000, _RGB, 20),
    "mnist": DatasetInfo(partial(_idx, "mnist", None), train=60_000, shape=_GREY, classes=10),
    "fashion-mnist": DatasetInfo(
        partial(_idx, "fashion-mnist", Augment(crop=2, cutout=0)), train=60_000, shape=_GREY, classes=10
    ),
    "tiny-imagenet": DatasetInfo(
        _tiny_imagenet, scan=_scan_tiny_imagenet, train=100_000, shape=(3, 64, 64), classes=200
    ),
    "imagenet": _folders("imagenet", "val", 1_281_167, 1000),
    "flowers102": _folders("flowers102", "test", 2040, 102),
    "pets": _folders("pets", "test", 3680, 37),
    "images": DatasetInfo(_images, scan=_scan_images),
}


def read_named(name: str, reading: Reading) -> Data:
    """Read a data set of the table.

    Args:
        name: a key of `DATASETS`.
        reading: how to read it.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError, ValueError, ModuleNotFoundError, OSError: from the reader.
    """
    if name not in DATASETS:
        raise ValueError(
            f"unknown data {name!r}{suggest(name, DATASETS)} (data: {', '.join(DATASETS)}, or package.module:function)"
        )
    return DATASETS[name].read(reading)
