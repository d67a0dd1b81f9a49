"""A monitor for losses and gradients that are not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatmin.train.feed import Batch
from flatmin.train.meter import Meter
from flatmin.train.trainer import Trainer

# Updates between two checks. A check would make the GPU wait; the optimizer itself skips updates that are not finite.
_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class NonFiniteUpdate:
    """An update whose loss or gradient was not finite.

    Args:
        step: number of the update, from 1.
        epoch: number of the epoch, from 1.
        batch: number of the batch in the epoch, from 1.
        loss: loss of a process where it was not finite; finite if only the gradient was not.
        samples: positions of the batch's samples in the training part, for each process.
        before: number of updates of the run that were skipped before this one.
    """

    step: int
    epoch: int
    batch: int
    loss: float
    samples: list[list[int]]
    before: int

    @property
    def content(self) -> dict[str, Any]:
        """The content of nonfinite.json; the loss is text, because JSON has no nan."""
        return {**vars(self), "loss": str(self.loss)}

    def sentence(self, where: str = "") -> str:
        """The message that says why the run stops.

        Args:
            where: text that names the file with the samples, if there is one.
        """
        what = "gradient" if math.isfinite(self.loss) else "loss"
        more = f", after {self.before} skipped update{'s' * (self.before > 1)}" if self.before else ""
        return (
            f"the training {what} was not finite in step {self.step}, batch {self.batch} of epoch {self.epoch}{where}"
            f"{more}; try a smaller lr or rho"
        )


class NonFiniteMonitor:
    """Checks updates and decides when the run must stop.

    In one process on the CPU, and when updates may be skipped, it checks every update. Otherwise it checks every 50th
    update and the end of each epoch, because a check waits for the device. An update that is not finite does not change
    the weights (`SAM`, nonfinite="skip"); the buffers that its forward passes changed are reset to their values after
    the last check.

    Args:
        trainer: trainer of the run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        config = trainer.config
        self._skips_allowed = config.max_skips if config.nonfinite == "skip" else 0
        careful = config.nonfinite == "skip" or (config.device == "cpu" and trainer.world.size == 1)
        self._every = 1 if careful else _EVERY
        self._known = 0
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._averaged = False
        self.skips = 0
        self.begin(0)

    def begin(self, position: int) -> None:
        """Start an epoch, or continue one after `position` batches."""
        self._looked, self._unseen = position, list[Tensor]()

    def before(self) -> None:
        """Prepare for an update."""
        if self._unseen:
            return
        average = self._trainer.average
        touched = [*self._trainer.model.buffers(), *(() if average is None else average.buffers())]
        self._kept = [(one, one.detach().clone()) for one in touched]
        self._averaged = average is not None and average.begun

    def after(self, batch: Batch, meter: Meter, *, epoch: int, now: bool = False) -> NonFiniteUpdate | None:
        """Check after an update; returns the update that stops the run, or None.

        Args:
            batch: batch of the update.
            meter: meter of the epoch, including the update.
            epoch: number of the epoch, from 1.
            now: check in any case, because a checkpoint must not contain unchecked updates.
        """
        self._unseen.append(batch.index)
        if not now and len(meter) % self._every and len(meter) < self._trainer.feed.steps:
            return None
        losses = torch.stack(meter.losses[self._looked :])
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        count = self._agreed(max(len(bad), self._skipped()), losses.device)
        unseen, first = self._unseen, self._looked
        self.begin(len(meter))
        if not count:
            return None
        self._put_back()
        before, self.skips = self.skips, self.skips + count
        meter.skipped += count
        if self.skips <= self._skips_allowed:
            return None
        world = self._trainer.world
        first_bad = [positions[0] for positions in world.all_gather(bad) if positions]
        at = min(first_bad, default=len(unseen) - 1)
        seen = world.all_gather(float(losses[at]))
        return NonFiniteUpdate(
            step=self._trainer.steps - len(meter) + first + at + 1,
            epoch=epoch,
            batch=first + at + 1,
            loss=next((loss for loss in seen if not math.isfinite(loss)), seen[0]),
            samples=world.all_gather(unseen[at].tolist()),
            before=before,
        )

    def _put_back(self) -> None:
        """Undo the changes to buffers by a batch whose update was skipped."""
        trainer = self._trainer
        for one, copy in self._kept:
            one.copy_(copy)
        if trainer.average is not None and not self._averaged:
            trainer.average.forget()
        trainer.previous = None  # a bad batch must not be used for the next ascent

    def _skipped(self) -> int:
        """Number of updates that the optimizer skipped since the last check.

        It is 0 with a scaler, which also skips updates to adjust its scale.
        """
        if self._trainer.scaler is not None:
            return 0
        total = self._trainer.optimizer.counts()["skipped_steps"]
        new, self._known = total - self._known, total
        return new

    def _agreed(self, count: int, device: torch.device) -> int:
        """The largest count over all processes, so that either all of them stop or none."""
        if self._trainer.world.size == 1:
            return count
        return int(max(self._trainer.world.all_gather(count)))
