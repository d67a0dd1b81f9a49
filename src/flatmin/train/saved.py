"""Read finished runs: configuration, data and trained model."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.data.dataset import Data
from flatmin.measure.checkpoints import find_weights, misfit, misshapen, state_dicts, unwrapped
from flatmin.train.config import RunConfig
from flatmin.train.files import reason
from flatmin.train.fingerprint import content_of
from flatmin.train.folder import WEIGHTS, RunFolder
from flatmin.train.inputs import Inputs
from flatmin.train.sources import build_model, load_data
from flatmin.words import install


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A trained network, with the information that is needed to build it again.

    Args:
        name: name of the run.
        label: arm of the study that the run belongs to.
        config: configuration of the run.
        weights: file of the trained weights.
        known: description of the model's inputs, if the run recorded it.
        content: digest of the training data, if the run recorded it.
        key: which weights in the file to use, see `weights_for`.
        remarks: what one should know of the weights, as sentences: that they are not those of the last epoch, or that
            the network has not learned.
    """

    name: str
    label: str
    config: RunConfig
    weights: Path
    known: Inputs | None = None
    content: str | None = None
    key: str | None = None
    remarks: tuple[str, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether this is a run of flatmin, with a known method, and not a file of weights."""
        return (self.weights.parent / "config.json").is_file()

    @property
    def here(self) -> RunConfig:
        """The configuration for the CPU, whatever device the run used."""
        return dataclasses.replace(self.config, device="cpu", graph=False)

    def data(self, data_dir: str | None = None) -> Data:
        """The training data of the run, on the CPU; label noise is included.

        Args:
            data_dir: folder of the data. Default: the one in the run's configuration.

        Raises:
            ValueError, ModuleNotFoundError: see `load_data`.

        Warns:
            UserWarning: the data differ from those of the training.
        """
        config = self.here if data_dir is None else dataclasses.replace(self.here, data_dir=data_dir)
        data = load_data(config)
        if self.content is not None:
            content = content_of(config, data)
            if content is not None and content.digest != self.content:
                warnings.warn(
                    f"the data {config.data!r} differ from those that {self.name!r} was trained on; these results are "
                    "for the present data.",
                    stacklevel=2,
                )
        return data

    def inputs(self) -> Inputs:
        """Description of the model's inputs and classes; taken from the data if the run did not record it."""
        return self.known or Inputs.of(self.data())

    def transform(self, x: Tensor) -> Tensor:
        """Convert samples to the form that the model expects; see `flatmin.train.inputs.Inputs.transform`."""
        return self.inputs().transform(x)

    def check(self) -> None:
        """Raise ValueError unless there are weights."""
        if not self.weights.is_file():
            raise ValueError(
                f"{self.weights.parent} has no weights ({self.weights.name} is missing): the run used weights=false or "
                "is of an earlier version. Remove the folder and repeat the run."
            )

    def model(self, data: Data | None = None) -> nn.Module:
        """The trained model, on the CPU and in training mode.

        Args:
            data: the run's own data, if they are already loaded; only runs of an earlier version need them.

        Raises:
            ValueError: there are no weights, or they do not fit the model.
        """
        self.check()
        model = build_model(self.here, self.inputs() if data is None else data)
        load_weights(model, self.weights, key=self.key)
        return model


def load(run: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> nn.Module:
    """Load the trained model of a finished run, in eval mode, with the weights that the run selected.

    The model expects inputs as in training. If the training images were stored as bytes, these are floats normalised
    with the statistics of the training part; `flatmin.train.saved.open_run(run).transform(x)` computes them from a
    batch of bytes. The data set is not needed, except for runs of earlier versions without `data.json`.

    Args:
        run: folder of the run.
        device: device of the model. Default "cpu".

    Returns:
        The trained module; its outputs are logits. `requires_grad` of its parameters is as in training.

    Raises:
        ValueError: the folder has no run, the run is unfinished or failed, or the weights are missing or do not fit.

    Examples:
        >>> model = flatmin.load("flatmin-runs/runs/mine")                       # doctest: +SKIP
        >>> logits = model(open_run("flatmin-runs/runs/mine").transform(images)) # doctest: +SKIP
    """
    return open_run(run).model().to(device).eval()


def open_run(folder: str | os.PathLike[str]) -> SavedRun:
    """Open the folder of a finished run.

    Raises:
        ValueError: the folder has no run, or the run is unfinished or failed.
    """
    path = Path(folder)
    run = RunFolder(path)
    if not run.begun:
        raise ValueError(f"{path} is not a run folder: it has no config.json (runs are in FOLDER/runs).")
    config, labels = run.config()
    try:
        result = dict(json.loads((path / "result.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"the run in {path} is not finished: it has no result.json.") from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"the run in {path} cannot be read: {reason(error)}.") from error
    if failure := result.get("failure"):
        raise ValueError(f"the run in {path} failed: {failure}.")
    name = path.resolve().name
    label = labels.get("label", name)
    return SavedRun(
        name=name,
        label=label,
        config=config,
        weights=path / WEIGHTS,
        known=run.inputs(),
        content=labels.get("content"),
        remarks=_remarks(result),
    )


def _remarks(result: Mapping[str, Any]) -> tuple[str, ...]:
    """See `SavedRun.remarks`; `result` is the content of result.json."""
    remarks = []
    chosen, epochs = result.get("chosen") or {}, result.get("epochs")
    if chosen.get("epoch", epochs) != epochs:
        remarks.append(f"the weights are those of epoch {chosen['epoch']} of {epochs}, the best on validation data")
    if result.get("trained") is False:
        remarks.append("the network has not learned: its training loss is not clearly below chance level")
    return tuple(remarks)


def load_weights(model: nn.Module, path: Path, *, key: str | None = None) -> None:
    """Load weights from a file into a model; see `weights_for`."""
    model = unwrapped(model)
    state = weights_for(model, path, key=key)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit the model: {' '.join(str(error).split())}") from error


def weights_for(model: nn.Module, path: Path, *, key: str | None = None) -> dict[str, Any]:
    """Read the weights of a model from a file, as a state dict with the model's own names, on the CPU.

    The file was written by torch.save or safetensors. It holds a state dict, a whole module, or a dictionary that
    contains state dicts, such as a checkpoint of Lightning or one with the optimizer's state. Names may have a prefix,
    such as those that DataParallel, torch.compile or FSDP add. A warning says which entries were left out.

    Args:
        model: the model; only its names and shapes are read.
        path: the file. Code in it is never executed: for classes that torch does not know, only attributes are read.
        key: which weights to take if several fit the model. Default: those that are not an average over training.

    Raises:
        ValueError: the file has no weights, they do not fit the model, or several sets of weights fit.
        ModuleNotFoundError: a .safetensors file needs the extra "safetensors".
    """
    saved = read_file(path)
    own = unwrapped(model).state_dict(keep_vars=True)
    try:
        weights = find_weights(own, saved, key=key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if weights is None:
        how = misfit(own, saved)
        if not how:
            raise ValueError(f"{path} has no state dict, neither at its top level nor in the dictionaries inside it.")
        state = next((state for _, state in state_dicts(saved) if _takes(model, state)), None)
        if state is None:
            raise ValueError(
                f"the weights in {path} do not fit the model: {how}. Build the model with the same code and arguments "
                "as when they were saved."
            )
        return state
    if bad := misshapen(own, weights.state):
        shapes = "; ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise ValueError(
            f"the weights in {path} do not fit the model: other shapes: {shapes}. Build the model with the same "
            "arguments as when they were saved, such as the number of classes or the width."
        )
    for remark in weights.remarks:
        warnings.warn(f"{path}: {remark}", stacklevel=2)
    return weights.state


def _takes(model: nn.Module, state: dict[str, Any]) -> bool:
    """Whether a model loads a state dict with other names, as modules that support names of earlier versions do."""
    try:
        copy.deepcopy(unwrapped(model)).load_state_dict(state)
    except Exception:  # a module's own hooks may raise anything
        return False
    return True


def read_file(path: Path) -> Any:
    """Read a file of weights to the CPU, without executing code from it.

    Objects of classes that torch does not know become dictionaries that keep their attributes.

    Raises:
        ValueError: the file is missing, or cannot be read without executing code.
        ModuleNotFoundError: a .safetensors file needs the extra "safetensors".
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = error
    except Exception as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a scripted model (TorchScript); save only its weights: "
                f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pt')."
            ) from error
        raise ValueError(f"{path} was not written by torch.save, or it is damaged.") from error
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # numpy rebuilds its numbers with functions; the other usual objects have a class and attributes.
        inert = [(_Number if name.startswith("numpy") else _Attributes, name) for name in unknown]
        with torch.serialization.safe_globals(inert):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        # torch's own advice, to load without weights_only, would execute any code in the file.
        raise ValueError(
            f"{path} cannot be read without executing code in it. If you trust the file, save only its weights: "
            f"torch.save(torch.load({str(path)!r}, weights_only=False).state_dict(), 'weights.pt') for a whole model, "
            "or the same for the entry that holds the state dict."
        ) from why


class _Attributes:
    """Replaces a class that must not be imported: its objects become dictionaries that keep their attributes."""

    def __new__(cls, *arguments: Any) -> Any:
        # Some classes, such as the module of torch.compile, are built from arguments.
        return OrderedDict((str(i), argument) for i, argument in enumerate(arguments))


class _Number:
    """Replaces numpy's types and functions; their numbers are not used here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_safetensors(path: Path) -> dict[str, Any]:
    if importlib.util.find_spec("safetensors") is None:
        raise ModuleNotFoundError(
            f"{path} needs safetensors, which is not installed; to install it: {install('safetensors')}."
        )
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except Exception as error:
        raise ValueError(f"{path} is not a .safetensors file, or it is damaged: {error}.") from error
