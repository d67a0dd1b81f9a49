"""`Split` and `Data`: a data set in three parts, held as tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs and integer labels of one part of a data set.

    Args:
        x: inputs, shape (n, ...), floating or integer (token ids).
        y: labels, shape (n,), int64 in 0..K-1.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> Split:
        """The same part on another device."""
        return Split(self.x.to(device), self.y.to(device))


@dataclass(frozen=True, eq=False)
class Data:
    """A classification data set: what is trained on, what hyperparameters are chosen on, what is reported.

    Args:
        train: training part; `train.y` are the labels that are trained on, wrong ones included.
        val: validation part. Hyperparameters and the best epoch are chosen here and nowhere else.
        test: test part; nothing is chosen on it.
        num_classes: K.
        clean: the training labels before noise, shape (n,). Default: `train.y`, that is, no noise.
        name: what tables print.

    Raises:
        ValueError: shapes, types or labels that do not fit together.
    """

    train: Split
    val: Split
    test: Split
    num_classes: int
    clean: Tensor | None = None
    name: str = "data"

    def __post_init__(self) -> None:
        for part in ("train", "val", "test"):
            _check(self.name, part, getattr(self, part), self.num_classes, self.train.x.shape[1:])
        if self.clean is not None and self.clean.shape != self.train.y.shape:
            raise ValueError(
                f"{self.name}: clean has shape {tuple(self.clean.shape)}, expected {tuple(self.train.y.shape)} "
                "like train.y."
            )

    @property
    def wrong(self) -> Tensor:
        """Mask of the training samples whose label is wrong, shape (n,), bool."""
        return torch.zeros_like(self.train.y, dtype=torch.bool) if self.clean is None else self.train.y != self.clean

    def with_labels(self, noisy: Tensor) -> Data:
        """The same data with other training labels; the present ones become `clean`."""
        return dataclasses.replace(self, train=Split(self.train.x, noisy), clean=self.train.y)

    def to(self, device: torch.device | str) -> Data:
        """The same data on another device."""
        clean = None if self.clean is None else self.clean.to(device)
        parts = {part: getattr(self, part).to(device) for part in ("train", "val", "test")}
        return dataclasses.replace(self, **parts, clean=clean)


def _check(name: str, part: str, split: Split, classes: int, shape: Sequence[int]) -> None:
    where = f"{name}: {part}"
    x, y = split.x, split.y
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise ValueError(f"{where} must hold tensors, got {type(x).__name__} and {type(y).__name__}.")
    if y.dim() != 1 or y.dtype != torch.int64:
        raise ValueError(f"{where}.y must be int64 labels of shape (n,), got {y.dtype} of shape {tuple(y.shape)}.")
    if len(y) == 0 or x.dim() < 2 or len(x) != len(y):
        raise ValueError(
            f"{where} needs as many inputs as labels and at least one, "
            f"got x of shape {tuple(x.shape)} and y of shape {tuple(y.shape)}."
        )
    if x.shape[1:] != torch.Size(shape):
        raise ValueError(f"{where}.x has samples of shape {tuple(x.shape[1:])}, but train.x has {tuple(shape)}.")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise ValueError(f"{where}.x holds NaN or infinite values; clean them first.")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{where}.y has labels from {low} to {high}, expected 0 to {classes - 1} ({classes} classes).")


def as_data(found: Any, name: str) -> Data:
    """What a user's function returned, as `Data`.

    Args:
        found: a `Data`, or three pairs ((x, y) train, (x, y) validation, (x, y) test) of tensors or arrays;
            the number of classes is then the largest label plus one.
        name: what tables and errors call it.

    Raises:
        ValueError: anything else, or parts that do not fit together.
    """
    if isinstance(found, Data):
        return found
    expected = "expected a flatmin.data.base.Data or three pairs: (x, y) for train, validation and test"
    if not isinstance(found, (tuple, list)) or len(found) != 3:
        raise ValueError(f"{name} returned {_shape_of(found)}; {expected}.")
    splits = []
    for part, pair in zip(("train", "validation", "test"), found, strict=True):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"{name} returned {_shape_of(pair)} for {part}; {expected}.")
        try:
            x, y = torch.as_tensor(pair[0]), torch.as_tensor(pair[1])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {part} cannot be made into tensors: {error}; {expected}.") from error
        if x.dtype == torch.float64:
            x = x.float()
        if not y.is_floating_point() and y.dtype != torch.bool:
            y = y.long()
        splits.append(Split(x, y))
    classes = 1 + max(int(s.y.max()) if s.y.numel() else -1 for s in splits)
    train, val, test = splits
    return Data(train, val, test, num_classes=classes, name=name)


def _shape_of(found: Any) -> str:
    if isinstance(found, (tuple, list)):
        return f"a {type(found).__name__} of {len(found)}"
    return f"a {type(found).__name__}"
