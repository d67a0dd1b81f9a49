"""Export the weights of a run: a plain state dict, or safetensors."""

from __future__ import annotations

import importlib.util
import json
import os
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from flatmin.train.config import identity
from flatmin.train.files import write_atomically
from flatmin.train.saved import SavedRun, weights_for
from flatmin.train.settings import canonical
from flatmin.words import install

ENDINGS = (".pt", ".pth", ".safetensors")


def export(run: SavedRun, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the selected weights of a run to a file, after checking that they fit its model.

    Args:
        run: a finished run with weights.
        path: the file. Its name ends in .pt or .pth (a state dict on the CPU, written by `torch.save`), or in
            .safetensors (extra "safetensors"), with the run's "config" and "inputs" as JSON in the metadata.
        force: overwrite an existing file.

    Returns:
        The path.

    Raises:
        ValueError: the ending is another one, the file exists, or the weights are missing or do not suit the format.
        ModuleNotFoundError: the extra is not installed.
        OSError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in ENDINGS:
        raise ValueError(
            f"{target} must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}; the ending decides the format."
        )
    safe = target.suffix == ".safetensors"
    if safe:
        _require()
    if target.exists() and not force:
        raise ValueError(f"{target} already exists; name another file, or overwrite it with --force.")
    state = weights_for(run.model(), run.weights)
    write = partial(_write, _safe(state, run)) if safe else partial(torch.save, state)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, write)
    return target


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def _require() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise ModuleNotFoundError(
            "a .safetensors file needs safetensors, which is not installed; to install it: "
            f"{install('safetensors')}; or name a .pt file."
        )


def _safe(state: dict[str, Any], run: SavedRun) -> bytes:
    from safetensors.torch import save

    other = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise ValueError(
            f"the state dict of {run.name} has entries that are not tensors ({', '.join(other)}), which safetensors "
            "cannot store; name a .pt file."
        )
    about = {"config": {**identity(run.config), "label": run.label}, "inputs": canonical(run.inputs())}
    metadata = {"format": "pt", **{name: json.dumps(content) for name, content in about.items()}}
    # safetensors refuses weights that share memory, so each one is copied.
    return bytes(save({name: value.contiguous().clone() for name, value in state.items()}, metadata=metadata))
