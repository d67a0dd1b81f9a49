"""Whether somebody trains in a folder: a lock on the folder itself, which ends with the process, however it ends.

No file is left behind, and no name of a host or number of a process is written. Where the operating system or the
file system cannot lock a folder, `in_use` goes by the times of the files in it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

RECENT = 600  # seconds
_WRITTEN = ("config.json", "*.jsonl", "result.json", "checkpoints/*")
_TRIES, _PAUSE = 20, 0.05  # somebody who only looks holds the lock for a moment


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Train in a folder; it is made if it is not there.

    Raises:
        ValueError: another process does.
        OSError: the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = _open(folder)
    try:
        for turn in range(_TRIES):
            if _locked(handle) is not False:
                break
            if turn == _TRIES - 1:
                raise ValueError(f"another process trains in {folder}: wait until it ends, or name another folder.")
            time.sleep(_PAUSE)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def in_use(folder: Path) -> bool:
    """Whether a process trains in the folder.

    Known where folders can be locked; elsewhere: whether a file in it was changed in the last `RECENT` seconds.
    """
    handle = _open(folder)
    try:
        mine = _locked(handle)
        if mine is False:
            time.sleep(_PAUSE)  # another one who only looks is gone by then
            mine = _locked(handle)
        return changed(folder) > time.time() - RECENT if mine is None else not mine
    finally:
        if handle is not None:
            os.close(handle)


def changed(folder: Path) -> float:
    """When a run last wrote into its folder, in seconds since 1970; 0 if it never did."""
    times = [0.0]
    for path in (one for pattern in _WRITTEN for one in folder.glob(pattern)):
        with contextlib.suppress(OSError):  # checkpoints come and go
            times.append(path.stat().st_mtime)
    return max(times)


def _open(folder: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError:
        return None


def _locked(handle: int | None) -> bool | None:
    """Lock an open folder; False if somebody else has it, None if it cannot be locked."""
    if handle is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
