"""Runs on local processes: one thread each, results as they come, nothing lost but what is under way."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

import torch

from flatmin.study.events import EpochDone, Event, RunBroke, RunDone
from flatmin.study.store import Run, Store, unique
from flatmin.study.timing import one_thread
from flatmin.train.folder import RunFolder
from flatmin.train.loop import train
from flatmin.train.options import Options
from flatmin.train.result import Epoch, Result

OnEvent = Callable[[Event], None]


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


def finished_and_missing(
    runs: Iterable[Run], store: Store, warn: Callable[[str], None]
) -> tuple[dict[str, Outcome], list[Run]]:
    """Outcomes of the finished runs by name, and the runs to do; each run once.

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
            missing.append(run)
        else:
            found[run.name] = Outcome(result=known[0], lines=tuple(known[1]))
    return found, missing


def perform(run: Run, store: Store, on_line: Callable[[Epoch], None]) -> Outcome:
    """Do one run in this process and store it. Errors of any kind become part of the outcome."""
    lines: list[Epoch] = []
    try:

        def keep(line: Epoch) -> None:
            lines.append(line)
            on_line(line)

        options = Options(checkpoint_every=0, log_every=0, signals=False, weights=store.weights)
        folder = RunFolder(store.folder(run))
        result = train(run.config, folder=folder, options=options, labels=run.labels, on_epoch=keep)
    except Exception as error:
        text = str(error).strip() or "no message"
        return Outcome(error=text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")
    return Outcome(result=result, lines=tuple(lines))


def execute(runs: Sequence[Run], store: Store, *, workers: int, on_event: OnEvent) -> dict[str, Outcome]:
    """Do all runs, in the given order as workers become free.

    Args:
        runs: with different names.
        store: where they are kept.
        workers: processes, each with one thread; they are started fresh (spawn), so a script that calls this needs
            `if __name__ == "__main__":`. 0: all in this process, with one thread.
        on_event: called here, in this process, with `EpochDone`, `RunDone` and `RunBroke`.

    Returns:
        The outcome of every run by its name.

    Raises:
        Interrupted: on Ctrl-C, after the workers have been stopped.
    """
    outcomes: dict[str, Outcome] = {}
    try:
        if workers == 0:
            _here(runs, store, outcomes, on_event)
        elif runs:
            _Pool(runs, store, min(workers, len(runs)), outcomes, on_event).run()
    except KeyboardInterrupt:
        raise Interrupted(len(outcomes), len(runs)) from None
    return outcomes


def _here(runs: Sequence[Run], store: Store, outcomes: dict[str, Outcome], on_event: OnEvent) -> None:
    with one_thread():
        for run in runs:
            outcome = perform(run, store, partial(_tell_epoch, on_event, run))
            outcomes[run.name] = outcome
            _tell(run, outcome, on_event)


def _tell_epoch(on_event: OnEvent, run: Run, line: Epoch) -> None:
    on_event(EpochDone(run=run.name, epochs=run.config.epochs, line=line))


def _tell(run: Run, outcome: Outcome, on_event: OnEvent) -> None:
    if outcome.result is not None:
        on_event(RunDone(run=run.name, result=outcome.result))
    else:
        on_event(RunBroke(run=run.name, error=outcome.error or "no result"))


class _Pool:
    """Workers, what each is doing, and what waits."""

    def __init__(
        self, runs: Sequence[Run], store: Store, workers: int, outcomes: dict[str, Outcome], on_event: OnEvent
    ) -> None:
        self._waiting = list(reversed(runs))
        self._store, self._size = store, workers
        self._outcomes, self._on_event = outcomes, on_event
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[Connection, BaseProcess] = {}
        self._started: set[Connection] = set()
        self._busy: dict[Connection, Run] = {}

    def run(self) -> None:
        try:
            for _ in range(self._size):
                self._start()
            while self._busy:
                for ready in wait(list(self._busy)):
                    self._receive(cast(Connection, ready))
            for connection in self._workers:
                connection.send(None)
            for process in self._workers.values():
                process.join(5)
        finally:
            self._stop()

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._store), daemon=True)
        with _sigint_ignored():
            process.start()
        theirs.close()
        self._workers[ours] = process
        self._assign(ours)

    def _assign(self, connection: Connection) -> None:
        self._busy.pop(connection, None)
        if self._waiting:
            self._busy[connection] = self._waiting.pop()
            try:
                connection.send(self._busy[connection])
            except OSError:
                self._replace(connection)

    def _receive(self, connection: Connection) -> None:
        run = self._busy[connection]
        try:
            message = connection.recv()
        except (EOFError, OSError):
            self._replace(connection)
            return
        self._started.add(connection)
        if message is None:
            return
        if isinstance(message, Epoch):
            _tell_epoch(self._on_event, run, message)
            return
        self._outcomes[run.name] = message
        self._assign(connection)
        _tell(run, message, self._on_event)

    def _replace(self, connection: Connection) -> None:
        """A worker died: its run is broken, another worker takes its place."""
        process = self._workers.pop(connection)
        run = self._busy.pop(connection)
        connection.close()
        process.join(5)
        if connection not in self._started:
            raise RuntimeError(
                f"a worker process could not start (exit code {process.exitcode}); a script that calls compare() needs "
                '`if __name__ == "__main__":` around the call, or workers=0.'
            )
        outcome = Outcome(
            error=f"the worker process ended with exit code {process.exitcode} during this run; "
            "a negative code is a signal, -9 often means that memory ran out"
        )
        self._outcomes[run.name] = outcome
        _tell(run, outcome, self._on_event)
        if self._waiting:
            self._start()

    def _stop(self) -> None:
        for process in self._workers.values():
            if process.is_alive():
                process.terminate()
        for process in self._workers.values():
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def _sigint_ignored() -> Iterator[None]:
    """A process started inside ignores Ctrl-C from its first moment; signals can only be set in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, store: Store) -> None:
    """A worker's life: take a run, do it, send epochs and the outcome."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(1)
    try:
        connection.send(None)
        while (run := connection.recv()) is not None:
            connection.send(perform(run, store, connection.send))
    except (EOFError, BrokenPipeError):
        return
