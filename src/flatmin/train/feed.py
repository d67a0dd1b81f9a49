"""Training batches: order, reading, augmentation and normalisation, on the device of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatmin.data.dataset import Data, Stored, Stream
from flatmin.train.config import RunConfig, derive_seed
from flatmin.train.processes import ALONE, World

# A GPU augments several batches at once, to launch fewer kernels; on a CPU they would not fit into the cache.
_AHEAD = {"cpu": 1, "cuda": 4096}  # samples


@dataclass(frozen=True)
class Batch:
    """The samples of one update in this process.

    Args:
        x: inputs of the model.
        y: labels.
        index: positions of the samples in the training part, on the CPU.
    """

    x: Tensor
    y: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def split(self, parts: int) -> list[Batch]:
        """Split into equal parts; with fewer samples than parts, one part per sample."""
        parts = min(parts, len(self))
        pieces = zip(*(t.tensor_split(parts) for t in (self.x, self.y, self.index)), strict=True)
        return [Batch(*piece) for piece in pieces]


class Feed:
    """The batches of every epoch; they do not depend on the number of processes.

    Order and augmentation use generators of their own, seeded by the run's seed. A batch is augmented once, so that all
    passes of an update see the same images. With several processes, each one draws random numbers for the whole batch
    and uses its share; samples of the last batch that cannot be shared evenly are left out. Samples that are read from
    files have the same order and the same random numbers; their random views depend on the run's seed and the epoch.

    Args:
        data: the data, on the device of the model.
        config: configuration with batch size, seed and memory format.
        world: the processes.

    Raises:
        ValueError: the batch is larger than the data, or cannot be divided among the processes or parts.
    """

    def __init__(self, data: Data, config: RunConfig, world: World = ALONE) -> None:
        self.data, self.world = data, world
        self._size, self._drop_last, self._channels_last = config.batch_size, config.drop_last, config.channels_last
        self._order = torch.Generator().manual_seed(derive_seed(config.seed, "order"))
        self._augment = torch.Generator().manual_seed(derive_seed(config.seed, "augment"))
        self._views = derive_seed(config.seed, "views")
        self._number = 0
        self._stream: Stream | None = None
        self._began = self._states()
        if config.batch_size % world.size:
            raise ValueError(
                f"batch_size={config.batch_size} cannot be divided evenly among {world.size} processes; use a multiple "
                f"of {world.size}."
            )
        if config.batch_size // world.size < config.accumulate:
            raise ValueError(
                f"accumulate={config.accumulate} is more than the {config.batch_size // world.size} samples of a batch "
                "in each process; use fewer parts."
            )
        self.steps = steps_of(config, len(data.train), world.size)

    def epoch(self, start: int = 0) -> Iterator[Batch]:
        """The batches of the next epoch, from number `start` on.

        Random numbers are drawn for the earlier batches too, but these are not read or augmented.

        Raises:
            ValueError: a file cannot be read.
        """
        self._began = self._states()
        self._number += 1
        order = torch.randperm(len(self.data.train), generator=self._order)
        batches = order.split(self._size)
        whole, x = batches[: self.steps], self.data.train.x
        yield from self._held(x, whole, start) if isinstance(x, Tensor) else self._read(x, whole, start)
        if not self._drop_last:
            self._draws(batches[self.steps :])  # a batch that only a run with fewer processes would use

    def _held(self, samples: Tensor, batches: Sequence[Tensor], start: int) -> Iterator[Batch]:
        """The batches, for samples in memory."""
        device = self.data.train.y.device
        ahead = max(1, _AHEAD[device.type] // self._size)
        for first in range(0, len(batches), ahead):
            group = batches[first : first + ahead]
            draws = self._draws(group)
            if first + len(group) <= start:
                continue
            index = torch.cat([self._mine(part) for part in group])
            there = _sent(index, device)
            x, y = self._inputs(samples[there], draws), self.data.train.y[there]
            sizes = [len(part) // self.world.size for part in group]
            made = zip(x.split(sizes), y.split(sizes), index.split(sizes), strict=True)
            for number, piece in enumerate(made, start=first):
                if number >= start:
                    yield Batch(*piece)

    def _read(self, samples: Stored, batches: Sequence[Tensor], start: int) -> Iterator[Batch]:
        """The batches, for samples in files."""
        if self._stream is None:
            self._check()
            self._stream = samples.stream(self._views)
        for part in batches[:start]:
            self._draws([part])
        left, y = batches[start:], self.data.train.y
        shares = [self._mine(part) for part in left]
        read = self._stream.epoch(self._number - 1, shares)
        for part, index, x in zip(left, shares, read, strict=True):
            there = _sent(index, y.device)
            yield Batch(self._inputs(x, self._draws([part])), y[there], index)

    def _check(self) -> None:
        """Check the files of all parts before the first update; each process checks its share."""
        share = slice(self.world.rank, None, self.world.size)
        for part in {id(one.x): one for one in (self.data.train, self.data.val, self.data.test)}.values():
            if not isinstance(part.x, Tensor):
                part.x.only(share).check()

    def state_dict(self, *, inside: bool) -> dict[str, Any]:
        """Generators and number of the epoch: as at the start of an unfinished epoch (`inside`), else as they are."""
        return dict(self._began if inside else self._states())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._order.set_state(state["order"])
        self._augment.set_state(state["augment"])
        self._number = state["number"]

    def _states(self) -> dict[str, Any]:
        return {"order": self._order.get_state(), "augment": self._augment.get_state(), "number": self._number}

    def _mine(self, batch: Tensor) -> Tensor:
        """This process's share of a batch, along the last dimension."""
        share = batch.shape[-1] // self.world.size
        return batch.narrow(-1, self.world.rank * share, share)

    def _draws(self, group: Sequence[Tensor]) -> Tensor | None:
        if self.data.augment is None or not group:
            return None
        drawn = [self._mine(self.data.augment.draw(len(part), self._augment)) for part in group]
        return _sent(torch.cat(drawn, dim=1), self.data.train.y.device)

    def _inputs(self, x: Tensor, draws: Tensor | None) -> Tensor:
        augment, statistics = self.data.augment, self.data.statistics
        if augment is None or statistics is None or draws is None:
            return self.data.inputs(x, channels_last=self._channels_last)
        return augment.apply(x, statistics, draws, channels_last=self._channels_last)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor from the CPU to the device; for a GPU it is pinned first, so that the copy does not block."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def steps_of(config: RunConfig, samples: int, processes: int = 1) -> int:
    """Number of updates per epoch.

    Raises:
        ValueError: the batch is larger than the data.
    """
    if config.batch_size > samples:
        raise ValueError(
            f"batch_size={config.batch_size} is larger than the {samples} training samples; use {samples} or fewer."
        )
    whole, rest = divmod(samples, config.batch_size)
    return whole + (rest >= processes and not config.drop_last)
