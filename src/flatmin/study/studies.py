"""Many runs as one study: plan, do what is missing, and sum up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flatmin.recipes import Recipe
from flatmin.stats import Stat, holm, paired, paired_p, summarise
from flatmin.study.costs import guess_seconds
from flatmin.study.events import Event, Planned, Warned
from flatmin.study.executor import Outcome, execute, finished_and_missing
from flatmin.study.spec import METRICS, Published, StudySpec
from flatmin.study.store import Run, Store
from flatmin.study.unfold import Cell, cells
from flatmin.train.config import RunConfig
from flatmin.train.fingerprint import digest, environment, external_versions, package_digest, user_sources
from flatmin.train.result import Result
from flatmin.train.trainer import build_recipe

OnEvent = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """What a study will do.

    Args:
        spec: the study.
        cells: its rows.
        runs: by (row, seed); rows of one configuration share their runs.
        found: outcomes of finished runs by name.
        missing: runs to do.
        warnings: about the run folders.
    """

    spec: StudySpec
    cells: list[Cell]
    runs: dict[tuple[int, int], Run]
    found: dict[str, Outcome]
    missing: list[Run]
    warnings: list[str] = field(default_factory=list)


def plan(spec: StudySpec, out: Path, *, make: bool = True) -> StudyPlan:
    """Unfold a study and look for finished runs; no data are read.

    Args:
        spec: the study.
        out: the folder of the runs.
        make: make that folder if it does not exist.

    Raises:
        ValueError: settings that do not go together, or a folder that cannot be written.
    """
    rows = cells(spec)
    store = Store(out, make=make)
    # The method names the folder, not the arm: studies that call one configuration by two names share its runs.
    runs = {
        (i, seed): Run(label=config.method, config=config, code=_code(config))
        for i, cell in enumerate(rows)
        for seed, config in cell.configs.items()
    }
    warnings: list[str] = []
    found, missing = finished_and_missing(runs.values(), store, warnings.append)
    return StudyPlan(spec=spec, cells=rows, runs=runs, found=found, missing=missing, warnings=warnings)


def _code(config: RunConfig) -> str:
    """Digest of the code that decides a run's outcome; a named data set is known by its name."""
    specs = [*config.plugins, *(spec for spec in (config.model, config.data) if ":" in spec)]
    recipes: list[Recipe] = [build_recipe(config)]
    return digest(user_sources(specs, recipes), package_digest(), *external_versions(specs))


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number of a row: ours over the seeds, its difference to the baseline, and what was published.

    Args:
        stat: mean and 95 % t interval over the seeds.
        std: sample standard deviation, as papers print it; NaN for one seed.
        diff: paired difference to the baseline at the same point of the axes; None without one.
        p: of the paired t test of that difference, corrected over the table (Holm); None without one.
        published: numbers to stand beside.
    """

    stat: Stat
    std: float
    diff: Stat | None = None
    p: float | None = None
    published: tuple[Published, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One row of the table.

    Args:
        arm, values: see `Cell`.
        n: seeds with a result.
        gradients: gradient evaluations of one update.
        columns: by metric.
        flags: e.g. "failed: 1 of 3".
    """

    arm: str
    values: Mapping[str, str]
    n: int
    gradients: float
    columns: Mapping[str, Value]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """What a study found.

    Args:
        spec: the study.
        rows: in its order.
        metrics: the columns that some row has.
        errors: row and seed -> why there is no result.
        environment: versions and machine.
    """

    spec: StudySpec
    rows: list[StudyRow]
    metrics: tuple[str, ...]
    errors: Mapping[str, str]
    environment: Mapping[str, object]


def study(todo: StudyPlan, *, out: Path, workers: int, on_event: OnEvent | None = None) -> StudyTable:
    """Do the missing runs and sum up.

    Args:
        todo: of `plan`.
        out: the folder that it was made for.
        workers: see `flatmin.study.executor.execute`.
        on_event: told what happens.

    Raises:
        Interrupted: on Ctrl-C; finished runs are kept.
        OSError, ValueError, ModuleNotFoundError: the data or a network cannot be had.
    """
    tell: OnEvent = on_event if on_event is not None else lambda event: None
    for text in todo.warnings:
        tell(Warned(text=text))
    tell(
        Planned(
            stage="study",
            runs=len(todo.found) + len(todo.missing),
            reused=len(todo.found),
            epochs=sum(run.config.epochs for run in todo.missing),
            seconds=guess_seconds([run.config for run in todo.missing], workers) if todo.missing else None,
        )
    )
    outcomes = todo.found | execute(todo.missing, Store(out), workers=workers, on_event=tell)
    return tabulate(todo, outcomes)


def tabulate(todo: StudyPlan, outcomes: Mapping[str, Outcome]) -> StudyTable:
    """The table of what is finished."""
    spec = todo.spec
    results = [
        {
            seed: outcome.result
            for seed in cell.configs
            if (outcome := outcomes.get(todo.runs[i, seed].name)) is not None
            and outcome.result is not None
            and outcome.result.failure is None
        }
        for i, cell in enumerate(todo.cells)
    ]
    numbers = [{metric: _by_seed(found, metric) for metric in METRICS} for found in results]
    rows = [_row(todo, i, results[i], numbers[i], _baseline(todo, i, numbers)) for i in range(len(todo.cells))]
    errors = {
        f"{todo.cells[i].label}, seed {seed}": text
        for (i, seed), run in todo.runs.items()
        if (outcome := outcomes.get(run.name)) is not None
        if (text := outcome.error or (outcome.result.failure if outcome.result else None))
    }
    return StudyTable(
        spec=spec,
        rows=_corrected(rows),
        metrics=tuple(metric for metric in METRICS if any(row.columns[metric].stat.n for row in rows)),
        errors=errors,
        environment=environment(todo.cells[0].config.device, 1),
    )


def _by_seed(found: Mapping[int, Result], metric: str) -> dict[int, float]:
    values = {seed: _number(result, metric) for seed, result in found.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def _number(result: Result, metric: str) -> float | None:
    if metric in ("test_acc", "val_acc"):
        return None if result.chosen is None else float(result.chosen[metric])
    if metric == "memorised":
        return None if result.last is None or result.last["memorised"] is None else float(result.last["memorised"])
    if metric == "lambda_max":
        return None if result.lambda_max is None else float(result.lambda_max["value"])
    value = result.train_ce if metric == "train_ce" else result.seconds
    return None if value is None else float(value)


def _baseline(
    todo: StudyPlan, i: int, numbers: Sequence[Mapping[str, Mapping[int, float]]]
) -> Mapping[str, Mapping[int, float]] | None:
    """The baseline's numbers at the same point of the axes that it has."""
    own = todo.cells[i]
    if own.arm == todo.spec.baseline:
        return None
    for k, cell in enumerate(todo.cells):
        if cell.arm == todo.spec.baseline and own.at(cell.values):
            return numbers[k]
    return None


def _row(
    todo: StudyPlan,
    i: int,
    found: Mapping[int, Result],
    numbers: Mapping[str, Mapping[int, float]],
    base: Mapping[str, Mapping[int, float]] | None,
) -> StudyRow:
    cell = todo.cells[i]
    columns = {}
    for metric in METRICS:
        stat = summarise(list(numbers[metric].values()))
        diff = None if base is None else paired(numbers[metric], base[metric])
        columns[metric] = Value(
            stat=stat,
            std=_deviation(stat),
            diff=diff,
            p=None if diff is None or diff.n < 2 else paired_p(diff),
            published=tuple(
                one
                for one in todo.spec.published
                if one.label == cell.arm and one.metric == metric and cell.at(one.where)
            ),
        )
    failed = len(cell.configs) - len(found)
    untrained = sum(not result.trained for result in found.values())
    flags = [f"{what}: {count} of {len(cell.configs)}" for what, count in _counts(failed, untrained) if count]
    gradients = [result.gradient_evaluations for result in found.values()] or [
        build_recipe(cell.config).gradient_evaluations
    ]
    return StudyRow(
        arm=cell.arm,
        values=cell.values,
        n=len(found),
        gradients=math.fsum(gradients) / len(gradients)
        if gradients
        else build_recipe(cell.config).gradient_evaluations,
        columns=columns,
        flags=tuple(flags),
    )


def _counts(failed: int, untrained: int) -> tuple[tuple[str, int], ...]:
    return ("no result", failed), ("did not train", untrained)


def _deviation(stat: Stat) -> float:
    if stat.n < 2:
        return math.nan
    return math.sqrt(math.fsum((value - stat.mean) ** 2 for value in stat.values) / (stat.n - 1))


def _corrected(rows: Sequence[StudyRow]) -> list[StudyRow]:
    """P values corrected for all rows of a column."""
    columns = [dict(row.columns) for row in rows]
    for metric in METRICS:
        places = [i for i, row in enumerate(rows) if row.columns[metric].p is not None]
        raw = [float(rows[i].columns[metric].p or 0.0) for i in places]
        for i, p in zip(places, holm(raw), strict=True):
            columns[i][metric] = dataclasses.replace(columns[i][metric], p=p)
    return [dataclasses.replace(row, columns=own) for row, own in zip(rows, columns, strict=True)]
