"""The loop around a scheduler that executes runs elsewhere: submit, poll, retry, cancel."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from flatmin.study.executors.executor import Reporter, RunOutcome
from flatmin.study.executors.signals import ctrl_c_later
from flatmin.study.executors.tasks import Busy, Task, TaskQueue
from flatmin.study.store import Run, Store
from flatmin.train.folder import RunFolder
from flatmin.train.lock import in_use

Job = TypeVar("Job")
_IDLE = 0.5  # seconds between polls while other processes work on all that is left


@dataclass(frozen=True)
class Lost:
    """A job that ended without an outcome.

    Args:
        how: what happened, e.g. "was on a node that died".
    """

    how: str


class Scheduler(Protocol[Job]):
    """An existing scheduler. Its jobs call `flatmin.study.executors.worker.run_quietly`."""

    def submit(self, task: Task, store: Store) -> Job:
        """Submit a run."""
        ...

    def poll(self, job: Job) -> RunOutcome | Busy | Lost | None:
        """How a job ended; None while it is running."""
        ...

    def cancel(self, job: Job) -> None:
        """Cancel a job; also called for jobs that have ended meanwhile."""
        ...


def submit_loop(
    scheduler: Scheduler[Job], runs: Sequence[Run], store: Store, *, workers: int, pause: float, reporter: Reporter
) -> None:
    """Execute all runs. An exception cancels the jobs in progress.

    Args:
        scheduler: executes them.
        runs: in this order.
        store: where they are stored; this process must see it too.
        workers: jobs at a time.
        pause: seconds between polls.
        reporter: receives epochs and outcomes.
    """
    waiting = TaskQueue(runs)
    busy: dict[str, tuple[Task, Job]] = {}
    sizes: dict[str, int] = {}
    try:
        while waiting or busy:
            for _ in range(len(waiting)):
                if len(busy) == workers:
                    break
                task = waiting.take()
                if task.wait and in_use(store.folder(task.run)):
                    waiting.postpone(task)  # a job that waits would keep its node from others
                    continue
                task = dataclasses.replace(task, wait=False)
                with ctrl_c_later():  # otherwise a submitted job could be forgotten
                    busy[task.run.name] = (task, scheduler.submit(task, store))
            for task, job in list(busy.values()):
                outcome = scheduler.poll(job)
                _report_epochs(task.run, store, reporter, sizes)
                if outcome is None:
                    continue
                del busy[task.run.name]
                if isinstance(outcome, RunOutcome):
                    reporter.end(task.run, outcome)
                elif isinstance(outcome, Busy):
                    waiting.postpone(task)
                else:
                    scheduler.cancel(job)  # it may be queued again by its own scheduler
                    if reporter.lost(task.run, outcome.how):
                        waiting.retry(task)
            if busy or waiting:
                time.sleep(pause if busy else max(pause, _IDLE))
    finally:
        for _, job in busy.values():
            scheduler.cancel(job)


def _report_epochs(run: Run, store: Store, reporter: Reporter, sizes: dict[str, int]) -> None:
    """Report the epochs that a run has written; `sizes` are those of its file at the last poll."""
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
        reporter.epoch(run, line)
