"""Executors of the runs of a study: local processes, a Ray cluster, or Slurm jobs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from flatmin.study.executors.loop import OnEvent, Reporter
from flatmin.study.executors.settings import SETTINGS
from flatmin.study.store import Run, RunOutcome, Store, finished_and_missing
from flatmin.train.settings import fill, read_table
from flatmin.words import install, suggest

__all__ = [
    "EXECUTORS",
    "Executor",
    "OnEvent",
    "RunOutcome",
    "StudyInterrupted",
    "execute",
    "executor_settings",
    "finished_and_missing",
    "make_executor",
]

# The optional package that each executor needs.
EXECUTORS = {"local": None, "ray": "ray", "slurm": "submitit"}


class Executor(Protocol):
    """Settings of a scheduler, with a method that executes runs on it."""

    def run(self, runs: Sequence[Run], store: Store, *, workers: int, reporter: Reporter) -> None:
        """Execute all runs. An exception stops the runs in progress.

        Args:
            runs: at least one run.
            store: where they are stored.
            workers: number of runs at a time.
            reporter: receives epochs and outcomes.
        """
        ...


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C during a study. The message says what is stored and how to continue."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(
            f"Interrupted: {done} of {total} runs are finished and kept; the same command continues from there."
        )


def make_executor(name: str, settings: Mapping[str, Any] | None = None) -> Executor:
    """Create an executor; nothing starts before its `run`.

    Args:
        name: one of `EXECUTORS`.
        settings: fields of the executor's class in `flatmin.study.executors.settings`.

    Raises:
        ValueError: an unknown name or setting.
        ModuleNotFoundError: the executor's package is not installed.
    """
    if name not in EXECUTORS:
        raise ValueError(f"unknown executor {name!r}{suggest(name, EXECUTORS)} (executors: {', '.join(EXECUTORS)})")
    package = EXECUTORS[name]
    if package is not None and importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"the executor {name} needs {package}: {install(name)}.")
    made: Executor = fill(
        importlib.import_module(f"flatmin.study.executors.{name}").EXECUTOR, settings or {}, origin=f"executor {name}"
    )
    return made


def executor_settings(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Settings of an executor from `key=value` overrides.

    Raises:
        ValueError: an unknown executor or setting, or a value of the wrong type.
        ModuleNotFoundError: the executor's package is not installed.
    """
    make_executor(name)
    settings = read_table(SETTINGS[name], overrides, unknown=f"the executor {name} has no setting")
    make_executor(name, settings)
    return settings


def execute(
    runs: Sequence[Run],
    store: Store,
    *,
    workers: int,
    on_event: OnEvent,
    executor: str = "local",
    settings: Mapping[str, Any] | None = None,
) -> dict[str, RunOutcome]:
    """Execute all runs, in the given order as workers become free.

    If the worker of a run is lost, another worker resumes the run from its last checkpoint, at most twice. A run that
    an earlier call left unfinished is resumed too. Several calls may work on the same store: a run that another call
    has finished in the meantime is not repeated.

    Args:
        runs: runs with different names.
        store: where they are stored.
        workers: number of concurrent runs, each with one thread. Local workers are spawned processes, so a script that
            calls this needs `if __name__ == "__main__":`. With 0, which only the local executor accepts, all runs are
            executed in this process with one thread.
        on_event: called in this process with `EpochDone`, `RunDone`, `RunBroke` and `Warned`.
        executor: one of `EXECUTORS`. Default: processes on this machine.
        settings: settings of the executor, see `make_executor`.

    Returns:
        The outcome of every run by its name.

    Raises:
        StudyInterrupted: on Ctrl-C, after the runs in progress have been stopped.
        ValueError, ModuleNotFoundError: see `make_executor`; or an invalid number of workers.
    """
    chosen = make_executor(executor, settings)
    if workers < 0 or (workers == 0 and executor != "local"):
        raise ValueError(f"the executor {executor} needs at least one worker, got workers={workers}.")
    outcomes: dict[str, RunOutcome] = {}
    try:
        if runs:
            chosen.run(runs, store, workers=workers, reporter=Reporter(store, on_event, outcomes))
    except KeyboardInterrupt:
        done = sum(store.find(run, lambda text: None) is not None for run in runs)
        raise StudyInterrupted(done, len(runs)) from None
    return outcomes
