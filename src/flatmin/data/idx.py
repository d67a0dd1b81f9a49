"""Data in the format of MNIST (idx files, plain or .gz): MNIST, Fashion-MNIST, KMNIST.

A file is two zero bytes, one byte for the type of the numbers (8: unsigned bytes), one for the number of dimensions,
then each dimension as a 32-bit integer, most significant byte first, then the numbers, the last dimension fastest.

Source: Y. LeCun, C. Cortes, C. J. C. Burges, The MNIST database of handwritten digits; H. Xiao, K. Rasul, R. Vollgraf,
Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, 2017.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from flatmin.data.augment import Augment
from flatmin.data.dataset import Data, Split
from flatmin.data.official import three_parts

_UNSIGNED_BYTE = 8


def load_idx(
    folder: str | os.PathLike[str],
    *,
    name: str = "mnist",
    num_classes: int = 10,
    validation: float | None = 0.1,
    split_seed: int = 42,
    stratified: bool = False,
    augment: Augment | None = None,
) -> Data:
    """A data set of four idx files as bytes in three parts; of MNIST 54 000 train, 6000 validation, 10 000 test.

    Pixels stay bytes; `flatmin.data.augment` normalises each batch with the statistics of the training part. The
    validation part is drawn by `flatmin.data.images.split_validation`.

    Args:
        folder: as in `read_idx_parts`.
        name: what tables and errors call it. Default "mnist".
        num_classes: K. Default 10.
        validation: share of the training images; None: see `three_parts`. Default 0.1.
        split_seed: of the split. Default 42.
        stratified: give every class the same share in the validation part. Default False.
        augment: of the training images. Default None: none, as mirrored digits are none.

    Returns:
        x of shape (n, 1, H, W), uint8.

    Raises:
        FileNotFoundError, ValueError: as `read_idx_parts`, `split_validation` and `Data`.
    """
    train, test = read_idx_parts(folder)
    return three_parts(
        train,
        test,
        num_classes=num_classes,
        name=name,
        validation=validation,
        split_seed=split_seed,
        stratified=stratified,
        augment=augment,
    )


def read_idx_parts(folder: str | os.PathLike[str]) -> tuple[Split, Split]:
    """The official training and test part, in their order.

    Args:
        folder: holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the two of t10k, plain or with .gz; or has
            a subfolder `raw` that does.

    Returns:
        Train and test: x of shape (n, 1, H, W), uint8, and int64 labels.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file of another format or size, or as many labels as images are not there.
    """
    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"there is no folder {place}; name the one that holds train-images-idx3-ubyte.")
    if (place / "raw").is_dir():
        place /= "raw"
    return _part(place, "train"), _part(place, "t10k")


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """The numbers of one idx file of unsigned bytes, in their shape; a name that ends in .gz is unpacked.

    Returns:
        uint8.

    Raises:
        ValueError: another format, another type of numbers, or fewer or more bytes than the header says.
    """
    path = Path(path)
    if path.suffix == ".gz":
        try:
            with gzip.open(path, "rb") as file_object:
                data = file_object.read()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be unpacked: {error}; get the file again.") from error
    else:
        data = path.read_bytes()
    if len(data) < 4 or data[:2] != b"\0\0" or data[3] == 0:
        raise ValueError(
            f"{path} is no idx file: it starts with the bytes {data[:4].hex(' ')}, expected 00 00 08 and the number "
            "of dimensions; get the original file."
        )
    kind, dimensions = data[2], data[3]
    if kind != _UNSIGNED_BYTE:
        raise ValueError(
            f"{path} holds numbers of type {kind:#04x}, expected 0x08, unsigned bytes; convert them first."
        )
    begin = 4 + 4 * dimensions
    if len(data) < begin:
        raise ValueError(f"{path} has {len(data)} bytes, expected {begin} for the header alone; get the file again.")
    shape = struct.unpack(f">{dimensions}I", data[4:begin])
    expected = begin + math.prod(shape)
    if len(data) != expected:
        raise ValueError(
            f"{path} has {len(data)} bytes, expected {expected} for shape {shape}; it is cut short or damaged: "
            "get the file again."
        )
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=begin).view(shape)


def _part(place: Path, prefix: str) -> Split:
    images, labels = _find(place, prefix, "images", 3), _find(place, prefix, "labels", 1)
    x, y = read_idx(images), read_idx(labels)
    if x.dim() != 3:
        raise ValueError(f"{images} has shape {tuple(x.shape)}, expected (n, rows, columns).")
    if y.dim() != 1 or len(y) != len(x):
        raise ValueError(
            f"{labels} has shape {tuple(y.shape)}, expected ({len(x)},), one label per image of {images.name}."
        )
    return Split(x.unsqueeze(1), y.long())


def _find(place: Path, prefix: str, what: str, dimensions: int) -> Path:
    # Some copies have a dot where the original has a hyphen.
    names = [f"{prefix}-{what}{dot}idx{dimensions}-ubyte{end}" for end in ("", ".gz") for dot in "-."]
    for name in names:
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(f"{place / names[0]} is missing, plain or with .gz; name the folder that holds it.")
