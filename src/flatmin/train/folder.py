"""The folder of a run: configuration, environment, metrics, checkpoints, weights and result."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatmin.train import checkpoint, lock
from flatmin.train.config import RunConfig
from flatmin.train.files import append, reason, sweep, write_atomically, write_json, write_text
from flatmin.train.fingerprint import merged
from flatmin.train.inputs import Inputs
from flatmin.train.result import VERSION, Epoch, Result
from flatmin.train.settings import canonical, fill
from flatmin.words import read_text

WEIGHTS = "weights.pt"
INPUTS = "data.json"
PAGE = "show.html"  # written by `flatmin show`
TABLES = ("steps.jsonl", "measures.jsonl")


class RunFolder:
    """A run on disk.

    config.json, env.json and data.json (inputs of the model) are written first. metrics.jsonl has one line per epoch,
    steps.jsonl one line per `log_every` updates, measures.jsonl one line per measurement. checkpoints/ holds the
    checkpoints, weights.pt a state dict. result.json is written last; a run that has it is finished.

    Args:
        path: path of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._held = False

    @contextmanager
    def hold(self, *, patience: float | None = lock.GLANCE) -> Iterator[None]:
        """Lock the folder against other processes; a nested call on the same object has no effect.

        Args:
            patience: see `flatmin.train.lock.hold`.

        Raises:
            flatmin.train.lock.InUseError: another process is training here.
            OSError: the folder cannot be created.
        """
        if self._held:
            yield
            return
        with lock.hold(self.path, patience=patience):
            self._held = True
            try:
                yield
            finally:
                self._held = False

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """The file of the selected weights."""
        return self.path / WEIGHTS

    @property
    def begun(self) -> bool:
        """Whether there is a run, finished or not."""
        return (self.path / "config.json").is_file()

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return (self.path / "result.json").is_file()

    def begin(
        self, config: RunConfig, environment: Mapping[str, Any], inputs: Inputs | None = None, **labels: str
    ) -> None:
        """Prepare the folder for a new run, and remove the files of an earlier one.

        Args:
            config: resolved configuration.
            environment: versions and hardware.
            inputs: description of the model's inputs, so that the model can be built again without the data.
            labels: additional entries of config.json, such as the run's key.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("result.json", WEIGHTS, "nonfinite.json", INPUTS, PAGE, *TABLES):
            (self.path / name).unlink(missing_ok=True)
        for report in self.path.glob("card-*.json"):  # of an earlier run's weights
            report.unlink()
        checkpoint.clear(self.checkpoints)
        sweep(self.path)
        self.set_lines([])
        write_json(self.path / "env.json", dict(environment))
        if inputs is not None:
            write_json(self.path / INPUTS, canonical(inputs))
        self.set_config(config, **labels)

    def set_config(self, config: RunConfig, **labels: str) -> None:
        """Write config.json."""
        write_json(self.path / "config.json", {**labels, **canonical(config)})

    def take_over(self, other: RunFolder) -> None:
        """Copy the files that a run in another folder needs to continue in this one, which has no run yet.

        Raises:
            OSError: a file cannot be read or written.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for name in ("env.json", INPUTS, "metrics.jsonl", *TABLES):
            if (other.path / name).is_file():
                shutil.copyfile(other.path / name, self.path / name)
        for path in checkpoint.listed(other.checkpoints)[:1]:
            shutil.copyfile(path, self.checkpoints / path.name)

    def config(self) -> tuple[RunConfig, dict[str, str]]:
        """The configuration, and the other entries of config.json.

        Raises:
            ValueError: config.json cannot be read.
        """
        where = self.path / "config.json"
        names = {field.name for field in dataclasses.fields(RunConfig)}
        try:
            table = json.loads(read_text(where))
            if not isinstance(table, dict):
                raise ValueError("config.json is not a table")
            config = fill(RunConfig, {k: v for k, v in table.items() if k in names}, origin=str(where))
            return config, {k: str(v) for k, v in table.items() if k not in names}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the run in {self.path} cannot be read: {reason(error)}.") from error

    def inputs(self) -> Inputs | None:
        """Description of the model's inputs; None if the run did not record it, as in earlier versions.

        Raises:
            ValueError: data.json cannot be read.
        """
        where = self.path / INPUTS
        try:
            return fill(Inputs, json.loads(read_text(where)), origin=str(where))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where} cannot be read: {reason(error)}; remove this file, and flatmin reads the data set instead."
            ) from error

    def environment(self) -> dict[str, Any]:
        """Versions and hardware; empty if env.json cannot be read."""
        try:
            table = json.loads(read_text(self.path / "env.json"))
        except (OSError, ValueError):
            return {}
        return table if isinstance(table, dict) else {}

    def add_environment(self, added: Mapping[str, Any]) -> None:
        """Add the environment in which the run continues; env.json lists both values of entries that differ."""
        write_json(self.path / "env.json", merged([self.environment(), added]))

    def add_line(self, line: Epoch) -> None:
        """Add an epoch to metrics.jsonl."""
        append(self.path / "metrics.jsonl", json.dumps(dataclasses.asdict(line)))

    def set_lines(self, lines: Sequence[Epoch]) -> None:
        """Rewrite metrics.jsonl."""
        text = "".join(json.dumps(dataclasses.asdict(line)) + "\n" for line in lines)
        write_text(self.path / "metrics.jsonl", text)

    def lines(self, *, expected: int | None = None) -> list[Epoch]:
        """The epochs in metrics.jsonl.

        Raises:
            ValueError: a line cannot be read, or the number of lines is not the expected one.
        """
        name = "metrics.jsonl"
        try:
            text = read_text(self.path / name)
            lines = [Epoch(**json.loads(line)) for line in text.splitlines()]
        except (OSError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from error
        if expected is not None and len(lines) != expected:
            raise ValueError(f"{name} has {len(lines)} epochs, expected {expected}")
        return lines

    def add_step(self, step: Mapping[str, Any]) -> None:
        """Add a line to steps.jsonl."""
        append(self.path / "steps.jsonl", json.dumps(step))

    def add_measures(self, values: Mapping[str, Any]) -> None:
        """Add a line to measures.jsonl."""
        append(self.path / "measures.jsonl", json.dumps(values))

    def record_nonfinite(self, content: Mapping[str, Any]) -> None:
        """Write nonfinite.json, which says where a loss or gradient was not finite."""
        write_json(self.path / "nonfinite.json", dict(content))

    def steps(self) -> list[dict[str, Any]]:
        """The lines of steps.jsonl; a truncated last line is left out."""
        return self._table("steps.jsonl")

    def measures(self) -> list[dict[str, Any]]:
        """The lines of measures.jsonl; a truncated last line is left out."""
        return self._table("measures.jsonl")

    def _table(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        if not path.is_file():
            return []
        rows = []
        for line in read_text(path).splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind(self, lines: Sequence[Epoch], step: int) -> None:
        """Remove all records after a checkpoint.

        Args:
            lines: the epochs up to the checkpoint.
            step: number of updates at the checkpoint.
        """
        checkpoint.rewind(self.checkpoints, step)
        sweep(self.path)
        self.set_lines(lines)
        for name in TABLES:
            if (self.path / name).is_file():
                rows = [json.dumps(one) + "\n" for one in self._table(name) if one["step"] <= step]
                write_text(self.path / name, "".join(rows))

    def keep(self, state: Mapping[str, Any]) -> None:
        """Write the selected weights."""
        plain = {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in state.items()}
        write_atomically(self.weights, lambda file: torch.save(plain, file))

    def finish(self, result: Result, *, prolong: bool = False, **labels: str) -> None:
        """Write result.json, which marks the run as finished; remove the checkpoints unless the run failed.

        Args:
            result: result of the run.
            prolong: keep the last checkpoint, so that the run can continue with more epochs. Default False.
            labels: additional entries of result.json.
        """
        write_json(self.path / "result.json", {"version": VERSION, **labels, **canonical(result)})
        if result.failure is None:
            checkpoint.clear(self.checkpoints, keep=1 if prolong else 0)

    def result(self, check: Callable[[Mapping[str, Any]], bool] = lambda table: True) -> Result:
        """The result of a finished run.

        Args:
            check: called with the content of result.json; returns False if it belongs to another run.

        Raises:
            ValueError: result.json cannot be read, or belongs to another run.
            FileNotFoundError: the run is not finished.
        """
        try:
            table = json.loads(read_text(self.path / "result.json"))
            if table["version"] != VERSION or not check(table):
                raise ValueError("it belongs to another run or version")
            fields = {field.name for field in dataclasses.fields(Result)}
            return Result(**{key: value for key, value in table.items() if key in fields})
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(reason(error)) from error
