"""The monitor of losses and gradients that are not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatmin.train.feed import Batch
from flatmin.train.meter import Meter
from flatmin.train.trainer import Trainer

# Between two checks a GPU runs ahead; the optimizer itself skips updates that are not finite.
_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class NonFiniteUpdate:
    """An update whose loss or gradient was not finite.

    Args:
        step: number of the update, from 1.
        epoch: from 1.
        batch: in the epoch, from 1.
        loss: of the process where it was not finite; finite if only the gradient was not.
        samples: indices of the batch in the training part, by process.
        before: updates of the run that were skipped before this one.
    """

    step: int
    epoch: int
    batch: int
    loss: float
    samples: list[list[int]]
    before: int

    @property
    def content(self) -> dict[str, Any]:
        """For nonfinite.json, which knows no nan."""
        return {**vars(self), "loss": str(self.loss)}

    def sentence(self, where: str = "") -> str:
        """Why the run stops.

        Args:
            where: file that has the samples, if there is one.
        """
        what = "gradient" if math.isfinite(self.loss) else "loss"
        more = f", after {self.before} skipped update{'s' * (self.before > 1)}" if self.before else ""
        return (
            f"the training {what} was not finite in step {self.step}, batch {self.batch} of epoch {self.epoch}{where}"
            f"{more}; try a smaller lr or rho"
        )


class NonFiniteMonitor:
    """Checks every update and decides when the run must stop.

    On one CPU, and when updates may be skipped, it checks every update; otherwise every 50th and at the end of an
    epoch, because a check waits for the device. An update that is not finite leaves the weights alone (`SAM`,
    nonfinite="skip"); the buffers that its forward passes touched are restored to their values after the last check.

    Args:
        trainer: of the run.
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
        """A new epoch, or one that continues after so many batches."""
        self._looked, self._unseen = position, list[Tensor]()

    def before(self) -> None:
        """Call this before an update."""
        if self._unseen:
            return
        average = self._trainer.average
        touched = [*self._trainer.model.buffers(), *(() if average is None else average.buffers())]
        self._kept = [(one, one.detach().clone()) for one in touched]
        self._averaged = average is not None and average.begun

    def after(self, batch: Batch, meter: Meter, *, epoch: int, now: bool = False) -> NonFiniteUpdate | None:
        """Call this after an update; returns the update that stops the run, or None.

        Args:
            batch: of the update.
            meter: of the epoch, the update included.
            epoch: from 1.
            now: check in any case: a checkpoint must not hold unchecked updates.
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
        """Undo what a batch changed whose update was skipped."""
        trainer = self._trainer
        for one, copy in self._kept:
            one.copy_(copy)
        if trainer.average is not None and not self._averaged:
            trainer.average.forget()
        trainer.previous = None  # no batch to climb on

    def _skipped(self) -> int:
        """Updates that the optimizer has skipped since the last check; a scaler skips for reasons of its own."""
        if self._trainer.scaler is not None:
            return 0
        total = self._trainer.optimizer.counts()["skipped_steps"]
        new, self._known = total - self._known, total
        return new

    def _agreed(self, count: int, device: torch.device) -> int:
        """The largest count of all processes, so that all stop or none."""
        if self._trainer.world.size == 1:
            return count
        return int(max(self._trainer.world.all_gather(count)))
