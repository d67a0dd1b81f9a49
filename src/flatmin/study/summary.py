"""What a study found: the object that tables and pages are drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flatmin.stats import PERCENT, POINTS, Stat, paired, summarise
from flatmin.study.arms import Candidate
from flatmin.study.executors import RunOutcome
from flatmin.study.finished import ends_of
from flatmin.study.timing import Ratio
from flatmin.train.config import Scalar
from flatmin.train.result import Result

__all__ = ["Choice", "Finding", "Ratio", "Row", "Stat", "Summary", "make_row"]

METRICS = ("train_loss", "val_acc", "val_loss", "test_acc", "memorised")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm over its seeds. Accuracies, differences and `memorised` in percent, `train_ce` in nats.

    Args:
        gradient_evaluations: per step.
        n: seeds with a result.
        last, best: test accuracy at the last and at the best-validation epoch.
        diff: paired difference of `last` to the base arm over the seeds that both have; None without a base.
        train_ce: un-augmented training part, labels as trained on, eval mode.
        lambda_max: of the Hessian of that loss.
        lambda_residual: largest relative residual over the seeds; NaN if not measured.
        time_ratio: time per training step relative to the base optimizer; None if not measured.
        flags: e.g. "did not train".
    """

    label: str
    method: str
    rho: float | None
    gradient_evaluations: float
    n: int
    last: Stat
    best: Stat
    diff: Stat | None
    memorised: Stat
    train_ce: Stat
    lambda_max: Stat
    lambda_residual: float = math.nan
    time_ratio: Ratio | None = None
    flags: list[str] = field(default_factory=list)

    @property
    def cut(self) -> bool:
        """Whether an interval of the row is cut; see `Stat.cut`."""
        return any(stat.cut for stat in (self.last, self.best, self.diff, self.memorised, self.train_ce) if stat)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A candidate of a tuned arm: its values, and validation accuracy at the last epoch in percent."""

    values: Mapping[str, Scalar]
    val_acc: Stat
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything that a table or a page shows.

    Args:
        title: what was compared.
        rows: in the order of the table.
        curves: label -> metric -> one list per seed of one value per epoch.
        notes: what follows and what does not.
        tuning: label -> (rho, validation accuracy) for the arms whose rho was chosen here.
        choices: label -> every candidate of a tuned arm, on any axis.
        command: what makes this again.
        environment: versions and machine.
        errors: run -> why it has no result.
    """

    title: str
    rows: list[Row]
    curves: dict[str, dict[str, list[list[float]]]]
    notes: list[str] = field(default_factory=list)
    tuning: dict[str, list[tuple[float, Stat]]] = field(default_factory=dict)
    choices: dict[str, list[Choice]] = field(default_factory=dict)
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A row's candidate and the outcomes of its runs by seed."""

    candidate: Candidate
    outcomes: Mapping[int, RunOutcome]

    @property
    def label(self) -> str:
        """The row's name."""
        return self.candidate.label

    @property
    def results(self) -> dict[int, Result]:
        """Results of the runs that reached their last epoch, by seed."""
        return {
            seed: outcome.result
            for seed, outcome in self.outcomes.items()
            if outcome.result is not None and outcome.result.failure is None
        }

    def last(self, key: str = "test_acc") -> dict[int, float]:
        """A value of the last epoch by seed."""
        return {seed: float(r.last[key]) for seed, r in self.results.items() if r.last and r.last[key] is not None}

    def curves(self) -> dict[str, list[list[float]]]:
        """Metric -> one list per seed of one value per epoch; NaN where there is none."""
        lines = [outcome.lines for _, outcome in sorted(self.outcomes.items()) if outcome.lines]
        return {metric: [[_number(getattr(line, metric)) for line in one] for one in lines] for metric in METRICS}


def make_row(
    finding: Finding,
    base: Finding | None,
    *,
    gradient_evaluations: float,
    time_ratio: Ratio | None,
    steps: Mapping[str, float],
) -> Row:
    """The arm's row.

    Args:
        finding: its runs.
        base: the arm to which differences are taken; None if there is none.
        gradient_evaluations: per step.
        time_ratio: see `Row`.
        steps: see `flatmin.study.costs.Counts.steps`.
    """
    test = steps.get("test_acc", 0.0)
    found = list(finding.results.values())
    curvature = [r.lambda_max for r in found if r.lambda_max is not None]
    return Row(
        label=finding.label,
        method=finding.candidate.config.method,
        rho=finding.candidate.config.rho,
        gradient_evaluations=gradient_evaluations,
        n=len(found),
        last=summarise(list(finding.last().values()), step=test, ends=PERCENT),
        best=summarise([float(r.best["test_acc"]) for r in found if r.best is not None], step=test, ends=PERCENT),
        diff=None
        if base is None or base.label == finding.label
        else paired(finding.last(), base.last(), step=test, ends=POINTS),
        memorised=summarise(list(finding.last("memorised").values()), step=steps.get("memorised", 0.0), ends=PERCENT),
        train_ce=summarise([r.train_ce for r in found if r.train_ce is not None], ends=ends_of("train_ce")),
        lambda_max=summarise([float(one["value"]) for one in curvature]),
        lambda_residual=max((float(one["residual"]) for one in curvature), default=math.nan),
        time_ratio=time_ratio,
        flags=_flags(finding, found, curvature),
    )


def _flags(finding: Finding, found: Sequence[Result], curvature: Sequence[Mapping[str, Any]]) -> list[str]:
    total = len(finding.outcomes)
    counts = {
        "did not train": sum(not r.trained for r in found),
        "failed": total - len(found),
        "λ not converged": sum(not one["converged"] for one in curvature),
    }
    return [flag if count == total else f"{flag}: {count} of {total}" for flag, count in counts.items() if count]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
