"""Helpers for messages and for text files that people write. Imports only the standard library."""

from __future__ import annotations

import codecs
import contextlib
import difflib
import os
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


# Longer marks first, since the mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path | Traversable) -> str:
    """Read a text file; all line ends become line feeds.

    The encoding may be UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has another encoding. The message names the file, the line and the probable encoding.
    """
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        kind = encoding.removesuffix("-sig").upper()
        if encoding != "utf-8":
            raise ValueError(f"{path} begins like {kind} text but is damaged; save it as UTF-8.") from None
        near = "UTF-16 without a byte order mark" if b"\0" in data else "Latin-1 or Windows-1252"
        raise ValueError(
            f"{path} is not UTF-8 text: line {line} has the byte 0x{data[error.start]:02x}, as in {near}; save it as "
            "UTF-8."
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} is not UTF-8 text but looks like UTF-16 without a byte order mark; save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


_LONGEST = 400


def suggest(word: str, choices: Iterable[str]) -> str:
    """The text "; did you mean 'x'?" if one of the choices is similar to the word, else "".

    Case and leading dashes are ignored. A choice is similar if it begins with the word, if it makes up most of the
    word, or if it differs in few letters (added, left out, replaced or swapped): one in a word of 3 letters or more,
    two from 8 letters on, three from 12 letters on.
    """
    near = nearest(word, choices, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def ended(text: str) -> str:
    """The text with a full stop, unless it ends with a punctuation mark.

    Examples:
        >>> ended("no such file"), ended("did you mean 'x'?")
        ('no such file.', "did you mean 'x'?")
    """
    return text if text.endswith((".", "?", "!")) else f"{text}."


def nearest(word: str, choices: Iterable[str], count: int) -> list[str]:
    """At most `count` choices that are similar to the word as defined in `suggest`, the most similar first."""
    asked = word.lstrip("-").lower()
    limit = (len(asked) >= 3) + (len(asked) >= 8) + (len(asked) >= 12)
    matches: list[tuple[int, float, str]] = []
    for name in choices if asked else ():
        own = name.lstrip("-").lower()
        if own.startswith(asked):
            matches.append((0, 0.0, name))
        elif abs(len(own) - len(asked)) <= limit and (slips := _slips(asked, own)) <= limit:
            matches.append((slips, -difflib.SequenceMatcher(None, asked, own).ratio(), name))
        elif own in asked and len(own) > 0.6 * len(asked):
            matches.append((limit + 1, -len(own) / len(asked), name))
    # Sorted by similarity only, so that equally similar words keep their order.
    return [name for _, _, name in sorted(matches, key=lambda f: f[:2])[:count]]


def _slips(a: str, b: str) -> int:
    """The number of edits between two words: letters added, left out, replaced or swapped with the next one."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                row[-1] = min(row[-1], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


def duration(seconds: float) -> str:
    """An estimated duration in words, to two digits.

    Examples:
        >>> duration(54.7), duration(76524190)
        ('about 55 seconds', 'about 2.4 years')
    """
    for size, name in ((86400 * 365, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"about {float(f'{seconds / size:.2g}'):g} {name}"
    return "about a second" if seconds < 1.5 else f"about {float(f'{seconds:.2g}'):g} seconds"


def elapsed(seconds: float) -> str:
    """A measured time, in its two largest units.

    Examples:
        >>> elapsed(12.34), elapsed(293), elapsed(17560), elapsed(100800)
        ('12.3 s', '4 min 53 s', '4 h 53 min', '1 d 4 h')
    """
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    for size, unit, part, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if (whole := round(seconds / part) * part) >= size:
            return f"{whole // size} {unit} {whole % size // part} {small}"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def install(extra: str) -> str:
    """The command that installs an extra, for error messages.

    Examples:
        >>> install("report")
        "pip install '.[report]' in a clone of flatmin"
    """
    return f"pip install '.[{extra}]' in a clone of flatmin"


def warn(text: str) -> None:
    """Give a warning that points to the nearest line of code outside flatmin and torch."""
    torch = getattr(sys.modules.get("torch"), "__file__", None) or __file__
    inside = (str(Path(__file__).parent) + os.sep, str(Path(torch).parent) + os.sep, contextlib.__file__)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def explained(error: BaseException) -> bool:
    """Whether the error's message is enough for a user, without a traceback.

    This holds for errors of the operating system, which name the file, and for errors that flatmin raises itself. It
    does not hold for a ValueError from inside another library, or for a division by zero.
    """
    if isinstance(error, OSError):
        return True
    meant = isinstance(error, (ValueError, ImportError)) or type(error) in (ArithmeticError, FloatingPointError)
    return meant and _raised_here(error.__traceback__)


def reason(error: BaseException) -> str:
    """Describe an error in one line: its message, and its type unless it is a ValueError of flatmin.

    For errors from other code it also names the line that raised it, in the user's own code if possible.
    """
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} ..."
    if isinstance(error, ValueError) and explained(error):
        return text
    named = type(error).__name__ + (f": {text}" if text else "")
    if explained(error):
        return named
    lines = traceback.extract_tb(error.__traceback__)
    at = ([line for line in lines if _theirs(line.filename)] or lines)[-1:]
    return named + "".join(f" ({Path(line.filename).name}, line {line.lineno})" for line in at)


def _theirs(file: str) -> bool:
    """Whether a source file belongs to the user: not to Python, an installed package or flatmin."""
    inside = (str(Path(__file__).parent) + os.sep, str(Path(os.__file__).parent) + os.sep, "<")
    return not file.startswith(inside) and not {"site-packages", "dist-packages"} & set(Path(file).parts)


def _raised_here(trace: TracebackType | None) -> bool:
    package = Path(__file__).resolve().parent
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and package in Path(trace.tb_frame.f_code.co_filename).resolve().parents
