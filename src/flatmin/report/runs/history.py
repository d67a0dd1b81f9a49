"""Read runs from their folders, whether finished, failed, stopped or running."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatmin.train.config import RunConfig
from flatmin.train.files import reason
from flatmin.train.folder import RunFolder
from flatmin.train.lock import in_use
from flatmin.train.result import Epoch, Result
from flatmin.words import read_text

FINISHED, FAILED, RUNNING, STOPPED = "finished", "failed", "running", "stopped"
RULES = {"val": "best on validation", "last": "last epoch", "max-test": "best on test: a biased estimate"}


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The epoch whose weights a run keeps, or would keep if it ended now.

    Args:
        epoch: number of the epoch.
        rule: the run's setting `selection`.
        val_acc, test_acc, test_top5, test_loss: numbers of these weights; None if unknown.
        final: whether the run has ended; if not, it may still choose another epoch.
    """

    epoch: int
    rule: str
    val_acc: float | None = None
    test_acc: float | None = None
    test_top5: float | None = None
    test_loss: float | None = None
    final: bool = True

    @property
    def text(self) -> str:
        """The epoch and the rule by which it was chosen."""
        return f"{self.epoch}, {RULES.get(self.rule, self.rule)}{'' if self.final else ' so far'}"


@dataclass(frozen=True, kw_only=True)
class History:
    """A run as it is on disk.

    Args:
        path: the run folder.
        name: a name that is unique among the runs shown together.
        label: the label of its arm.
        config: the settings.
        environment: versions and machine.
        state: FINISHED, FAILED, RUNNING or STOPPED (interrupted; it can be continued).
        lines: the epochs so far.
        steps, measures: recorded updates and measurements, if there are any.
        result: the result; None if the run has not ended.
        nonfinite: the content of nonfinite.json, which says where a loss or gradient was not finite; None without it.
    """

    path: Path
    name: str
    label: str
    config: RunConfig
    environment: Mapping[str, Any]
    state: str
    lines: tuple[Epoch, ...]
    steps: tuple[Mapping[str, Any], ...] = ()
    measures: tuple[Mapping[str, Any], ...] = ()
    result: Result | None = None
    nonfinite: Mapping[str, Any] | None = None

    @property
    def failure(self) -> str | None:
        """Why the run ended early; None if it did not."""
        return None if self.result is None else self.result.failure

    @property
    def chosen(self) -> Chosen | None:
        """The epoch whose weights are kept; None before the first epoch has ended."""
        selection, result = self.config.selection, self.result
        if result is not None and result.failure is None:
            if (chosen := result.chosen) is not None:
                return Chosen(
                    epoch=chosen["epoch"],
                    rule=chosen["selection"],
                    val_acc=chosen.get("val_acc"),
                    test_acc=chosen.get("test_acc"),
                    test_top5=chosen.get("test_top5"),
                    test_loss=chosen.get("test_loss"),
                )
            if result.last is not None:  # results of older versions
                last = result.last
                return Chosen(epoch=last["epoch"], rule="last", val_acc=last["val_acc"], test_acc=last["test_acc"])
        if not self.lines:
            return None
        line = self.lines[-1]
        if selection == "val":
            line = max(self.lines, key=lambda one: (one.val_acc, -one.val_loss, -one.epoch))
        elif selection == "max-test":
            line = max(self.lines, key=lambda one: (one.test_acc or 0.0, -one.epoch))
        return Chosen(
            epoch=line.epoch,
            rule=selection,
            val_acc=line.val_acc,
            test_acc=line.test_acc,
            test_top5=line.test_top5,
            final=False,
        )


def read(folder: Path, *, tables: bool = True) -> History:
    """Read one run.

    An incomplete last line, which is being written, is ignored.

    Args:
        folder: the run folder.
        tables: whether to read the recorded updates and measurements too.

    Raises:
        ValueError: the folder is not a run, or its files are damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}.")
    run = RunFolder(folder)
    if not run.begun:
        raise ValueError(
            f"{folder} is not a run folder: it has no config.json. Runs are in FOLDER/runs; `flatmin runs list FOLDER` "
            "lists them."
        )
    config, labels = run.config()
    name = folder.resolve().name
    # The result is read before the lines, so that a run that ends in between has all of them.
    result = _result(run)
    state = (FAILED if result.failure else FINISHED) if result else RUNNING if in_use(folder) else STOPPED
    return History(
        path=folder,
        name=name,
        label=labels.get("label", name),
        config=config,
        environment=run.environment(),
        state=state,
        lines=tuple(_epochs(folder / "metrics.jsonl")),
        steps=tuple(_rows(folder / "steps.jsonl")) if tables else (),
        measures=tuple(_rows(folder / "measures.jsonl")) if tables else (),
        result=result,
        nonfinite=_table(folder / "nonfinite.json"),
    )


def read_all(folders: Iterable[Path]) -> list[History]:
    """Read several runs, each once, with distinct names.

    Raises:
        ValueError: see `read`.
    """
    once: dict[Path, Path] = {}
    for folder in folders:
        once.setdefault(folder.resolve(), folder)
    histories = [read(folder) for folder in once.values()]
    names = [run.name for run in histories]
    return [run if names.count(run.name) == 1 else dataclasses.replace(run, name=str(run.path)) for run in histories]


def _result(run: RunFolder) -> Result | None:
    try:
        return run.result()
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{run.path / 'result.json'} cannot be read: {reason(error)}.") from error


def _table(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is none."""
    try:
        table = json.loads(read_text(path))
    except (OSError, ValueError):
        return None
    return table if isinstance(table, dict) else None


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; a last line without a line feed is still being written and is left out.

    Raises:
        ValueError: a line is not a table of numbers.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(v is None or isinstance(v, (int, float)) for v in row.values()):
            raise ValueError(f"line {number} of {path} is damaged: it is not a table of numbers.")
        rows.append(row)
    return rows


def _epochs(path: Path) -> list[Epoch]:
    names = {field.name for field in dataclasses.fields(Epoch)}
    epochs = []
    for number, row in enumerate(_rows(path), 1):
        try:
            epochs.append(Epoch(**{key: value for key, value in row.items() if key in names}))
        except TypeError as error:
            raise ValueError(f"line {number} of {path} is damaged: it is not an epoch.") from error
    return epochs


def names_of(rows: Sequence[Mapping[str, Any]], *, without: Iterable[str]) -> list[str]:
    """The keys that occur in the rows, in order of appearance, without some."""
    left_out = set(without)
    return [key for key in dict.fromkeys(key for row in rows for key in row) if key not in left_out]
