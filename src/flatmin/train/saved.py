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


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A trained network with what is needed to build it again.

    Args:
        name: of the run.
        label: the arm that it belongs to.
        config: what it was trained with.
        weights: file of the trained weights.
        known: what the model takes, if the run has written it down.
        content: digest of the data that it was trained on, if the run has written it down.
        key: which weights of the file, see `weights_for`.
    """

    name: str
    label: str
    config: RunConfig
    weights: Path
    known: Inputs | None = None
    content: str | None = None
    key: str | None = None

    @property
    def trained(self) -> bool:
        """Whether it is a run of flatmin, whose method is known, and no file of weights."""
        return (self.weights.parent / "config.json").is_file()

    @property
    def here(self) -> RunConfig:
        """The configuration as it is on the CPU, wherever the run was."""
        return dataclasses.replace(self.config, device="cpu", graph=False)

    def data(self, data_dir: str | None = None) -> Data:
        """The data that it was trained on, wrong labels included, on the CPU.

        Args:
            data_dir: where they lie now. Default: where they were.

        Raises:
            ValueError, ModuleNotFoundError: see `load_data`.

        Warns:
            UserWarning: they are others than in training.
        """
        config = self.here if data_dir is None else dataclasses.replace(self.here, data_dir=data_dir)
        data = load_data(config)
        if self.content is not None:
            content = content_of(config, data)
            if content is not None and content.digest != self.content:
                warnings.warn(
                    f"the data {config.data!r} are not, bit for bit, those that {self.name!r} was trained on; the "
                    "results here belong to the present data.",
                    stacklevel=2,
                )
        return data

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
        load_weights(model, self.weights, key=self.key)
        return model


def load(run: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> nn.Module:
    """The trained model of a finished run, ready for inference: in eval mode, with the weights that the run chose.

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
    return SavedRun(
        name=name,
        label=label,
        config=config,
        weights=path / WEIGHTS,
        known=run.inputs(),
        content=labels.get("content"),
    )


def load_weights(model: nn.Module, path: Path, *, key: str | None = None) -> None:
    """Read weights from a file into a model; see `weights_for`."""
    model = unwrapped(model)
    state = weights_for(model, path, key=key)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit the model: {' '.join(str(error).split())}") from error


def weights_for(model: nn.Module, path: Path, *, key: str | None = None) -> dict[str, Any]:
    """The weights of a model in a file, as a state dict by the model's own names, on the CPU.

    The file holds a state dict, a dictionary with state dicts somewhere in it, such as a checkpoint of Lightning or one
    with the optimizer's state beside the weights, or a whole module; torch.save or safetensors wrote it. Names may have
    a prefix, and what DataParallel, torch.compile or FSDP add. A warning says what of the file was left out.

    Args:
        model: of these weights; only its names and shapes are read.
        path: the file. Its code is never run: of classes that torch does not know only the attributes are read.
        key: which weights, where the file holds several that fit. Default: those that are no average over training.

    Raises:
        ValueError: a file that holds no weights, weights that do not fit the model, or several that do.
        ModuleNotFoundError: a .safetensors file without the extra "safetensors".
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
            raise ValueError(f"{path} holds no state dict, at its top or in the dictionaries inside it.")
        state = next((state for _, state in state_dicts(saved) if _takes(model, state)), None)
        if state is None:
            raise ValueError(
                f"the weights in {path} do not fit the model: {how}. Build the model as it was when they were saved: "
                "with the same code and the same arguments."
            )
        return state
    if bad := misshapen(own, weights.state):
        shapes = "; ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise ValueError(
            f"the weights in {path} do not fit the model: of another shape: {shapes}. Build the model as it was when "
            "they were saved: with the same arguments, such as the number of classes or the width."
        )
    for remark in weights.remarks:
        warnings.warn(f"{path}: {remark}", stacklevel=2)
    return weights.state


def _takes(model: nn.Module, state: dict[str, Any]) -> bool:
    """Whether a model loads a state dict of other names, as modules that know the names of earlier versions do."""
    try:
        copy.deepcopy(unwrapped(model)).load_state_dict(state)
    except Exception:  # a module's own hooks may raise anything
        return False
    return True


def read_file(path: Path) -> Any:
    """What a file of weights holds, on the CPU, without running code from it.

    Objects of classes that torch does not know come as dictionaries, with their attributes as attributes.

    Raises:
        ValueError: no file, or one that cannot be read so.
        ModuleNotFoundError: a .safetensors file without the extra "safetensors".
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
                f"{path} is a scripted model, which is a program; save its weights alone: "
                f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pt')."
            ) from error
        raise ValueError(f"{path} is no file that torch.save wrote, or it is damaged.") from error
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # numpy's numbers are made by functions, everything else that is usual by a class and its attributes.
        inert = [(_Number if name.startswith("numpy") else _Attributes, name) for name in unknown]
        with torch.serialization.safe_globals(inert):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        # torch's own advice, to load without weights_only, would run whatever the file holds.
        raise ValueError(
            f"{path} cannot be read without running the code in it. If you trust it, save its weights alone: "
            f"torch.save(torch.load({str(path)!r}, weights_only=False).state_dict(), 'weights.pt') for a whole model, "
            "or the entry that holds the state dict."
        ) from why


class _Attributes:
    """Stands for a class that is not to be imported: its objects become dictionaries that keep the attributes."""

    def __new__(cls, *arguments: Any) -> Any:
        # torch.compile's module, for one, is made of the module inside.
        return OrderedDict((str(i), argument) for i, argument in enumerate(arguments))


class _Number:
    """Stands for numpy's types and functions, whose numbers are of no interest here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_safetensors(path: Path) -> dict[str, Any]:
    if importlib.util.find_spec("safetensors") is None:
        raise ModuleNotFoundError(
            f"{path} needs safetensors, which is not installed; run: pip install 'flatmin[safetensors]'."
        )
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except Exception as error:
        raise ValueError(f"{path} is no .safetensors file, or it is damaged: {error}.") from error
