"""What all executors share: the protocol, the outcome of a run, and the reporter of events."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from flatmin.study.events import EpochDone, Event, ReportDone, RunBroke, RunDone, Warned
from flatmin.study.record import Record
from flatmin.study.store import Run, Store, unique
from flatmin.train import checkpoint
from flatmin.train.folder import RunFolder
from flatmin.train.lock import InUseError
from flatmin.train.result import Epoch, Result

OnEvent = Callable[[Event], None]

ATTEMPTS = 3  # how often a run starts whose workers are lost


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C during a study. The message says what is stored and how to continue."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(
            f"Interrupted: {done} of {total} runs are finished and kept; the same command continues from there."
        )


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """The result and the epochs of a run, or the error that it raised.

    Args:
        result, lines, error: the former two, or the latter.
        report: the flatness of its network, as `flatmin.measure.Report.to_dict`; None if none was asked for.
        refusal: why there is no report.
    """

    result: Result | None = None
    lines: tuple[Epoch, ...] = ()
    error: str | None = None
    report: Mapping[str, Any] | None = None
    refusal: str | None = None


class Executor(Protocol):
    """A place where runs are executed."""

    def run(
        self, runs: Sequence[Run], store: Store, *, workers: int, on_event: OnEvent, outcomes: dict[str, RunOutcome]
    ) -> None:
        """Execute all runs. An exception stops the runs in progress.

        Args:
            runs: at least one.
            store: where they are stored.
            workers: how many run at a time.
            on_event: called with each event, in this process.
            outcomes: filled by name as runs end.
        """
        ...


def finished_and_missing(
    runs: Iterable[Run], store: Store, warn: Callable[[str], None]
) -> tuple[dict[str, RunOutcome], list[Run]]:
    """Outcomes of the finished runs by name, and the runs that are missing; each run once.

    A run that is repeated because it has not recorded what is asked for also records what it recorded before.
    Checkpoints that a finished run left behind are removed, if the store may write.

    Args:
        runs: wanted.
        store: where to look.
        warn: see `Store.find`.
    """
    finished: dict[str, RunOutcome] = {}
    missing: list[Run] = []
    for run in unique(runs):
        recorded = store.find(run, warn)
        if recorded is None:
            missing.append(done_again(run, store))
        else:
            finished[run.name] = RunOutcome(result=recorded[0], lines=tuple(recorded[1]))
            if store.writes:
                _tidy(RunFolder(store.folder(run)))
    return finished, missing


def done_again(run: Run, store: Store) -> Run:
    """The run, recording also what it recorded before, for other studies that read it."""
    return dataclasses.replace(run, record=run.record.with_also(_recorded(run, store)))


def _tidy(folder: RunFolder) -> None:
    """Remove the checkpoints of a finished run whose processes were killed right after its result."""
    if folder.checkpoints.is_dir():
        with suppress(InUseError), folder.hold(patience=0):
            if folder.finished:
                checkpoint.clear(folder.checkpoints)


def _recorded(run: Run, store: Store) -> Record:
    try:
        labels = RunFolder(store.folder(run)).config()[1]
    except ValueError:
        return Record()
    return Record.of(labels) if labels.get("key") == run.key else Record()


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

    def epoch(self, run: Run, line: Epoch) -> None:
        """Report an epoch that has not been reported yet."""
        if line.epoch > self._reached.get(run.name, 0):
            self._reached[run.name] = line.epoch
            self._on_event(EpochDone(run=run.name, epochs=run.config.epochs, line=line))

    def end(self, run: Run, outcome: RunOutcome) -> None:
        """Store an outcome and report it, after the epochs that have not been reported yet."""
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
            self._on_event(Warned(text=f"{run.name} is not measured: {outcome.refusal}"))

    def lost(self, run: Run, how: str) -> bool:
        """Whether to retry a run whose worker is lost; after `ATTEMPTS` it counts as failed.

        Args:
            run: which.
            how: what happened to the worker, e.g. "ended with exit code -9".
        """
        tries = self._begun[run.name] = self._begun.get(run.name, 0) + 1
        recorded = self._store.find(run, lambda text: None)  # if it was lost while it measured
        if tries < ATTEMPTS:
            again = "resumed from its last checkpoint" if recorded is None else "measured again"
            self._on_event(Warned(text=f"{run.name} is {again}, because its worker {how}."))
            return True
        text = f"its worker was lost {tries} times during this run; the last one {how}"
        if recorded is None:
            self.end(run, RunOutcome(error=text))
        else:
            self.end(run, RunOutcome(result=recorded[0], lines=tuple(recorded[1]), refusal=text))
        return False
