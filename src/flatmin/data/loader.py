"""Batches of image files, read by worker processes. Needs Pillow.

What a batch holds depends on the seed, the epoch and the files alone, not on the number of workers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flatmin.data.dataset import Split
from flatmin.data.folder import Files
from flatmin.data.views import ImageView, UnreadableError, check_header, pillow, read_image

_HEADERS = 256  # that a worker opens at a time


class FileStream:
    """Chosen batches of image files as bytes, read by worker processes that live from epoch to epoch.

    Random crops depend on (seed, epoch, index of the file) alone. The global random state is not used. An epoch may be
    read again, alone, or in part, but not two of them at the same time.

    The workers have a session of their own: Ctrl-C and a signal to all processes of a job stop this one alone, which
    can then end an update before it stops them.

    Args:
        files: from `scan_folder` or `scan_annotated`.
        view: `RandomCrop` for training, `Centre` for evaluation.
        workers: processes; 0 reads in this one. Default 0.
        pin_memory: put batches where a copy to a CUDA device need not wait. Default False.
        seed: of the crops. Default 0.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: a negative number of workers.
    """

    def __init__(
        self, files: Files, view: ImageView, *, workers: int = 0, pin_memory: bool = False, seed: int = 0
    ) -> None:
        pillow()
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}.")
        self._wanted = _Wanted()
        self._loader: DataLoader[Any] = DataLoader(
            SingleImages(files, view, seed),
            batch_sampler=self._wanted,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_apart,
            # Its own generator: without one, every epoch would take a number from the global one.
            generator=torch.Generator().manual_seed(seed),
        )

    def batches(self, epoch: int, indices: Iterable[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: x of shape (b, 3, size, size), uint8, and y of shape (b,), int64.

        Args:
            epoch: its number.
            indices: of the files of each batch.

        Raises:
            ValueError: a file cannot be read as an image, or a worker process ended.
        """
        self._wanted.epoch, self._wanted.batches = epoch, indices
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise ValueError(
                    "a process that reads images ended, often because memory ran out, also the shared one (/dev/shm); "
                    "use fewer workers."
                ) from error
            if batch is None:
                return
            if isinstance(batch, str):
                raise ValueError(batch)
            yield batch


class FileLoader:
    """Batches of image files as bytes, every file once an epoch.

    Order and crops depend on (seed, epoch) alone: the batches are the same for any number of workers, and an epoch
    can be read again or alone, but not two of them at the same time.

    Args:
        files: see `FileStream`.
        view: see `FileStream`.
        batch_size: images in a batch; the last one of an epoch may be smaller.
        shuffle: a new order every epoch. Default True; else the order of `files`.
        drop_last: leave out a last batch that is smaller. Default False.
        workers: see `FileStream`.
        pin_memory: see `FileStream`.
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
        view: ImageView,
        *,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise ValueError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {workers}.")
        if not len(files) or (drop_last and batch_size > len(files)):
            raise ValueError(
                f"{files.root} has {len(files)} images, which make no batch of {batch_size}; use a smaller batch_size."
            )
        self.files, self.view = files, view
        self._batch_size, self._shuffle, self._drop_last, self._seed = batch_size, shuffle, drop_last, seed
        self._stream = FileStream(files, view, workers=workers, pin_memory=pin_memory, seed=seed)

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.files), self._batch_size)
        return whole + (rest > 0 and not self._drop_last)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: x of shape (b, 3, size, size), uint8, and y of shape (b,), int64.

        Raises:
            ValueError: a file cannot be read as an image, or a worker process ended.
        """
        order = list(range(len(self.files)))
        if self._shuffle:
            state = random.Random(f"{self._seed}/{number}").getrandbits(63)
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(state)).tolist()
        starts = range(0, len(self) * self._batch_size, self._batch_size)
        return self._stream.batches(number, (order[start : start + self._batch_size] for start in starts))


def load_files(files: Files, view: ImageView, *, workers: int = 0, seed: int = 0) -> Split:
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


def check_files(files: Files, indices: Sequence[int], *, workers: int = 0) -> None:
    """Open files and read no more than what they begin with: about 0.1 ms for each, of some ms for all of it.

    Args:
        files: from `scan_folder` or `scan_annotated`.
        indices: which.
        workers: processes. Default 0: this one.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: some are no images; the first is named. A file that is cut short is not noticed.
    """
    pillow()
    loader: DataLoader[Any] = DataLoader(
        _Headers(files),
        sampler=indices,
        batch_size=_HEADERS,
        num_workers=workers,
        collate_fn=_told,
        worker_init_fn=_apart,
        generator=torch.Generator().manual_seed(0),
    )
    bad = [text for batch in loader for text in batch]
    if bad:
        raise ValueError(bad[0] if len(bad) == 1 else f"{bad[0]} So it is with {len(bad) - 1} more.")


class SingleImages(Dataset["tuple[Tensor, int] | str"]):
    """One image and its label, or why there is none: an exception would reach the user as a worker's traceback."""

    def __init__(self, files: Files, view: ImageView, seed: int) -> None:
        self.files, self.view, self.seed = files, view, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        epoch, index = key
        path = self.files.root / self.files.paths[index]
        try:
            return read_image(path, self.view, seed=self.seed, epoch=epoch, index=index), self.files.labels[index]
        except UnreadableError as error:
            return str(error)


def collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    """A batch, or why there is none."""
    images, labels = [], []
    for item in items:
        if isinstance(item, str):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


def _apart(worker: int) -> None:
    """Leave the group of processes that a terminal or a job sends its signals to."""
    if hasattr(os, "setsid"):
        os.setsid()


class _Wanted:
    """Batches of (epoch, index): the epoch travels with the index, so persistent workers need no message."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batches: Iterable[Sequence[int]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for indices in self.batches:
            yield [(epoch, index) for index in indices]


class _Headers(Dataset[str]):
    """Why a file is no image; empty for one that is."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def __getitem__(self, index: int) -> str:
        try:
            check_header(self.files.root / self.files.paths[index])
        except UnreadableError as error:
            return str(error)
        return ""


def _told(texts: list[str]) -> list[str]:
    return [text for text in texts if text]
