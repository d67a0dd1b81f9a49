"""What all executors share: how one run is done and gone on with, and what is told of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from flatmin.study.events import EpochDone, Event, RunBroke, RunDone, Warned
from flatmin.study.record import Record
from flatmin.study.store import Run, Store, unique
from flatmin.study.timing import one_thread
from flatmin.train import checkpoint
from flatmin.train import events as training
from flatmin.train.folder import RunFolder
from flatmin.train.loop import train
from flatmin.train.result import Epoch, Result

OnEvent = Callable[[Event], None]

ATTEMPTS = 3  # how often a run is begun whose workers are lost


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a study. The message says what is kept and how to go on."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(
            f"Interrupted: {done} of {total} runs are finished and kept; the same command goes on from there."
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run's result and epochs, or the error that it raised."""

    result: Result | None = None
    lines: tuple[Epoch, ...] = ()
    error: str | None = None


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

    A run that is done again because it has not recorded what is asked for also records what it had.

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
            missing.append(dataclasses.replace(run, record=run.record.with_also(_recorded(run, store))))
        else:
            found[run.name] = Outcome(result=known[0], lines=tuple(known[1]))
    return found, missing


def _recorded(run: Run, store: Store) -> Record:
    try:
        labels = RunFolder(store.folder(run)).config()[1]
    except ValueError:
        return Record()
    return Record.of(labels) if labels.get("key") == run.key else Record()


def perform(run: Run, store: Store, on_line: Callable[[Epoch], None]) -> Outcome:
    """Do one run in this process and store it, or go on with it from its last checkpoint.

    While another process trains in its folder this one waits, and takes the result that it finds then. Errors of any
    kind become part of the outcome.

    Args:
        run: which.
        store: where it is kept.
        on_line: called with every epoch, those of earlier parts of the run included.
    """
    folder = RunFolder(store.folder(run))
    try:
        with folder.hold(patience=None):
            known = store.find(run, lambda text: None)
            if known is None:
                return _train(run, store, folder, on_line)
    except Exception as error:
        text = str(error).strip() or "no message"
        return Outcome(error=text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")
    checkpoint.clear(folder.checkpoints)  # a process that was killed right after its result may have left some
    for line in known[1]:
        on_line(line)
    return Outcome(result=known[0], lines=tuple(known[1]))


def work(run: Run, store: Store) -> Outcome:
    """`perform` with one thread and without progress, for a process elsewhere; it needs nothing but these two."""
    with one_thread():
        return perform(run, store, lambda line: None)


def _train(run: Run, store: Store, folder: RunFolder, on_line: Callable[[Epoch], None]) -> Outcome:
    def on_event(event: training.Event) -> None:
        if isinstance(event, training.Began):
            for line in folder.lines():
                on_line(line)

    options = run.record.options(
        checkpoint_every=1, checkpoint_seconds=store.checkpoint_seconds, signals=False, weights=store.weights
    )
    resume = _unfinished(run, folder)
    result = train(
        run.config,
        folder=folder,
        resume=resume,
        options=options,
        labels=run.labels,
        on_event=on_event,
        on_epoch=on_line,
    )
    checkpoint.clear(folder.checkpoints)  # a study does not go on with a run that failed
    return Outcome(result=result, lines=tuple(folder.lines(expected=None if result.failure else result.epochs)))


def _unfinished(run: Run, folder: RunFolder) -> bool:
    """Whether the folder holds a part of this very run."""
    if not folder.begun or folder.finished:
        return False
    try:
        labels = folder.config()[1]
    except ValueError:
        return False
    return all(labels.get(key, "") == run.labels.get(key, "") for key in ("key", "record"))


class Teller:
    """Tells of each epoch and the end of a run once, however often parts of it are repeated.

    Args:
        on_event: told.
        outcomes: filled by name.
    """

    def __init__(self, on_event: OnEvent, outcomes: dict[str, Outcome]) -> None:
        self._on_event, self._outcomes = on_event, outcomes
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
        if outcome.result is not None:
            self._on_event(RunDone(run=run.name, result=outcome.result))
        else:
            self._on_event(RunBroke(run=run.name, error=outcome.error or "no result"))

    def lost(self, run: Run, how: str) -> bool:
        """Whether a run whose worker is gone is to be taken up again; else it is broken.

        Args:
            run: which.
            how: what happened to the worker, e.g. "ended with exit code -9".
        """
        tries = self._begun[run.name] = self._begun.get(run.name, 0) + 1
        if tries < ATTEMPTS:
            self._on_event(
                Warned(text=f"{run.name} is taken up again from its last checkpoint, because its worker {how}.")
            )
            return True
        self.end(run, Outcome(error=f"its worker was lost {tries} times during this run; the last one {how}"))
        return False
