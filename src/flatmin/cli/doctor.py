"""`flatmin doctor`: installed packages, devices, and how to install missing packages."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import typer

OLDEST_TORCH = (2, 6)


@dataclass(frozen=True)
class Extra:
    """An optional dependency: the name of the extra, the distribution that it installs, and its purpose."""

    name: str
    distribution: str
    purpose: str


EXTRAS = (
    Extra("digits", "scikit-learn", "the handwritten digits that `flatmin compare` trains on by default"),
    Extra("report", "plotly", "the HTML pages of `flatmin compare`, `study`, `measure` and `show`"),
    Extra(
        "plot",
        "matplotlib",
        "figures of landscapes and spectra (flatmin.report.figures.static) and of `flatmin theory`",
    ),
    Extra("safetensors", "safetensors", "`flatmin export RUN FILE.safetensors`"),
    Extra("vision", "timm", "models of timm and torchvision; class folders of images, which need Pillow alone"),
    Extra("lightning", "lightning", "flatmin.integrations.lightning"),
    Extra("hf", "transformers", "flatmin.integrations.hf, and Accelerate"),
    Extra("skorch", "skorch", "skorch nets; see docs/frameworks.md"),
    Extra("tensorboard", "tensorboard", "TensorBoard files of `flatmin train`"),
    Extra("wandb", "wandb", "runs of `flatmin train` in Weights & Biases"),
    Extra("mlflow", "mlflow-skinny", "runs of `flatmin train` in MLflow"),
    Extra("trackio", "trackio", "runs of `flatmin train` in Trackio"),
    Extra("search", "optuna", "`flatmin search`: settings of a study's arms"),
    Extra("ray", "ray", "runs of `flatmin study` on a Ray cluster"),
    Extra("slurm", "submitit", "runs of `flatmin study` as Slurm jobs"),
)
CORE = ("torch", "numpy", "typer", "rich")


def installed(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def doctor() -> None:
    """Print versions, devices, missing packages and how to install them.

    The exit code is 1 if a required package is missing or too old.

    Examples:
        flatmin doctor
        flatmin doctor > doctor.txt
    """
    problems: list[str] = []
    typer.echo("Versions")
    _line("flatmin", installed("flatmin") or "run from its sources, not installed")
    _line("python", f"{platform.python_version()} ({sys.executable})")
    _line("platform", platform.platform())
    for name in CORE:
        _line(name, installed(name) or "MISSING")
        if installed(name) is None:
            problems.append(f"{name} is missing; run: pip install {name}")
    typer.echo("\nDevices")
    problems += _devices()
    typer.echo("\nExtras")
    missing = []
    for extra in EXTRAS:
        installed_version = installed(extra.distribution)
        state = (
            f"{extra.distribution} {installed_version}" if installed_version else f"{extra.distribution} not installed"
        )
        _line(extra.name, f"{state}: {extra.purpose}")
        if installed_version is None:
            missing.append(f"{extra.name} is not installed; to get it: pip install 'flatmin[{extra.name}]'")
    typer.echo("")
    for line in problems + missing:
        typer.echo(f"- {line}")
    if not problems and not missing:
        typer.echo("Nothing is missing.")
    if problems:
        raise typer.Exit(1)


def _line(name: str, value: str) -> None:
    typer.echo(f"  {name:<13} {value}")


def _devices() -> list[str]:
    """Print the devices of torch; return problems and how to solve them."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [f"torch cannot be imported ({error}); reinstall it: pip install --force-reinstall torch"]
    _line("cpu", f"{torch.get_num_threads()} threads for torch")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            _line(f"cuda:{i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    elif torch.version.cuda is None and torch.version.hip is None:
        _line("cuda", "none: this torch is built for the CPU")
    else:
        _line("cuda", f"none found, although this torch is built for {torch.version.cuda or torch.version.hip}")
    if torch.backends.mps.is_available():
        _line("mps", "available")
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        return [f"torch {torch.__version__} is too old; run: pip install 'torch>={wanted}'"]
    return []
