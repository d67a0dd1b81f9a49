"""One folder a run: resolved configuration, environment, a line an epoch, and a result that is written last."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from flatmin.train.config import RunConfig
from flatmin.train.loop import Epoch, Result
from flatmin.train.settings import canonical, content_hash

VERSION = 1
WEIGHTS = "weights.pt"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run to be done or found done.

    Args:
        label: the arm it belongs to; names the folder and nothing else.
        config: what decides the outcome.
        code: digest of the code that matters.
    """

    label: str
    config: RunConfig
    code: str

    @property
    def key(self) -> str:
        """Hex digest of configuration and code."""
        return content_hash(self.config, self.code)

    @property
    def name(self) -> str:
        """The folder's name: label, seed, and the first ten digits of the key."""
        slug = re.sub(r"[^a-z0-9.+]+", "-", self.label.lower()).replace("-+-", "-").strip("-") or "run"
        return f"{slug}-s{self.config.seed}-{self.key[:10]}"


class Store:
    """The folder `<out>/runs`.

    Args:
        out: made if it does not exist.
        weights: whether finished runs keep their trained weights.

    Raises:
        ValueError: a folder that cannot be made or written to.
    """

    def __init__(self, out: Path, *, weights: bool = True) -> None:
        self.out, self.weights = Path(out), weights
        self.runs = self.out / "runs"
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.runs):
                pass
        except OSError as error:
            raise ValueError(
                f"the folder {str(self.out)!r} cannot be written ({error.strerror or error}); name another one."
            ) from error

    def folder(self, run: Run) -> Path:
        """Where a run lives."""
        return self.runs / run.name

    def find(self, run: Run, warn: Callable[[str], None]) -> tuple[Result, list[Epoch]] | None:
        """A finished run's result and epochs, or None if it must be run.

        A folder whose result cannot be read, or belongs to another run, counts as unfinished.

        Args:
            run: which.
            warn: called with a sentence that names the file.
        """
        folder = self.folder(run)
        path = folder / "result.json"
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["version"] != VERSION or found["key"] != run.key:
                raise ValueError("it belongs to another run or version")
            fields = {field.name for field in dataclasses.fields(Result)}
            result = Result(**{key: value for key, value in found.items() if key in fields})
            return result, read_lines(folder / "metrics.jsonl", expected=None if result.failure else result.epochs)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn(f"{path} is not a finished result ({reason(error)}); the run is done again.")
            return None

    def begin(self, run: Run, environment: dict[str, Any]) -> Path:
        """Make a run's folder, without any earlier result in it."""
        folder = self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        (folder / WEIGHTS).unlink(missing_ok=True)
        (folder / "metrics.jsonl").write_text("", encoding="utf-8")
        config = {"label": run.label, "key": run.key, "code": run.code, **canonical(run.config)}
        write_atomically(folder / "config.json", config)
        write_atomically(folder / "env.json", environment)
        return folder

    def keep(self, run: Run, model: nn.Module) -> None:
        """Keep the trained weights, if this store does."""
        if self.weights:
            state = {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in model.state_dict().items()}
            _atomically(self.folder(run) / WEIGHTS, lambda file: torch.save(state, file))

    def finish(self, run: Run, result: Result) -> None:
        """Write result.json; from then on the run is finished."""
        content = {"version": VERSION, "key": run.key, "label": run.label, **canonical(result)}
        write_atomically(self.folder(run) / "result.json", content)


def append_line(path: Path, line: Epoch) -> None:
    """Add an epoch to metrics.jsonl."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(line)) + "\n")


def read_lines(path: Path, *, expected: int | None) -> list[Epoch]:
    """The epochs in metrics.jsonl.

    Raises:
        ValueError: a line that is no epoch, or another number of lines than expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = [Epoch(**json.loads(line)) for line in text.splitlines()]
    except (OSError, TypeError) as error:
        raise ValueError(f"{path.name}: {error}") from error
    if expected is not None and len(lines) != expected:
        raise ValueError(f"{path.name} has {len(lines)} epochs, expected {expected}")
    return lines


def write_atomically(path: Path, content: Any) -> None:
    """JSON by write, fsync and rename: the file is whole or absent."""
    _atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def _atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def unique(runs: Iterable[Run]) -> list[Run]:
    """Without repetitions of one folder, in order."""
    return list({run.name: run for run in runs}.values())


def reason(error: Exception) -> str:
    """Why a file of a run could not be read, in few words."""
    if isinstance(error, json.JSONDecodeError):
        return "truncated or damaged"
    if isinstance(error, KeyError):
        return f"no entry {error.args[0]!r}"
    return str(error).rstrip(".") or type(error).__name__
