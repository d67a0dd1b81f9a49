"""Settings of the executors, which can be read without their packages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from flatmin.train.keys import OneOf, Range, check


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """Settings of the local executor; there are none."""


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """Settings of the executor for Ray.

    Args:
        address: address of the cluster, as for `ray.init` ("auto", "ray://head:10001"). Default: a temporary cluster
            on this machine with one CPU for each worker. If the program is already connected to a cluster, that one is
            used.
        cpus: CPUs of each run. A run computes with one thread; further CPUs are for processes that read image files.
        gpus: GPUs of each run. Default: one if the run uses a GPU.

    Raises:
        ValueError: a number out of range.
    """

    address: str | None = None
    cpus: Annotated[float, Range(0, open_low=True)] = 1.0
    gpus: Annotated[float | None, Range(0)] = None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """Settings of the executor for Slurm.

    Args:
        cluster: slurm, or one of submitit's substitutes for tests: local (processes of this machine, which continue
            when this one ends) or debug (in this process).
        timeout_min: time limit of a job in minutes.
        requeues: how often a job that reaches its time limit is queued again.
        mem_gb: memory of each job in GB.
        cpus_per_task: CPUs of each job. A run computes with one thread; further CPUs are for processes that read image
            files.
        gpus_per_node: GPUs of each job.
        partition, account, qos, constraint, exclude, nodelist, gres, comment: options of sbatch of the same name.
        setup: shell commands to execute before the run, such as "module load cuda".
        extra: further options of sbatch without the dashes, each as extra.NAME=value.

    Raises:
        ValueError: a number out of range or an unknown cluster.
    """

    cluster: Annotated[str, OneOf(("slurm", "local", "debug"))] = "slurm"
    timeout_min: Annotated[int, Range(1)] = 60
    requeues: Annotated[int, Range(0)] = 50
    mem_gb: Annotated[float | None, Range(0)] = None
    cpus_per_task: Annotated[int, Range(1)] = 1
    gpus_per_node: Annotated[int | None, Range(0)] = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    gres: str | None = None
    comment: str | None = None
    setup: tuple[str, ...] = ()
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)


SETTINGS: dict[str, type] = {"local": LocalSettings, "ray": RaySettings, "slurm": SlurmSettings}
