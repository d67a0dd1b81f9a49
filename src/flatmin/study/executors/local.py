"""Runs on local processes: one thread each, results as they come, nothing lost but what is under way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Final, cast

import torch

from flatmin.streams import settle_streams
from flatmin.study.executors.base import OnEvent, Outcome, Teller
from flatmin.study.executors.orders import Busy, Order, Queue
from flatmin.study.executors.performing import perform
from flatmin.study.executors.signals import ctrl_c_ignored
from flatmin.study.store import Run, Store
from flatmin.study.timing import one_thread
from flatmin.train.result import Epoch
from flatmin.train.sources import check_machine

START: Final = "spawn"


@dataclass(frozen=True, kw_only=True)
class Local:
    """Processes of this machine, or this process alone."""

    def run(
        self, runs: Sequence[Run], store: Store, *, workers: int, on_event: OnEvent, outcomes: dict[str, Outcome]
    ) -> None:
        """See `flatmin.study.executors.base.Executor`; with 0 workers all in this process.

        Raises:
            ValueError: this machine lacks the device of a run, or its precision.
        """
        for config in {(run.config.device, run.config.precision): run.config for run in runs}.values():
            check_machine(config)
        waiting, teller = Queue(runs), Teller(store, on_event, outcomes)
        if workers:
            _Pool(waiting, store, min(workers, len(runs)), teller).run()
            return
        with one_thread():
            while waiting:
                order = waiting.take()
                found = perform(order, store, partial(teller.epoch, order.run))
                if isinstance(found, Busy):
                    waiting.put_off(order)
                else:
                    teller.end(order.run, found)


EXECUTOR = Local


class _Pool:
    """Workers, what each is doing, and what waits."""

    def __init__(self, waiting: Queue, store: Store, workers: int, teller: Teller) -> None:
        self._waiting = waiting
        self._store, self._size, self._teller = store, workers, teller
        self._context = multiprocessing.get_context(START)
        self._workers: dict[Connection, BaseProcess] = {}
        self._started: set[Connection] = set()
        self._busy: dict[Connection, Order] = {}

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
        order = self._busy[connection]
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
            self._teller.epoch(order.run, message)
            return
        if isinstance(message, Busy):
            self._waiting.put_off(order)
        self._assign(connection)
        if isinstance(message, Outcome):
            self._teller.end(order.run, message)

    def _replace(self, connection: Connection) -> None:
        """A worker died: another one takes its place, and its run, unless that has had enough of them."""
        process = self._workers.pop(connection)
        order = self._busy.pop(connection)
        connection.close()
        process.join(5)
        code = process.exitcode
        if connection not in self._started and (code is None or code >= 0):  # not by a signal
            raise RuntimeError(
                f"a worker process could not start (exit code {code}); a script that calls compare() needs "
                '`if __name__ == "__main__":` around the call, or workers=0.'
            )
        how = f"ended with exit code {code}; a negative code is a signal, -9 often means that memory ran out"
        if self._teller.lost(order.run, how):
            self._waiting.again(order)
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
    """A worker's life: take a run, do it, send epochs and the outcome."""
    settle_streams()  # a model or a data set of the user's may print
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        connection.send(None)
        while (order := connection.recv()) is not None:
            connection.send(perform(order, store, connection.send))
    except (EOFError, OSError):
        return


def _end_with_parent() -> None:
    """End as soon as the process that asked for the work has; whoever goes on with it starts from the checkpoint."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
