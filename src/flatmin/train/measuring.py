"""Measurements between epochs: the card of a part of the training data."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from flatmin.measure.card import card
from flatmin.measure.problem import Problem
from flatmin.train.config import stream
from flatmin.train.evaluate import batches
from flatmin.train.trainer import Trainer


def measured(trainer: Trainer, what: str, examples: int) -> dict[str, float]:
    """Numbers of `flatmin.measure.card` by name, for the mean cross-entropy in eval mode; the model is left as it is.

    Args:
        trainer: of the run; with an average of the weights, the caller applies it.
        what: sections, see `card`.
        examples: training samples, drawn once for all runs; their labels are those trained on.

    Raises:
        ValueError: an unknown section, or samples in files and more of them than should be kept in memory.
    """
    data = trainer.data
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(stream(0, "measure")))
    part = data.train.only(order[:examples].sort().values)
    training = trainer.model.training
    devices = [] if trainer.config.device == "cpu" else [torch.device(trainer.config.device)]
    with torch.random.fork_rng(devices=devices):
        problem = Problem(trainer.model, F.cross_entropy, list(batches(data, part)), split="train")
        found = card(problem, what)
    trainer.model.train(training)
    return {name: q.value for name, q in found.quantities.items() if math.isfinite(q.value)}
