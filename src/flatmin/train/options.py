"""Options of a run that do not change its outcome: logging, measuring, checkpoints and trackers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from flatmin.measure.report import chosen
from flatmin.train.keys import Range, check


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a run records while it trains.

    Args:
        Logging and measuring during training

        log_every: number of updates between the lines of steps.jsonl; 0: no lines.
        diagnostics: add the optimizer's diagnostics to these lines; this needs one more copy of the gradient and one of
            the displacement, in memory and in checkpoints.
        measure_every: number of epochs between measurements; 0: no measurements.
        measures: sections of the report to measure, separated by commas; see `flatmin measure`.
        measure_examples: number of training samples to measure on.
        measure_m: number of samples in each group of m-sharpness; 0: no m-sharpness.
        measure_rho: l2 radius of worst-case and average sharpness and of m-sharpness.

    Raises:
        ValueError: a value is out of range, a measurement is unknown, or the groups of m-sharpness do not fit.
    """

    log_every: Annotated[int, Range(0)] = 0
    diagnostics: bool = False
    measure_every: Annotated[int, Range(0)] = 0
    measures: str = "hessian,sharpness"
    measure_examples: Annotated[int, Range(1)] = 1000
    measure_m: Annotated[int, Range(0)] = 0
    measure_rho: Annotated[float, Range(0, open_low=True)] = 0.05

    def __post_init__(self) -> None:
        check(self)
        try:
            chosen(self.measures)
        except ValueError as error:
            raise ValueError(f"measures={self.measures}: {error}") from error
        check_groups(self.measures, self.measure_examples, self.measure_m)


def check_groups(measures: str, examples: int, m: int) -> None:
    """Check the group size of m-sharpness.

    Args:
        measures: sections of the report.
        examples: number of samples to measure on.
        m: number of samples in a group; 0: no groups.

    Raises:
        ValueError: a group has more samples than are measured on, or m-sharpness is not measured.
    """
    if m > examples:
        raise ValueError(f"measure_m={m} is more than the {examples} samples that are measured on; use fewer.")
    if m and "sharpness" not in chosen(measures):
        raise ValueError(
            f"measure_m={m} needs the section sharpness, which measures={measures} does not contain; add it, or leave "
            "out measure_m."
        )


@dataclass(frozen=True, kw_only=True)
class Options(Recording):
    """Options of a run that do not change its outcome.

    Args:
        Checkpoints, files and trackers

        checkpoint_every: number of epochs between checkpoints; 0: no checkpoints at the end of epochs.
        checkpoint_seconds: shortest time between checkpoints at the end of epochs, in seconds; 0: no limit.
        checkpoint_steps: number of updates between additional checkpoints within an epoch; 0: none.
        keep_checkpoints: number of checkpoints to keep on disk.
        prolong: keep the last checkpoint of a finished run, so that it can continue with more epochs where its
            schedule allows this (see `flatmin.train.state.fixed_length`).
        weights: save the selected weights in weights.pt.
        signals: write a checkpoint and stop on Ctrl-C and SIGTERM.
        trackers: trackers to log to, in addition to the JSON lines files.
        project: name under which trackers group runs.

    Raises:
        ValueError: a value is out of range, a measurement is unknown, or the groups of m-sharpness do not fit.
    """

    checkpoint_every: Annotated[int, Range(0)] = 1
    checkpoint_seconds: Annotated[float, Range(0)] = 0.0
    checkpoint_steps: Annotated[int, Range(0)] = 0
    keep_checkpoints: Annotated[int, Range(1)] = 2
    prolong: bool = True
    weights: bool = True
    signals: bool = True
    log_every: Annotated[int, Range(0)] = 50
    trackers: tuple[str, ...] = ()
    project: str = "flatmin"
