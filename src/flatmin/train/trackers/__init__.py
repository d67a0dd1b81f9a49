"""Trackers: a run's events in TensorBoard, Weights & Biases, MLflow or Trackio.

All four are fed by `content.scalars` and `content.settings`, so that a number has the same name in each. They write
below the run folder, work without a network, and receive nothing that is not in the run's own files.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from flatmin.train.trackers.content import scalars, settings
from flatmin.train.trackers.tracker import Safely, Sink, Tracker
from flatmin.words import suggest

__all__ = ["TRACKERS", "Safely", "Sink", "Tracker", "make_tracker", "scalars", "settings"]

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")

# MLflow's small package has no database of its own, and its newer versions refuse to write plain files.
_NEEDS = {"mlflow": ("mlflow", "sqlalchemy", "alembic")}


def make_tracker(name: str, *, folder: Path, run: str, project: str = "flatmin", resume: bool = False) -> Tracker:
    """A tracker for one run. Nothing is written before its `Began`.

    Args:
        name: one of `TRACKERS`.
        folder: of the run; everything is written below it, unless the variable of the tracker's package names another
            place (WANDB_DIR, MLFLOW_TRACKING_URI, TRACKIO_DIR).
        run: name of the run.
        project: what runs are collected under; MLflow's experiment. Default "flatmin".
        resume: continue what an earlier part of this run has recorded in the folder. Default False.

    Raises:
        ValueError: an unknown name.
        ModuleNotFoundError: the tracker's package is not installed.
    """
    if name not in TRACKERS:
        raise ValueError(f"unknown tracker {name!r}{suggest(name, TRACKERS)} (trackers: {', '.join(TRACKERS)})")
    missing = [module for module in _NEEDS.get(name, (name,)) if not _installed(module)]
    if missing:
        raise ModuleNotFoundError(f'the tracker {name} needs {" and ".join(missing)}: pip install "flatmin[{name}]".')
    sink = importlib.import_module(f"flatmin.train.trackers.{name}").SINK
    made: Tracker = sink(folder=Path(folder).absolute(), run=run, project=project, resume=resume)
    return made


def _installed(module: str) -> bool:
    """Whether it can be imported; a folder of that name in the working directory (as trackers make them) is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None
