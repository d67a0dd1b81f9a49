"""Standard output and error that never raise, not on unencodable characters, closed pipes or full disks."""

from __future__ import annotations

import codecs
import errno
import io
import sys
import unicodedata
from typing import Any, TextIO

_PLAIN = "flatmin-plain"  # name of the error handler
_SIGNS = "± × − – — · • ‖ → ≤ ≥ ≈ ∞ ∇ √ ß λ Λ ‘ ’ “ ”"
_WORDS = "+- x - - - . * || -> <= >= ~ inf grad sqrt ss lambda Lambda ' ' \" \""
_ASCII = dict(zip(_SIGNS.split(), _WORDS.split(), strict=True))


def settle_streams() -> None:
    """Make this process's standard output and error accept any text, so that printing cannot end a training run.

    A character that the encoding lacks is replaced by ASCII: "+-" for "±", "rho" for "ρ", "o" for "ö", and "?" if there
    is no similar text. Text that can no longer be written, as after `| head`, is dropped. The encoding does not change,
    nor does an error handler that the user has chosen (PYTHONIOENCODING).
    """
    codecs.register_error(_PLAIN, _replace)
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        errors = stream.errors if stream.errors in ("ignore", "replace", "xmlcharrefreplace", "namereplace") else _PLAIN
        if stream is getattr(sys, f"__{name}__") and not stream.isatty():  # a terminal cannot be closed by a reader
            stream.flush()
            setattr(sys, name, _lasting(stream, errors))
        else:
            stream.reconfigure(errors=errors)


def unwritten() -> OSError | None:
    """The error that made standard output incomplete; None if it is complete or its reader has closed the pipe."""
    raw = _raw(sys.stdout) if isinstance(sys.stdout, io.TextIOWrapper) else None
    problem = raw.problem if isinstance(raw, Lasting) else None
    # Windows reports EINVAL where POSIX reports EPIPE.
    return None if problem is None or problem.errno in (errno.EPIPE, errno.EINVAL) else problem


class Lasting(io.RawIOBase):
    """A raw stream that drops everything after the first error in writing.

    Args:
        raw: the stream to write to.

    Attributes:
        problem: the first error; None if there was none.
    """

    def __init__(self, raw: Any) -> None:
        self._to = raw
        self.problem: OSError | None = None

    def write(self, data: Any) -> int | None:
        """Write the data; drop them after an error."""
        if self.problem is None:
            try:
                written: int | None = self._to.write(data)
                return written
            except OSError as error:
                self.problem = error
        return len(data)

    def writable(self) -> bool:
        """True."""
        return True

    def fileno(self) -> int:
        """The file descriptor of the stream."""
        number: int = self._to.fileno()
        return number

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return bool(self._to.isatty())


def _raw(stream: io.TextIOWrapper) -> Any:
    buffer = stream.buffer
    return getattr(buffer, "raw", buffer)


def _lasting(stream: io.TextIOWrapper, errors: str) -> io.TextIOWrapper:
    """The same stream, writing through `Lasting`."""
    raw = Lasting(_raw(stream))
    buffer: Any = raw if stream.buffer is _raw(stream) else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """The error handler for `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    if "\udc80" <= text[0] <= "\udcff":  # a byte of a file name that is not text: write it unchanged
        return bytes([ord(text[0]) - 0xDC00]), error.start + 1
    return "".join(map(plain, text)), error.end


def fitted(text: str, encoding: str) -> str:
    """The text as a stream with this encoding will show it, to measure the width of columns."""
    codecs.register_error(_PLAIN, _replace)
    return text.encode(encoding, _PLAIN).decode(encoding, "replace")


def plain(char: str) -> str:
    """The ASCII replacement of a character.

    Examples:
        >>> [plain(char) for char in "±ρöₖ─│█π"]
        ['+-', 'rho', 'o', 'k', '-', '|', '#', 'pi']
    """
    if char.isascii() or char in _ASCII:
        return _ASCII.get(char, char)
    parts = [part for part in unicodedata.normalize("NFKD", char) if not unicodedata.combining(part)]
    if parts and all(part.isascii() for part in parts):
        return "".join(parts)
    kind, *rest = unicodedata.name(char, "UNKNOWN").split()
    if kind == "GREEK":
        return rest[-1].title() if "CAPITAL" in rest else rest[-1].lower()
    if kind == "BOX":
        return "-" if rest[-1] == "HORIZONTAL" else "|" if rest[-1] == "VERTICAL" else "+"
    return "#" if "BLOCK" in rest else "?"
