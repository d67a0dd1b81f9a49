"""Atomic writing of files: a file is complete or absent, even if the process is killed while writing."""

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


_TELLS = '<>:"/\\|?*'  # characters that some file system does not allow in names
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{kind}{n}" for kind in ("COM", "LPT") for n in "123456789")}
_LONGEST = 200  # bytes; file systems allow 255, and endings and the names of temporary files are added


def check_name(name: str, option: str) -> None:
    """Raise ValueError unless the name is a valid file or folder name on every system; paths are not allowed.

    Args:
        name: the name as it was typed.
        option: the option that it belongs to, for the error message.

    Raises:
        ValueError: the name is empty, too long, "." or "..", contains a separator, a control character or a character
            that Windows reserves, begins or ends with a space, ends with a dot, or is the name of a Windows device.
    """
    why = None
    if not name.strip():
        why = "it is empty"
    elif any(one in "/\\" for one in name):
        why = "it is a path; names must not contain / or \\"
    elif bad := next((one for one in name if one in _TELLS or not one.isprintable()), None):
        why = f"names must not contain {bad!r}"
    elif name != name.strip() or name.endswith(".") or name.startswith("-"):
        why = "names must not begin with a space or a hyphen, or end with a space or a dot"
    elif name.partition(".")[0].strip().upper() in _DEVICES:
        why = "Windows reserves this name for a device"
    elif len(name.encode(errors="surrogateescape")) > _LONGEST:
        why = f"it is longer than {_LONGEST} bytes"
    if why is not None:
        shown = name if len(name) <= 60 else f"{name[:57]}..."
        raise ValueError(f"{option} {shown!r} is not a valid name for a file or folder: {why}.")


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    write_atomically(path, lambda file: file.write(as_utf8(text)))


def as_utf8(text: str) -> bytes:
    """Encode text in UTF-8; a byte of a file name that is not text is written as an escape sequence."""
    return text.encode(errors="backslashreplace")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file by write, fsync and rename: it has the old content or the new one, never a part of it.

    Raises:
        OSError: the file cannot be written.
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
        OSError: the file cannot be written.
    """
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def sweep(folder: Path) -> None:
    """Remove temporary files of interrupted writes."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of the file to disk errors that are raised inside the context.

    Raises:
        OSError: with the name of the file and the cause.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if (cause := disk_error(error)) is None:
            raise
        raise OSError(f"{path} could not be written: {cause.strerror or cause}.") from error


def disk_error(error: Exception) -> OSError | None:
    """The disk error that caused another error (torch's writer turns it into a RuntimeError); None if there is none."""
    cause = error if isinstance(error, OSError) else error.__context__
    return cause if isinstance(cause, OSError) else None


def sync_folder(folder: Path) -> None:
    """Flush a rename to the disk, on systems that can synchronise folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: Exception) -> str:
    """Why a file could not be read, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return "truncated or damaged"
    if isinstance(error, KeyError):
        return f"no entry {error.args[0]!r}"
    return str(error).rstrip(".") or type(error).__name__
