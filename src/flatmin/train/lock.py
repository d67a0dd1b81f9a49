"""Whether a process trains in a folder: a lock on the folder, which ends with the process in any case.

No host names or process numbers are written. On a file system that locks files only, such as NFS, the folder has a
lock file. Where nothing can be locked, `in_use` uses the modification times of the files. The package filelock does not
serve, because to ask whether a folder is in use it writes a lock file into it, and refuses folders that are read-only.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

RECENT = 600  # seconds
_WRITTEN = ("config.json", "result.json")  # beside lines and checkpoints
_FILE = ".lock"
_PAUSE, _LONGEST = 0.05, 0.5
GLANCE = 1.0  # seconds; somebody who only looks holds the lock for a moment


class InUseError(ValueError):
    """Another process trains in the folder."""


@contextmanager
def hold(folder: Path, *, patience: float | None = GLANCE) -> Iterator[None]:
    """Lock a folder for training; it is created if it is missing.

    Args:
        folder: which.
        patience: seconds to wait for another process that trains there; None: for as long as it takes.

    Raises:
        InUseError: another process does.
        OSError: the folder cannot be made.
    """
    begun, pause = time.monotonic(), _PAUSE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle, mine = _lock(folder, make=True)
        # What was locked may have been removed, and made again, meanwhile.
        if mine is not False and _still(handle, folder):
            break
        _release(handle)
        if patience is not None and time.monotonic() - begun > patience:
            raise InUseError(f"another process trains in {folder}: wait until it ends, or name another folder.")
        time.sleep(pause)
        pause = min(_LONGEST, 1.1 * pause)
    try:
        yield
    finally:
        _release(handle)


def _still(handle: int | None, folder: Path) -> bool:
    """Whether what is open is still what the folder's name stands for."""
    if handle is None:
        return True
    mine = os.fstat(handle)
    for path in (folder, folder / _FILE):
        try:
            there = path.stat()
        except OSError:
            continue
        if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
            return True
    return False


def _release(handle: int | None) -> None:
    """Release a lock, also where a forked process has the file open."""
    if handle is None:
        return
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def in_use(folder: Path) -> bool:
    """Whether a process trains in the folder.

    Known where folders can be locked; elsewhere: whether a file in it was changed in the last `RECENT` seconds.
    """
    handle, mine = _lock(folder)
    _release(handle)
    if mine is False:
        time.sleep(_PAUSE)  # another one who only looks is gone by then
        handle, mine = _lock(folder)
        _release(handle)
    return changed(folder) > time.time() - RECENT if mine is None else not mine


def changed(folder: Path) -> float:
    """When a run last wrote into its folder, in seconds since 1970; 0 if it never did."""
    return changed_and_size(folder)[0]


def changed_and_size(folder: Path) -> tuple[float, int]:
    """`changed`, and the bytes of all files, by one look at each."""
    return _walk(folder, _tells)


def _tells(name: str) -> bool:
    """Whether a file in a run's folder is written while it trains."""
    return name in _WRITTEN or name.endswith(".jsonl")


def _every(name: str) -> bool:
    return True


def _none(name: str) -> bool:
    return False


def _walk(folder: str | os.PathLike[str], tells: Callable[[str], bool]) -> tuple[float, int]:
    latest, size = 0.0, 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for one in entries:
            with contextlib.suppress(OSError):  # checkpoints come and go
                if one.is_dir(follow_symlinks=False):
                    moment, more = _walk(one, _every if tells is _tells and one.name == "checkpoints" else _none)
                    latest, size = max(latest, moment), size + more
                    continue
                status = one.stat(follow_symlinks=False)
                size += status.st_size
                if tells(one.name):
                    latest = max(latest, status.st_mtime)
    return latest, size


def _lock(folder: Path, *, make: bool = False) -> tuple[int | None, bool | None]:
    """Lock the folder, or the file in it where the file system locks files only.

    Args:
        folder: which.
        make: whether to make that file.

    Returns:
        What is open, and whether it is locked now: False if somebody else has the lock, None if nothing can be locked.
    """
    for path, flags in ((folder, os.O_RDONLY), (folder / _FILE, os.O_RDWR | (os.O_CREAT if make else 0))):
        try:
            handle = os.open(path, flags) if fcntl is not None else None
        except OSError:
            continue
        mine = _locked(handle)
        if mine is not None:
            return handle, mine
        _release(handle)
    return None, None


def _locked(handle: int | None) -> bool | None:
    """Lock what is open; False if somebody else has it, None if it cannot be locked."""
    if handle is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
