"""The work of one process: start or continue a run, then measure its network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flatmin.study.code import code_of
from flatmin.study.executors.loop import Busy, Task
from flatmin.study.store import Run, RunOutcome, Store
from flatmin.study.stored_reports import make_report, stored_report
from flatmin.study.timing import one_thread
from flatmin.train import checkpoint, lock
from flatmin.train import events as training
from flatmin.train.fingerprint import OtherDataError
from flatmin.train.folder import RunFolder
from flatmin.train.loop import train
from flatmin.train.result import Epoch, Result


def run_task(task: Task, store: Store, on_line: Callable[[Epoch], None]) -> RunOutcome | Busy:
    """Start a run in this process, or continue it from its last checkpoint, then store it and measure its network.

    Work that another call or process has finished is not repeated. If another process is working on the run, nothing
    is done. All errors become part of the outcome, except those that `on_line` raises.

    Args:
        task: the run.
        store: where it is stored.
        on_line: called with every epoch, including those of earlier parts of the run.
    """
    run, folder, listener = task.run, RunFolder(store.folder(task.run)), _Listener(on_line)
    try:
        if code_of(run.config) != task.code:
            raise ValueError(
                "the worker's code differs from the code with which the study was planned: flatmin, torch or your own "
                "modules have changed or differ on that machine. Use the same versions everywhere and start the "
                "command again."
            )
        with folder.hold():
            recorded = store.find(run, lambda text: None)
            if recorded is None:
                return _measured(run, folder, _train(run, store, folder, listener))
            checkpoint.clear(
                folder.checkpoints
            )  # a process that was killed right after writing the result may have left some
            for line in recorded[1]:
                listener(line)
            return _measured(run, folder, RunOutcome(result=recorded[0], lines=tuple(recorded[1])))
    except lock.InUseError:
        return Busy()
    except Exception as error:
        if listener.raised is not None:
            raise listener.raised from None
        return RunOutcome(error=_in_words(error))


def run_quietly(task: Task, store: Store) -> RunOutcome | Busy:
    """`run_task` with one thread and without reports of epochs, which are in the run's folder."""
    with one_thread():
        return run_task(task, store, lambda line: None)


class _Listener:
    """Passes epochs on, and remembers an exception of the receiver, which is not an error of the run."""

    def __init__(self, on_line: Callable[[Epoch], None]) -> None:
        self._on_line = on_line
        self.raised: Exception | None = None

    def __call__(self, line: Epoch) -> None:
        try:
            self._on_line(line)
        except Exception as error:
            self.raised = error
            raise


def _in_words(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _measured(run: Run, folder: RunFolder, outcome: RunOutcome) -> RunOutcome:
    """The outcome with the report of the network, if the run has a view and did not fail."""
    if run.view is None or outcome.result is None or outcome.result.failure is not None:
        return outcome
    report = stored_report(folder.path, run.view)
    if report is None:
        try:
            report = make_report(folder.path, run.view)
        except Exception as error:
            return dataclasses.replace(outcome, refusal=_in_words(error))
    return dataclasses.replace(outcome, report=report)


def _train(run: Run, store: Store, folder: RunFolder, on_line: Callable[[Epoch], None]) -> RunOutcome:
    def on_event(event: training.Event) -> None:
        if isinstance(event, training.Began):
            for line in folder.lines():
                on_line(line)

    def go(resume: bool) -> Result:
        return train(
            run.config,
            folder=folder,
            resume=resume,
            options=options,
            labels=run.labels,
            content=run.content,
            on_event=on_event,
            on_epoch=on_line,
        )

    options = run.record.options(
        checkpoint_every=1,
        checkpoint_seconds=store.checkpoint_seconds,
        signals=False,
        weights=store.weights,
        prolong=False,
    )
    resume = _unfinished(run, folder)
    try:
        result = go(resume)
    except OtherDataError:
        # The data were unknown to the plan and have changed since the first part of the run.
        if not resume or run.content is not None:
            raise
        result = go(False)
    checkpoint.clear(folder.checkpoints)  # a study does not continue a failed run
    return RunOutcome(result=result, lines=tuple(folder.lines(expected=None if result.failure else result.epochs)))


def _unfinished(run: Run, folder: RunFolder) -> bool:
    """Whether the folder holds an unfinished part of this run."""
    if not folder.begun or folder.finished:
        return False
    try:
        labels = folder.config()[1]
    except ValueError:
        return False
    return all(labels.get(key, "") == run.labels.get(key, "") for key in ("key", "record"))
