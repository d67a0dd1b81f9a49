"""Execute runs as tasks of a Ray cluster: an existing one, or a temporary one on this machine."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray import exceptions

from flatmin.study.executors.loop import Busy, Reporter, Task, run_all
from flatmin.study.executors.settings import RaySettings
from flatmin.study.executors.worker import run_quietly
from flatmin.study.pool import Lost
from flatmin.study.store import Run, RunOutcome, Store

_MOMENT = 0.1  # seconds between reports of epochs
_NODES = 5.0  # seconds between checks for live nodes


class Ray(RaySettings):
    """Executes runs as tasks of a Ray cluster.

    The store must be a folder that all nodes see under the same path. flatmin, the user's modules and the data must be
    available on all nodes. Ray's usage statistics are turned off.
    """

    def run(self, runs: Sequence[Run], store: Store, *, workers: int, reporter: Reporter) -> None:
        """See `flatmin.study.executors.Executor`.

        Raises:
            ValueError: there is no such cluster, no node has enough CPUs or GPUs for a run, or all nodes were lost.
        """
        mine = not ray.is_initialized()
        if mine:
            self._connect(workers)
        try:
            self._check(runs)
            run_all(_Scheduler(self), runs, store.absolute(), workers=workers, reporter=reporter)
        finally:
            if mine:
                ray.shutdown()

    def _check(self, runs: Sequence[Run]) -> None:
        """Raise ValueError for runs that no node can execute, which would wait forever.

        Raises:
            ValueError: no node has enough CPUs or GPUs.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for run in runs:
            needs = {"CPU": self.cpus, "GPU": self.gpus_of(run)}
            if not any(all(node.get(kind, 0.0) >= need for kind, need in needs.items()) for node in nodes):
                raise ValueError(
                    f"no node of the Ray cluster has {self.cpus:g} CPUs and {self.gpus_of(run):g} GPUs, which "
                    f"{run.name} needs; set cpus and gpus, or device=cpu."
                )

    def gpus_of(self, run: Run) -> float:
        """Number of GPUs of a run."""
        return float(run.config.device == "cuda") if self.gpus is None else self.gpus

    def _connect(self, workers: int) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        shared: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if self.address is not None:
            try:
                ray.init(address=self.address, **shared)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"there is no Ray cluster at {self.address!r}: {' '.join(str(error).split())}"
                ) from error
            return
        ray.init(address="local", num_cpus=max(1, math.ceil(workers * self.cpus)), include_dashboard=False, **shared)


EXECUTOR = Ray


class _Scheduler:
    """Submits Ray tasks without Ray's own retries, because `Reporter.lost` counts retries."""

    def __init__(self, settings: Ray) -> None:
        self._settings, self._remote = settings, ray.remote(run_quietly)
        self._looked = time.monotonic()

    def submit(self, task: Task, store: Store) -> Any:
        remote = self._remote.options(
            num_cpus=self._settings.cpus,
            num_gpus=self._settings.gpus_of(task.run),
            max_retries=0,
            name=task.run.name,
        )
        return remote.remote(task, store)

    def poll(self, job: Any) -> RunOutcome | Busy | Lost | None:
        if not ray.wait([job], timeout=0)[0]:
            return None
        try:
            outcome: RunOutcome | Busy = ray.get(job)
        except exceptions.RayTaskError as error:  # raised before the run, whose own errors become an outcome
            return RunOutcome(error=f"it could not be started on its node: {_first_line(error.cause or error)}")
        except exceptions.RayError as error:
            return Lost(f"ended with {type(error).__name__}: {_first_line(error)}")
        return outcome

    def wait(self, jobs: Collection[Any]) -> None:
        """See `Scheduler.wait`. Also checks that a node is left, because Ray waits forever for lost nodes.

        Raises:
            ValueError: no node is left.
        """
        ray.wait(list(jobs), timeout=_MOMENT)
        if time.monotonic() - self._looked < _NODES:
            return
        self._looked = time.monotonic()
        if not any(node["Alive"] for node in ray.nodes()):
            raise ValueError(
                "the Ray cluster has lost all its nodes (a node that is too busy to answer counts as lost). Finished "
                "runs are kept; the same command continues from there."
            )

    def cancel(self, job: Any) -> None:
        ray.cancel(job, force=True)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
