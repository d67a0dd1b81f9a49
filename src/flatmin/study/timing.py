"""Time per training step relative to the base optimizer."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import torch

from flatmin.methods import BASE
from flatmin.study.store import Run
from flatmin.train.config import RunConfig
from flatmin.train.feed import Batch
from flatmin.train.files import write_json
from flatmin.train.settings import content_hash
from flatmin.train.trainer import Trainer
from flatmin.words import read_text

WARM_UP, STEPS, ROUNDS = 5, 5, 11


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Median and quartiles of the ratios of neighbouring measurements."""

    median: float
    q25: float
    q75: float


class Stepper:
    """A trainer whose steps are timed, epoch after epoch without end."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._batches = self._endless()

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self._trainer.batches()
            self._trainer.steps = 0  # restart the schedule

    def seconds(self, steps: int) -> float:
        """Wall time in seconds of the given number of training steps."""
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

    All steps run in one process on one thread. After warm-up, each round times the base and then every configuration
    for a few steps, in an order that rotates from round to round. Ratios are taken within a round, so that slow phases
    of the machine affect both sides. The ratio of a configuration that equals the base shows the measurement noise.

    Args:
        configs: name -> configuration.
        base: the base optimizer's configuration.
        rounds: number of rounds, each of which gives one ratio.

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


def step_times(runs: Sequence[Run], folder: Path, on_begin: Callable[[int], None]) -> list[Ratio]:
    """Time per training step of each run relative to plain training of the same network on the same data.

    Ratios are stored in the folder and reused by later calls with the same code and settings.

    Args:
        runs: one run for each row of a table.
        folder: made if it does not exist.
        on_begin: called before a measurement with the number of configurations.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(content_hash(_plain(run.config)), []).append(run)
    ratios: dict[str, Ratio] = {}
    for group in groups.values():
        timed = {_kind(run): run.config for run in reversed(group)}
        base = dataclasses.replace(_plain(group[0].config), epochs=group[0].config.epochs)
        key = content_hash(sorted(timed), _plain(base), sorted({run.code for run in group}), group[0].data_word or "")
        path = folder / f"{key[:10]}.json"
        found = _kept(path, key)
        if found is None:
            on_begin(len(timed))
            found = time_ratios(timed, base)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"key": key, "ratios": {name: dataclasses.asdict(one) for name, one in found.items()}})
        ratios |= {run.name: found[_kind(run)] for run in group}
    return [ratios[run.name] for run in runs]


def _plain(config: RunConfig) -> RunConfig:
    """The base optimizer alone under these settings; settings that do not affect the time of a step are fixed."""
    bare = dataclasses.replace(config, method=BASE, rho=None, params={}, ema=None, measure=False)
    return dataclasses.replace(bare, epochs=1, seed=0, lr=0.1, weight_decay=5e-4)


def _kind(run: Run) -> str:
    """A digest of the settings that affect the time of a step."""
    config = run.config
    return content_hash(config.method, config.params, bool(config.rho), config.ema is None)


def _kept(path: Path, key: str) -> dict[str, Ratio] | None:
    """Stored ratios of an earlier call; None if there are none for this key."""
    try:
        found = json.loads(read_text(path))
        return {name: Ratio(**one) for name, one in found["ratios"].items()} if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # measuring again costs seconds


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread inside, as in the workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
