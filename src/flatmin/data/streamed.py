"""Images that are read from files on demand, for data sets that do not fit into memory. Needs Pillow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from flatmin.data.dataset import HELD, Index
from flatmin.data.folder import Files, files_digest
from flatmin.data.loader import FileStream, check_files
from flatmin.data.views import Centre, ImageView, RandomCrop, read_planes


class FileImages:
    """Inputs of one part of a data set as a list of image files (a `flatmin.data.dataset.Stored`). No pixels are kept.

    `images[index]` reads with the evaluation view, in threads (Pillow releases Python's global lock). `stream` reads
    with the training view, in worker processes.

    The constructor opens no file. `check` opens every file, which takes a few percent of the time of reading them, and
    finds missing files and files that are not images. A truncated file is detected only when it is read.

    Args:
        files: from `scan_folder` or `scan_annotated`.
        view: view for evaluation. Default None: `Centre` of 224 pixels.
        training: view for training, of the same size. Default None: `RandomCrop` of that size.
        workers: number of threads for evaluation and of processes for training. Default 0: neither.
        device: device of the tensors that are read. Default "cpu".
        chosen: indices of the files that belong to this part, shape (n,), int64. Default None: all files.

    Raises:
        ValueError: the views have different sizes.

    Example::

        files = scan_folder("imagenet/train")
        part = Split(FileImages(files, workers=8), torch.tensor(files.labels))
    """

    dtype = torch.uint8

    def __init__(
        self,
        files: Files,
        view: ImageView | None = None,
        training: ImageView | None = None,
        *,
        workers: int = 0,
        device: torch.device | str = "cpu",
        chosen: Tensor | None = None,
    ) -> None:
        self.view = Centre() if view is None else view
        self.training = RandomCrop(self.view.size) if training is None else training
        if self.view.size != self.training.size:
            raise ValueError(
                f"the views for evaluation and training must have the same size, got {self.view.size} and "
                f"{self.training.size}."
            )
        self.files, self.workers = files, workers
        self.device = torch.device(device)
        self.chosen = torch.arange(len(files)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def shape(self) -> torch.Size:
        """Shape of all images, (n, 3, size, size)."""
        return torch.Size((len(self), 3, self.view.size, self.view.size))

    def dim(self) -> int:
        """Number of dimensions, 4."""
        return 4

    def to(self, device: torch.device | str, /) -> FileImages:
        """The same files, read to another device."""
        return self._with(self.chosen, device)

    def only(self, index: Index, /) -> FileImages:
        """A subset of the files, by indices, mask or slice."""
        return self._with(self.chosen[index.cpu() if isinstance(index, Tensor) else index], self.device)

    def __getitem__(self, index: Index, /) -> Tensor:
        """Read images with the evaluation view, shape (n, 3, size, size), uint8.

        Raises:
            ModuleNotFoundError: Pillow is not installed.
            ValueError: a file cannot be read as an image, or the images would take more than 4 GiB of memory.
        """
        part = self.only(index)
        size = math.prod(part.shape)
        if size > HELD:
            raise ValueError(
                f"{len(part)} images of shape {tuple(self.shape[1:])} would take {size / 2**30:.0f} GiB of memory; "
                "read fewer at a time."
            )
        images = torch.empty(part.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        part._read_into(images.numpy())
        return images.to(self.device, non_blocking=True)

    def check(self) -> None:
        """Open every file and check its header, about 0.1 ms per file.

        Raises:
            ModuleNotFoundError: Pillow is not installed.
            ValueError: some files are missing or not images; the message names the first.
        """
        check_files(self.files, self.chosen.tolist(), workers=self.workers)

    def facts(self) -> Iterator[str]:
        """Strings that identify the images: the views, `flatmin.data.folder.files_digest`, and the chosen indices."""
        yield f"{self.view} {self.training}"
        yield files_digest([self.files])
        yield ",".join(map(str, self.chosen.tolist()))

    def stream(self, seed: int) -> ImageStream:
        """Return an object that reads training batches. The crops depend only on (seed, epoch, index of the file).

        Raises:
            ModuleNotFoundError: Pillow is not installed.
        """
        return ImageStream(self, seed)

    def _with(self, chosen: Tensor, device: torch.device | str) -> FileImages:
        return FileImages(self.files, self.view, self.training, workers=self.workers, device=device, chosen=chosen)

    def _read_into(self, rows: np.ndarray) -> None:
        indices = self.chosen.tolist()

        def read(k: int) -> None:
            index = indices[k]
            planes = read_planes(self.files.root / self.files.paths[index], self.view, index=index)
            rows[k] = np.frombuffer(planes, np.uint8).reshape(rows.shape[1:])

        if self.workers < 2:
            for k in range(len(indices)):
                read(k)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            for _ in pool.map(read, range(len(indices))):
                pass


class ImageStream:
    """Training batches, epoch by epoch, read ahead by worker processes; see `FileImages.stream`."""

    def __init__(self, images: FileImages, seed: int) -> None:
        self._chosen, self._device = images.chosen, images.device
        self._stream = FileStream(
            images.files,
            images.training,
            workers=images.workers,
            pin_memory=images.device.type == "cuda",
            seed=seed,
        )

    def epoch(self, number: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each batch, shape (b, 3, size, size), uint8, on the device.

        Args:
            number: number of the epoch.
            batches: indices into this part for each batch, on the CPU.

        Raises:
            ValueError: a file cannot be read as an image, or a worker process was terminated.
        """
        for x, _ in self._stream.batches(number, (self._chosen[batch].tolist() for batch in batches)):
            yield x.to(self._device, non_blocking=True)
