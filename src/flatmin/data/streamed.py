"""Images that stay files until a batch asks for them, for sets that do not fit into memory. Needs Pillow."""

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
    """Inputs of a part of a data set (`flatmin.data.dataset.Stored`): a list of files, of which no pixel is kept.

    `images[index]` reads with the view of evaluation, in threads, since Pillow works without Python's lock; `stream`
    reads with that of training, in worker processes.

    Nothing but the list is looked at when it is made. `check` opens every file, some percent of the work of reading
    it, and finds files that are missing or no images; one that is cut short shows itself when it is read.

    Args:
        files: from `scan_folder` or `scan_annotated`.
        view: of evaluation. Default: `Centre` of 224 pixels.
        training: view of training, of the same size. Default: `RandomCrop` of that size.
        workers: threads of the one and processes of the other; 0 works alone. Default 0.
        device: where what is read goes. Default "cpu".
        chosen: indices of the files that belong to the part, shape (n,), int64. Default: all.

    Raises:
        ValueError: views of different sizes.

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
                f"the views of evaluation and training must be of one size, got {self.view.size} and "
                f"{self.training.size}."
            )
        self.files, self.workers = files, workers
        self.device = torch.device(device)
        self.chosen = torch.arange(len(files)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def shape(self) -> torch.Size:
        """(n, 3, size, size)."""
        return torch.Size((len(self), 3, self.view.size, self.view.size))

    def dim(self) -> int:
        """4."""
        return 4

    def to(self, device: torch.device | str, /) -> FileImages:
        """The same files, read for another device."""
        return self._with(self.chosen, device)

    def only(self, index: Index, /) -> FileImages:
        """Some of the files, by indices, mask or slice."""
        return self._with(self.chosen[index.cpu() if isinstance(index, Tensor) else index], self.device)

    def __getitem__(self, index: Index, /) -> Tensor:
        """The images as they are evaluated, shape (n, 3, size, size), uint8.

        Raises:
            ModuleNotFoundError: Pillow is not installed.
            ValueError: a file cannot be read as an image, or so many that they should not be read at once.
        """
        part = self.only(index)
        size = math.prod(part.shape)
        if size > HELD:
            raise ValueError(
                f"{len(part)} images of {tuple(self.shape[1:])} would be {size / 2**30:.0f} GiB in memory; take fewer "
                "at a time."
            )
        images = torch.empty(part.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        part._read_into(images.numpy())
        return images.to(self.device, non_blocking=True)

    def check(self) -> None:
        """Open every file, about 0.1 ms for each.

        Raises:
            ModuleNotFoundError: Pillow is not installed.
            ValueError: some are missing or no images; the first is named.
        """
        check_files(self.files, self.chosen.tolist(), workers=self.workers)

    def facts(self) -> Iterator[str]:
        """Content of the files as far as `flatmin.data.folder.files_digest` reads it, which of them, and how seen."""
        yield f"{self.view} {self.training}"
        yield files_digest([self.files])
        yield ",".join(map(str, self.chosen.tolist()))

    def stream(self, seed: int) -> ImageStream:
        """Batches as they are trained on; what `RandomCrop` draws depends on (seed, epoch, file) alone.

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
    """The batches of one epoch after the other, read ahead by worker processes; see `FileImages.stream`."""

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
        """The images of each batch, shape (b, 3, size, size), uint8, on the device.

        Args:
            number: of the epoch.
            batches: positions in the part, on the CPU.

        Raises:
            ValueError: a file cannot be read as an image, or a worker process ended.
        """
        for x, _ in self._stream.batches(number, (self._chosen[batch].tolist() for batch in batches)):
            yield x.to(self._device, non_blocking=True)
