"""What a run does beside training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flatmin.measure.report import chosen


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run does beside training; none of it changes the outcome.

    Args:
        checkpoint_every: epochs between checkpoints; 0: none.
        checkpoint_seconds: write one at the end of an epoch only if so many seconds have passed since the last one, or
            since the start; 0: at the end of every epoch that `checkpoint_every` names.
        checkpoint_steps: updates between further checkpoints inside an epoch; 0: none.
        keep_checkpoints: how many stay on disk.
        prolong: keep the last checkpoint of a finished run that can continue with more epochs, see
            `flatmin.train.state.fixed_length`.
        weights: whether the chosen weights are kept.
        signals: whether Ctrl-C and SIGTERM end the run with a checkpoint.
        log_every: updates between events of steps; 0: none.
        diagnostics: record the optimizer's diagnostics, at the cost of one more copy of the gradient and one of the
            displacement, which checkpoints hold too.
        trackers: names of `flatmin.train.trackers.TRACKERS`.
        project: name under which trackers group runs.
        measure_every: epochs between measurements; 0: none.
        measures: what is measured then, as `what` of `flatmin.measure.report`.
        measure_examples: on how many training samples.
        measure_m: of these in a group of m-sharpness; 0: no m-sharpness.
        measure_rho: l2 radius of worst and average cases, those of the groups too.

    Raises:
        ValueError: a value out of range, an unknown measurement, or groups that nothing fills or asks for.
    """

    checkpoint_every: int = 1
    checkpoint_seconds: float = 0.0
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    prolong: bool = True
    weights: bool = True
    signals: bool = True
    log_every: int = 50
    diagnostics: bool = False
    trackers: tuple[str, ...] = ()
    project: str = "flatmin"
    measure_every: int = 0
    measures: str = "hessian,sharpness"
    measure_examples: int = 1000
    measure_m: int = 0
    measure_rho: float = 0.05

    def __post_init__(self) -> None:
        for name, low in (("keep_checkpoints", 1), ("measure_examples", 1), ("measure_m", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)!r}.")
        for name in ("checkpoint_every", "checkpoint_seconds", "checkpoint_steps", "log_every", "measure_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}.")
        try:
            chosen(self.measures)
        except ValueError as error:
            raise ValueError(f"measures={self.measures}: {error}") from error
        check_groups(self.measures, self.measure_examples, self.measure_m, self.measure_rho)


def check_groups(measures: str, examples: int, m: int, rho: float) -> None:
    """Refuse groups of m-sharpness that nothing fills or asks for, and a radius that is none.

    Args:
        measures: sections of the report.
        examples: samples that are measured on.
        m: of these in a group; 0: no groups.
        rho: radius.

    Raises:
        ValueError: see above.
    """
    if not 0 < rho < math.inf:
        raise ValueError(f"measure_rho must be above 0, got {rho!r}.")
    if m > examples:
        raise ValueError(f"measure_m={m} samples are a group, but only {examples} are measured on; use fewer.")
    if m and "sharpness" not in chosen(measures):
        raise ValueError(f"measure_m={m} is for m-sharpness, of the section sharpness; measures={measures} has none.")
