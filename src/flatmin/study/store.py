"""The store of a study's runs: one folder for each run, named after everything that determines its outcome."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from flatmin.study.measuring import View
from flatmin.study.record import Record
from flatmin.train import checkpoint
from flatmin.train.config import RunConfig, identity
from flatmin.train.files import reason
from flatmin.train.fingerprint import Content
from flatmin.train.folder import RunFolder
from flatmin.train.lock import InUseError
from flatmin.train.result import Epoch, Result
from flatmin.train.settings import content_hash


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of a study, finished or still to be executed.

    Args:
        label: used in the name of the folder only.
        config: the settings that determine the outcome.
        code: digest of the code that determines the outcome.
        record: what the run records besides its result; a finished run that lacks it is repeated.
        view: what is measured of its network afterwards; None for nothing.
        content: content of the data; None for data of a package, or if unknown where the run is planned.
        data_key: text that represents the data in the key. Default: the digest of `content`, if there is one.
    """

    label: str
    config: RunConfig
    code: str
    record: Record = field(default_factory=Record)
    view: View | None = None
    content: Content | None = None
    data_key: str | None = None

    @property
    def key(self) -> str:
        """Hex digest of configuration, code and data."""
        data = [] if self.data_word is None else [self.data_word]
        return content_hash(identity(self.config), self.code, *data)

    @property
    def data_word(self) -> str | None:
        """The text that represents the data in the key; None for data of a package."""
        if self.data_key is not None or self.content is None:
            return self.data_key
        return self.content.digest

    @property
    def labels(self) -> dict[str, str]:
        """What config.json holds besides the configuration."""
        labels = {"label": self.label, "key": self.key, "code": self.code}
        if self.data_word is not None:
            labels["data_key"] = self.data_word
        return {**labels, "record": self.record.word} if self.record.word else labels

    @property
    def name(self) -> str:
        """The folder's name: label, seed, and the first ten digits of the key."""
        return f"{self.stem}-{self.key[:10]}"

    @property
    def stem(self) -> str:
        """The folder's name without the key."""
        slug = re.sub(r"[^a-z0-9.+]+", "-", self.label.lower()).replace("-+-", "-").strip("-") or "run"
        return f"{slug[:100]}-s{self.config.seed}"


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """The result and the epochs of a run, or the error that it raised.

    Args:
        result: the result; None if the run raised an error.
        lines: the epochs.
        error: the error; None if there is a result.
        report: measured flatness of the network, as `flatmin.measure.Report.to_dict`; None if it was not measured.
        refusal: why there is no report.
    """

    result: Result | None = None
    lines: tuple[Epoch, ...] = ()
    error: str | None = None
    report: Mapping[str, Any] | None = None
    refusal: str | None = None


class Store:
    """The folder `<out>/runs`.

    Args:
        out: made if it does not exist.
        weights: whether finished runs keep their trained weights.
        checkpoint_seconds: least number of seconds between two checkpoints of a run, which are written at ends of
            epochs; 0 for a checkpoint at the end of every epoch.
        make: whether the folder may be created and changed; False to look for finished runs only.

    Raises:
        ValueError: the folder cannot be created or written to.
    """

    def __init__(self, out: Path, *, weights: bool = True, make: bool = True, checkpoint_seconds: float = 60.0) -> None:
        self.out, self.weights, self.checkpoint_seconds = Path(out), weights, checkpoint_seconds
        self.writes = make
        self._taken: dict[str, Path] = {}
        self.runs = self.out / "runs"
        if not make:
            return
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.runs):
                pass
        except OSError as error:
            raise ValueError(
                f"the folder {str(self.out)!r} cannot be written ({error.strerror or error}); name another one."
            ) from error

    def absolute(self) -> Store:
        """The same store, for processes that have another working directory."""
        there = copy.copy(self)
        there.out, there.runs = self.out.absolute(), self.runs.absolute()
        there._taken = {name: folder.absolute() for name, folder in self._taken.items()}
        return there

    def folder(self, run: Run) -> Path:
        """The folder of a run."""
        return self._taken.get(run.name, self.runs / run.name)

    def take(self, run: Run, folder: Path) -> None:
        """Use a finished run of an archive for this one, whatever code trained it."""
        self._taken[run.name] = folder

    def taken(self, run: Run) -> bool:
        """Whether a run comes from an archive."""
        return run.name in self._taken

    def find(self, run: Run, warn: Callable[[str], None]) -> tuple[Result, list[Epoch]] | None:
        """A finished run's result and epochs; None if the run must be executed.

        A folder whose result cannot be read, or belongs to another run, counts as unfinished.

        Args:
            run: the run.
            warn: called with a message if such a folder is found.
        """
        folder = RunFolder(self.folder(run))
        if not folder.finished:
            return None
        try:
            result = folder.result(lambda table: self.taken(run) or table["key"] == run.key)
            if not run.record.kept_in(folder.config()[1]):
                warn(f"{folder.path} lacks records that this study needs; the run is repeated.")
                return None
            return result, folder.lines(expected=None if result.failure else result.epochs)
        except (OSError, ValueError) as error:
            path = folder.path / "result.json"
            warn(f"{path} is not a valid result ({reason(error)}); the run is repeated.")
            return None

    def known_data(self, run: Run) -> str | None:
        """The `data_word` of an existing run with the same settings, code and data_dir; None if there is none.

        Used on machines without the data, e.g. to summarise runs that were executed elsewhere.
        """
        for folder in self.alike(run):
            config, labels = folder.config()
            if config.data_dir == run.config.data_dir and labels.get("code") == run.code and "data_key" in labels:
                return labels["data_key"]
        return None

    def alike(self, run: Run) -> Iterator[RunFolder]:
        """The existing runs with the same settings, whatever their code and data."""
        names, settings = os.listdir(self.runs) if self.runs.is_dir() else [], content_hash(identity(run.config))
        for name in sorted(name for name in names if name.startswith(f"{run.stem}-")):
            folder = RunFolder(self.runs / name)
            with suppress(OSError, ValueError):  # it cannot be read
                changed = (folder.path / "config.json").stat().st_mtime_ns
                if _settings_of(folder.path, changed) == settings:
                    yield folder


@cache
def _settings_of(path: Path, changed: int) -> str:
    """Digest of the settings of an existing run; `changed`, when they were written, is part of the cache key."""
    return content_hash(identity(RunFolder(path).config()[0]))


def unique(runs: Iterable[Run]) -> list[Run]:
    """The runs without repetitions, in order."""
    return list({run.name: run for run in runs}.values())


def finished_and_missing(
    runs: Iterable[Run], store: Store, warn: Callable[[str], None]
) -> tuple[dict[str, RunOutcome], list[Run]]:
    """Outcomes of the finished runs by name, and the runs that are missing; each run once.

    A run that is repeated because it lacks records also records what it recorded before. Checkpoints that a finished
    run left behind are removed, if the store may write.

    Args:
        runs: the runs that are needed.
        store: their store.
        warn: see `Store.find`.
    """
    finished: dict[str, RunOutcome] = {}
    missing: list[Run] = []
    for run in unique(runs):
        recorded = store.find(run, warn)
        if recorded is None:
            missing.append(done_again(run, store))
        else:
            finished[run.name] = RunOutcome(result=recorded[0], lines=tuple(recorded[1]))
            if store.writes:
                _tidy(RunFolder(store.folder(run)))
    return finished, missing


def done_again(run: Run, store: Store) -> Run:
    """The run with a record that includes what it recorded before, because other studies may use it."""
    return dataclasses.replace(run, record=run.record.with_also(_recorded(run, store)))


def _tidy(folder: RunFolder) -> None:
    """Remove the checkpoints of a finished run whose process was killed right after it had written the result."""
    if folder.checkpoints.is_dir():
        with suppress(InUseError), folder.hold(patience=0):
            if folder.finished:
                checkpoint.clear(folder.checkpoints)


def _recorded(run: Run, store: Store) -> Record:
    try:
        labels = RunFolder(store.folder(run)).config()[1]
    except ValueError:
        return Record()
    return Record.of(labels) if labels.get("key") == run.key else Record()
