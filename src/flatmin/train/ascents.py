"""The optimizer of a run and closures of a few batches, to measure the method's own ascent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from flatmin.data.dataset import Data
from flatmin.measure.radius import LOW_RESOLUTION, RESOLUTION
from flatmin.methods import Need
from flatmin.optim import SAM
from flatmin.train.feed import Batch
from flatmin.train.saved import SavedRun, load_weights
from flatmin.train.trainer import Trainer

BATCHES = 5
"""Number of batches that are measured on."""
FILLED = 20
"""Number of updates with learning rate 0 that fill the memory of a method at the weights of a finished run."""

Closures = list[Any]
Ascents = tuple[SAM, Closures, float]


@contextmanager
def ascents(trainer: Trainer, index: Tensor) -> Iterator[Ascents]:
    """The optimizer of a run during training, closures of a few batches, and the resolution of their losses.

    The trainer's counters are restored afterwards.

    Args:
        trainer: trainer of the run.
        index: positions of samples in the training part. They are split into batches of the run's size, at most five;
            if they do not fill one, they form a single smaller batch.
    """
    kept = trainer.gradients, trainer._right, trainer._seen, trainer.model.training
    trainer._right, trainer._seen = {}, []
    trainer.model.train()
    try:
        resolution = RESOLUTION if trainer.config.precision == "float32" else LOW_RESOLUTION
        yield trainer.optimizer, [_closure(trainer, batch) for batch in _batches(trainer, index)], resolution
    finally:
        trainer.gradients, trainer._right, trainer._seen, training = kept
        trainer.model.train(training)


@contextmanager
def saved_ascents(run: SavedRun, data: Data, index: Tensor) -> Iterator[Ascents]:
    """The same for a finished run, on the CPU; the memory of the method is filled again at the trained weights.

    Args:
        run: the run.
        data: its training data.
        index: see `ascents`.
    """
    trainer = Trainer(run.here, data=data)
    load_weights(trainer.model, run.weights, key=run.key)
    state = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    if any(part.slots for part in trainer.recipe.parts.values()) or Need.BASE_MOMENTUM in trainer.recipe.needs:
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.0
        for batch in _endless(trainer, FILLED):
            trainer._one(batch)
        trainer.model.load_state_dict(state)
    with ascents(trainer, index) as found:
        yield found


def _batches(trainer: Trainer, index: Tensor) -> list[Batch]:
    size, data = trainer.config.batch_size, trainer.data
    pieces = [piece for piece in index.split(size) if len(piece) == size][:BATCHES] or [index]
    device = data.train.y.device
    return [
        Batch(
            data.inputs(data.train.x[piece.to(device)], channels_last=trainer.config.channels_last),
            data.train.y[piece.to(device)],
            piece,
        )
        for piece in pieces
    ]


def _closure(trainer: Trainer, batch: Batch) -> Callable[[], Tensor] | list[Callable[[], Tensor]]:
    if Need.MICRO_BATCHES in trainer.recipe.needs:
        return [_run(trainer, number, part) for number, part in enumerate(trainer.parts(batch))]
    return _run(trainer, 0, batch)


def _run(trainer: Trainer, key: int, batch: Batch) -> Callable[[], Tensor]:
    return lambda: trainer._closure(key, [batch])


def _endless(trainer: Trainer, count: int) -> Iterator[Batch]:
    """`count` batches, over as many epochs as needed."""
    done = 0
    while done < count:
        for batch in trainer.batches():
            if done == count:
                return
            done += 1
            yield batch
