"""Time per training step relative to the base optimizer, and a guess of how long a study takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles

import torch

from flatmin.train import evaluate
from flatmin.train.config import RunConfig
from flatmin.train.feed import Batch
from flatmin.train.trainer import Trainer, build_recipe

WARM_UP, STEPS, ROUNDS = 5, 5, 21
START_SECONDS = 4.0  # a fresh worker imports torch and the data's package
CURVATURE_GRADIENTS = 30.0  # a Lanczos run of about a dozen products costs so many gradients of the training part


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Median and quartiles of the ratios of neighbouring measurements."""

    median: float
    q25: float
    q75: float


class Stepper:
    """A trainer that gives one step after another, epoch after epoch."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._batches = self._endless()

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self._trainer.batches()
            self._trainer.steps = 0  # the schedule ends with the run

    def seconds(self, steps: int) -> float:
        """Wall time of that many training steps."""
        trainer = self._trainer
        trainer.model.train()
        self._wait()
        begun = time.perf_counter()
        for _ in range(steps):
            trainer.step(next(self._batches))
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self._trainer.config.device != "cpu":
            torch.cuda.synchronize()


def time_ratios(configs: Mapping[str, RunConfig], base: RunConfig, *, rounds: int = ROUNDS) -> dict[str, Ratio]:
    """Time per training step of each configuration relative to the base.

    One process and one thread. After warm-up each round times the base and then every configuration for a few steps,
    in an order that rotates from round to round; a ratio is taken within its round, so slow spells of the machine
    hit both sides. A configuration equal to the base is a copy of it: its ratio shows the noise of the measurement.

    Args:
        configs: name -> configuration.
        base: the base optimizer's configuration.
        rounds: number of ratios.

    Returns:
        Median and quartiles by name.
    """
    with one_thread(), torch.random.fork_rng(devices=[]):
        first = Trainer(base)
        reference = Stepper(first)
        steppers = {name: Stepper(Trainer(config, data=first.data)) for name, config in configs.items()}
        for stepper in (reference, *steppers.values()):
            stepper.seconds(WARM_UP)
        ratios: dict[str, list[float]] = {name: [] for name in steppers}
        names = list(steppers)
        for turn in range(rounds):
            shift = turn % len(names)
            floor = reference.seconds(STEPS)
            for name in names[shift:] + names[:shift]:
                ratios[name].append(steppers[name].seconds(STEPS) / floor)
    return {name: _ratio(values) for name, values in ratios.items()}


def _ratio(values: Sequence[float]) -> Ratio:
    q25, median, q75 = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Ratio(median=median, q25=q25, q75=q75)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of one plain step and of one evaluation, and the number of steps in an epoch."""

    step: float
    score: float
    steps: int


def measure_speed(trainer: Trainer, *, most: float = 1.0) -> Speed:
    """Time a few steps, for about `most` seconds at most after the first two."""
    with one_thread(), torch.random.fork_rng(devices=[]):
        stepper = Stepper(trainer)
        stepper.seconds(2)
        times: list[float] = []
        while len(times) < 10 and sum(times) < most:
            times.append(stepper.seconds(1))
        begun = time.perf_counter()
        for part in (trainer.data.val, trainer.data.test):
            evaluate.score(trainer.model, trainer.data, part, trainer.config)
        score = time.perf_counter() - begun
    return Speed(
        step=sorted(times)[len(times) // 2],
        score=score,
        steps=-(-len(trainer.data.train) // trainer.config.batch_size),
    )


def guess_seconds(configs: Sequence[RunConfig], speed: Speed, workers: int) -> float:
    """A guess of the wall time of these runs on so many workers."""
    total = 0.0
    for config in configs:
        gradients = build_recipe(config).gradient_evaluations
        total += config.epochs * (speed.steps * gradients * speed.step + speed.score)
        total += CURVATURE_GRADIENTS * speed.steps * speed.step * config.measure
    return total / max(1, workers) + (START_SECONDS if workers else 0.0)


@contextmanager
def one_thread() -> Iterator[None]:
    """Give torch one thread inside, as in the workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
