"""A pool of local processes with one thread each that call a function."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Final, Self

import torch

from flatmin.streams import settle_streams

START: Final = "spawn"
_MOMENT = 0.1  # seconds


@dataclass(frozen=True)
class Lost:
    """A job that ended without a result.

    Args:
        how: what happened, as a predicate, e.g. "was on a node that died".
    """

    how: str


class Worker:
    """A process of the pool; `started` is set when it has finished starting up."""

    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self.process, self.connection, self.started = process, connection, False


class Pool:
    """A context manager for processes that call a function. On exit all processes are ended, busy or not.

    A process is started when a job is submitted and none is idle. It ignores Ctrl-C, ends when this process ends, and
    may have child processes, such as those that read images. Processes are spawned, so a script that creates a pool
    needs `if __name__ == "__main__":`.

    Args:
        function: called with the arguments of each job. Arguments and result must be picklable, and the result must
            not be None. If the function raises an error, its process is lost.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._context = multiprocessing.get_context(START)
        self._workers: list[Worker] = []
        self._idle: list[Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            if worker not in self._idle:
                worker.process.terminate()
                continue
            with suppress(OSError):  # the process has ended already
                worker.connection.send(None)
        for worker in self._workers:
            worker.process.join(5)
            self.cancel(worker)

    def submit(self, *arguments: Any) -> Worker:
        """Start a job."""
        self._idle = [worker for worker in self._idle if worker.process.is_alive()]
        worker = self._idle.pop() if self._idle else self._start()
        with suppress(OSError):  # `poll` sees that the process has ended
            worker.connection.send(arguments)
        return worker

    def poll(self, worker: Worker) -> Any:
        """The result of a job, None while it runs, or `Lost` if its process has ended.

        Raises:
            RuntimeError: the process could not start.
        """
        alive = (
            worker.process.is_alive()
        )  # checked first, so that messages sent before the process ended are still read
        try:
            while worker.connection.poll():
                message = worker.connection.recv()
                if worker.started:
                    self._idle.append(worker)
                    return message
                worker.started = True
            if alive:
                return None
        except (EOFError, OSError):
            worker.process.join(5)
        code = worker.process.exitcode
        if not worker.started and (code is None or code >= 0):  # not ended by a signal
            raise RuntimeError(
                f"a worker process could not start (exit code {code}); put the code of the script that starts workers "
                'under `if __name__ == "__main__":`, or use workers=0.'
            )
        return Lost(f"ended with exit code {code} (a negative code is a signal; -9 often means that memory ran out)")

    def wait(self, workers: Collection[Worker]) -> None:
        """Wait until a job may have ended, at most 0.1 seconds."""
        # Child processes of a dead worker may keep its pipe open, so the process itself is watched too.
        wait([*(one.connection for one in workers), *(one.process.sentinel for one in workers)], _MOMENT)

    def cancel(self, worker: Worker) -> None:
        """End the process of a job."""
        worker.process.terminate()
        worker.process.join(2)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.connection.close()

    def _start(self) -> Worker:
        ours, theirs = self._context.Pipe()
        # Not a daemon, because a daemon cannot start processes that read images.
        process = self._context.Process(target=_serve, args=(theirs, self._function), daemon=False)
        with _ctrl_c_ignored():
            process.start()
        theirs.close()
        self._workers.append(worker := Worker(process, ours))
        return worker


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    """The main function of a process: report that it has started, then call the function for each job."""
    settle_streams()  # the user's model or data set may print
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        connection.send(None)
        while (arguments := connection.recv()) is not None:
            connection.send(function(*arguments))


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Make processes that are started inside ignore Ctrl-C; outside the main thread this has no effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
