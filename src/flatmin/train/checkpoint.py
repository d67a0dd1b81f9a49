"""Checkpoints: written to a temporary file and then renamed, and read only if their hash matches."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from flatmin.train.files import disk_error, sweep, sync_folder

FORMAT = 1
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")
_BLOCK = 1 << 20


class _Hashing:
    """A file for writing that computes a digest of its content."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint, and remove older ones so that `keep` remain.

    The file name contains the number of updates and the beginning of the content's SHA-256, so that a complete file can
    be recognised without a second file.

    Args:
        folder: folder of the checkpoints; created if needed.
        step: number of updates done.
        state: tensors and plain values.
        keep: number of checkpoints to keep. Default 2, so that one is left if the newest is damaged.

    Raises:
        OSError: the checkpoint could not be written; the existing ones stay, and no part of the new one remains.
    """
    temporary = folder / f".step.{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            hashing = _Hashing(file)
            torch.save({"format": FORMAT, "step": step, **state}, hashing)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"step-{step:09d}-{hashing.digest.hexdigest()[:16]}.pt"
        os.replace(temporary, path)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:
        if (cause := disk_error(error)) is None:
            raise
        raise OSError(
            f"the checkpoint of step {step} could not be written to {folder}: {cause.strerror or cause}; free disk "
            "space, and continue from the previous checkpoint with --resume."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    others = [one for one in listed(folder) if one != path]
    for old in others[max(0, keep - 1) :]:
        old.unlink(missing_ok=True)
    return path


def listed(folder: Path) -> list[Path]:
    """All checkpoints in a folder, newest first."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file()]
    return sorted(named, key=lambda path: (path.name[:14], path.stat().st_mtime_ns), reverse=True)


def step_of(path: Path) -> int:
    """The number of updates after which a checkpoint was written."""
    return int(path.name[5:14])


def newest(folder: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """Read the newest checkpoint that is complete, on the CPU; None if there is none.

    Args:
        folder: folder of the checkpoints.
        warn: called with a sentence for every damaged checkpoint that is skipped, and if none is complete.
    """
    damaged = listed(folder)
    for path in damaged:
        try:
            return read(path)
        except ValueError as error:
            warn(f"{error} It is skipped.")
    if damaged:
        warn(f"no checkpoint in {folder} is complete, so the run starts from the beginning.")
    return None


def rewind(folder: Path, step: int) -> None:
    """Remove the checkpoints after an update (which are damaged), and temporary files of interrupted writes."""
    if not folder.is_dir():
        return
    for path in listed(folder):
        if step_of(path) > step:
            path.unlink(missing_ok=True)
    sweep(folder)


def read(path: Path) -> dict[str, Any]:
    """Read one checkpoint.

    Raises:
        ValueError: the file is truncated, damaged, or has another format.
    """
    named = _NAME.fullmatch(path.name)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
            whole = named is not None and digest.hexdigest().startswith(named[2])
            file.seek(0)
            state: Any = torch.load(file, map_location="cpu", weights_only=True) if whole else None
    except OSError as error:
        raise ValueError(f"the checkpoint {path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # torch.load raises errors of any type
        raise ValueError(f"{path} is not a checkpoint of flatmin.") from error
    if not whole:
        raise ValueError(f"the checkpoint {path} is truncated or damaged.")
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of flatmin.")
    if state.get("format") != FORMAT:
        raise ValueError(f"the checkpoint {path} has format {state.get('format')!r}, expected {FORMAT}.")
    return state


def clear(folder: Path, *, keep: int = 0) -> None:
    """Remove all checkpoints but the newest `keep`, and temporary files of interrupted writes."""
    with suppress(FileNotFoundError):  # the folder does not exist, or another process removes it too
        for path in listed(folder)[keep:]:
            path.unlink(missing_ok=True)
        sweep(folder)
        if not any(folder.iterdir()):
            folder.rmdir()
