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
        name: of the run; its folder's name, if it has one.
        config: resolved.
        environment: versions, device, threads and processes.
        parameters: numbers that are trained.
        samples: of the training part.
        steps: updates of an epoch.
        gradient_evaluations: gradients of one batch per update, on average.
        epoch, step: 0, or how many a resumed run has done already.
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
    """About once a second of training, for displays; on a GPU the device may be some updates behind.

    Args:
        step: updates since the beginning.
        epoch: the current one, from 1.
    """

    step: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """After every `log_every` updates.

    Args:
        step: updates since the beginning.
        epoch: the current one, from 1.
        lr: of the last update.
        rho: see `Epoch`.
        loss: mean since the event before, over all processes; see `Epoch.train_loss`.
        seconds: of training since the event before.
        images: seen since the event before.
        diagnostics: of the last update, if the run records them; see `SAM.diagnostics`.
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
    """After an epoch at which the run measures: numbers of `flatmin.measure.report` by name."""

    epoch: int
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Warned:
    """A warning of one sentence."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Ended:
    """After everything."""

    result: Result


Event = Began | Ticked | Stepped | EpochEnded | Measured | Warned | Ended
OnEvent = Callable[[Event], None]
