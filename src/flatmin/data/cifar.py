"""CIFAR-10 and CIFAR-100: 60 000 colour images of 32x32 pixels, from the official binary release.

A record is one label byte (CIFAR-100: two, the coarse one first) and 3072 pixel bytes: the red plane row by row, then
green, then blue. Nothing is downloaded unless asked for.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import tarfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from flatmin.data.augment import Augment
from flatmin.data.dataset import Data, Split
from flatmin.data.images import STATISTICS
from flatmin.data.official import three_parts
from flatmin.words import suggest

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_BLOCK = 1 << 20


@dataclass(frozen=True)
class _Release:
    """What the binary release of one data set consists of; `records` are those of each file."""

    title: str
    url: str
    md5: str
    folders: tuple[str, ...]
    train: tuple[str, ...]
    test: str
    records: dict[str, int]
    classes: tuple[int, ...]  # of each label byte

    @property
    def archive(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def record(self) -> int:
        return len(self.classes) + _PIXELS


_BATCHES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))

RELEASES = {
    "cifar10": _Release(
        title="CIFAR-10",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        folders=("cifar-10-batches-bin", "cifar-10-binary"),
        train=_BATCHES,
        test="test_batch.bin",
        records=dict.fromkeys((*_BATCHES, "test_batch.bin"), 10_000),
        classes=(10,),
    ),
    "cifar100": _Release(
        title="CIFAR-100",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        folders=("cifar-100-binary",),
        train=("train.bin",),
        test="test.bin",
        records={"train.bin": 50_000, "test.bin": 10_000},
        classes=(20, 100),
    ),
}


def load_cifar(
    name: str,
    folder: str | os.PathLike[str],
    *,
    coarse: bool = False,
    validation: float | None = 0.1,
    split_seed: int = 42,
    stratified: bool = False,
    download: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Data:
    """CIFAR as bytes in three parts: 45 000 train, 5000 validation, 10 000 test.

    Pixels stay bytes, a quarter of the memory of float32; `flatmin.data.augment` normalises each batch, with the
    statistics that the papers print, and crops and mirrors (no cutout). The validation part is drawn by
    `flatmin.data.images.split_validation`.

    Args:
        name: "cifar10" or "cifar100".
        folder: as in `read_cifar`.
        coarse: the 20 superclasses of CIFAR-100 as labels. Default: its 100 classes.
        validation: share of the 50 000 training images; None: see `three_parts`. Default 0.1.
        split_seed: of the split. Default 42, as in BiSAM and the papers after it.
        stratified: take the same number of every class into the validation part. Default False.
        download: get the archive if nothing is found. Default False.
        progress: as in `download_cifar`.

    Returns:
        x of shape (n, 3, 32, 32), uint8.

    Raises:
        ValueError, FileNotFoundError, OSError: as `read_cifar`, `download_cifar` and `split_validation`.
    """
    train, test = read_cifar(name, folder, coarse=coarse, download=download, progress=progress)
    classes = _release(name).classes
    return three_parts(
        train,
        test,
        num_classes=classes[0 if coarse else -1],
        name=f"{name}-coarse" if coarse else name,
        validation=validation,
        split_seed=split_seed,
        stratified=stratified,
        statistics=STATISTICS[name],
        augment=Augment(cutout=0),
    )


def read_cifar(
    name: str,
    folder: str | os.PathLike[str],
    *,
    coarse: bool = False,
    download: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> tuple[Split, Split]:
    """The official training and test part, in the order of the release.

    Args:
        name: "cifar10" or "cifar100".
        folder: where the .bin files are; or its parent, with the folder's official name (cifar-10-batches-bin,
            cifar-100-binary) or that of the archive (cifar-10-binary); or a folder with the official .tar.gz, or
            that file itself. An archive is checked against the official MD5 and read without unpacking it to disk.
        coarse: the 20 superclasses of CIFAR-100 as labels. Default: its 100 classes.
        download: if nothing is found, get the archive into `folder`. Default False.
        progress: as in `download_cifar`.

    Returns:
        Train (50 000) and test (10 000): x of shape (n, 3, 32, 32), uint8, and int64 labels.

    Raises:
        FileNotFoundError: nothing is there, or one of the files is missing.
        ValueError: an unknown name, coarse labels of CIFAR-10, or a file of another size, content or checksum.
        OSError: the download failed.
    """
    release = _release(name)
    if coarse and len(release.classes) == 1:
        raise ValueError(f"{release.title} has no coarse labels; leave coarse=False or read cifar100.")
    place = _find(release, Path(folder))
    if place is None:
        if not download:
            raise FileNotFoundError(
                f"no {release.title} under {folder}: expected {release.train[0]} there or in "
                f"{' or '.join(release.folders)}, or the archive {release.archive} (the binary version, not the "
                "Python one); name the folder that holds them, or download with download=True."
            )
        place = download_cifar(name, folder, progress=progress)
    files = (*release.train, release.test)
    if place.is_dir():
        parts = [_read_file(release, place, file, coarse) for file in files]
    else:
        contents = _read_archive(release, place, coarse)
        parts = [contents[file] for file in files]
    x = torch.cat([part[0] for part in parts[:-1]]) if len(parts) > 2 else parts[0][0]
    y = torch.cat([part[1] for part in parts[:-1]])
    return Split(x, y), Split(*parts[-1])


def download_cifar(
    name: str,
    folder: str | os.PathLike[str],
    *,
    progress: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Get the official archive into a folder, which is made if needed.

    The archive appears under its name only when it is whole and its MD5 is the official one; a failure leaves
    nothing behind.

    Args:
        name: "cifar10" or "cifar100", about 170 MB each.
        folder: where to put it.
        progress: called after every block with the bytes so far and the bytes in all, or None if the server does not
            say.

    Returns:
        The archive.

    Raises:
        ValueError: an unknown name, or a download with another checksum.
        OSError: no connection, or no place to write.
    """
    release = _release(name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / release.archive
    temporary = folder / f"{release.archive}.{os.getpid()}.part"
    try:
        with temporary.open("wb") as out:
            digest = _fetch(release.url, out, progress)
        if digest != release.md5:
            raise ValueError(
                f"the download of {release.url} has MD5 {digest}, expected {release.md5}; it is cut short or another "
                "file: try again, or get the archive in another way."
            )
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _fetch(url: str, out: IO[bytes], progress: Callable[[int, int | None], None] | None) -> str:
    """Copy a URL into a file; the MD5 of what came."""
    digest, done = hashlib.md5(usedforsecurity=False), 0
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            length = response.headers.get("Content-Length")
            total = None if length is None else int(length)
            while block := response.read(_BLOCK):
                out.write(block)
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise OSError(
            f"{url} could not be downloaded: {reason}; check the connection and the disk, or get the archive in "
            "another way and name its folder."
        ) from error
    return digest.hexdigest()


def _release(name: str) -> _Release:
    if name not in RELEASES:
        raise ValueError(f"unknown data {name!r}{suggest(name, RELEASES)} (data: {', '.join(RELEASES)}).")
    return RELEASES[name]


def _find(release: _Release, folder: Path) -> Path | None:
    """The folder with the files or the archive; None if neither is there."""
    if folder.is_file():
        return folder
    for place in (folder, *(folder / name for name in release.folders)):
        if any((place / file).is_file() for file in (*release.train, release.test)):
            return place
    archive = folder / release.archive
    return archive if archive.is_file() else None


def _read_file(release: _Release, place: Path, file: str, coarse: bool) -> tuple[Tensor, Tensor]:
    path = place / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, but other files of {release.title} are there; unpack {release.archive} again."
        )
    with path.open("rb") as file_object:
        return _records(release, file_object, path.stat().st_size, file, str(path), coarse)


def _read_archive(release: _Release, path: Path, coarse: bool) -> dict[str, tuple[Tensor, Tensor]]:
    with path.open("rb") as file_object:
        digest = hashlib.file_digest(file_object, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if digest != release.md5:
        raise ValueError(
            f"{path} has MD5 {digest}, expected {release.md5} of {release.archive}; it is cut short or another file: "
            "delete it and get the archive again, or unpack it and name the folder."
        )
    contents = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            file = member.name.rpartition("/")[2]
            content = archive.extractfile(member) if file in release.records else None  # None: a folder
            if content is not None:
                contents[file] = _records(release, content, member.size, file, f"{path}: {file}", coarse)
    for file in release.records:
        if file not in contents:
            raise ValueError(f"{path} holds no {file}; get {release.archive} again.")
    return contents


def _records(
    release: _Release, file_object: IO[bytes], size: int, file: str, where: str, coarse: bool
) -> tuple[Tensor, Tensor]:
    """Pixels and labels of one file."""
    count, labels = release.records[file], len(release.classes)
    expected = count * release.record
    data = bytearray(file_object.read(expected)) if size == expected else b""
    if len(data) != expected:
        raise ValueError(
            f"{where} has {size} bytes, expected {expected} ({count} records of {release.record}); it is cut short or "
            f"another file: unpack {release.archive} again."
        )
    records = torch.frombuffer(data, dtype=torch.uint8).view(count, release.record)
    for column, classes in enumerate(release.classes):
        highest = int(records[:, column].max())
        if highest >= classes:
            raise ValueError(
                f"{where} holds the label {highest}, expected 0 to {classes - 1}; it is no file of the binary version "
                f"of {release.title}: unpack {release.archive} again."
            )
    y = records[:, 0 if coarse else labels - 1].long()
    return records[:, labels:].reshape(count, *_SHAPE).contiguous(), y
