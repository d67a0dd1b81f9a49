"""Many runs as one study: do what is missing, measure what is asked for, and sum up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flatmin.study.cards import cards_of
from flatmin.study.costs import guess_seconds
from flatmin.study.events import Event, Planned, Warned
from flatmin.study.executors import Outcome, execute
from flatmin.study.plan import StudyPlan
from flatmin.study.tabulate import StudyTable, tabulate

OnEvent = Callable[[Event], None]


def study(
    todo: StudyPlan,
    *,
    workers: int,
    on_event: OnEvent | None = None,
    executor: str = "local",
    settings: Mapping[str, Any] | None = None,
) -> StudyTable:
    """Do the missing runs, measure the networks, and sum up.

    Args:
        todo: of `flatmin.study.plan.plan`.
        workers: runs at a time.
        on_event: told what happens.
        executor: where they are done, see `flatmin.study.executors.execute`.
        settings: of the executor.

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
    outcomes = dict(todo.found) | execute(
        todo.missing, todo.store, workers=workers, on_event=tell, executor=executor, settings=settings
    )
    return tabulate(todo, outcomes, *_cards(todo, outcomes, workers, tell))


def _cards(
    todo: StudyPlan, outcomes: Mapping[str, Outcome], workers: int, tell: OnEvent
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    if todo.spec.measure is None:
        return {}, {}
    runs = {run.name: run for run in todo.runs.values()}
    ended = [
        run
        for name, run in runs.items()
        if (outcome := outcomes.get(name)) is not None and outcome.result is not None and not outcome.result.failure
    ]
    return cards_of(ended, todo.store, todo.spec.measure, workers=workers, on_event=tell)
