"""Measurements between epochs, on some of the training samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from flatmin.data.dataset import check_held
from flatmin.measure.problem import Problem
from flatmin.measure.report import ReportSettings, report
from flatmin.train.ascents import ascents
from flatmin.train.config import derive_seed
from flatmin.train.evaluate import batches
from flatmin.train.options import Options, check_groups
from flatmin.train.trainer import Trainer
from flatmin.words import reason


def measured(trainer: Trainer, options: Options, warn: Callable[[str], None]) -> dict[str, float]:
    """Measure the mean cross-entropy in eval mode; returns the numbers of `flatmin.measure.report` by name.

    The model is not changed. Quantities that cannot be measured are left out with a warning; the run continues.

    Args:
        trainer: trainer of the run; if there is an average of the weights, the caller applies it.
        options: what to measure, and on how many training samples. All runs use the same samples, with the labels of
            the training.
        warn: called with a sentence for every quantity that could not be measured.
    """
    data = trainer.data
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(derive_seed(0, "measure")))
    index = order[: options.measure_examples].sort().values
    part = data.train.only(index)
    training = trainer.model.training
    devices = [] if trainer.config.device == "cpu" else [torch.device(trainer.config.device)]
    with torch.random.fork_rng(devices=devices):
        try:
            problem = Problem(trainer.model, F.cross_entropy, list(batches(data, part)), split="train")
        except Exception as error:
            warn(f"nothing could be measured: {reason(error)}")
            return {}
        finally:
            trainer.model.train(training)
        flatness = report(
            problem, options.measures, settings=_settings(options), ascents=partial(ascents, trainer, index)
        )
    trainer.model.train(training)
    lacking = flatness.missing | {q.name: q.note for q in flatness.quantities.values() if not math.isfinite(q.value)}
    for what, why in lacking.items():
        warn(f"{what} could not be measured: {why}")
    return {name: q.value for name, q in flatness.quantities.items() if math.isfinite(q.value)}


def check(trainer: Trainer, options: Options) -> None:
    """Check the measurement options before the first step.

    Raises:
        ValueError: a group of m-sharpness has more samples than are measured on, or the samples do not fit into memory.
    """
    if options.measure_every:
        examples = min(options.measure_examples, len(trainer.data.train))
        check_held(trainer.data.train.x, examples)
        check_groups(options.measures, examples, options.measure_m)


def _settings(options: Options) -> ReportSettings:
    """Settings with a single radius; curves over several radii are not recorded during training."""
    return ReportSettings(m=options.measure_m, rho=options.measure_rho, rhos=(options.measure_rho,))
