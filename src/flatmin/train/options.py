"""What a run does beside training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from flatmin.measure.report import chosen
from flatmin.train.keys import Range, check


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a run writes down while it trains.

    Args:
        Logging and measuring while it trains

        log_every: updates between recorded lines; 0: none.
        diagnostics: record the optimizer's diagnostics in these lines, at the cost of one more copy of the gradient and
            one of the displacement, which checkpoints hold too.
        measure_every: epochs between measurements; 0: none.
        measures: sections of the report that are measured then, see `flatmin measure`.
        measure_examples: number of training samples that are measured on.
        measure_m: samples in a group of m-sharpness; 0: no m-sharpness.
        measure_rho: l2 radius of worst and average cases, and of m-sharpness.

    Raises:
        ValueError: a value out of range, an unknown measurement, or groups that nothing fills or asks for.
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
    """Refuse groups of m-sharpness that nothing fills or asks for.

    Args:
        measures: sections of the report.
        examples: number of samples that are measured on.
        m: samples in a group; 0: no groups.

    Raises:
        ValueError: see above.
    """
    if m > examples:
        raise ValueError(f"measure_m={m} samples are a group, but only {examples} are measured on; use fewer.")
    if m and "sharpness" not in chosen(measures):
        raise ValueError(f"measure_m={m} is for m-sharpness, of the section sharpness; measures={measures} has none.")


@dataclass(frozen=True, kw_only=True)
class Options(Recording):
    """What a run does beside training; none of it changes the outcome.

    Args:
        Checkpoints, files and trackers

        checkpoint_every: epochs between checkpoints; 0: none.
        checkpoint_seconds: write a checkpoint at the end of an epoch only if this many seconds have passed since the
            last one, or since the start; 0: always.
        checkpoint_steps: updates between further checkpoints inside an epoch; 0: none.
        keep_checkpoints: number of checkpoints that stay on disk.
        prolong: keep the last checkpoint of a finished run that can continue with more epochs, see
            `flatmin.train.state.fixed_length`.
        weights: keep the chosen weights.
        signals: let Ctrl-C and SIGTERM end the run with a checkpoint.
        trackers: trackers beside the JSON lines.
        project: name under which trackers group runs.

    Raises:
        ValueError: a value out of range, an unknown measurement, or groups that nothing fills or asks for.
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
