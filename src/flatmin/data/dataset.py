"""`Split` and `Data`: a data set in three parts, held in memory as tensors or read from files on demand."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from flatmin.data.augment import Augment, normalise
from flatmin.data.images import Statistics

HELD = 4 * 2**30
"""Limit, in bytes, on the memory that inputs read from files may take at once: 4 GiB."""

Index = Tensor | slice


@runtime_checkable
class Stored(Protocol):
    """Interface of inputs that are not in memory and replace a tensor, such as `flatmin.data.streamed.FileImages`.

    `x[index]` reads samples as they are used for evaluation. The index is a slice, a tensor of indices or a mask.
    """

    @property
    def shape(self) -> torch.Size:
        """Shape of all samples, (n, ...), as of a tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensors that are read."""

    @property
    def device(self) -> torch.device:
        """Device of the tensors that are read."""

    def dim(self) -> int:
        """Number of dimensions."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Index, /) -> Tensor: ...

    def to(self, device: torch.device | str, /) -> Stored:
        """The same samples, read to another device."""

    def only(self, index: Index, /) -> Stored:
        """A subset of the samples. Nothing is read."""

    def check(self) -> None:
        """Raise ValueError if a quick check, without reading whole samples, finds some that cannot be read."""

    def facts(self) -> Iterator[str]:
        """Strings that identify the samples: they change when the samples change."""

    def stream(self, seed: int) -> Stream:
        """The samples as they are used for training. Random views depend on (seed, epoch, sample) only."""


class Stream(Protocol):
    """Interface of an object that reads batches of stored samples, epoch by epoch."""

    def epoch(self, number: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the samples of each batch, on the device.

        Args:
            number: number of the epoch.
            batches: indices of the samples of each batch, on the CPU.

        Raises:
            ValueError: a sample cannot be read.
        """


Samples = Tensor | Stored


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs and integer labels of one part of a data set.

    Args:
        x: inputs, shape (n, ...), floating-point or integer (token ids); a tensor, or a `Stored` that reads them.
        y: labels, shape (n,), int64 in 0..K-1.
    """

    x: Samples
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def only(self, index: Index) -> Split:
        """A subset of the samples, by indices, mask or slice. Nothing is read from files."""
        return Split(self.x[index] if isinstance(self.x, Tensor) else self.x.only(index), self.y[index])

    def to(self, device: torch.device | str) -> Split:
        """The same part on another device."""
        return Split(self.x.to(device), self.y.to(device))


@dataclass(frozen=True, eq=False)
class Data:
    """A classification data set with a training, a validation and a test part.

    Args:
        train: training part. `train.y` holds the labels used for training, including wrong ones.
        val: validation part. Hyperparameters and the best epoch are chosen on it, and on nothing else.
        test: test part, used for reporting only.
        num_classes: number of classes, K.
        clean: the training labels before noise was added, shape (n,). Default None: `train.y`, that is, no noise.
        name: name of the data set, printed in tables. Default "data".
        statistics: channel statistics used to normalise images stored as bytes. Default None: inputs are passed to the
            model unchanged.
        augment: augmentation of training images stored as bytes. Default None: no augmentation.
        notes: sentences about how the data were read, shown to the user. Default: none.

    Raises:
        ValueError: shapes, dtypes or labels do not fit together.
    """

    train: Split
    val: Split
    test: Split
    num_classes: int
    clean: Tensor | None = None
    name: str = "data"
    statistics: Statistics | None = None
    augment: Augment | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in ("train", "val", "test"):
            _check(self.name, part, getattr(self, part), self.num_classes, self.train.x.shape[1:])
        if (self.statistics is None) != (self.train.x.dtype != torch.uint8 or self.train.x.dim() != 4):
            kind = f"{self.train.x.dtype} of shape {tuple(self.train.x.shape)}"
            raise ValueError(
                f"{self.name}: statistics are required for images of bytes (uint8, 4-D) and not allowed for other "
                f"inputs; got {'no ' if self.statistics is None else ''}statistics with x of {kind}."
            )
        if self.augment is not None and self.statistics is None:
            raise ValueError(f"{self.name}: only images of bytes, uint8 of shape (n, C, H, W), can be augmented.")
        if self.clean is not None and self.clean.shape != self.train.y.shape:
            raise ValueError(
                f"{self.name}: clean has shape {tuple(self.clean.shape)}, expected {tuple(self.train.y.shape)} "
                "like train.y."
            )

    def inputs(self, x: Tensor, *, channels_last: bool = False) -> Tensor:
        """The input of the model for samples of any part, without augmentation. Bytes are normalised."""
        if self.statistics is not None:
            return normalise(x, self.statistics, channels_last=channels_last)
        return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x

    @property
    def wrong(self) -> Tensor:
        """Mask of the training samples with a wrong label, shape (n,), bool."""
        return torch.zeros_like(self.train.y, dtype=torch.bool) if self.clean is None else self.train.y != self.clean

    def with_labels(self, noisy: Tensor) -> Data:
        """The same data with new training labels. The current labels become `clean`."""
        return dataclasses.replace(self, train=Split(self.train.x, noisy), clean=self.train.y)

    def to(self, device: torch.device | str) -> Data:
        """The same data on another device."""
        clean = None if self.clean is None else self.clean.to(device)
        val = self.val.to(device)
        test = val if self.test is self.val else self.test.to(device)
        return dataclasses.replace(self, train=self.train.to(device), val=val, test=test, clean=clean)


def _check(name: str, part: str, split: Split, classes: int, shape: Sequence[int]) -> None:
    where = f"{name}: {part}"
    x, y = split.x, split.y
    if not isinstance(x, (Tensor, Stored)) or not isinstance(y, Tensor):
        raise ValueError(f"{where} must hold tensors, got {type(x).__name__} and {type(y).__name__}.")
    if y.dim() != 1 or y.dtype != torch.int64:
        raise ValueError(f"{where}.y must be int64 labels of shape (n,), got {y.dtype} of shape {tuple(y.shape)}.")
    if len(y) == 0 or x.dim() < 2 or len(x) != len(y):
        raise ValueError(
            f"{where} must have at least one sample and as many inputs as labels, "
            f"got x of shape {tuple(x.shape)} and y of shape {tuple(y.shape)}."
        )
    if x.shape[1:] != torch.Size(shape):
        raise ValueError(f"{where}.x has samples of shape {tuple(x.shape[1:])}, but train.x has {tuple(shape)}.")
    if isinstance(x, Tensor) and x.is_floating_point() and not bool(x.isfinite().all()):
        raise ValueError(f"{where}.x contains NaN or infinite values; remove or replace them first.")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{where}.y has labels from {low} to {high}, expected 0 to {classes - 1} ({classes} classes).")


def check_held(x: Samples, count: int) -> None:
    """Raise ValueError if `count` samples that are read from files would take more than `HELD` bytes as float32."""
    size = 4 * math.prod(x.shape[1:])
    if not isinstance(x, Tensor) and count * size > HELD:
        raise ValueError(
            f"the measurements keep their samples in memory, and {count} images of shape {tuple(x.shape[1:])} take "
            f"{count * size / 2**30:.0f} GiB; use at most {HELD // size} images (--examples in `flatmin measure`)."
        )


def as_data(returned: Any, name: str) -> Data:
    """Convert the return value of a user's function to `Data`.

    Args:
        returned: a `Data`, or three pairs ((x, y) train, (x, y) validation, (x, y) test) of tensors or arrays. For
            pairs, the number of classes is the largest label plus one, and images of bytes are normalised with the
            statistics of the training part.
        name: name for tables and error messages.

    Raises:
        ValueError: `returned` is something else, or the parts do not fit together.
    """
    if isinstance(returned, Data):
        return returned
    expected = "expected a flatmin.data.dataset.Data or three pairs: (x, y) for train, validation and test"
    if not isinstance(returned, (tuple, list)) or len(returned) != 3:
        raise ValueError(f"{name} returned {_shape_of(returned)}; {expected}.")
    splits = []
    for part, pair in zip(("train", "validation", "test"), returned, strict=True):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"{name} returned {_shape_of(pair)} for {part}; {expected}.")
        x, y = (_tensor(value, f"{name}: {part}.{which}", expected) for value, which in zip(pair, "xy", strict=True))
        if x.is_floating_point() or x.dtype == torch.bool:
            x = x.float()
        elif x.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch supports few operations on these
            x = x.long()
        if not y.is_floating_point() and y.dtype != torch.bool:
            y = y.long()
        splits.append(Split(x, y))
    classes = 1 + max(int(s.y.max()) if s.y.numel() else -1 for s in splits)
    train, val, test = splits
    bytes_ = train.x.dtype == torch.uint8 and train.x.dim() == 4
    statistics = Statistics.of(train.x[:]) if bytes_ and len(train) else None
    return Data(train, val, test, num_classes=classes, name=name, statistics=statistics)


def _tensor(value: Any, where: str, expected: str) -> Tensor:
    """Convert inputs or labels returned by a user's function to a tensor, keeping their dtype.

    Raises:
        ValueError: `value` holds text, dates or other objects, or rows of different lengths.
    """
    try:
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_complex():
                raise TypeError("it is sparse or complex; pass a dense tensor of real numbers")
            return value.detach()
        if isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
            return torch.stack([torch.as_tensor(one).detach() for one in value])
        with warnings.catch_warnings():
            # A read-only memory map may be larger than memory, so it is not copied; nothing here writes to it.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(_numbers(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} cannot be converted to a tensor: {str(error).rstrip('.')}; {expected}.") from error


def _numbers(value: Any) -> np.ndarray:
    """Convert to an array that torch accepts: writable, contiguous, native byte order, numbers of at most 8 bytes.

    Raises:
        TypeError: the array does not hold numbers.
        ValueError: some entries are masked.
    """
    array = np.asarray(value)
    if np.ma.is_masked(value):
        raise ValueError("some entries are masked; fill them or remove their samples")
    kind = array.dtype.kind
    if kind == "O":
        other = next((type(one).__name__ for one in array.flat if not isinstance(one, Real)), None)
        if other is not None:
            raise TypeError(f"it has dtype object and contains {other}; convert it to numbers first")
        kind = "i" if all(isinstance(one, Integral) for one in array.flat) else "f"
        array = array.astype(np.int64 if kind == "i" else np.float64)
    if kind not in "biuf":
        kinds = {"U": "text", "S": "text", "M": "dates", "m": "times", "c": "complex numbers"}
        raise TypeError(
            f"it contains {kinds.get(kind, array.dtype)}; convert it to numbers first (classes: 0 to K - 1)"
        )
    native = np.dtype(np.float64) if kind == "f" and array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    array = array.astype(native, order="C", copy=False)
    return array if array.flags.writeable or isinstance(value, np.memmap) else array.copy()


def _shape_of(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
