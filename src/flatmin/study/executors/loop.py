"""The loop that executes runs on any scheduler: submit, poll, report, retry, cancel."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol, TypeVar

from flatmin.study.code import code_of
from flatmin.study.events import EpochDone, Event, ReportDone, RunBroke, RunDone, Warned
from flatmin.study.pool import Lost
from flatmin.study.store import Run, RunOutcome, Store
from flatmin.train.folder import RunFolder
from flatmin.train.lock import in_use
from flatmin.train.result import Epoch

OnEvent = Callable[[Event], None]
Job = TypeVar("Job")

ATTEMPTS = 3  # how often a run is started if its workers are lost
_IDLE = 0.5  # seconds between polls while other processes work on all remaining runs


@dataclass(frozen=True)
class Busy:
    """Another process is working on the run."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run for a worker.

    Args:
        run: the run to execute.
        code: digest of the code with which the study was planned, see `flatmin.study.code.code_of`.
    """

    run: Run
    code: str

    @classmethod
    def of(cls, run: Run) -> Task:
        """The task of a run, with the digest of this process's code.

        Raises:
            ValueError: a module that the run needs cannot be found.
        """
        return cls(run=run, code=code_of(run.config))


class Scheduler(Protocol[Job]):
    """A place where runs are executed. Its jobs call `flatmin.study.executors.worker.run_quietly`."""

    def submit(self, task: Task, store: Store, /) -> Job:
        """Submit a run; Ctrl-C waits until this returns."""
        ...

    def poll(self, job: Job, /) -> RunOutcome | Busy | Lost | None:
        """How a job ended; None while it is running."""
        ...

    def wait(self, jobs: Collection[Job], /) -> None:
        """Wait until one of the jobs may have ended, but not longer than progress may stay unreported."""
        ...

    def cancel(self, job: Job, /) -> None:
        """Cancel a job; also called for jobs that have already ended."""
        ...


def run_all(scheduler: Scheduler[Job], runs: Sequence[Run], store: Store, *, workers: int, reporter: Reporter) -> None:
    """Execute all runs, in order. An exception cancels the jobs in progress.

    A run that another process is working on is postponed until all others have started, and then until that process
    ends, so that two calls on the same store share the work.

    Args:
        scheduler: executes the runs.
        runs: runs with different names.
        store: where they are stored; this process must be able to read it.
        workers: number of jobs at a time.
        reporter: receives epochs and outcomes.

    Raises:
        ValueError: a module that a run needs cannot be found.
    """
    waiting = deque(Task.of(run) for run in runs)
    elsewhere: set[str] = set()  # runs that another process was found to work on
    busy: dict[str, tuple[Task, Job]] = {}
    try:
        while waiting or busy:
            for _ in range(len(waiting)):
                if len(busy) == workers:
                    break
                task = waiting.popleft()
                name = task.run.name
                if name in elsewhere and in_use(store.folder(task.run)):
                    waiting.append(task)  # a waiting job would block its worker
                    continue
                reporter.submitted(task.run)
                with ctrl_c_later():  # otherwise a submitted job might not be cancelled
                    busy[name] = (task, scheduler.submit(task, store))
            if busy:
                scheduler.wait([job for _, job in busy.values()])
            elif waiting:
                time.sleep(_IDLE)
            for name, (task, job) in list(busy.items()):
                outcome = scheduler.poll(job)
                reporter.written(task.run)
                if outcome is None:
                    continue
                if isinstance(outcome, Lost):
                    scheduler.cancel(job)  # the scheduler itself may queue it again
                del busy[name]
                if isinstance(outcome, RunOutcome):
                    reporter.ended(task.run, outcome)
                elif isinstance(outcome, Busy):
                    elsewhere.add(name)
                    waiting.append(task)
                elif reporter.lost(task.run, outcome.how):
                    waiting.appendleft(task)
    finally:
        for _, job in busy.values():
            scheduler.cancel(job)


class Reporter:
    """Reports each epoch and the end of a run once, also when parts of the run are repeated.

    Args:
        store: where the runs are.
        on_event: called with each event.
        outcomes: filled by name.
    """

    def __init__(self, store: Store, on_event: OnEvent, outcomes: dict[str, RunOutcome]) -> None:
        self._store, self._on_event, self._outcomes = store, on_event, outcomes
        self._reached: dict[str, int] = {}
        self._begun: dict[str, int] = {}
        self._marks: dict[str, tuple[int, ...]] = {}

    def submitted(self, run: Run) -> None:
        """Remember the state of the file of epochs, which may be that of a run about to be replaced."""
        self._marks[run.name] = self._mark(run)

    def written(self, run: Run) -> None:
        """Report the epochs that a run has written into its folder since the last call."""
        mark = self._mark(run)
        if mark == self._marks.get(run.name):
            return
        try:
            lines = RunFolder(self._store.folder(run)).lines()
        except ValueError:  # the file is being written
            return
        self._marks[run.name] = mark
        for line in lines:
            self.epoch(run, line)

    def epoch(self, run: Run, line: Epoch) -> None:
        """Report an epoch that has not been reported yet."""
        if line.epoch > self._reached.get(run.name, 0):
            self._reached[run.name] = line.epoch
            self._on_event(EpochDone(run=run.name, epochs=run.config.epochs, line=line))

    def ended(self, run: Run, outcome: RunOutcome) -> None:
        """Store an outcome and report it, after any epochs that have not been reported yet."""
        for line in outcome.lines:
            self.epoch(run, line)
        self._outcomes[run.name] = outcome
        if outcome.result is None:
            self._on_event(RunBroke(run=run.name, error=outcome.error or "no result"))
            return
        self._on_event(RunDone(run=run.name, result=outcome.result))
        if outcome.report is not None:
            self._on_event(ReportDone(run=run.name))
        if outcome.refusal is not None:
            self._on_event(Warned(text=f"{run.name} could not be measured: {outcome.refusal}"))

    def lost(self, run: Run, how: str) -> bool:
        """Whether to retry a run whose worker is lost; after `ATTEMPTS` it counts as failed.

        Args:
            run: the run.
            how: what happened to the worker, e.g. "ended with exit code -9".
        """
        tries = self._begun[run.name] = self._begun.get(run.name, 0) + 1
        recorded = self._store.find(run, lambda text: None)  # there is a result if it was lost while measuring
        if tries < ATTEMPTS:
            again = "resumed from its last checkpoint" if recorded is None else "measured again"
            self._on_event(Warned(text=f"{run.name} is {again}, because its worker {how}."))
            return True
        text = f"its worker was lost {tries} times during this run; the last one {how}"
        if recorded is None:
            self.ended(run, RunOutcome(error=text))
        else:
            self.ended(run, RunOutcome(result=recorded[0], lines=tuple(recorded[1]), refusal=text))
        return False

    def _mark(self, run: Run) -> tuple[int, ...]:
        """A value that changes whenever the file of a run's epochs changes."""
        try:
            found = (self._store.folder(run) / "metrics.jsonl").stat()
        except OSError:  # the file does not exist yet
            return ()
        return found.st_ino, found.st_mtime_ns, found.st_size


@contextmanager
def ctrl_c_later() -> Iterator[None]:
    """Delay a Ctrl-C until the end of the block, in place of an error that it caused; a second one acts at once.

    This has no effect outside the main thread, or if other code handles Ctrl-C.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = False

    def later(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    signal.signal(signal.SIGINT, later)
    try:
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt
