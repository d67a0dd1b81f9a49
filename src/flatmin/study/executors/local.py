"""Runs on local processes with one thread each; an interrupt loses at most the runs in progress."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Final, cast

import torch

from flatmin.streams import settle_streams
from flatmin.study.executors.executor import OnEvent, Reporter, RunOutcome
from flatmin.study.executors.settings import LocalSettings
from flatmin.study.executors.signals import ctrl_c_ignored
from flatmin.study.executors.tasks import Busy, Task, TaskQueue
from flatmin.study.executors.worker import run_task
from flatmin.study.store import Run, Store
from flatmin.study.timing import one_thread
from flatmin.train.result import Epoch
from flatmin.train.sources import check_machine

START: Final = "spawn"


class Local(LocalSettings):
    """Processes of this machine, or this process alone."""

    def run(
        self, runs: Sequence[Run], store: Store, *, workers: int, on_event: OnEvent, outcomes: dict[str, RunOutcome]
    ) -> None:
        """See `flatmin.study.executors.executor.Executor`; with 0 workers all in this process.

        Raises:
            ValueError: this machine lacks the device of a run, or its precision.
        """
        for config in {(run.config.device, run.config.precision): run.config for run in runs}.values():
            check_machine(config)
        waiting, reporter = TaskQueue(runs), Reporter(store, on_event, outcomes)
        if workers:
            _Pool(waiting, store, min(workers, len(runs)), reporter).run()
            return
        with one_thread():
            while waiting:
                task = waiting.take()
                outcome = run_task(task, store, partial(reporter.epoch, task.run))
                if isinstance(outcome, Busy):
                    waiting.postpone(task)
                else:
                    reporter.end(task.run, outcome)


EXECUTOR = Local


class _Pool:
    """The workers, their tasks, and the queue."""

    def __init__(self, waiting: TaskQueue, store: Store, workers: int, reporter: Reporter) -> None:
        self._waiting = waiting
        self._store, self._size, self._teller = store, workers, reporter
        self._context = multiprocessing.get_context(START)
        self._workers: dict[Connection, BaseProcess] = {}
        self._started: set[Connection] = set()
        self._busy: dict[Connection, Task] = {}

    def run(self) -> None:
        try:
            for _ in range(self._size):
                self._start()
            while self._busy:
                # Processes that read images may hold a dead worker's end of the pipe, so its end is watched too.
                ends = {self._workers[connection].sentinel: connection for connection in self._busy}
                ready = wait([*self._busy, *ends])
                for connection in {ends.get(one, one) if isinstance(one, int) else one for one in ready}:
                    self._receive(cast(Connection, connection))
            for connection in self._workers:
                with suppress(OSError):  # it has ended meanwhile
                    connection.send(None)
            for process in self._workers.values():
                process.join(5)
        finally:
            self._stop()

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        # No daemon, which could not start processes that read images; it ends with this process all the same.
        process = self._context.Process(target=_serve, args=(theirs, self._store), daemon=False)
        with ctrl_c_ignored():
            process.start()
        theirs.close()
        self._workers[ours] = process
        self._assign(ours)

    def _assign(self, connection: Connection) -> None:
        self._busy.pop(connection, None)
        if self._waiting:
            self._busy[connection] = self._waiting.take()
            try:
                connection.send(self._busy[connection])
            except OSError:
                self._replace(connection)

    def _receive(self, connection: Connection) -> None:
        task = self._busy[connection]
        try:
            if not connection.poll():
                raise EOFError
            message = connection.recv()
        except (EOFError, OSError):
            self._replace(connection)
            return
        self._started.add(connection)
        if message is None:
            return
        if isinstance(message, Epoch):
            self._teller.epoch(task.run, message)
            return
        if isinstance(message, Busy):
            self._waiting.postpone(task)
        self._assign(connection)
        if isinstance(message, RunOutcome):
            self._teller.end(task.run, message)

    def _replace(self, connection: Connection) -> None:
        """A worker died: start another one, and retry its run unless it was lost too often."""
        process = self._workers.pop(connection)
        task = self._busy.pop(connection)
        connection.close()
        process.join(5)
        code = process.exitcode
        if connection not in self._started and (code is None or code >= 0):  # not by a signal
            raise RuntimeError(
                f"a worker process could not start (exit code {code}); a script that calls compare() needs "
                '`if __name__ == "__main__":` around the call, or workers=0.'
            )
        how = f"ended with exit code {code}; a negative code is a signal, -9 often means that memory ran out"
        if self._teller.lost(task.run, how):
            self._waiting.retry(task)
        if self._waiting:
            self._start()

    def _stop(self) -> None:
        for process in self._workers.values():
            process.terminate()
        for process in self._workers.values():
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(connection: Connection, store: Store) -> None:
    """The loop of a worker: take a run, execute it, send epochs and the outcome."""
    settle_streams()  # a model or a data set of the user's may print
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        connection.send(None)
        while (task := connection.recv()) is not None:
            connection.send(run_task(task, store, connection.send))
    except (EOFError, OSError):
        return


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended; the run can be resumed from its checkpoint."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
