"""List and remove the runs in a folder."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatmin.train.files import reason
from flatmin.train.lock import changed_and_size, in_use
from flatmin.train.package import package_digest
from flatmin.train.result import VERSION

DAMAGED = "damaged"
# Keys of config.json that have columns of their own, or that are not settings.
_SHOWN = {
    *("method", "rho", "data", "model", "seed", "epochs"),
    *("label", "key", "code", "data_key", "record", "content", "data_dir", "workers", "device"),
}
_NESTED = {"params": "", "model_params": "model."}  # nested tables, with the prefix of their keys
_ABSENT = object()
# Files that `RunFolder.begin` writes. Before a folder is removed all are checked, since other programs write a
# config.json too.
MARKS = ("config.json", "env.json", "metrics.jsonl")


@dataclass(frozen=True, kw_only=True)
class Digest:
    """The entry of a run in a list.

    Args:
        state: see `flatmin.report.runs.history.History`.
        label, method, rho, data, model, seed, epochs: settings of the run.
        done: number of finished epochs.
        epoch, val_acc, test_acc: epoch and accuracies of the weights that are kept.
        failure: why the run ended early; None if it did not.
        stale: whether the run belongs to a study and was made with different code of flatmin or torch, so that no
            study uses it.
        settings: the contents of config.json.
    """

    state: str
    label: str
    method: str
    rho: float | None
    data: str
    model: str
    seed: int
    epochs: int
    done: int
    epoch: int | None = None
    val_acc: float | None = None
    test_acc: float | None = None
    failure: str | None = None
    stale: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run in a list.

    Args:
        path: the run folder.
        changed: time of the last change, in seconds since 1970.
        size: size on disk in bytes.
        digest: the contents; None if the run cannot be read.
        problem: why the run cannot be read.
    """

    path: Path
    changed: float
    size: int
    digest: Digest | None = None
    problem: str = ""

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name or self.path.resolve().name

    @property
    def state(self) -> str:
        """The state of the digest, or DAMAGED."""
        return DAMAGED if self.digest is None else self.digest.state

    @property
    def test_acc(self) -> float | None:
        """The test accuracy of the weights that are kept."""
        return None if self.digest is None else self.digest.test_acc

    def as_json(self) -> dict[str, Any]:
        """The entry as plain values."""
        table: dict[str, Any] = {
            "name": self.name,
            "path": str(self.path),
            "state": self.state,
            "changed": self.changed,
            "size": self.size,
        }
        if self.digest is None:
            return {**table, "problem": self.problem}
        return table | {key: value for key, value in dataclasses.asdict(self.digest).items() if key != "settings"}


def entries(folder: Path) -> list[Entry]:
    """The runs in FOLDER/runs, or in the folder itself if there are none there, by name.

    Raises:
        ValueError: the folder does not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}.")
    folders: list[Path] = []
    for place in (folder / "runs", folder):
        if not folders and place.is_dir():
            folders = [
                place / name for name in sorted(os.listdir(place)) if os.path.isfile(place / name / "config.json")
            ]
    return [_entry(path) for path in folders]


def _entry(path: Path) -> Entry:
    changed, size = changed_and_size(path)
    shared: dict[str, Any] = {"path": path, "changed": changed, "size": size}
    try:
        return Entry(**shared, digest=_finished(path) or _digest(path))
    except (OSError, ValueError) as error:
        return Entry(**shared, problem=reason(error))


def _finished(path: Path) -> Digest | None:
    """The digest of a finished run, read without its records, which is faster; None for any other run."""
    try:
        config = json.loads((path / "config.json").read_bytes())
        result = json.loads((path / "result.json").read_bytes())
        chosen = result["chosen"]
        if result["version"] != VERSION or result["failure"] is not None:
            return None
        return Digest(
            state="finished",
            label=config.get("label", path.name),
            **{key: config[key] for key in ("method", "rho", "data", "model", "seed", "epochs")},
            done=(path / "metrics.jsonl").read_bytes().count(b"\n"),
            **{key: chosen[key] for key in ("epoch", "val_acc", "test_acc")},
            stale=_stale(path, config),
            settings=config,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest(path: Path) -> Digest:
    """The digest of any run.

    Raises:
        OSError, ValueError: the run cannot be read.
    """
    from flatmin.report.runs.history import read  # imports torch, which lists of finished runs do not need

    run = read(path, tables=False)
    chosen = run.chosen
    return Digest(
        state=run.state,
        label=run.label,
        **{key: getattr(run.config, key) for key in ("method", "rho", "data", "model", "seed", "epochs")},
        done=len(run.lines),
        epoch=None if chosen is None else chosen.epoch,
        val_acc=None if chosen is None else chosen.val_acc,
        test_acc=None if chosen is None else chosen.test_acc,
        failure=run.failure,
        stale=_stale(path, json.loads((path / "config.json").read_bytes())),
        settings=json.loads((path / "config.json").read_bytes()),
    )


def _stale(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether a run of a study was made with different code; `flatmin.study.stale` also checks the user's own code."""
    if "code" not in config:
        return False
    there = json.loads((path / "env.json").read_bytes())
    return package_digest()[:10] not in str(there.get("code", "")).split("; ")


def unusual(listed: Sequence[Entry]) -> list[str]:
    """For each run the settings in which it differs from most of the list, as key=value, without those in columns."""
    tables = [{} if entry.digest is None else entry.digest.settings for entry in listed]
    told: list[list[str]] = [[] for _ in listed]

    def tell(key: str, values: Sequence[Any]) -> None:
        words = [None if value is _ABSENT else _word(value) for value in values]
        usual = Counter(words).most_common(1)[0][0]
        for own, word in zip(told, words, strict=True):
            own += [f"{key}={word}"] if word not in (None, usual) else []

    kinds = {tuple(table) for table in tables}
    for key in dict.fromkeys(itertools.chain(*kinds)):
        values = [table[key] for table in tables] if len(kinds) == 1 else [table.get(key, _ABSENT) for table in tables]
        if values.count(values[0]) == len(values) or key in _SHOWN:
            continue
        if key not in _NESTED:
            tell(key, values)
            continue
        parts = [{} if value is _ABSENT else value for value in values]
        for name in dict.fromkeys(itertools.chain(*parts)):
            tell(f"{_NESTED[key]}{name}", [part.get(name, _ABSENT) for part in parts])
    return [" ".join(own) for own in told]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)


def size_of(folder: Path) -> int:
    """The size of the files in a folder, in bytes."""
    return changed_and_size(folder)[1]


def check_removable(folders: Iterable[Path], *, force: bool = False) -> None:
    """Raise ValueError unless all folders are runs that no process is working on.

    Args:
        folders: the folders.
        force: whether to allow runs that a process seems to be working on.
    """
    for folder in folders:
        missing = [name for name in MARKS if not (folder / name).is_file()]
        if folder.is_symlink() or missing:
            why = "it is a link" if folder.is_symlink() else f"it has no {missing[0]}"
            raise ValueError(f"{folder} is not a run ({why}); nothing was removed.")
        if not force and in_use(folder):
            raise ValueError(f"{folder} is still running; stop it first, or add --force. Nothing was removed.")


def remove(folders: Sequence[Path]) -> None:
    """Remove folders with all their files."""
    for folder in folders:
        shutil.rmtree(folder.resolve())  # "." cannot be removed by that name
