"""Image files in one folder per class: ImageNet, Tiny-ImageNet and a user's own data.

`scan_folder` lists the files. A view from `flatmin.data.views` turns a file into a square of bytes.
`flatmin.data.loader` reads the files with worker processes.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from flatmin.words import read_text

_OF_SYSTEMS = ("Thumbs.db", "desktop.ini")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")


@dataclass(frozen=True)
class Files:
    """Image files with their labels.

    Args:
        root: the folder that contains the files.
        classes: names of the classes in alphabetical order. The position of a name is its label.
        paths: paths of the files relative to `root`, class by class, in alphabetical order within each class.
        labels: label of each file.
        notes: sentences about the scan, shown to the user, such as how many files were skipped. Default: none.
    """

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def counts(self) -> dict[str, int]:
        """Number of files per class."""
        counts = dict.fromkeys(self.classes, 0)
        for label in self.labels:
            counts[self.classes[label]] += 1
        return counts


def scan_folder(root: str | os.PathLike[str], *, classes: Sequence[str] | None = None) -> Files:
    """List the image files of root/CLASS/ and its subfolders, as in the `train` folder of ImageNet and Tiny-ImageNet.

    Names that begin with a dot are ignored. Files with other extensions than `SUFFIXES`, images beside the class
    folders, and symbolic links to folders are skipped. `Files.notes` reports how many of these there are, and how many
    images are in subfolders.

    Args:
        root: folder with one folder per class.
        classes: names of the classes, such as those of the training part, so that a validation part gets the same
            labels. Default None: the names of the folders.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: there is no class folder, a class has no images, or a folder is not one of `classes`.
    """
    root = _folder(root)
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{root} contains no folders; expected one folder of images per class.")
    class_names = tuple(sorted(names if classes is None else classes))
    for name in names:
        if name not in class_names:
            raise ValueError(
                f"{root / name} is not one of the {len(class_names)} classes of the training part; remove it."
            )
    paths: list[str] = []
    labels: list[int] = []
    seen = _Seen(beside=sum(entry.is_file() and _is_image(entry.name) for entry in os.scandir(root)))
    for label, name in enumerate(class_names):
        own = _images_below(root, name, seen)
        if not own:
            there = f" (files skipped so far: {seen.listed()})" if seen.others else ""
            raise ValueError(
                f"{root / name} contains no images; expected files that end in {', '.join(SUFFIXES)}{there}; add "
                "images or remove the class."
            )
        paths += own
        labels += [label] * len(own)
    return Files(root, class_names, tuple(paths), tuple(labels), seen.notes(root))


def scan_annotated(root: str | os.PathLike[str], *, classes: Sequence[str]) -> Files:
    """List the files of Tiny-ImageNet's `val`: images in root/images/, their classes in root/val_annotations.txt.

    A line of the annotations has the name of the file, its class and four numbers of a bounding box (not used),
    separated by tabs.

    Args:
        root: folder with `images` and `val_annotations.txt`.
        classes: names of the classes of the training part.

    Raises:
        FileNotFoundError: the annotations, or a file named in them, are missing.
        ValueError: a line has another form, or a class is not one of `classes`.
    """
    root = _folder(root)
    table = root / "val_annotations.txt"
    if not table.is_file():
        raise FileNotFoundError(
            f"{table} is missing; give the val folder of Tiny-ImageNet, or use scan_folder for one folder per class."
        )
    class_names = tuple(sorted(classes))
    label_of = {name: label for label, name in enumerate(class_names)}
    there = set(os.listdir(_folder(root / "images")))
    rows = []
    for number, line in enumerate(read_text(table).splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise ValueError(
                f"{table}, line {number}: expected a file name and its class, separated by a tab, got {line!r}."
            )
        file, name = fields[0], fields[1].strip()
        if name not in label_of:
            raise ValueError(
                f"{table}, line {number}: {name!r} is not one of the {len(class_names)} classes of the training part."
            )
        if file not in there:
            raise FileNotFoundError(
                f"{table}, line {number}: {root / 'images' / file} is missing; unpack the data again."
            )
        rows.append((label_of[name], f"images/{file}"))
    if not rows:
        raise ValueError(f"{table} is empty; unpack the data again.")
    rows.sort()
    return Files(root, class_names, tuple(path for _, path in rows), tuple(label for label, _ in rows))


def _folder(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}; give the folder with the unpacked images.")
    return path


def files_digest(parts: Sequence[Files]) -> str:
    """Hex digest of image files: of their paths relative to the root, labels, sizes and content.

    It does not depend on where the root is. If the files take at most `WHOLE` bytes (256 MiB) in total, they are read
    completely. Otherwise about `SAMPLED` (2000) files, evenly spaced in the list, contribute a block at their start,
    middle and end. The digest is cached in the process until the size or modification time of a file changes.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    files = [(part, index) for part in parts for index in range(len(part))]
    named, states = hashlib.sha256(), hashlib.sha256()
    total = 0
    for part, index in files:
        state = os.stat(part.root / part.paths[index])
        total += state.st_size
        named.update(f"{part.paths[index]}\0{part.labels[index]}\0{state.st_size}\0".encode(errors="surrogateescape"))
        states.update(f"{part.root.absolute()}\0{state.st_mtime_ns}\0".encode(errors="surrogateescape"))
    key = named.hexdigest() + states.hexdigest()
    if key not in _digests:
        step = 1 if total <= WHOLE else max(1, len(files) // SAMPLED)
        for part, index in files[::step]:
            with open(part.root / part.paths[index], "rb") as file:
                for block in iter(lambda: file.read(_BLOCK), b"") if total <= WHOLE else _blocks(file):
                    named.update(block)
        _digests[key] = named.hexdigest()
    return _digests[key]


WHOLE, SAMPLED = 256 * 2**20, 2000
_BLOCK, _PIECE = 2**20, 4096
_digests: dict[str, str] = {}


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    size = os.fstat(file.fileno()).st_size
    for begin in (0, (size - _PIECE) // 2, size - _PIECE):
        file.seek(max(0, begin))
        yield file.read(_PIECE)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


@dataclass
class _Seen:
    """Counts of a scan: other files by extension, images in subfolders and beside the class folders, linked folders."""

    beside: int = 0
    below: int = 0
    links: int = 0
    others: Counter[str] = field(default_factory=Counter)

    def listed(self) -> str:
        return ", ".join(f"{count} of {ending or 'no extension'}" for ending, count in sorted(self.others.items()))

    def notes(self, root: Path) -> tuple[str, ...]:
        notes = []
        if self.others:
            notes.append(f"{root}: skipped files with other extensions than {', '.join(SUFFIXES)}: {self.listed()}.")
        if self.beside:
            notes.append(f"{root}: skipped images beside the class folders, which have no class: {self.beside}.")
        if self.below:
            notes.append(f"{root}: images in subfolders of a class folder belong to that class: {self.below}.")
        if self.links:
            notes.append(f"{root}: skipped symbolic links to folders in a class folder: {self.links}.")
        return tuple(notes)


def _images_below(root: Path, name: str, seen: _Seen) -> list[str]:
    """Image files below root/name, relative to the root, in alphabetical order."""
    images = []
    for place, folders, files in os.walk(root / name):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        seen.links += sum(os.path.islink(os.path.join(place, folder)) for folder in folders)
        below = Path(place).relative_to(root)
        for file in files:
            if _is_image(file):
                images.append((below / file).as_posix())
                # Tiny-ImageNet stores the images of a class in a subfolder `images`.
                seen.below += len(below.parts) > 1 and below.parts[1:] != ("images",)
            elif not file.startswith(".") and file not in _OF_SYSTEMS:
                seen.others[os.path.splitext(file)[1].lower()] += 1
    return sorted(images)
