"""Finished runs read back: configuration, data and trained model."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.data.base import Data
from flatmin.train.config import RunConfig
from flatmin.train.files import reason
from flatmin.train.folder import WEIGHTS, RunFolder
from flatmin.train.inputs import Inputs
from flatmin.train.sources import build_model, load_data


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A trained net with what it takes to build it again.

    Args:
        name: of the run.
        label: the arm that it belongs to.
        config: what it was trained with.
        weights: file of the trained weights.
        known: what the model takes, if the run has written it down.
    """

    name: str
    label: str
    config: RunConfig
    weights: Path
    known: Inputs | None = None

    @property
    def here(self) -> RunConfig:
        """The configuration as it is on the CPU, wherever the run was."""
        return dataclasses.replace(self.config, device="cpu", graph=False)

    def data(self) -> Data:
        """The data that it was trained on, wrong labels included, on the CPU.

        Raises:
            ValueError, ModuleNotFoundError: see `load_data`.
        """
        return load_data(self.here)

    def inputs(self) -> Inputs:
        """What the model takes and answers; read off the data where the run has not written it down."""
        return self.known or Inputs.of(self.data())

    def transform(self, x: Tensor) -> Tensor:
        """Samples as the model takes them; see `flatmin.train.inputs.Inputs.transform`."""
        return self.inputs().transform(x)

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
            data: the run's own, if it is at hand. Default: not needed, except by runs of an earlier version.

        Raises:
            ValueError: no weights, or weights that do not fit the model.
        """
        self.check()
        model = build_model(self.here, self.inputs() if data is None else data)
        load_weights(model, self.weights)
        return model


def load(run: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> nn.Module:
    """The trained model of a finished run, ready to be asked: in eval mode, with the weights that the run chose.

    It takes what it was trained on. Where the data were images of bytes, that is floats normalised with the statistics
    of the training part, which `flatmin.train.saved.open_run(run).transform(x)` makes of a batch of bytes. The data
    themselves are not needed; a run of flatmin 0.1 before `data.json` has to read them once.

    Args:
        run: its folder.
        device: where the model is to be.

    Returns:
        The module that the run trained, with its parameters as trainable as they were; outputs are logits.

    Raises:
        ValueError: no run, one that is not finished or failed, one without weights, or weights that do not fit.

    Example:
        >>> model = flatmin.load("flatmin-runs/runs/mine")                       # doctest: +SKIP
        >>> logits = model(open_run("flatmin-runs/runs/mine").transform(images)) # doctest: +SKIP
    """
    return open_run(run).model().to(device).eval()


def open_run(folder: str | os.PathLike[str]) -> SavedRun:
    """A finished run by its folder.

    Raises:
        ValueError: no run, one that is not finished, or one that failed.
    """
    path = Path(folder)
    run = RunFolder(path)
    if not run.begun:
        raise ValueError(f"{path} is not a run: there is no config.json in it (runs are in FOLDER/runs).")
    config, labels = run.config()
    try:
        failure = dict(json.loads((path / "result.json").read_text(encoding="utf-8"))).get("failure")
    except FileNotFoundError:
        raise ValueError(f"the run in {path} is not finished: there is no result.json in it.") from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"the run in {path} cannot be read: {reason(error)}.") from error
    if failure:
        raise ValueError(f"the run in {path} failed: {failure}.")
    name = path.resolve().name
    label = labels.get("label", name)
    return SavedRun(name=name, label=label, config=config, weights=path / WEIGHTS, known=run.inputs())


def load_weights(model: nn.Module, path: Path) -> None:
    """Read a state dict, or a checkpoint that holds one under "state_dict" or "model", into a model.

    Raises:
        ValueError: a file that is no such checkpoint, or weights that do not fit the model.
    """
    try:
        model.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit the model: {' '.join(str(error).split())}") from error


def read_weights(path: Path) -> dict[str, Any]:
    """The state dict in a file, at its top or under "state_dict" or "model", on the CPU.

    Raises:
        ValueError: a file that holds none.
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
    return dict(state)
