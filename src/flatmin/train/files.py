"""Files that are complete or absent, whatever happens while they are written."""

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


_TELLS = '<>:"/\\|?*'  # what some file system takes for something else than a part of a name
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{kind}{n}" for kind in ("COM", "LPT") for n in "123456789")}
_LONGEST = 200  # bytes: file systems allow 255, and endings and marks of unfinished files come on top


def check_name(name: str, option: str) -> None:
    """Raise ValueError unless this is a plain file or folder name on every system; paths are not.

    Args:
        name: as it was typed.
        option: that it was typed for, for the error.

    Raises:
        ValueError: an empty or too long name, one with a separator, a control character or one that Windows reserves,
            "." and "..", a space or dot at an end, or a device of Windows.
    """
    why = None
    if not name.strip():
        why = "it is empty"
    elif any(one in "/\\" for one in name):
        why = "it is a path; names have no / and no \\"
    elif bad := next((one for one in name if one in _TELLS or not one.isprintable()), None):
        why = f"names have no {bad!r}"
    elif name != name.strip() or name.endswith(".") or name.startswith("-"):
        why = "names neither begin with a space or a hyphen nor end with a space or a dot"
    elif name.partition(".")[0].strip().upper() in _DEVICES:
        why = "Windows keeps this name for a device"
    elif len(name.encode(errors="surrogateescape")) > _LONGEST:
        why = f"it is longer than {_LONGEST} bytes"
    if why is not None:
        shown = name if len(name) <= 60 else f"{name[:57]}..."
        raise ValueError(f"{option} {shown!r} cannot be the name of a file or folder: {why}.")


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
    """Append a line to a file.

    Raises:
        OSError: it cannot be written.
    """
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def sweep(folder: Path) -> None:
    """Remove the remains of interrupted writes."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of the file to errors of the disk that are raised inside.

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
