"""The tasks of workers and their queue."""

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
class Task:
    """A run for a worker.

    Args:
        run: to execute.
        code: the digest of the code that the study was planned with, see `flatmin.study.code.code_of`.
        wait: while another process works on the run, wait for it.
    """

    run: Run
    code: str
    wait: bool = True

    @classmethod
    def of(cls, run: Run) -> Task:
        """The task of a run, with the digest of the code of this process.

        Raises:
            ValueError: a module of the run's cannot be found.
        """
        return cls(run=run, code=code_of(run.config))


class TaskQueue:
    """The runs of a study that have not started, in order.

    A run that another process works on is postponed until all others have started, and only then waited for. So two
    calls on one store share the work.

    Args:
        runs: with different names.

    Raises:
        ValueError: a module of a run's cannot be found.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self._waiting = deque(dataclasses.replace(Task.of(run), wait=False) for run in runs)

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> Task:
        """Take the next task."""
        return self._waiting.popleft()

    def retry(self, task: Task) -> None:
        """Retry a lost task next."""
        self._waiting.appendleft(task)

    def postpone(self, task: Task) -> None:
        """Move a task that another process works on to the end."""
        self._waiting.append(dataclasses.replace(task, wait=True))
