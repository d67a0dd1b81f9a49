"""Execute runs as Slurm jobs, with submitit."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.helpers import DelayedSubmission

from flatmin.study.executors.loop import Busy, Reporter, Task, run_all
from flatmin.study.executors.settings import SlurmSettings
from flatmin.study.executors.worker import run_quietly
from flatmin.study.pool import Lost
from flatmin.study.store import Run, RunOutcome, Store

_PAUSE = {"slurm": 2.0, "local": 0.1, "debug": 0.0}  # seconds between polls
_SLURM_ONLY = ("partition", "account", "qos", "constraint", "exclude", "nodelist", "gres", "comment")


class Slurm(SlurmSettings):
    """Executes runs as Slurm jobs, one for each run.

    The store must be a folder that all nodes see under the same path. A job that is preempted, or that reaches its time
    limit, is queued again and continues from the run's last checkpoint. Measuring a network starts over in that case,
    so the limit must be longer than a measurement takes. Logs are in FOLDER/slurm.
    """

    def run(self, runs: Sequence[Run], store: Store, *, workers: int, reporter: Reporter) -> None:
        """See `flatmin.study.executors.Executor`.

        Raises:
            ValueError: there is no Slurm on this machine, or Slurm does not accept the settings.
        """
        there = store.absolute()
        run_all(_Scheduler(self, there.out / "slurm"), runs, there, workers=workers, reporter=reporter)

    def parameters(self) -> dict[str, Any]:
        """The settings as arguments of `submitit.AutoExecutor.update_parameters`."""
        plain = ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")
        parameters = {name: getattr(self, name) for name in plain}
        parameters |= {f"slurm_{name}": getattr(self, name) for name in _SLURM_ONLY}
        if self.setup:
            parameters |= {"slurm_setup": list(self.setup), "local_setup": list(self.setup)}
        if self.extra:
            parameters["slurm_additional_parameters"] = dict(self.extra)
        return {name: value for name, value in parameters.items() if value is not None}


EXECUTOR = Slurm


class _Scheduler:
    """Submits submitit jobs."""

    def __init__(self, settings: Slurm, logs: Path) -> None:
        self._settings = settings
        try:
            self._executor = submitit.AutoExecutor(
                logs,
                cluster=settings.cluster,
                slurm_max_num_timeout=settings.requeues,
                local_max_num_timeout=settings.requeues,
            )
            self._executor.update_parameters(**settings.parameters())
        except (RuntimeError, NameError, AssertionError) as error:
            raise ValueError(f"executor slurm: {' '.join(str(error).split())}") from error

    def submit(self, task: Task, store: Store) -> Any:
        self._executor.update_parameters(name=task.run.name)
        try:
            return self._executor.submit(_Work(), task, store)
        except FailedJobError as error:
            raise ValueError(f"executor slurm: {' '.join(str(error).split())}") from error

    def poll(self, job: Any) -> RunOutcome | Busy | Lost | None:
        try:
            if not job.done():
                return None
            if self._settings.cluster == "local" and not job.paths.result_pickle.exists():
                return self._lost(job)  # submitit would wait for the file to appear
            outcome: RunOutcome | Busy = job.result()
        except FailedJobError as error:  # raised before the run, whose own errors become an outcome
            lines = [line for line in str(error).splitlines() if line.strip(" -")]
            why = next((line for line in reversed(lines) if "Error" in line), "no reason given").strip()
            return RunOutcome(error=f"it could not be started: {why}; its log is {job.paths.stderr}")
        except UncompletedJobError:
            return self._lost(job)
        return outcome

    def wait(self, jobs: Collection[Any]) -> None:
        time.sleep(_PAUSE[self._settings.cluster])

    def cancel(self, job: Any) -> None:
        job.cancel(check=False)

    @staticmethod
    def _lost(job: Any) -> Lost:
        return Lost(f"(job {job.job_id}) ended as {job.state.lower()}; its log is {job.paths.stderr}")


class _Work:
    """The function of a job. The method `checkpoint` makes it checkpointable in the sense of submitit."""

    def __call__(self, task: Task, store: Store) -> RunOutcome | Busy:
        return run_quietly(task, store)

    def checkpoint(self, task: Task, store: Store) -> DelayedSubmission:
        """The job to queue after preemption or at the time limit: the same, because the run folder has the state."""
        return DelayedSubmission(self, task, store)
