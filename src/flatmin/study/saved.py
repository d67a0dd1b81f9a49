"""Finished runs read back: configuration, data and trained model."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatmin.data.base import Data
from flatmin.study.store import WEIGHTS, reason
from flatmin.train.config import RunConfig
from flatmin.train.settings import fill
from flatmin.train.sources import build_model, load_data


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A trained net with what it takes to build it again.

    Args:
        name: of the run.
        label: the arm that it belongs to.
        config: what it was trained with.
        weights: file of the trained weights.
    """

    name: str
    label: str
    config: RunConfig
    weights: Path

    def data(self) -> Data:
        """The data that it was trained on, wrong labels included, on the CPU.

        Raises:
            ValueError, ModuleNotFoundError: see `load_data`.
        """
        return load_data(dataclasses.replace(self.config, device="cpu"))

    def check(self) -> None:
        """Raise ValueError unless there are weights."""
        if not self.weights.is_file():
            raise ValueError(
                f"{self.weights.parent} holds no weights ({self.weights.name}); runs keep them unless weights=false, "
                "and runs of an earlier version have none: remove the folder and do the run again."
            )

    def model(self, data: Data | None = None) -> nn.Module:
        """The trained model on the CPU, in training mode as it was left.

        Args:
            data: the run's own, if it is at hand.

        Raises:
            ValueError: no weights, or weights that do not fit the model.
        """
        self.check()
        config = dataclasses.replace(self.config, device="cpu")
        model = build_model(config, self.data() if data is None else data)
        load_weights(model, self.weights)
        return model


def open_run(folder: str | os.PathLike[str]) -> SavedRun:
    """A finished run by its folder.

    Raises:
        ValueError: no run, one that is not finished, or one that failed.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a run: there is no config.json in it (runs are in FOLDER/runs).")
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
        label = str(found["label"])
        known = {f.name for f in dataclasses.fields(RunConfig)}
        config = fill(RunConfig, {k: v for k, v in found.items() if k in known}, origin=str(path / "config.json"))
        failure = dict(json.loads((path / "result.json").read_text(encoding="utf-8"))).get("failure")
    except FileNotFoundError:
        raise ValueError(f"the run in {path} is not finished: there is no result.json in it.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the run in {path} cannot be read: {reason(error)}.") from error
    if failure:
        raise ValueError(f"the run in {path} failed: {failure}.")
    return SavedRun(name=path.name, label=label, config=config, weights=path / WEIGHTS)


def load_weights(model: nn.Module, path: Path) -> None:
    """Read a state dict, or a checkpoint that holds one under "state_dict" or "model", into a model.

    Raises:
        ValueError: a file that is no such checkpoint, or weights that do not fit the model.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}.") from None
    except Exception as error:
        # torch's own advice, to load without weights_only, would run whatever the file holds.
        raise ValueError(f"{path} is no state dict that torch.save wrote, or it holds more than tensors.") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    # Modules may add state of any kind under a name of their own.
    good = isinstance(state, dict) and all(
        isinstance(k, str) and (isinstance(t, torch.Tensor) or k.endswith("_extra_state")) for k, t in state.items()
    )
    if not good:
        raise ValueError(f'{path} holds no state dict, at its top or under "state_dict" or "model".')
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit the model: {' '.join(str(error).split())}") from error
