"""Image files in one folder per class: ImageNet, Tiny-ImageNet, and data of one's own.

`scan_folder` lists the files, a view of `flatmin.data.views` says how one file becomes a square of bytes, and
`flatmin.data.loader` reads them with worker processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flatmin.words import read_text

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")


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
    for number, line in enumerate(read_text(table).splitlines(), start=1):
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
