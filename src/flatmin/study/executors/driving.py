"""The loop around an engine that does runs elsewhere: hand over, look, take up again what was lost, call off."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from flatmin.study.executors.base import Outcome, Teller
from flatmin.study.executors.orders import Busy, Order, Queue
from flatmin.study.executors.signals import ctrl_c_later
from flatmin.study.store import Run, Store
from flatmin.train.folder import RunFolder
from flatmin.train.lock import in_use

Job = TypeVar("Job")
_IDLE = 0.5  # seconds between looks where all that is left is done by others


@dataclass(frozen=True)
class Lost:
    """A job that ended without an outcome.

    Args:
        how: what happened, e.g. "was on a node that died".
    """

    how: str


class Engine(Protocol[Job]):
    """A scheduler that exists already. Its jobs call `flatmin.study.executors.performing.work`."""

    def submit(self, order: Order, store: Store) -> Job:
        """Hand over a run."""
        ...

    def look(self, job: Job) -> Outcome | Busy | Lost | None:
        """How a job ended; None while it has not."""
        ...

    def cancel(self, job: Job) -> None:
        """Call off a job, also one that has ended meanwhile."""
        ...


def drive(
    engine: Engine[Job], runs: Sequence[Run], store: Store, *, workers: int, pause: float, teller: Teller
) -> None:
    """Do all runs; what is under way is called off when an exception passes through.

    Args:
        engine: does them.
        runs: in this order.
        store: where they are kept; this process must see it too.
        workers: jobs at a time.
        pause: seconds between looks.
        teller: told of epochs and ends.
    """
    waiting = Queue(runs)
    busy: dict[str, tuple[Order, Job]] = {}
    sizes: dict[str, int] = {}
    try:
        while waiting or busy:
            for _ in range(len(waiting)):
                if len(busy) == workers:
                    break
                order = waiting.take()
                if order.wait and in_use(store.folder(order.run)):
                    waiting.put_off(order)  # a job that waits would keep its node from others
                    continue
                order = dataclasses.replace(order, wait=False)
                with ctrl_c_later():  # else a job could be handed over and nobody know of it
                    busy[order.run.name] = (order, engine.submit(order, store))
            for order, job in list(busy.values()):
                found = engine.look(job)
                _tell_epochs(order.run, store, teller, sizes)
                if found is None:
                    continue
                del busy[order.run.name]
                if isinstance(found, Outcome):
                    teller.end(order.run, found)
                elif isinstance(found, Busy):
                    waiting.put_off(order)
                else:
                    engine.cancel(job)  # it may be queued again by its own scheduler
                    if teller.lost(order.run, found.how):
                        waiting.again(order)
            if busy or waiting:
                time.sleep(pause if busy else max(pause, _IDLE))
    finally:
        for _, job in busy.values():
            engine.cancel(job)


def _tell_epochs(run: Run, store: Store, teller: Teller, sizes: dict[str, int]) -> None:
    """Tell of the lines that a run has written; `sizes` are those of its file at the last look."""
    folder = RunFolder(store.folder(run))
    try:
        size = (folder.path / "metrics.jsonl").stat().st_size
        if size == sizes.get(run.name):
            return
        lines = folder.lines()
    except (OSError, ValueError):  # not there yet, or being written
        return
    sizes[run.name] = size
    for line in lines:
        teller.epoch(run, line)
