"""Batches of image files, read by worker processes. Needs Pillow.

The content of a batch depends only on the seed, the epoch and the files, not on the number of workers.
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

_HEADERS = 256  # files that a worker opens per batch


class FileStream:
    """Given batches of image files as bytes, read by worker processes that persist between epochs.

    Random crops depend only on (seed, epoch, index of the file). The global random state is not used. An epoch can be
    read again, on its own, or in part, but two epochs cannot be read at the same time.

    The workers run in their own process session, so Ctrl-C or a signal to all processes of a job reaches only the main
    process, which can finish an update before it stops the workers.

    Args:
        files: from `scan_folder` or `scan_annotated`.
        view: `RandomCrop` for training, `Centre` for evaluation.
        workers: number of worker processes; 0 reads in the current process. Default 0.
        pin_memory: put batches in pinned memory, from which copies to a CUDA device are asynchronous. Default False.
        seed: seed of the random crops. Default 0.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: `workers` is negative.
    """

    def __init__(
        self, files: Files, view: ImageView, *, workers: int = 0, pin_memory: bool = False, seed: int = 0
    ) -> None:
        pillow()
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}.")
        self._sampler = _IndexSampler()
        self._loader: DataLoader[Any] = DataLoader(
            SingleImages(files, view, seed),
            batch_sampler=self._sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_own_session,
            # Without its own generator, the DataLoader would draw from the global one in every epoch.
            generator=torch.Generator().manual_seed(seed),
        )

    def batches(self, epoch: int, indices: Iterable[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch: x of shape (b, 3, size, size), uint8, and y of shape (b,), int64.

        Args:
            epoch: number of the epoch.
            indices: indices of the files of each batch.

        Raises:
            ValueError: a file cannot be read as an image, or a worker process was terminated.
        """
        self._sampler.epoch, self._sampler.batches = epoch, indices
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise ValueError(
                    "a worker process that reads images was terminated, often because memory or shared memory "
                    "(/dev/shm) ran out; use fewer workers."
                ) from error
            if batch is None:
                return
            if isinstance(batch, str):
                raise ValueError(batch)
            yield batch


class FileLoader:
    """Batches of image files as bytes; each epoch contains every file once.

    Order and crops depend only on (seed, epoch): the batches are the same for any number of workers. An epoch can be
    read again or on its own, but two epochs cannot be read at the same time.

    Args:
        files: see `FileStream`.
        view: see `FileStream`.
        batch_size: number of images per batch. The last batch of an epoch may be smaller.
        shuffle: use a new random order in each epoch; otherwise the order of `files`. Default True.
        drop_last: omit the last batch if it is smaller. Default False.
        workers: see `FileStream`.
        pin_memory: see `FileStream`.
        seed: seed of the order and the crops. Default 0.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: `batch_size` is below 1, `workers` is negative, or there are too few files for one batch.

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
                f"{files.root} has {len(files)} images, too few for a batch of {batch_size}; use a smaller batch_size."
            )
        self.files, self.view = files, view
        self._batch_size, self._shuffle, self._drop_last, self._seed = batch_size, shuffle, drop_last, seed
        self._stream = FileStream(files, view, workers=workers, pin_memory=pin_memory, seed=seed)

    def __len__(self) -> int:
        """Number of batches per epoch."""
        whole, rest = divmod(len(self.files), self._batch_size)
        return whole + (rest > 0 and not self._drop_last)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch: x of shape (b, 3, size, size), uint8, and y of shape (b,), int64.

        Raises:
            ValueError: a file cannot be read as an image, or a worker process was terminated.
        """
        order = list(range(len(self.files)))
        if self._shuffle:
            state = random.Random(f"{self._seed}/{number}").getrandbits(63)
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(state)).tolist()
        starts = range(0, len(self) * self._batch_size, self._batch_size)
        return self._stream.batches(number, (order[start : start + self._batch_size] for start in starts))


def load_files(files: Files, view: ImageView, *, workers: int = 0, seed: int = 0) -> Split:
    """Read all images into memory, in the order of `files`: n * 3 * size^2 bytes.

    A random view gives the images of epoch 0.

    Args:
        files: see `FileStream`.
        view: see `FileStream`.
        workers: see `FileStream`. Default 0.
        seed: seed of the view. Default 0.

    Returns:
        x of shape (n, 3, size, size), uint8, and the labels.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: there are no files, or a file cannot be read as an image.
    """
    loader = FileLoader(files, view, batch_size=64, shuffle=False, workers=workers, seed=seed)
    x = torch.empty(len(files), 3, view.size, view.size, dtype=torch.uint8)
    for k, (part, _) in enumerate(loader.epoch(0)):
        x[64 * k : 64 * k + len(part)] = part
    return Split(x, torch.tensor(files.labels, dtype=torch.int64))


def check_files(files: Files, indices: Sequence[int], *, workers: int = 0) -> None:
    """Open files and check their headers. This takes about 0.1 ms per file; reading a whole file takes some ms.

    Args:
        files: from `scan_folder` or `scan_annotated`.
        indices: indices of the files to check.
        workers: number of worker processes. Default 0: the current process.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: some files are not images; the message names the first. Truncated files are not detected.
    """
    pillow()
    loader: DataLoader[Any] = DataLoader(
        _Headers(files),
        sampler=indices,
        batch_size=_HEADERS,
        num_workers=workers,
        collate_fn=_messages,
        worker_init_fn=_own_session,
        generator=torch.Generator().manual_seed(0),
    )
    bad = [text for batch in loader for text in batch]
    if bad:
        raise ValueError(bad[0] if len(bad) == 1 else f"{bad[0]} In total, {len(bad)} files cannot be read.")


class SingleImages(Dataset["tuple[Tensor, int] | str"]):
    """One image and its label, or an error message: an exception would be shown as the traceback of a worker."""

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
    """A batch, or the error message of an image that could not be read."""
    images, labels = [], []
    for item in items:
        if isinstance(item, str):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


def _own_session(worker: int) -> None:
    """Start a new session, so that signals to the process group do not reach the worker."""
    if hasattr(os, "setsid"):
        os.setsid()


class _IndexSampler:
    """Batch sampler that yields (epoch, index): persistent workers get the epoch with each index."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batches: Iterable[Sequence[int]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for indices in self.batches:
            yield [(epoch, index) for index in indices]


class _Headers(Dataset[str]):
    """The error message for a file that is not an image; an empty string otherwise."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def __getitem__(self, index: int) -> str:
        try:
            check_header(self.files.root / self.files.paths[index])
        except UnreadableError as error:
            return str(error)
        return ""


def _messages(texts: list[str]) -> list[str]:
    return [text for text in texts if text]
