"""The loop around an engine that does runs elsewhere: hand over, look, take up again what was lost, call off."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from flatmin.study.executors.base import Outcome, Teller
from flatmin.study.store import Run, Store
from flatmin.train.folder import RunFolder

Job = TypeVar("Job")


@dataclass(frozen=True)
class Lost:
    """A job that ended without an outcome.

    Args:
        how: what happened, e.g. "was on a node that died".
    """

    how: str


class Engine(Protocol[Job]):
    """A scheduler that exists already. Its jobs call `flatmin.study.executors.base.work`."""

    def submit(self, run: Run, store: Store) -> Job:
        """Hand over a run."""
        ...

    def look(self, job: Job) -> Outcome | Lost | None:
        """How a job ended; None while it has not."""
        ...

    def cancel(self, job: Job) -> None:
        """Call off a job, also one that has ended meanwhile."""
        ...


def drive(
    engine: Engine[Job], runs: Sequence[Run], store: Store, *, workers: int, pause: float, teller: Teller
) -> None:
    """Do all runs; what is under way is called off when an exception passes through.

    Args:
        engine: does them.
        runs: in this order.
        store: where they are kept; this process must see it too.
        workers: jobs at a time.
        pause: seconds between looks.
        teller: told of epochs and ends.
    """
    waiting = list(reversed(runs))
    busy: dict[str, tuple[Run, Job]] = {}
    sizes: dict[str, int] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                run = waiting.pop()
                busy[run.name] = (run, engine.submit(run, store))
            for run, job in list(busy.values()):
                found = engine.look(job)
                _tell_epochs(run, store, teller, sizes)
                if found is None:
                    continue
                del busy[run.name]
                if isinstance(found, Outcome):
                    teller.end(run, found)
                else:
                    engine.cancel(job)  # it may be queued again by its own scheduler
                    if teller.lost(run, found.how):
                        waiting.append(run)
            if busy:
                time.sleep(pause)
    finally:
        for _, job in busy.values():
            engine.cancel(job)


def _tell_epochs(run: Run, store: Store, teller: Teller, sizes: dict[str, int]) -> None:
    """Tell of the lines that a run has written; `sizes` are those of its file at the last look."""
    folder = RunFolder(store.folder(run))
    try:
        size = (folder.path / "metrics.jsonl").stat().st_size
        if size == sizes.get(run.name):
            return
        lines = folder.lines()
    except (OSError, ValueError):  # not there yet, or being written
        return
    sizes[run.name] = size
    for line in lines:
        teller.epoch(run, line)
