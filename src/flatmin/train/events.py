"""The events of a run, for progress displays, JSON lines and trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flatmin.train.config import RunConfig
from flatmin.train.result import Epoch, Result


@dataclass(frozen=True, kw_only=True)
class Began:
    """Before the first step.

    Args:
        name: name of the run: that of its folder, if it has one, else the method.
        config: resolved configuration.
        environment: versions, device, threads and processes.
        parameters: number of trained parameters.
        samples: number of training samples.
        steps: number of updates per epoch.
        gradient_evaluations: average number of gradient evaluations per update.
        epoch, step: epochs and updates that a resumed run has already done; else 0.
    """

    name: str
    config: RunConfig
    environment: Mapping[str, Any]
    parameters: int
    samples: int
    steps: int
    gradient_evaluations: float
    epoch: int = 0
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Ticked:
    """About once per second of training, for progress displays; a GPU may be some updates behind.

    Args:
        step: number of updates since the start of training.
        epoch: current epoch, from 1.
    """

    step: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """After every `log_every` updates.

    Args:
        step: number of updates since the start of training.
        epoch: current epoch, from 1.
        lr: learning rate of the last update.
        rho: see `Epoch`.
        loss: mean loss since the previous event, over all processes; see `Epoch.train_loss`.
        seconds: training time since the previous event, in seconds.
        images: number of images since the previous event.
        diagnostics: diagnostics of the last update, if the run records them; see `SAM.diagnostics`.
    """

    step: int
    epoch: int
    lr: float
    rho: float | None
    loss: float
    seconds: float
    images: int
    diagnostics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class EpochEnded:
    """After every epoch and its evaluation."""

    line: Epoch
    step: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """After the measurements of an epoch: numbers of `flatmin.measure.report` by name."""

    epoch: int
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Warned:
    """A warning, in one sentence."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Ended:
    """At the end of the run."""

    result: Result


Event = Began | Ticked | Stepped | EpochEnded | Measured | Warned | Ended
OnEvent = Callable[[Event], None]
