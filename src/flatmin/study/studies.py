"""Many runs as one study: do what is missing, measure what is asked for, and sum up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flatmin.study.costs import guess_seconds
from flatmin.study.events import Event, Planned, Warned
from flatmin.study.executors import execute
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
        on_event: called with each event.
        executor: where they are done, see `flatmin.study.executors.execute`.
        settings: of the executor.

    Raises:
        StudyInterrupted: on Ctrl-C; finished runs are kept.
        OSError, ValueError, ModuleNotFoundError: the data, a network or a device cannot be had.
    """
    tell: OnEvent = on_event if on_event is not None else lambda event: None
    configs = [run.config for run in todo.missing]
    for text in todo.warnings:
        tell(Warned(text=text))
    tell(
        Planned(
            stage="study",
            runs=len(todo.finished) + len(todo.missing),
            reused=len(todo.finished) - len(todo.unmeasured),
            epochs=sum(run.config.epochs for run in todo.open),
            nets=sum(run.view is not None for run in todo.open),
            # What it takes elsewhere is not known here.
            seconds=guess_seconds(configs, workers) if configs and executor == "local" else None,
        )
    )
    outcomes = dict(todo.finished) | execute(
        todo.open, todo.store, workers=workers, on_event=tell, executor=executor, settings=settings
    )
    return tabulate(todo, outcomes)
