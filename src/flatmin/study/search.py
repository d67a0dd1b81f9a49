"""Search a study's settings on validation data, with the same number of gradient evaluations for every method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatmin.study.code import Contents
from flatmin.study.costs import Sizes
from flatmin.study.dimensions import Dimension
from flatmin.study.events import Event, Planned, Warned
from flatmin.study.executors import RunOutcome, execute, finished_and_missing
from flatmin.study.expand import GridPoint, grid_points, takes
from flatmin.study.plan import run_of
from flatmin.study.spec import StudySpec
from flatmin.study.store import Run, Store
from flatmin.study.sweep import Axis
from flatmin.study.trial import check_runs
from flatmin.train.config import RunConfig
from flatmin.train.feed import steps_of
from flatmin.train.options import Options
from flatmin.train.settings import field_types
from flatmin.words import install, suggest

BATCH = 4  # trials of an arm at a time; constant, so that the result does not depend on the number of workers


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point that was tried.

    Args:
        settings: values of the searched settings, as text.
        score: mean validation accuracy over the search's seeds in percent, with 0 for a run that diverged.
        cost: gradient evaluations, in epochs of plain training.
    """

    settings: Mapping[str, str]
    score: float
    cost: float


@dataclass(kw_only=True)
class SearchResult:
    """The trials of one arm at one point of the study's other axes.

    Args:
        grid_point: the row of the study.
        trials: the trials, in the order in which they were proposed.
    """

    grid_point: GridPoint
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """The trial with the highest score; the first of several; None without trials."""
        return max(self.trials, key=lambda trial: trial.score, default=None)

    @property
    def spent(self) -> float:
        """Gradient evaluations, in epochs of plain training."""
        return math.fsum(trial.cost for trial in self.trials)


def search(
    spec: StudySpec,
    dimensions: Sequence[Dimension],
    *,
    budget: float,
    out: Path,
    workers: int,
    on_event: Callable[[Event], None] | None = None,
    download: bool = False,
    **how: Any,
) -> list[SearchResult]:
    """Search every row of a study with Optuna's tree-structured Parzen estimator and the same budget for each row.

    A trial trains the row's configuration with the proposed settings once for each of the study's seeds. Its cost is
    counted in gradient evaluations, so a method with two evaluations per update gets half as many trials as plain
    training. The search of a row stops before the trial that would exceed the budget. A point that is proposed twice
    counts twice. Finished runs are reused: a repeated call repeats the same search, and a larger budget extends it.

    Args:
        spec: the study; settings and axes of its arms with searched keys are ignored. Each arm must have one row.
        dimensions: the settings to search; those that do not apply to an arm are left out for it.
        budget: gradient evaluations for each row, in epochs of plain training.
        out: the output folder.
        workers: see `flatmin.study.executors.execute`.
        on_event: called with each event.
        download: download missing data where that is possible.
        how: further arguments of `execute`.

    Returns:
        The results, in the order of the study's rows.

    Raises:
        ValueError: a budget below the cost of one trial, a setting that applies to no arm, or a trial with invalid
            settings; or what `flatmin.study.trial.check_runs` raises before the first run.
        ModuleNotFoundError: Optuna is not installed (extra "search").
        StudyInterrupted: on Ctrl-C; finished runs are kept.
    """
    tell = on_event if on_event is not None else lambda event: None
    tasks = _tasks(spec, dimensions)
    sizes, store, contents = Sizes(), Store(out), Contents(download=download)
    configs = [config for task in tasks for config in task.result.grid_point.configs.values()]
    notes = check_runs(configs, contents, here=how.get("executor", "local") == "local", sizes=sizes)
    for task in tasks:
        least = task.cost(task.result.grid_point.config, sizes) * len(spec.seeds)
        if least > budget:
            raise ValueError(
                f"a trial of {task.result.grid_point.label} costs {least:g} epochs of plain training, more than the "
                f"budget of {budget:g}; raise the budget or lower epochs."
            )
    planned = sum(int(budget / (t.cost(t.result.grid_point.config, sizes) * len(spec.seeds))) for t in tasks) * len(
        spec.seeds
    )
    epochs = sum(task.result.grid_point.config.epochs for task in tasks) * planned // len(tasks)
    tell(Planned(stage="search", runs=planned, reused=0, epochs=epochs, seconds=None))
    for text in (*contents.warnings, *notes):
        tell(Warned(text=text))
    for task in tasks:
        if task.unsearched:
            tell(Warned(text=f"{task.result.grid_point.label} has no {' and no '.join(task.unsearched)} to search."))
    while open_tasks := [task for task in tasks if not task.done]:
        asked = [(task, ask) for task in open_tasks for ask in task.ask(spec, budget, sizes, store, contents)]
        runs = {run.name: run for _, ask in asked for run in ask.runs}
        finished, missing = finished_and_missing(runs.values(), store, lambda text: tell(Warned(text=text)))
        outcomes = finished | execute(missing, store, workers=workers, on_event=tell, **how)
        for task, ask in asked:
            task.tell(ask, outcomes)
    for task in tasks:
        if task.dimensions and not task.result.trials:
            raise ValueError(
                f"the first trial of {task.result.grid_point.label} would cost more than the budget of {budget:g}; "
                "raise the budget, or search smaller epochs."
            )
    return [task.result for task in tasks]


@dataclass(frozen=True, kw_only=True)
class _Ask:
    """A proposed point: Optuna's trial, its settings, its runs and its cost."""

    trial: Any
    settings: dict[str, str]
    runs: list[Run]
    cost: float


class _Task:
    """The search of one row."""

    def __init__(
        self, grid_point: GridPoint, arm: int, dimensions: Sequence[Dimension], unsearched: Sequence[str]
    ) -> None:
        optuna = _optuna()
        self.result, self.arm = SearchResult(grid_point=grid_point), arm
        self.dimensions, self.unsearched = dimensions, unsearched
        self.done = not dimensions
        sampler = optuna.samplers.TPESampler(seed=0, constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)

    def cost(self, config: RunConfig, sizes: Sizes) -> float:
        """The cost of one run, in epochs of plain training."""
        return sizes.cost(config) / steps_of(config, sizes.of(config)[0])

    def ask(self, spec: StudySpec, budget: float, sizes: Sizes, store: Store, contents: Contents) -> list[_Ask]:
        """The next points to try; sets `done` when the budget is used up."""
        asked: list[_Ask] = []
        spent = self.result.spent
        while len(asked) < BATCH:
            trial = self._study.ask()
            settings = {dimension.key: dimension.ask(trial) for dimension in self.dimensions}
            configs = _configs(spec, self.arm, settings)
            cost = math.fsum(self.cost(config, sizes) for config in configs)
            if spent + cost > budget * (1 + 1e-9):
                self.done = True
                break
            spent += cost
            runs = [run_of(config, store, contents) for config in configs]
            asked.append(_Ask(trial=trial, settings=settings, runs=runs, cost=cost))
        return asked

    def tell(self, ask: _Ask, outcomes: Mapping[str, RunOutcome]) -> None:
        """Record the outcome of a point.

        Raises:
            ValueError: a run raised an error.
        """
        scores = []
        for run in ask.runs:
            outcome = outcomes[run.name]
            if outcome.result is None:
                raise ValueError(f"the trial {' '.join(f'{k}={v}' for k, v in ask.settings.items())}: {outcome.error}")
            scores.append(0.0 if outcome.result.chosen is None else float(outcome.result.chosen["val_acc"]))
        score = math.fsum(scores) / len(scores)
        self._study.tell(ask.trial, score)
        self.result.trials.append(Trial(settings=ask.settings, score=score, cost=ask.cost))


def _tasks(spec: StudySpec, dimensions: Sequence[Dimension]) -> list[_Task]:
    """One task for each row, without the searched axes."""
    keys = [dimension.key for dimension in dimensions]
    double = [key for i, key in enumerate(keys) if key in keys[:i]]
    if not keys:
        raise ValueError("there is nothing to search; write an interval such as lr=0.01..1.")
    if double:
        raise ValueError(f"{double[0]} is searched twice.")
    for key in keys:
        if key == "seed" or key in field_types(Options):
            raise ValueError(f"{key} cannot be searched; set the seeds of each trial with seed=0,1.")
    tasks = []
    for i in range(len(spec.arms)):
        own = [dimension for dimension in dimensions if takes(spec, spec.arms[i], dimension.key)]
        missing = [dimension.key for dimension in dimensions if dimension not in own]
        rows = grid_points(_alone(spec, i, {key: None for key in keys}))
        if len(rows) > 1:
            axis = next(iter(rows[0].values))
            raise ValueError(
                f"study {spec.name}: {rows[0].arm} has {len(rows)} rows to search; give one value for each axis that "
                f"is not searched, e.g. {axis}={rows[0].values[axis]}."
            )
        if rows[0].config.train_on_val:
            raise ValueError(
                f"study {spec.name}: train_on_val=true validates on the test part, which must not be used in a search."
            )
        tasks.append(_Task(rows[0], i, own, missing))
    for key in keys:
        if all(key in task.unsearched for task in tasks):
            near = suggest(key, field_types(RunConfig))
            raise ValueError(f"study {spec.name}: no arm has {key!r} to search{near}")
    return tasks


def _alone(spec: StudySpec, arm: int, settings: Mapping[str, str | None]) -> StudySpec:
    """The study with a single arm, with the given settings in place of its own; None removes a key.

    The settings become axes of one value, which override the entries of `given`.
    """
    one = spec.arms[arm]
    settings_left = {key: value for key, value in one.settings.items() if key not in settings}
    chosen = [Axis(key, (value,)) for key, value in settings.items() if value is not None]
    axes = (*(axis for axis in one.axes if axis.key not in settings), *chosen)
    return dataclasses.replace(
        spec,
        arms=(dataclasses.replace(one, settings=settings_left, axes=axes, choose=()),),
        axes=tuple(axis for axis in spec.axes if axis.key not in settings),
        settings={key: value for key, value in spec.settings.items() if key not in settings},
        baselines=(),
        choose=(),
        choose_seeds=(),
        baseline=one.label,
        published=(),
    )


def _configs(spec: StudySpec, arm: int, settings: Mapping[str, str]) -> list[RunConfig]:
    """The runs of a point: the arm's, with these settings."""
    return list(grid_points(_alone(spec, arm, settings))[0].configs.values())


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"a search needs Optuna, which is not installed; run: {install('search')}") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
