"""Execute runs in local processes with one thread each, or in this process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from flatmin.study.executors.loop import Busy, Reporter, Task, run_all
from flatmin.study.executors.settings import LocalSettings
from flatmin.study.executors.worker import run_quietly, run_task
from flatmin.study.pool import Pool
from flatmin.study.store import Run, RunOutcome, Store
from flatmin.study.timing import one_thread
from flatmin.train.result import Epoch
from flatmin.train.sources import check_machine


class Local(LocalSettings):
    """Executes runs in local processes, or in this process."""

    def run(self, runs: Sequence[Run], store: Store, *, workers: int, reporter: Reporter) -> None:
        """See `flatmin.study.executors.Executor`. With 0 workers all runs are executed in this process.

        Raises:
            ValueError: this machine does not have the device of a run, or does not support its precision.
        """
        for config in {(run.config.device, run.config.precision): run.config for run in runs}.values():
            check_machine(config)
        if workers:
            with Pool(run_quietly) as pool:
                run_all(pool, runs, store, workers=workers, reporter=reporter)
        else:
            with one_thread():
                run_all(_Here(reporter.epoch), runs, store, workers=1, reporter=reporter)


EXECUTOR = Local


class _Here:
    """A scheduler that executes each run in this process when it is polled."""

    def __init__(self, on_epoch: Callable[[Run, Epoch], None]) -> None:
        self._on_epoch = on_epoch

    def submit(self, task: Task, store: Store) -> tuple[Task, Store]:
        return task, store

    def poll(self, job: tuple[Task, Store]) -> RunOutcome | Busy:
        task, store = job
        return run_task(task, store, lambda line: self._on_epoch(task.run, line))

    def wait(self, jobs: Collection[tuple[Task, Store]]) -> None:
        pass

    def cancel(self, job: tuple[Task, Store]) -> None:
        pass
