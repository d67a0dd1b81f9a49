"""Execute a study: run what is missing, measure the networks, and make the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flatmin.study.costs import Sizes, guess_seconds
from flatmin.study.events import Event, Planned, Timing, Tuned, Warned
from flatmin.study.executors import execute
from flatmin.study.plan import StudyPlan, plan_again
from flatmin.study.store import Run
from flatmin.study.tabulate import StudyTable, tabulate
from flatmin.study.timing import step_times
from flatmin.study.trial import check_runs
from flatmin.train.trainer import build_recipe
from flatmin.words import ended

OnEvent = Callable[[Event], None]


def study(
    todo: StudyPlan,
    *,
    workers: int,
    on_event: OnEvent | None = None,
    executor: str = "local",
    settings: Mapping[str, Any] | None = None,
) -> StudyTable:
    """Execute the missing runs, measure the networks, and make the table.

    If values are chosen on seeds of their own, the runs for the choice are executed first.

    Args:
        todo: plan from `flatmin.study.plan.plan`.
        workers: number of runs at a time.
        on_event: called with each event.
        executor: where runs are executed, see `flatmin.study.executors.execute`.
        settings: settings of the executor.

    Raises:
        StudyInterrupted: on Ctrl-C; finished runs are kept.
        ValueError: what `flatmin.study.trial.check_runs` raises before the first run; or no run has a result.
        OSError, ModuleNotFoundError: the data, a network or a device is not available.
    """
    tell: OnEvent = on_event if on_event is not None else lambda event: None
    outcomes, sizes = dict(todo.finished), Sizes()

    def do(todo: StudyPlan, runs: Sequence[Run]) -> None:
        configs = [run.config for run in runs if run not in todo.unmeasured]
        notes = check_runs(configs, todo.contents, here=executor == "local", sizes=sizes)
        for text in (*todo.warnings, *notes):
            tell(Warned(text=text))
        names = {run.name for run in runs}
        choice = todo.choice or todo
        tuning = any(choice.grid_points[i].choose and run.name in names for (i, _), run in choice.runs.items())
        labels = {
            run.name: f"{plan.grid_points[i].label}, seed {seed}"
            for plan in ((todo, choice) if choice is not todo else (todo,))
            for (i, seed), run in plan.runs.items()
            if tuning and run.name in names
        }
        tell(
            Planned(
                stage="tune" if tuning else "study",
                runs=len({run.name for plan in (todo, todo.choice) if plan for run in plan.runs.values()}),
                reused=len(todo.finished) - len(todo.unmeasured),
                epochs=sum(run.config.epochs for run in runs),
                nets=sum(run.view is not None for run in runs),
                labels=labels,
                # The speed of other machines is unknown.
                seconds=guess_seconds(configs, workers, sizes) if configs and executor == "local" else None,
            )
        )
        # The longest runs first, so that the workers finish at about the same time.
        runs = sorted(runs, key=lambda run: -run.config.epochs * build_recipe(run.config).gradient_evaluations)
        outcomes.update(execute(runs, todo.store, workers=workers, on_event=tell, executor=executor, settings=settings))

    do(todo, todo.open)
    if todo.waiting:
        begun = {run.name for run in todo.open}
        todo = plan_again(todo)
        outcomes |= {name: outcome for name, outcome in todo.finished.items() if name not in outcomes}
        do(todo, [run for run in todo.open if run.name not in begun])
    failures = [one.error or (one.result.failure if one.result else None) for one in outcomes.values()]
    if outcomes and all(failures):
        raise ValueError(f"all runs failed; the first error: {ended(str(failures[0]))}")
    table = tabulate(todo, outcomes)
    for label in table.tried:
        chosen = next(row for row in table.rows if row.label == label)
        tell(Tuned(label=chosen.arm, chosen=dict(chosen.chosen)))
    return with_times(table, todo, tell) if todo.spec.timing and executor == "local" else table


def with_times(table: StudyTable, todo: StudyPlan, on_event: OnEvent | None = None) -> StudyTable:
    """The table with the time per step of each row, measured on this machine or stored by an earlier call."""
    first = {id(todo.grid_points[i]): run for (i, _), run in reversed(list(todo.runs.items()))}
    rows = [row for row in table.rows if row.n and row.config is not None]

    def begin(count: int) -> None:
        if on_event is not None:
            on_event(Timing(methods=count))

    times = step_times([first[id(row.grid_point)] for row in rows], todo.store.out / "timing", begin)
    found = {id(row): time for row, time in zip(rows, times, strict=True)}
    return dataclasses.replace(table, rows=[dataclasses.replace(row, time=found.get(id(row))) for row in table.rows])
