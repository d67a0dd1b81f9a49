"""`flatmin doctor`: show installed packages and devices, and how to install missing packages."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import typer

from flatmin.cli.console import LEAST_WIDTH, PIPE_WIDTH
from flatmin.report.terminal import lay_out
from flatmin.words import install

OLDEST_TORCH = (2, 6)


@dataclass(frozen=True)
class Extra:
    """An optional dependency: the name of the extra, the package that it installs, and its purpose."""

    name: str
    distribution: str
    purpose: str


EXTRAS = (
    Extra("digits", "scikit-learn", "the handwritten digits, the default data of `flatmin compare`"),
    Extra("report", "plotly", "HTML pages of `flatmin compare`, `study`, `measure` and `show`"),
    Extra("plot", "matplotlib", "figures of `flatmin theory`, and figures as files for papers (--figures)"),
    Extra("safetensors", "safetensors", "`flatmin export RUN FILE.safetensors`"),
    Extra("vision", "timm", "models of timm and torchvision; data in image files (for these, Pillow is enough)"),
    Extra("lightning", "lightning", "use in Lightning: flatmin.integrations.lightning"),
    Extra("hf", "transformers", "use in Transformers and Accelerate: flatmin.integrations.hf"),
    Extra("skorch", "skorch", "use in skorch; see docs/loops/skorch.md"),
    Extra("tensorboard", "tensorboard", "log `flatmin train` to TensorBoard"),
    Extra("wandb", "wandb", "log `flatmin train` to Weights & Biases"),
    Extra("mlflow", "mlflow-skinny", "log `flatmin train` to MLflow"),
    Extra("trackio", "trackio", "log `flatmin train` to Trackio"),
    Extra("search", "optuna", "search settings with `flatmin search`"),
    Extra("ray", "ray", "run `flatmin study` on a Ray cluster"),
    Extra("slurm", "submitit", "run `flatmin study` as Slurm jobs"),
)
CORE = ("torch", "numpy", "typer", "rich")


def installed(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def doctor() -> None:
    """Check the installation: print versions and devices, and how to install missing packages.

    The exit code is 1 if a required package is missing or too old.

    Examples:
        flatmin doctor
        flatmin doctor > doctor.txt
    """
    problems: list[str] = []
    versions = [
        ["flatmin", installed("flatmin") or "not installed; run from its source code"],
        ["python", f"{platform.python_version()} ({sys.executable})"],
        ["platform", platform.platform()],
    ]
    for name in CORE:
        versions.append([name, installed(name) or "MISSING"])
        if installed(name) is None:
            problems.append(f"{name} is missing; run: pip install {name}")
    _show("Versions", versions)
    devices, troubles = _devices()
    problems += troubles
    _show("Devices", devices)
    missing, extras = [], []
    for extra in EXTRAS:
        installed_version = installed(extra.distribution)
        extras.append([extra.name, f"{extra.distribution} {installed_version or '(missing)'}", extra.purpose])
        if installed_version is None:
            missing.append(f"{extra.name} is not installed; to install it: {install(extra.name)}")
    _show("Extras", extras)
    for line in problems + missing:
        typer.echo(f"- {line}")
    if not problems and not missing:
        typer.echo("Nothing is missing.")
    if problems:
        raise typer.Exit(1)


def _show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a table without rich, which may be missing."""
    width = max(LEAST_WIDTH, shutil.get_terminal_size((PIPE_WIDTH, 24)).columns)
    lines = lay_out(rows, width=width - 2, encoding=getattr(sys.stdout, "encoding", None) or "utf-8", header=False)
    typer.echo("\n".join([title, *(f"  {line}".rstrip() for line, _ in lines), ""]))


def _devices() -> tuple[list[list[str]], list[str]]:
    """The devices of torch, and problems with their solutions."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [["none", "torch cannot be imported"]], [
            f"torch cannot be imported ({error}); reinstall it: pip install --force-reinstall torch"
        ]
    rows = [["cpu", f"{torch.get_num_threads()} threads for torch"]]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            rows.append([f"cuda:{i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"])
    elif torch.version.cuda is None and torch.version.hip is None:
        rows.append(["cuda", "not available: this torch is built for the CPU only"])
    else:
        rows.append(["cuda", f"no GPU found; this torch is built for {torch.version.cuda or torch.version.hip}"])
    if torch.backends.mps.is_available():
        rows.append(["mps", "available"])
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        return rows, [f"torch {torch.__version__} is too old; run: pip install 'torch>={wanted}'"]
    return rows, []
