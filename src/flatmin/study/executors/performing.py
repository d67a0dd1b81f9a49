"""How one run is done, gone on with, and measured, wherever its worker is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flatmin.study.code import code_of
from flatmin.study.executors.base import Outcome
from flatmin.study.executors.orders import Busy, Order
from flatmin.study.store import Run, Store
from flatmin.study.stored_reports import make_report, stored_report
from flatmin.study.timing import one_thread
from flatmin.train import checkpoint, lock
from flatmin.train import events as training
from flatmin.train.fingerprint import OtherDataError
from flatmin.train.folder import RunFolder
from flatmin.train.loop import train
from flatmin.train.result import Epoch, Result


def perform(order: Order, store: Store, on_line: Callable[[Epoch], None]) -> Outcome | Busy:
    """Do one run in this process and store it, or go on with it from its last checkpoint; then measure its network.

    What is there already is not repeated, be it of an earlier call or of another process that had the run meanwhile.
    Errors of any kind become part of the outcome, but for those of `on_line`.

    Args:
        order: the run.
        store: where it is kept.
        on_line: called with every epoch, those of earlier parts of the run included.
    """
    run, folder, listener = order.run, RunFolder(store.folder(order.run)), _Listener(on_line)
    try:
        if code_of(run.config) != order.code:
            raise ValueError(
                "the code of its worker is not the one that the study began with: flatmin, torch or your own modules "
                "have changed since, or are others there; start the command again, with the same ones everywhere."
            )
        with folder.hold(patience=None if order.wait else lock.GLANCE):
            known = store.find(run, lambda text: None)
            if known is None:
                return _measured(run, folder, _train(run, store, folder, listener))
            checkpoint.clear(folder.checkpoints)  # a process that was killed right after its result may have left some
            for line in known[1]:
                listener(line)
            return _measured(run, folder, Outcome(result=known[0], lines=tuple(known[1])))
    except lock.InUseError:
        return Busy()
    except Exception as error:
        if listener.raised is not None:
            raise listener.raised from None
        return Outcome(error=_in_words(error))


def work(order: Order, store: Store) -> Outcome | Busy:
    """`perform` with one thread and without progress, for a process elsewhere; it needs nothing but these two."""
    with one_thread():
        return perform(order, store, lambda line: None)


class _Listener:
    """Passes epochs on; what is raised there is no error of the run."""

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


def _measured(run: Run, folder: RunFolder, outcome: Outcome) -> Outcome:
    """With the report of the network, if it is wanted and there is a network."""
    if run.view is None or outcome.result is None or outcome.result.failure is not None:
        return outcome
    report = stored_report(folder.path, run.view)
    if report is None:
        try:
            report = make_report(folder.path, run.view)
        except Exception as error:
            return dataclasses.replace(outcome, refusal=_in_words(error))
    return dataclasses.replace(outcome, report=report)


def _train(run: Run, store: Store, folder: RunFolder, on_line: Callable[[Epoch], None]) -> Outcome:
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
        # The plan did not know the data, and they have changed since a part of the run was done.
        if not resume or run.content is not None:
            raise
        result = go(False)
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
