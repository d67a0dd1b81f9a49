"""What all executors share: what they are, what a run comes to, and what is told of it."""

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

ATTEMPTS = 3  # how often a run is begun whose workers are lost


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C during a study. The message says what is kept and how to go on."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(
            f"Interrupted: {done} of {total} runs are finished and kept; the same command goes on from there."
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run's result and epochs, or the error that it raised.

    Args:
        result, lines, error: the former two, or the latter.
        report: what was measured of its network, as `flatmin.measure.Report.to_dict`; None if nothing was to be.
        refusal: why there is no report.
    """

    result: Result | None = None
    lines: tuple[Epoch, ...] = ()
    error: str | None = None
    report: Mapping[str, Any] | None = None
    refusal: str | None = None


class Executor(Protocol):
    """A place where runs are done."""

    def run(
        self, runs: Sequence[Run], store: Store, *, workers: int, on_event: OnEvent, outcomes: dict[str, Outcome]
    ) -> None:
        """Do all runs; what is under way is stopped when an exception passes through.

        Args:
            runs: at least one.
            store: where they are kept.
            workers: how many at a time.
            on_event: told what happens, in this process.
            outcomes: filled by name as runs end.
        """
        ...


def finished_and_missing(
    runs: Iterable[Run], store: Store, warn: Callable[[str], None]
) -> tuple[dict[str, Outcome], list[Run]]:
    """Outcomes of the finished runs by name, and the runs to do; each run once.

    A run that is done again because it has not recorded what is asked for also records what it had. Checkpoints that a
    finished run has left are removed, if the store may write.

    Args:
        runs: wanted.
        store: where to look.
        warn: see `Store.find`.
    """
    found: dict[str, Outcome] = {}
    missing: list[Run] = []
    for run in unique(runs):
        known = store.find(run, warn)
        if known is None:
            missing.append(done_again(run, store))
        else:
            found[run.name] = Outcome(result=known[0], lines=tuple(known[1]))
            if store.writes:
                _tidy(RunFolder(store.folder(run)))
    return found, missing


def done_again(run: Run, store: Store) -> Run:
    """The run, recording also what it has recorded before, for other studies that look at that."""
    return dataclasses.replace(run, record=run.record.with_also(_recorded(run, store)))


def _tidy(folder: RunFolder) -> None:
    """Remove checkpoints of a finished run whose worker and driver were killed right after its result."""
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


class Teller:
    """Tells of each epoch and the end of a run once, however often parts of it are repeated.

    Args:
        store: where the runs are.
        on_event: told.
        outcomes: filled by name.
    """

    def __init__(self, store: Store, on_event: OnEvent, outcomes: dict[str, Outcome]) -> None:
        self._store, self._on_event, self._outcomes = store, on_event, outcomes
        self._reached: dict[str, int] = {}
        self._begun: dict[str, int] = {}

    def epoch(self, run: Run, line: Epoch) -> None:
        """Tell of an epoch unless it has been told."""
        if line.epoch > self._reached.get(run.name, 0):
            self._reached[run.name] = line.epoch
            self._on_event(EpochDone(run=run.name, epochs=run.config.epochs, line=line))

    def end(self, run: Run, outcome: Outcome) -> None:
        """Keep an outcome and tell of it, and of the epochs that have not been."""
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
        """Whether a run whose worker is gone is to be taken up again; else it is broken.

        Args:
            run: which.
            how: what happened to the worker, e.g. "ended with exit code -9".
        """
        tries = self._begun[run.name] = self._begun.get(run.name, 0) + 1
        known = self._store.find(run, lambda text: None)  # if it was lost while it measured
        if tries < ATTEMPTS:
            again = "taken up again from its last checkpoint" if known is None else "measured anew"
            self._on_event(Warned(text=f"{run.name} is {again}, because its worker {how}."))
            return True
        text = f"its worker was lost {tries} times during this run; the last one {how}"
        if known is None:
            self.end(run, Outcome(error=text))
        else:
            self.end(run, Outcome(result=known[0], lines=tuple(known[1]), refusal=text))
        return False
