"""Training batches: order, reading, augmentation and normalisation, on the device that the data are on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatmin.data.dataset import Data, Stored, Stream
from flatmin.train.config import RunConfig, derive_seed
from flatmin.train.processes import ALONE, World

# On a GPU the launches of augmentation are shared by several batches; a CPU's cache would not hold them.
_AHEAD = {"cpu": 1, "cuda": 4096}  # samples


@dataclass(frozen=True)
class Batch:
    """What one update sees in this process.

    Args:
        x: ready for the model.
        y: labels.
        index: of the samples in the training part, on the CPU.
    """

    x: Tensor
    y: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def split(self, parts: int) -> list[Batch]:
        """Equal parts; as many as there are samples, if that is fewer."""
        parts = min(parts, len(self))
        pieces = zip(*(t.tensor_split(parts) for t in (self.x, self.y, self.index)), strict=True)
        return [Batch(*piece) for piece in pieces]


class Feed:
    """The batches of one epoch after the other, the same for every number of processes.

    Order and augmentation come from generators of their own, seeded by the run's seed. A batch is augmented once, so
    that all passes of an update see the same images. In several processes every one draws for the whole batch and
    takes its share; samples of a last batch that cannot be shared evenly are left out. Samples that are read from files
    come in the same order and with the same draws, after random views that the run's seed and the epoch decide.

    Args:
        data: on the device of the model.
        config: batch size, seed and memory format.
        world: the processes.

    Raises:
        ValueError: a batch that is larger than the data, or that the processes or parts cannot share.
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
                f"batch_size={config.batch_size} cannot be shared evenly by {world.size} processes; use a multiple."
            )
        if config.batch_size // world.size < config.accumulate:
            raise ValueError(
                f"accumulate={config.accumulate} parts need as many samples; a batch has "
                f"{config.batch_size // world.size} in each process."
            )
        self.steps = steps_of(config, len(data.train), world.size)

    def epoch(self, start: int = 0) -> Iterator[Batch]:
        """The batches of the next epoch from number `start` on; what comes before is drawn and neither read nor made.

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
            self._draws(batches[self.steps :])  # too few for the processes; one process would have drawn for them

    def _held(self, samples: Tensor, batches: Sequence[Tensor], start: int) -> Iterator[Batch]:
        """The batches of samples in memory."""
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
        """The batches of samples in files."""
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
        """Look at the files of all parts before the first update; each process looks at its share."""
        share = slice(self.world.rank, None, self.world.size)
        for part in {id(one.x): one for one in (self.data.train, self.data.val, self.data.test)}.values():
            if not isinstance(part.x, Tensor):
                part.x.only(share).check()

    def state_dict(self, *, inside: bool) -> dict[str, Any]:
        """Generators and number of the epoch: as when the present epoch began if it is unfinished, else as they are."""
        return dict(self._began if inside else self._states())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there; see `state_dict`."""
        self._order.set_state(state["order"])
        self._augment.set_state(state["augment"])
        self._number = state["number"]

    def _states(self) -> dict[str, Any]:
        return {"order": self._order.get_state(), "augment": self._augment.get_state(), "number": self._number}

    def _mine(self, batch: Tensor) -> Tensor:
        """This process's share of what a batch has along its last dimension."""
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
    """A small tensor of the CPU on the device; pinned first for a GPU, which would wait for pageable memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def steps_of(config: RunConfig, samples: int, processes: int = 1) -> int:
    """Updates of an epoch.

    Raises:
        ValueError: a batch larger than the data.
    """
    if config.batch_size > samples:
        raise ValueError(
            f"batch_size={config.batch_size} is larger than the {samples} training samples; use {samples} or fewer."
        )
    whole, rest = divmod(samples, config.batch_size)
    return whole + (rest >= processes and not config.drop_last)
