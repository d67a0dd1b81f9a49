"""A few gloo processes that live as long as the test session, so that a distributed test costs milliseconds.

Calls share the default process group. Each starts from random seed 0 and ends with a barrier, so that ranks that have
lost step with each other fail the test that did it. After a failure the processes are killed, and the next call starts
new ones: closing a group in a living process can deadlock in torch, where its threads wait for Python and Python for
them.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import distributed as dist

START_TIMEOUT = 120.0  # seconds; importing torch alone takes a few on a slow machine
PRELOAD = ["flatmin", "torch._dynamo", "torch.nn.parallel", "torch.distributed.fsdp", "pytest"]
PRELOAD += ["flatmin.cli.main", "flatmin.train.loop", "flatmin.study.executors.local"]
GRACE = 0.5  # seconds in which other ranks may fail too after one has failed


class RankError(RuntimeError):
    """A scenario failed on some rank; the text has that rank's traceback."""


def forkserver() -> ForkServerContext:
    """Starts processes that have torch already: they are forked from one that has only imported it.

    All tests share that one process, so that it has what any of them needs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@dataclass(frozen=True)
class Job:
    """A call: the function by file, module and qualified name, and its pickled arguments."""

    path: str
    module: str
    name: str
    arguments: bytes

    @classmethod
    def of(cls, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Job:
        if not isinstance(function, FunctionType) or "<" in function.__qualname__:
            raise TypeError(f"a pool runs functions of a module, by their name; got {function!r}.")
        path = _file_of(sys.modules[function.__module__])
        return cls(path, function.__module__, function.__qualname__, pickle.dumps(arguments))

    def function(self) -> Callable[..., Any]:
        """The function itself, from its file."""
        module = sys.modules.get(self.module)
        if module is None or _file_of(module) != self.path:
            spec = importlib.util.spec_from_file_location(self.module, self.path)
            assert spec is not None and spec.loader is not None
            # Registered before it runs, as pickled arguments and dataclasses look their module up.
            module = sys.modules[self.module] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[self.module]
                raise
        found: Any = module
        for part in self.name.split("."):
            found = getattr(found, part)
        return found


@dataclass(frozen=True)
class Worker:
    """One rank, seen from the tests."""

    process: BaseProcess
    pipe: Connection


class Ranks:
    """`world` processes that run functions together; they start with the first call."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._workers: list[Worker] = []
        self._store: dist.TCPStore | None = None

    @property
    def pids(self) -> list[int | None]:
        """The processes that are up."""
        return [w.process.pid for w in self._workers]

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
        """What `function(rank, world, *arguments)` returns on each rank.

        Args:
            function: of a module; found there by its name.
            arguments: anything that can be pickled, as what the function returns.
            timeout: seconds until the pool is given up.

        Raises:
            RankError: it raised on some rank, a rank died, or the time is over.
        """
        job = Job.of(function, arguments)
        if not all(w.process.is_alive() for w in self._workers):
            self.close()
        if not self._workers:
            self._start()
        return self._ask(f"{job.module}.{job.name}", [job] * self.world, timeout)

    def close(self) -> None:
        """End the processes, whatever they do."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.pipe.close()
            worker.process.close()
        self._store = None

    def _start(self) -> None:
        # Hosted here, so that nobody has to guess a free port.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = forkserver()
        for rank in range(self.world):
            pipe, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, self.world, self._store.port, theirs), name=f"rank {rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append(Worker(process, pipe))
        self._ask("start", [], START_TIMEOUT)

    def _ask(self, what: str, jobs: list[Job], timeout: float) -> list[Any]:
        """Send the jobs and wait for all answers, in order of rank."""
        try:
            for worker, job in zip(self._workers, jobs, strict=False):
                worker.pipe.send(job)
            return self._collect(what, timeout)
        except BaseException:
            self.close()
            raise

    def _collect(self, what: str, timeout: float) -> list[Any]:
        waiting = {worker.pipe: rank for rank, worker in enumerate(self._workers)}
        answers: dict[int, bytes] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    failure, answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    process = self._workers[rank].process
                    process.join()
                    failure = f"died with exit code {process.exitcode}."
                if failure:
                    failures.append(f"{what}, rank {rank}: {failure}")
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            raise RankError("\n".join(failures))
        if waiting:
            late = ", ".join(f"rank {rank}" for rank in waiting.values())
            raise RankError(f"{what}: {late} did not end within {timeout:g} s; the pool was killed.")
        return [pickle.loads(answers[rank]) for rank in range(self.world)]


def serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    """The life of one process: a job, an answer, until the tests are gone."""
    # An interrupt from the keyboard goes to the tests, and these kill the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    # Long, since the tests give up earlier.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=30))
    pipe.send(("", pickle.dumps(None)))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(job, rank, world))


def _answer(job: Job, rank: int, world: int) -> tuple[str, bytes]:
    """The traceback, if the call failed, and its pickled value."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", module=r"torch\.(distributed|nn\.parallel)(\.|$)")
            value = job.function()(rank, world, *pickle.loads(job.arguments))
            dist.barrier()
        return "", pickle.dumps(value)
    except BaseException:
        return "\n" + traceback.format_exc(), b""


def _file_of(module: ModuleType) -> str:
    return str(Path(module.__file__ or "").resolve())


def end_with_parent() -> None:
    """Wait for the tests' process to end, and end too; a rank that hangs in a collective would outlive it otherwise."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
