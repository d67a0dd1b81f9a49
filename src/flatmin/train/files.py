"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")


def write_json(path: Path, content: Any) -> None:
    """JSON by write, fsync and rename."""
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def write_text(path: Path, text: str) -> None:
    """Text by write, fsync and rename."""
    write_atomically(path, lambda file: file.write(as_utf8(text)))


def as_utf8(text: str) -> bytes:
    """The text in UTF-8; a byte of a file name that is no text is written out."""
    return text.encode(errors="backslashreplace")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """A file by write, fsync and rename: it has the old content or the new one, never a part.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append(path: Path, line: str) -> None:
    """A line more at the end of a file.

    Raises:
        OSError: it cannot be written.
    """
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def sweep(folder: Path) -> None:
    """Remove what writes that were interrupted have left."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the disk that happens inside says which file it is about.

    Raises:
        OSError: in one sentence.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if (cause := disk_error(error)) is None:
            raise
        raise OSError(f"{path} could not be written: {cause.strerror or cause}.") from error


def disk_error(error: Exception) -> OSError | None:
    """The error of the disk behind another one: torch's writer turns it into a RuntimeError."""
    cause = error if isinstance(error, OSError) else error.__context__
    return cause if isinstance(cause, OSError) else None


def sync_folder(folder: Path) -> None:
    """Bring a rename to the disk, where folders can be synchronised."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: Exception) -> str:
    """Why a file could not be read, in few words."""
    if isinstance(error, json.JSONDecodeError):
        return "truncated or damaged"
    if isinstance(error, KeyError):
        return f"no entry {error.args[0]!r}"
    return str(error).rstrip(".") or type(error).__name__
