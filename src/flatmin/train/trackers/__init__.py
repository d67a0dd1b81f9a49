"""Trackers: log a run to TensorBoard, Weights & Biases, MLflow or Trackio.

All four use `content.scalars` and `content.settings`, so that a number has the same name in each. They write below the
run folder, work without a network, and log only what the run's own files contain as well.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from flatmin.train.trackers.content import scalars, settings
from flatmin.train.trackers.tracker import Safely, Sink, Tracker
from flatmin.words import install, suggest

__all__ = ["TRACKERS", "Safely", "Sink", "Tracker", "make_tracker", "scalars", "settings"]

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")

# The package mlflow-skinny comes without a database, and newer versions of MLflow cannot write plain files.
_NEEDS = {"mlflow": ("mlflow", "sqlalchemy", "alembic")}


def make_tracker(name: str, *, folder: Path, run: str, project: str = "flatmin", resume: bool = False) -> Tracker:
    """Make a tracker for one run. It writes nothing before the event `Began`.

    Args:
        name: one of `TRACKERS`.
        folder: folder of the run. The tracker writes below it, unless an environment variable of its package names
            another place (WANDB_DIR, MLFLOW_TRACKING_URI, TRACKIO_DIR).
        run: name of the run.
        project: name under which the tracker groups runs (in MLflow: the experiment). Default "flatmin".
        resume: continue the tracker's record of an earlier part of this run. Default False.

    Raises:
        ValueError: the name is unknown.
        ModuleNotFoundError: the tracker's package is not installed.
    """
    if name not in TRACKERS:
        raise ValueError(f"unknown tracker {name!r}{suggest(name, TRACKERS)} (trackers: {', '.join(TRACKERS)})")
    missing = [module for module in _NEEDS.get(name, (name,)) if not _installed(module)]
    if missing:
        raise ModuleNotFoundError(
            f"the tracker {name} needs {' and '.join(missing)}, which is not installed; to install it: {install(name)}."
        )
    sink = importlib.import_module(f"flatmin.train.trackers.{name}").SINK
    made: Tracker = sink(folder=Path(folder).absolute(), run=run, project=project, resume=resume)
    return made


def _installed(module: str) -> bool:
    """Whether a module can be imported. A tracker's folder of this name in the working directory does not count."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None
