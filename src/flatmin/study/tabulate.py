"""The table of a study: means, differences, values chosen on validation data, and plain training at equal cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flatmin.methods import BASE
from flatmin.stats import Stat, holm, paired, paired_p, summarise
from flatmin.study.costs import Sizes
from flatmin.study.executors import RunOutcome
from flatmin.study.expand import TASK, GridPoint, best, validation_score
from flatmin.study.finished import FinishedRun, ends_of
from flatmin.study.origins import origins
from flatmin.study.plan import StudyPlan
from flatmin.study.spec import METRICS, Published, StudySpec
from flatmin.study.store import unique
from flatmin.study.stored_reports import lacking
from flatmin.study.timing import Ratio
from flatmin.train.config import RunConfig
from flatmin.train.fingerprint import merged
from flatmin.train.folder import RunFolder
from flatmin.train.trainer import build_recipe

# Settings that rows must share, besides the task, to be compared at equal cost.
_COST = ("optimizer", "batch_size")
_NAMED = 3  # runs that a reason names
_FEW = 4  # the largest number of measured quantities that are all shown by default
_EQUAL = 0.02  # budgets that differ by no more than this share count as equal, because epochs are whole numbers


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number of a row: the mean over the seeds, its difference from the baseline, and published numbers.

    Args:
        stat: mean and 95 % t interval over the seeds.
        std: sample standard deviation; NaN for one seed.
        diff: paired difference from the baseline at the same point of the axes; None if there is no such row.
        p: p value of the paired t test of that difference; None without a difference or if its interval is unknown.
        corrected: p corrected by Holm's method for all tests of the column, see `StudyTable.tests`.
        published: published numbers for this cell.
    """

    stat: Stat
    std: float
    diff: Stat | None = None
    p: float | None = None
    corrected: float | None = None
    published: tuple[Published, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Equal:
    """Plain training at the same number of gradient evaluations.

    Args:
        label: label of that row; of several, the one that is best on validation data.
        diff: test accuracy minus that of plain training, paired by seed.
        p: p value of the paired t test; None for fewer than two pairs.
        corrected: p corrected by Holm's method for all rows that have such a test.
    """

    label: str
    diff: Stat
    p: float | None = None
    corrected: float | None = None


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One row of the table.

    Args:
        arm, values: see `GridPoint`.
        n: number of seeds with a result.
        gradients: gradient evaluations per update.
        columns: values by metric.
        flags: remarks such as "no result: 1 of 3".
        grid_point: the configurations; None in tables that were not made from runs.
        runs: the finished runs by seed.
        budget: gradient evaluations of a whole run, each on one batch; NaN if no run has a result.
        equal: plain training at that budget; None if there is no such row.
        steps: for metrics with discrete values, the distance between two neighbouring values; see
            `flatmin.study.costs.Counts.steps`.
        time: time of a training step relative to plain training; None if it was not measured.
    """

    arm: str
    values: Mapping[str, str]
    n: int
    gradients: float
    columns: Mapping[str, Value]
    flags: tuple[str, ...] = ()
    grid_point: GridPoint | None = None
    runs: Mapping[int, FinishedRun] = field(default_factory=dict)
    budget: float = math.nan
    equal: Equal | None = None
    steps: Mapping[str, float] = field(default_factory=dict)
    time: Ratio | None = None

    @property
    def point(self) -> Mapping[str, str]:
        """The values that distinguish the rows of an arm."""
        return self.values if self.grid_point is None else self.grid_point.point

    @property
    def chosen(self) -> Mapping[str, str]:
        """The values that were chosen on validation data."""
        return {key: value for key, value in self.values.items() if key not in self.point}

    @property
    def label(self) -> str:
        """Arm and values."""
        return " ".join([self.arm, *(f"{key}={value}" for key, value in self.values.items())])

    @property
    def config(self) -> RunConfig | None:
        """The configuration of the first seed; None in tables that were not made from runs."""
        return None if self.grid_point is None else self.grid_point.config

    @property
    def whole(self) -> bool:
        """Whether every seed has a result."""
        return self.grid_point is not None and self.n == len(self.grid_point.configs)


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """The results of a study.

    Args:
        spec: the study.
        rows: the rows in the study's order, only those with chosen values.
        metrics: the columns: those that the study lists, or that some row has.
        errors: failed runs and missing numbers, with the reason.
        environment: versions and machines of the runs.
        tried: the rows from which one was chosen, by the label of the chosen one.
        parts: numbers of training, validation and test samples if all rows have the same; None otherwise.
        origins: sentences about runs that come from an archive, see `flatmin.study.origins`.
    """

    spec: StudySpec
    rows: list[StudyRow]
    metrics: tuple[str, ...]
    errors: Mapping[str, str]
    environment: Mapping[str, object]
    tried: Mapping[str, Sequence[StudyRow]] = field(default_factory=dict)
    parts: tuple[int, int, int] | None = None
    origins: tuple[str, ...] = ()

    def tests(self, metric: str) -> int:
        """The number of tests: rows with a p value for a metric; the metric "equal" stands for tests at equal cost."""
        if metric == "equal":
            return sum(row.equal is not None and row.equal.p is not None for row in self.rows)
        return sum(row.columns[metric].p is not None for row in self.rows)

    @property
    def base(self) -> str:
        """The label of the arm to which the others are compared."""
        return self.spec.baseline


def tabulate(todo: StudyPlan, outcomes: Mapping[str, RunOutcome]) -> StudyTable:
    """The table of the finished runs.

    Args:
        todo: the plan of the study.
        outcomes: outcomes by the run's name.
    """
    spec = todo.spec
    sizes = Sizes()
    measured = () if spec.columns else _measured(outcomes[name].report for name in _names(todo) if name in outcomes)
    columns = tuple(dict.fromkeys((*METRICS, *spec.columns, *measured)))
    rows, tried = _chosen([_row(todo, i, outcomes, sizes, columns) for i in range(len(todo.grid_points))])
    if todo.choice is not None:
        choice = todo.choice
        tried = _chosen([_row(choice, i, outcomes, sizes, columns) for i in range(len(choice.grid_points))])[1]
    rows = [_compared(row, rows, spec) for row in rows]
    rows = _corrected(rows)
    errors: dict[str, str] = {}
    without: dict[tuple[str, str], list[str]] = {}
    parts = (todo,) if todo.choice is None else (todo.choice, todo)
    named = {(part.grid_points[i].label, seed): run for part in parts for (i, seed), run in part.runs.items()}
    for (label, seed), run in named.items():
        outcome = outcomes.get(run.name, RunOutcome())
        name = f"{label}, seed {seed}"
        if text := outcome.error or (outcome.result.failure if outcome.result else None):
            errors[name] = text
        if outcome.refusal:
            errors[f"{name}, not measured"] = outcome.refusal
        for what, why in lacking(outcome.report or {"sections": {}}).items():
            without.setdefault((what, why), []).append(name)
    for (what, why), names in without.items():
        some = "; ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        errors[f"{what} is missing for {some}"] = why
    return StudyTable(
        spec=spec,
        rows=rows,
        metrics=spec.columns or tuple(name for name in columns if any(row.columns[name].stat.n for row in rows)),
        errors=errors,
        environment=merged(RunFolder(todo.store.folder(run)).environment() for run in unique(named.values())),
        tried=tried,
        parts=_parts(rows, sizes),
        origins=origins(todo, named.values()),
    )


def _names(todo: StudyPlan) -> list[str]:
    return [run.name for run in unique(todo.runs.values())]


def _measured(reports: Iterable[Mapping[str, Any] | None]) -> tuple[str, ...]:
    """The measured quantities that a table shows by default: all if there are few, else the first of each section.

    Args:
        reports: reports as `flatmin.measure.Report.to_dict`.
    """
    sections: dict[str, dict[str, None]] = {}
    for report in reports:
        for name, section in (report or {}).get("sections", {}).items():
            sections.setdefault(name, {}).update(dict.fromkeys(section["quantities"]))
    every = [name for names in sections.values() for name in names]
    return tuple(every if len(every) <= _FEW else [next(iter(names)) for names in sections.values() if names])


def _row(
    todo: StudyPlan, i: int, outcomes: Mapping[str, RunOutcome], sizes: Sizes, columns_wanted: Sequence[str]
) -> StudyRow:
    """A row before comparison with others."""
    row, spec = todo.grid_points[i], todo.spec
    runs: dict[int, FinishedRun] = {}
    for seed in row.configs:
        run = todo.runs[i, seed]
        outcome = outcomes.get(run.name)
        if outcome is None or outcome.result is None or outcome.result.failure is not None:
            continue
        folder = RunFolder(todo.store.folder(run))
        runs[seed] = FinishedRun(
            result=outcome.result,
            lines=outcome.lines,
            steps=folder.steps() if spec.record.log_every else [],
            measures=folder.measures() if spec.record.measure_every else [],
            report=outcome.report,
        )
    columns = {}
    steps = sizes.steps(row.config) if runs else {}
    for metric in columns_wanted:
        values = list(_by_seed(runs, metric).values())
        stat = summarise(values, step=steps.get(metric, 0.0), ends=ends_of(metric))
        published = tuple(
            one for one in spec.published if one.label == row.arm and one.metric == metric and row.at(one.where)
        )
        columns[metric] = Value(stat=stat, std=_deviation(stat), published=published)
    results = [one.result for one in runs.values()]
    counts = {
        "no result": len(row.configs) - len(runs),
        "did not train": sum(not one.trained for one in results),
        "λ not converged": sum(
            one.lambda_max is not None and not one.lambda_max.get("converged", True) for one in results
        ),
    }
    gradients = [one.gradient_evaluations for one in results] or [build_recipe(row.config).gradient_evaluations]
    mean = math.fsum(gradients) / len(gradients)
    return StudyRow(
        arm=row.arm,
        values=row.values,
        n=len(runs),
        gradients=mean,
        columns=columns,
        flags=tuple(f"{what}: {count} of {len(row.configs)}" for what, count in counts.items() if count),
        grid_point=row,
        runs=runs,
        budget=mean * sizes.updates(row.config) if runs else math.nan,
        steps=steps,
    )


def _parts(rows: Sequence[StudyRow], sizes: Sizes) -> tuple[int, int, int] | None:
    found = {sizes.parts(row.config) for row in rows if row.config is not None and row.runs}
    return found.pop() if len(found) == 1 else None


def _by_seed(runs: Mapping[int, FinishedRun], metric: str) -> dict[int, float]:
    return {seed: value for seed, run in runs.items() if (value := run.number(metric)) is not None}


def _deviation(stat: Stat) -> float:
    if stat.n < 2:
        return math.nan
    return math.sqrt(math.fsum((value - stat.mean) ** 2 for value in stat.values) / (stat.n - 1))


def _chosen(every: Sequence[StudyRow]) -> tuple[list[StudyRow], dict[str, list[StudyRow]]]:
    """For each arm and point the row that is best on validation data, and the rows it was chosen from.

    A row that lacks a seed is not chosen, unless all do; then the first is taken.
    """
    groups: dict[tuple[object, ...], list[StudyRow]] = {}
    for row in every:
        assert row.grid_point is not None
        groups.setdefault(row.grid_point.group, []).append(row)
    rows, tried = [], {}
    for group in groups.values():
        scores = [
            validation_score((run.result, run.lines) for run in row.runs.values()) if row.whole else None
            for row in group
        ]
        rows.append(group[best(scores)])
        if len(group) > 1:
            tried[rows[-1].label] = group
    return rows, tried


def _compared(row: StudyRow, rows: Sequence[StudyRow], spec: StudySpec) -> StudyRow:
    """The row with its differences: from the baseline at the same point, and from plain training at equal cost."""
    base = _baseline(row, rows, spec)
    columns = dict(row.columns)
    if base is not None:
        for metric, value in row.columns.items():
            diff = _difference(row, base, metric)
            columns[metric] = dataclasses.replace(value, diff=diff, p=_p(diff))
    return dataclasses.replace(row, columns=columns, equal=_equal(row, rows))


def _baseline(row: StudyRow, rows: Sequence[StudyRow], spec: StudySpec) -> StudyRow | None:
    """The baseline's row at the same point of the axes."""
    if row.arm == spec.baseline or row.grid_point is None:
        return None
    for other in rows:
        if (
            other.arm == spec.baseline
            and other.grid_point is not None
            and row.grid_point.at(other.grid_point.point)
            and same(row, other, TASK)
        ):
            return other
    return None


def _equal(row: StudyRow, rows: Sequence[StudyRow]) -> Equal | None:
    """Plain training of the same network on the same task with as many gradient evaluations."""
    if row.grid_point is None or row.grid_point.config.method == BASE or math.isnan(row.budget):
        return None
    plain = [
        other
        for other in rows
        if other.grid_point is not None
        and other.grid_point.config.method == BASE
        and same(row, other, (*TASK, *_COST))
        and abs(other.budget - row.budget) <= _EQUAL * row.budget
    ]
    if not plain:
        return None
    whole = [other for other in plain if other.whole]
    rival = max(whole or plain, key=lambda other: other.columns["val_acc"].stat.mean)
    diff = _difference(row, rival, "test_acc")
    return None if diff is None else Equal(label=rival.label, diff=diff, p=_p(diff))


def _difference(row: StudyRow, other: StudyRow, metric: str) -> Stat | None:
    """The difference of two rows on the same data, paired by seed."""
    low, high = ends_of(metric)
    mine, theirs = _by_seed(row.runs, metric), _by_seed(other.runs, metric)
    return paired(mine, theirs, step=row.steps.get(metric, 0.0), ends=(low - high, high - low))


def same(row: StudyRow, other: StudyRow, keys: Sequence[str] = TASK) -> bool:
    """Whether the runs of two rows agree in these settings."""
    if row.grid_point is None or other.grid_point is None:
        return False
    mine, theirs = row.grid_point.config, other.grid_point.config
    return all(getattr(mine, key) == getattr(theirs, key) for key in keys)


def _p(diff: Stat | None) -> float | None:
    if diff is None or diff.n < 2 or math.isnan(p := paired_p(diff)):
        return None
    return p


def _corrected(rows: Sequence[StudyRow]) -> list[StudyRow]:
    """The rows with p values corrected for the number of tests in each column."""
    columns = [dict(row.columns) for row in rows]
    for metric in dict.fromkeys(metric for row in rows for metric in row.columns):
        adjusted = holm([own[metric].p for own in columns])
        for own, p in zip(columns, adjusted, strict=True):
            own[metric] = dataclasses.replace(own[metric], corrected=p)
    equal = holm([None if row.equal is None else row.equal.p for row in rows])
    return [
        dataclasses.replace(row, columns=own, equal=row.equal and dataclasses.replace(row.equal, corrected=p))
        for row, own, p in zip(rows, columns, equal, strict=True)
    ]
