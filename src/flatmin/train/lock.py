"""Locks on run folders, which show whether a process is training there. A lock ends with its process.

No host names or process numbers are written. On a file system that can lock files but no folders, such as NFS, the lock
is on a file in the folder. Where nothing can be locked, `in_use` looks at the modification times of the files. The
package filelock is not used, because checking a lock with it writes a lock file and fails for read-only folders.
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
_WRITTEN = ("config.json", "result.json")  # in addition to JSON lines and checkpoints
_FILE = ".lock"
_PAUSE, _LONGEST = 0.05, 0.5  # seconds
GLANCE = 1.0  # seconds; a process that only checks the lock holds it for a moment


class InUseError(ValueError):
    """Another process is training in the folder."""


@contextmanager
def hold(folder: Path, *, patience: float | None = GLANCE) -> Iterator[None]:
    """Lock a folder for training; the folder is created if it is missing.

    Args:
        folder: folder to lock.
        patience: seconds to wait for another process that is training there; None: wait without limit.

    Raises:
        InUseError: another process is still training there.
        OSError: the folder cannot be created.
    """
    begun, pause = time.monotonic(), _PAUSE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle, mine = _lock(folder, make=True)
        # Another process may have removed the folder and created it again in the meantime.
        if mine is not False and _still(handle, folder):
            break
        _release(handle)
        if patience is not None and time.monotonic() - begun > patience:
            raise InUseError(f"another process is training in {folder}; wait until it ends, or use another folder.")
        time.sleep(pause)
        pause = min(_LONGEST, 1.1 * pause)
    try:
        yield
    finally:
        _release(handle)


def _still(handle: int | None, folder: Path) -> bool:
    """Whether the open file or folder still exists under the same path."""
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
    """Release a lock, even if a forked process still has the file open."""
    if handle is None:
        return
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def in_use(folder: Path) -> bool:
    """Whether a process is training in the folder.

    If nothing can be locked there: whether a file in it was changed within the last `RECENT` seconds.
    """
    handle, mine = _lock(folder)
    _release(handle)
    if mine is False:
        time.sleep(_PAUSE)  # a process that only checked the lock has released it by then
        handle, mine = _lock(folder)
        _release(handle)
    return changed(folder) > time.time() - RECENT if mine is None else not mine


def changed(folder: Path) -> float:
    """Time of the run's last write to its folder, in seconds since 1970; 0 if there was none."""
    return changed_and_size(folder)[0]


def changed_and_size(folder: Path) -> tuple[float, int]:
    """`changed` and the total size of the files in bytes, in one pass over the folder."""
    return _walk(folder, _tells)


def _tells(name: str) -> bool:
    """Whether a file in a run folder is written during training."""
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
    """Lock the folder, or a file in it if the file system cannot lock folders.

    Args:
        folder: folder to lock.
        make: whether to create that file.

    Returns:
        The open handle, and whether it is locked: False if another process has the lock, None if nothing can be locked.
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
    """Lock an open handle; False if another process has the lock, None if it cannot be locked."""
    if handle is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
