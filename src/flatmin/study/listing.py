"""What runs there are in a folder, and their removal."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatmin.study.history import History, read
from flatmin.train.files import reason
from flatmin.train.lock import changed, in_use

DAMAGED = "damaged"
# What `RunFolder.begin` writes: other programs have a config.json too, and this one removes whole folders.
MARKS = ("config.json", "env.json", "metrics.jsonl")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run in a list.

    Args:
        path: its folder.
        state: that of `History`, or DAMAGED.
        changed: when it was last written to, in seconds since 1970.
        size: bytes on disk.
        history: without its tables; None if it cannot be read.
        problem: why it cannot be read.
    """

    path: Path
    state: str
    changed: float
    size: int
    history: History | None = None
    problem: str = ""

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.resolve().name

    @property
    def test_acc(self) -> float | None:
        """Of the weights that count."""
        chosen = None if self.history is None else self.history.chosen
        return None if chosen is None else chosen.test_acc

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = {
            "name": self.name,
            "path": str(self.path),
            "state": self.state,
            "changed": self.changed,
            "size": self.size,
        }
        if self.history is None:
            return {**found, "problem": self.problem}
        config, chosen = self.history.config, self.history.chosen
        return found | {
            "label": self.history.label,
            "method": config.method,
            "rho": config.rho,
            "data": config.data,
            "model": config.model,
            "seed": config.seed,
            "epochs": config.epochs,
            "done": len(self.history.lines),
            "epoch": None if chosen is None else chosen.epoch,
            "val_acc": None if chosen is None else chosen.val_acc,
            "test_acc": self.test_acc,
            "failure": self.history.failure,
        }


def entries(folder: Path) -> list[Entry]:
    """The runs in FOLDER/runs, or in the folder itself if there are none there, by name.

    Raises:
        ValueError: no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}.")
    found: list[Path] = []
    for place in (folder / "runs", folder):
        if not found and place.is_dir():
            found = [path for path in sorted(place.iterdir()) if (path / "config.json").is_file()]
    return [_entry(path) for path in found]


def _entry(path: Path) -> Entry:
    shared: dict[str, Any] = {"path": path, "changed": changed(path), "size": size_of(path)}
    try:
        history = read(path, tables=False)
    except (OSError, ValueError) as error:
        return Entry(**shared, state=DAMAGED, problem=reason(error))
    return Entry(**shared, state=history.state, history=history)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if not path.is_dir() else 0
        except OSError:  # a checkpoint that was replaced meanwhile
            continue
    return total


def check_removable(folders: Iterable[Path], *, force: bool = False) -> None:
    """Raise ValueError unless all are folders of runs that nobody works on.

    Args:
        folders: which.
        force: also those that somebody works on, as far as is known.
    """
    for folder in folders:
        missing = [name for name in MARKS if not (folder / name).is_file()]
        if folder.is_symlink() or missing:
            why = "a link" if folder.is_symlink() else f"there is no {missing[0]} in it"
            raise ValueError(f"{folder} is not a run ({why}); nothing was removed.")
        if not force and in_use(folder):
            raise ValueError(f"the run in {folder} is going on; stop it first, or add --force. Nothing was removed.")


def remove(folders: Sequence[Path]) -> None:
    """Remove folders with all that is in them."""
    for folder in folders:
        shutil.rmtree(folder)
