"""Text for people and from people: words for error messages, and files that people write. Imports nothing heavy."""

from __future__ import annotations

import codecs
import difflib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


# The longer marks first: that of UTF-16 is also how one of UTF-32 begins.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path | Traversable) -> str:
    """The text of a file; every line ends with a line feed alone.

    It is UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is in another encoding; the sentence names the file, the place and the probable encoding.
    """
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        kind = encoding.removesuffix("-sig").upper()
        if encoding != "utf-8":
            raise ValueError(f"{path} begins like {kind} but is damaged; save it as UTF-8.") from None
        near = "UTF-16 without a byte order mark" if b"\0" in data else "Latin-1 or Windows-1252"
        raise ValueError(
            f"{path} is not UTF-8 text: line {line} has the byte 0x{data[error.start]:02x}, as in {near}; save it as "
            "UTF-8."
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} is not UTF-8 text but looks like UTF-16 without a byte order mark; save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def suggest(word: str, known: Iterable[str]) -> str:
    """The words "; did you mean 'x'?" if something known begins with the word or is close to it, else nothing."""
    names = list(known)
    close = [k for k in names if word and k.startswith(word)] or difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def explained(error: BaseException) -> bool:
    """Whether the message alone tells a person what to do.

    So do errors of the operating system (they name the file), and those that flatmin itself raises on purpose; a
    ValueError from the inside of another library does not, nor does a division by zero.
    """
    if isinstance(error, OSError):
        return True
    meant = isinstance(error, (ValueError, ImportError)) or type(error) in (ArithmeticError, FloatingPointError)
    return meant and _raised_here(error.__traceback__)


def _raised_here(trace: TracebackType | None) -> bool:
    package = Path(__file__).resolve().parent
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and package in Path(trace.tb_frame.f_code.co_filename).resolve().parents
