"""The events of a study, for a progress display."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flatmin.train.result import Epoch, Result
from flatmin.words import duration


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Sent before any work starts: the number of runs and an estimate of the time.

    Args:
        stage: "tune", "compare", "study" or "search".
        runs: number of runs in all.
        reused: number of these that are finished already.
        epochs: epochs of all runs still to do.
        seconds: estimated time of all runs still to do; None if unknown.
        nets: number of networks to measure after training.
        labels: row and seed of each run, as text, by the run's name; while values are chosen only.
    """

    stage: str
    runs: int
    reused: int
    epochs: int
    seconds: float | None
    nets: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """The event as text, e.g. "30 runs, about 55 seconds"."""
        count = f"{self.runs} run{'s' if self.runs != 1 else ''}"
        if self.reused == self.runs:
            return f"{count}, all finished before"
        before = f", {self.reused} finished before" if self.reused else ""
        nets = f", {self.nets} network{'s' if self.nets != 1 else ''} to measure" if self.nets else ""
        return f"{count}{before}{nets}" + ("" if self.seconds is None else f", {duration(self.seconds)}")


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """A run finished an epoch."""

    run: str
    epochs: int
    line: Epoch


@dataclass(frozen=True, kw_only=True)
class RunDone:
    """A run finished; `result.failure` is set if its loss was not finite."""

    run: str
    result: Result


@dataclass(frozen=True, kw_only=True)
class RunBroke:
    """A run raised an error and has no result."""

    run: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The value chosen on validation for an arm."""

    label: str
    chosen: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The time per step is being measured, with nothing else running."""

    methods: int


@dataclass(frozen=True, kw_only=True)
class ReportDone:
    """A network has been measured."""

    run: str


@dataclass(frozen=True, kw_only=True)
class Warned:
    """A warning; the study continues."""

    text: str


Event = Planned | EpochDone | RunDone | RunBroke | Tuned | Timing | ReportDone | Warned
