"""CIFAR-10 and CIFAR-100: 60 000 colour images of 32x32 pixels, from the official binary release.

A record is one label byte (CIFAR-100: two, the coarse label first) and 3072 pixel bytes: the red plane row by row, then
green, then blue. Nothing is downloaded unless requested.

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
    """The files of the binary release of one data set. `records` is the number of records in each file."""

    title: str
    url: str
    md5: str
    folders: tuple[str, ...]
    train: tuple[str, ...]
    test: str
    records: dict[str, int]
    classes: tuple[int, ...]  # number of classes of each label byte

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
    """Load CIFAR in three parts: 45 000 training, 5000 validation and 10 000 test images.

    Pixels stay bytes, which takes a quarter of the memory of float32. `flatmin.data.augment` crops and mirrors each
    batch and normalises it with the statistics given in the papers (no cutout). The validation part is drawn by
    `flatmin.data.images.split_validation`.

    Args:
        name: "cifar10" or "cifar100".
        folder: see `read_cifar`.
        coarse: use the 20 superclasses of CIFAR-100 as labels instead of its 100 classes. Default False.
        validation: share of the 50 000 training images used for validation; None: see `three_parts`. Default 0.1.
        split_seed: seed of the validation split. Default 42, as in BiSAM and later papers.
        stratified: take the same number of images of each class for validation. Default False.
        download: download the archive if no files are found. Default False.
        progress: see `download_cifar`.

    Returns:
        The data: x of shape (n, 3, 32, 32), uint8.

    Raises:
        ValueError, FileNotFoundError, OSError: see `read_cifar`, `download_cifar` and `split_validation`.
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
    """Read the official training and test parts, in the order of the release.

    Args:
        name: "cifar10" or "cifar100".
        folder: one of these: the folder with the .bin files; its parent, if the folder has its official name
            (cifar-10-batches-bin, cifar-100-binary) or the name of the archive (cifar-10-binary); a folder with the
            official .tar.gz; or the archive itself. An archive is checked against the official MD5 and read without
            being unpacked to disk.
        coarse: use the 20 superclasses of CIFAR-100 as labels instead of its 100 classes. Default False.
        download: download the archive to `folder` if no files are found. Default False.
        progress: see `download_cifar`.

    Returns:
        The training part (50 000) and the test part (10 000): x of shape (n, 3, 32, 32), uint8, and int64 labels.

    Raises:
        FileNotFoundError: no files are found, or one of the files is missing.
        ValueError: the name is unknown, coarse labels of CIFAR-10 are requested, or a file has another size, content
            or checksum.
        OSError: the download failed.
    """
    release = _release(name)
    if coarse and len(release.classes) == 1:
        raise ValueError(f"{release.title} has no coarse labels; use coarse=False, or read cifar100.")
    place = _find(release, Path(folder))
    if place is None:
        if not download:
            raise FileNotFoundError(
                f"there is no {release.title} in {folder}: expected {release.train[0]} there or in "
                f"{' or '.join(release.folders)}, or the archive {release.archive} (the binary version, not the "
                "Python version); give the folder that contains them, or use download=True."
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
    """Download the official archive to a folder, which is created if needed.

    The archive gets its final name only after its MD5 has been checked. A failed download leaves no file behind.

    Args:
        name: "cifar10" or "cifar100", about 170 MB each.
        folder: where to put the archive.
        progress: called after each block with the bytes so far and the total number of bytes (None if the server does
            not report it). Default None.

    Returns:
        The path of the archive.

    Raises:
        ValueError: the name is unknown, or the checksum of the download is wrong.
        OSError: the download failed, or the file cannot be written.
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
                f"the download of {release.url} has MD5 {digest}, expected {release.md5}; it is incomplete or another "
                "file: try again, or get the archive in another way."
            )
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _fetch(url: str, out: IO[bytes], progress: Callable[[int, int | None], None] | None) -> str:
    """Copy the content of a URL to a file. Returns its MD5."""
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
            "another way and give its folder."
        ) from error
    return digest.hexdigest()


def _release(name: str) -> _Release:
    if name not in RELEASES:
        raise ValueError(f"unknown data {name!r}{suggest(name, RELEASES)} (data: {', '.join(RELEASES)}).")
    return RELEASES[name]


def _find(release: _Release, folder: Path) -> Path | None:
    """The folder with the files, or the archive; None if there is neither."""
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
            f"{path} is missing, although other files of {release.title} are there; unpack {release.archive} again."
        )
    with path.open("rb") as file_object:
        return _records(release, file_object, path.stat().st_size, file, str(path), coarse)


def _read_archive(release: _Release, path: Path, coarse: bool) -> dict[str, tuple[Tensor, Tensor]]:
    with path.open("rb") as file_object:
        digest = hashlib.file_digest(file_object, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if digest != release.md5:
        raise ValueError(
            f"{path} has MD5 {digest}, expected {release.md5} of {release.archive}; it is incomplete or another file: "
            "delete it and download the archive again, or unpack it and give the folder."
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
            raise ValueError(f"{path} does not contain {file}; download {release.archive} again.")
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
            f"{where} has {size} bytes, expected {expected} ({count} records of {release.record} bytes); it is "
            f"incomplete or another file: unpack {release.archive} again."
        )
    records = torch.frombuffer(data, dtype=torch.uint8).view(count, release.record)
    for column, classes in enumerate(release.classes):
        highest = int(records[:, column].max())
        if highest >= classes:
            raise ValueError(
                f"{where} contains the label {highest}, expected 0 to {classes - 1}; it is not a file of the binary "
                f"version of {release.title}: unpack {release.archive} again."
            )
    y = records[:, 0 if coarse else labels - 1].long()
    return records[:, labels:].reshape(count, *_SHAPE).contiguous(), y
