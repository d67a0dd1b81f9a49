"""The inputs and classes of a run's model, stored with the run so that the model can be built without its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmin.data.augment import normalise
from flatmin.data.dataset import Data
from flatmin.data.images import Statistics
from flatmin.train.settings import one_of

KINDS = ("bytes", "floats", "integers")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Description of a data set's samples: the content of data.json.

    Args:
        data: name of the data set.
        num_classes: number of classes K.
        shape: shape of one sample; (C, H, W) for an image.
        kind: "bytes" (images that are normalised before they enter the model), "floats", or "integers".
        mean, std: mean and standard deviation of each channel, for pixels scaled to [0, 1], to normalise bytes; None
            for the other kinds.

    Raises:
        ValueError: the kind is unknown, or the statistics do not suit it.
    """

    data: str
    num_classes: int
    shape: tuple[int, ...]
    kind: str = "floats"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        one_of(self, "kind", KINDS)
        if (self.kind == "bytes") != (self.mean is not None and self.std is not None):
            raise ValueError(
                f"mean and std are required for kind='bytes' and not allowed otherwise; got {self.kind!r}."
            )

    @classmethod
    def of(cls, data: Data) -> Inputs:
        """The description of a data set."""
        x, statistics = data.train.x, data.statistics
        return cls(
            data=data.name,
            num_classes=data.num_classes,
            shape=tuple(x.shape[1:]),
            kind=_kind(data),
            mean=None if statistics is None else tuple(statistics.mean),
            std=None if statistics is None else tuple(statistics.std),
        )

    @property
    def statistics(self) -> Statistics | None:
        """The statistics to normalise bytes with; None for the other kinds."""
        return None if self.mean is None or self.std is None else Statistics(self.mean, self.std)

    def transform(self, x: Tensor) -> Tensor:
        """Convert samples to the form that the model expects: bytes are normalised, other samples are unchanged.

        Args:
            x: a batch, shape (n, ...); uint8 if the run's data are bytes.

        Raises:
            ValueError: the samples have another shape, or are not bytes although the model was trained on bytes.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"the model expects samples of shape {self.shape}, got {tuple(x.shape[1:])}.")
        statistics = self.statistics
        if statistics is None:
            return x
        if x.dtype != torch.uint8:
            raise ValueError(f"transform expects images as bytes: torch.uint8 of shape (n, C, H, W); got {x.dtype}.")
        return normalise(x, statistics)

    def check(self, data: Data) -> None:
        """Raise ValueError unless the model can be evaluated on these data."""
        if data.num_classes != self.num_classes:
            raise ValueError(
                f"{data.name} has {data.num_classes} classes, but the run was trained on {self.data} with "
                f"{self.num_classes} classes; use data with the same number."
            )
        shape = tuple(data.train.x.shape[1:])
        if shape != self.shape or _kind(data) != self.kind:
            raise ValueError(
                f"{data.name} has {_kind(data)} of shape {_size(shape)}, but the run was trained on {self.kind} of "
                f"shape {_size(self.shape)} ({self.data}); use data of the same kind and shape."
            )


def _kind(data: Data) -> str:
    if data.statistics is not None:
        return "bytes"
    return "floats" if data.train.x.dtype.is_floating_point else "integers"


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
