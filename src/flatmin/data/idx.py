"""Reader for the format of MNIST (idx files, plain or .gz): MNIST, Fashion-MNIST, KMNIST.

A file consists of two zero bytes, one byte for the data type (8: unsigned bytes), one byte for the number of
dimensions, the dimensions as big-endian 32-bit integers, and the values with the last dimension varying fastest.

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
    """Load a data set of four idx files. MNIST has 54 000 training, 6000 validation and 10 000 test images.

    Pixels stay bytes. `flatmin.data.augment` normalises each batch with the statistics of the official training part.
    The validation part is drawn by `flatmin.data.images.split_validation`.

    Args:
        folder: see `read_idx_parts`.
        name: name for tables and error messages. Default "mnist".
        num_classes: number of classes, K. Default 10.
        validation: share of the training images used for validation; None: see `three_parts`. Default 0.1.
        split_seed: seed of the validation split. Default 42.
        stratified: give each class the same share in the validation part. Default False.
        augment: augmentation of the training images. Default None: no augmentation, since a mirrored digit is not a
            digit.

    Returns:
        The data: x of shape (n, 1, H, W), uint8.

    Raises:
        FileNotFoundError, ValueError: see `read_idx_parts`, `split_validation` and `Data`.
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
    """Read the official training and test parts, in the order of the files.

    Args:
        folder: folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
            t10k-labels-idx1-ubyte, plain or with .gz, or with a subfolder `raw` that contains them.

    Returns:
        The training and the test part: x of shape (n, 1, H, W), uint8, and int64 labels.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file has another format or size, or the numbers of images and labels differ.
    """
    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"there is no folder {place}; give the folder with train-images-idx3-ubyte.")
    if (place / "raw").is_dir():
        place /= "raw"
    return _part(place, "train"), _part(place, "t10k")


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """Read one idx file of unsigned bytes. A file whose name ends in .gz is decompressed.

    Returns:
        The values as uint8, in the shape given in the header.

    Raises:
        ValueError: the file has another format, another data type, or not as many bytes as the header says.
    """
    path = Path(path)
    if path.suffix == ".gz":
        try:
            with gzip.open(path, "rb") as file_object:
                data = file_object.read()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be decompressed: {error}; download the file again.") from error
    else:
        data = path.read_bytes()
    if len(data) < 4 or data[:2] != b"\0\0" or data[3] == 0:
        raise ValueError(
            f"{path} is not an idx file: it starts with the bytes {data[:4].hex(' ')}, expected 00 00 08 and the "
            "number of dimensions; download the original file."
        )
    kind, dimensions = data[2], data[3]
    if kind != _UNSIGNED_BYTE:
        raise ValueError(
            f"{path} contains values of type {kind:#04x}, expected 0x08 (unsigned bytes); convert them first."
        )
    begin = 4 + 4 * dimensions
    if len(data) < begin:
        raise ValueError(
            f"{path} has {len(data)} bytes, expected {begin} for the header alone; download the file again."
        )
    shape = struct.unpack(f">{dimensions}I", data[4:begin])
    expected = begin + math.prod(shape)
    if len(data) != expected:
        raise ValueError(
            f"{path} has {len(data)} bytes, expected {expected} for shape {shape}; it is incomplete or damaged: "
            "download the file again."
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
    # Some copies of the files have a dot where the original name has a hyphen.
    names = [f"{prefix}-{what}{dot}idx{dimensions}-ubyte{end}" for end in ("", ".gz") for dot in "-."]
    for name in names:
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(f"{place / names[0]} (or the same with .gz) is missing; give the folder that contains it.")
