"""What workers are told, and the queue that it comes from."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from flatmin.study.code import code_of
from flatmin.study.store import Run


@dataclass(frozen=True)
class Busy:
    """Another process works on the run."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker is told.

    Args:
        run: to be done.
        code: the digest of the code that the study was planned with, see `flatmin.study.code.code_of`.
        wait: while another process works on the run, wait for it.
    """

    run: Run
    code: str
    wait: bool = True

    @classmethod
    def of(cls, run: Run) -> Order:
        """Of a run, with the code that is here.

        Raises:
            ValueError: a module of the run's cannot be found.
        """
        return cls(run=run, code=code_of(run.config))


class Queue:
    """The runs of a study that are not under way, in order.

    One that another process works on is put off until all others have been begun, and only then waited for: so two
    calls on one store share the work.

    Args:
        runs: with different names.

    Raises:
        ValueError: a module of a run's cannot be found.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self._waiting = deque(dataclasses.replace(Order.of(run), wait=False) for run in runs)

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> Order:
        """The next one."""
        return self._waiting.popleft()

    def again(self, order: Order) -> None:
        """One that was lost is next."""
        self._waiting.appendleft(order)

    def put_off(self, order: Order) -> None:
        """One that another process works on is last."""
        self._waiting.append(dataclasses.replace(order, wait=True))
