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
# Of config.json: what a list has columns for, and what does not belong to the settings.
_SHOWN = {
    *("method", "rho", "data", "model", "seed", "epochs"),
    *("label", "key", "code", "data_key", "record", "content", "data_dir", "workers", "device"),
}
_NESTED = {"params": "", "model_params": "model."}  # tables of their own, and what their names begin with
_ABSENT = object()
# What `RunFolder.begin` writes: other programs have a config.json too, and this one removes whole folders.
MARKS = ("config.json", "env.json", "metrics.jsonl")


@dataclass(frozen=True, kw_only=True)
class Digest:
    """The entry of a run in a list.

    Args:
        state: that of `flatmin.report.runs.history.History`.
        label, method, rho, data, model, seed, epochs: the settings of the run.
        done: epochs so far.
        epoch, val_acc, test_acc: of the weights that count.
        failure: why it stopped before its end.
        stale: whether it is of a study and of other code of flatmin or torch than this, so that no study takes it.
        settings: all of them, by key, as far as config.json holds them.
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
        path: its folder.
        changed: when it was last written to, in seconds since 1970.
        size: bytes on disk.
        digest: what it is; None if it cannot be read.
        problem: why it cannot be read.
    """

    path: Path
    changed: float
    size: int
    digest: Digest | None = None
    problem: str = ""

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.name or self.path.resolve().name

    @property
    def state(self) -> str:
        """That of the digest, or DAMAGED."""
        return DAMAGED if self.digest is None else self.digest.state

    @property
    def test_acc(self) -> float | None:
        """Of the weights that count."""
        return None if self.digest is None else self.digest.test_acc

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
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
        ValueError: no such folder.
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
    """Of a run that has come to its end, without a look at all that it has recorded; None for any other.

    Lists are long, and nearly all that is in them is finished.
    """
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
    """Of any run.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    from flatmin.report.runs.history import read  # brings torch, which long lists of finished runs do without

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
    """Whether a run of a study is of other code than this; `flatmin.study.stale` knows of the user's own code too."""
    if "code" not in config:
        return False
    there = json.loads((path / "env.json").read_bytes())
    return package_digest()[:10] not in str(there.get("code", "")).split("; ")


def unusual(listed: Sequence[Entry]) -> list[str]:
    """What tells each run from the most of the list, as key=value words, but for what a list has columns for."""
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
    """Bytes of the files in a folder."""
    return changed_and_size(folder)[1]


def check_removable(folders: Iterable[Path], *, force: bool = False) -> None:
    """Raise ValueError unless all are folders of runs that no process trains in.

    Args:
        folders: which.
        force: also those in which a process seems to train.
    """
    for folder in folders:
        missing = [name for name in MARKS if not (folder / name).is_file()]
        if folder.is_symlink() or missing:
            why = "a link" if folder.is_symlink() else f"there is no {missing[0]} in it"
            raise ValueError(f"{folder} is not a run ({why}); nothing was removed.")
        if not force and in_use(folder):
            raise ValueError(f"the run in {folder} is going on; stop it first, or add --force. Nothing was removed.")


def remove(folders: Sequence[Path]) -> None:
    """Remove folders with all their files."""
    for folder in folders:
        shutil.rmtree(folder.resolve())  # "." cannot be removed by that name
