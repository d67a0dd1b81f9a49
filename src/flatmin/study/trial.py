"""Checks before the first run: missing data, and code that fails at its first update."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from flatmin.methods import Need
from flatmin.study.code import Contents
from flatmin.study.costs import Sizes
from flatmin.study.timing import one_thread
from flatmin.train.config import RunConfig
from flatmin.train.feed import steps_of
from flatmin.train.numerics import numerics
from flatmin.train.sources import check_machine
from flatmin.train.trainer import Trainer, build_recipe, build_schedule
from flatmin.words import duration, ended, explained, reason

_MOST = 20.0  # seconds that all trials together may take
_NAMED = 3  # combinations that a sentence names
# Settings that make two runs different combinations.
_METHOD = ("method", "plugins")
_NETWORK = ("model", "model_params", "data", "image_size", "device", "precision", "channels_last")
_LOOP = ("optimizer", "smoothing", "micro_batches", "accumulate", "graph", "deterministic")
# Replaced in a trial by a constant schedule; the schedule of the run is checked separately.
_SCHEDULE = ("schedule_unit", "warmup", "warmup_lr", "lr_min", "milestones", "gamma", "as_coded")
_CONSTANT: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(RunConfig) if f.name in _SCHEDULE}
_CONSTANT["schedule"] = "constant"


def check_runs(
    configs: Sequence[RunConfig], contents: Contents, *, here: bool = True, sizes: Sizes | None = None
) -> list[str]:
    """Check before the first run starts that all runs can be executed.

    Args:
        configs: configurations of the runs.
        contents: the data of the plan.
        here: whether runs are executed on this machine, which then needs their data. Otherwise missing data are no
            error, and runs that need them are not tried.
        sizes: known sizes of the data and speeds of the networks.

    Returns:
        Notes for the user, see `try_out`.

    Raises:
        ValueError: missing data, or an error from `try_out`.
    """
    sizes = sizes or Sizes()
    if here:
        for config in configs:
            contents.check(config)
    known = [config for config in configs if sizes.official(config) or not contents.absent(config)]
    return try_out(known, sizes, here=here)


def try_out(configs: Sequence[RunConfig], sizes: Sizes | None = None, *, here: bool = True) -> list[str]:
    """Perform one update on a few samples for each combination of method, network, data and precision of the runs.

    The samples are random where the form of the data is known without reading them. Cheap combinations come first, and
    every method and every network is tried once before any is tried again. Combinations that do not fit into 20
    seconds in all are left out.

    Args:
        configs: configurations of the runs.
        sizes: known sizes of the data and speeds of the networks.
        here: whether runs are executed on this machine. If not, combinations whose data are missing here are left
            out, and those whose device is missing are tried on the CPU.

    Returns:
        A sentence on the combinations that were left out because of the time; empty if there are none.

    Raises:
        ValueError: the first combination that fails, with its error and the line of the user's own code.
    """
    sizes = sizes or Sizes()
    combinations: dict[tuple[object, ...], tuple[float, RunConfig]] = {}
    for config in configs:
        try:
            build_schedule(config, steps_of(config, sizes.of(config)[0]))
            if _key(config) not in combinations:
                combinations[_key(config)] = _trial(config, sizes, here=here)
        except Exception as error:
            if here or not isinstance(error, OSError | ImportError):  # the data may be on the runs' machine
                raise _failure(config, error) from error
    seen: set[object] = set()
    spent = 0.0
    again: list[tuple[float, RunConfig]] = []
    left: list[tuple[float, RunConfig]] = []

    def attempt(seconds: float, trial: RunConfig) -> None:
        nonlocal spent
        if spent + seconds > _MOST:
            left.append((seconds, trial))
            return
        begun = time.monotonic()
        try:
            _update(trial, sizes)
        except Exception as error:
            raise _failure(trial, error) from error
        spent += time.monotonic() - begun
        seen.update(_parts(trial))

    for seconds, trial in sorted(combinations.values(), key=lambda one: one[0]):
        if _parts(trial) <= seen:
            again.append((seconds, trial))
        else:
            attempt(seconds, trial)
    for seconds, trial in again:
        attempt(seconds, trial)
    return [_left_out(left)] if left else []


def _key(config: RunConfig) -> tuple[object, ...]:
    """A key that distinguishes combinations."""
    params = {name: value for name, value in config.params.items() if not isinstance(value, float)}
    switches = (config.label_smoothing > 0, config.clip_norm is None, config.ema is None)
    return (*(str(getattr(config, name)) for name in (*_METHOD, *_NETWORK, *_LOOP)), str(params), *switches)


def _parts(config: RunConfig) -> set[tuple[str, ...]]:
    """The method and the network of a combination, each with its settings."""
    return {tuple(str(getattr(config, name)) for name in names) for names in (_METHOD, _NETWORK)}


def _trial(config: RunConfig, sizes: Sizes, *, here: bool) -> tuple[float, RunConfig]:
    """The estimated seconds of a trial, and its configuration with a batch as small as the method allows."""
    try:
        check_machine(config)
    except ValueError:
        if here:
            raise
        precision = "float32" if config.precision == "fp16" else config.precision
        config = dataclasses.replace(config, device="cpu", graph=False, precision=precision)
    recipe = build_recipe(config)
    parts = config.micro_batches if Need.MICRO_BATCHES in recipe.needs else config.accumulate
    updates = sizes.updates(config)
    count = min(max(4, 2 * parts), config.batch_size)
    seconds = count * sizes.gradient_seconds(config) * recipe.for_length(updates).gradient_evaluations
    # Epochs of one update, so that parts that depend on the length of training get that of the run.
    return seconds, dataclasses.replace(config, batch_size=count, epochs=updates, compile=False, **_CONSTANT)


def _update(trial: RunConfig, sizes: Sizes) -> None:
    data = sizes.samples(trial, trial.batch_size)
    trial = dataclasses.replace(trial, batch_size=len(data.train))
    with warnings.catch_warnings(), one_thread(), numerics(trial), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # the run itself warns
        trainer = Trainer(trial, data=data.to(trial.device))
        trainer.net.train()
        trainer.step(next(iter(trainer.batches())))
        if trial.device != "cpu":
            torch.cuda.synchronize()


def _failure(config: RunConfig, error: Exception) -> ValueError:
    why = str(error) if explained(error) else reason(error)
    what = f"method={config.method} with model={config.model} on data={config.data}"
    return ValueError(f"no run was started, because {what} fails at its first update: {ended(why)}")


def _left_out(left: Sequence[tuple[float, RunConfig]]) -> str:
    names = [f"{trial.method} with {trial.model}" for _, trial in left[:_NAMED]]
    more = f" and {len(left) - len(names)} more" if len(left) > len(names) else ""
    least = min(seconds for seconds, _ in left)
    return (
        f"Not checked before the first run, because one update takes {duration(least)} or more here: "
        f"{', '.join(names)}{more}."
    )
