"""Words for error messages; imports nothing heavy."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

_LONGEST = 400


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


def reason(error: BaseException) -> str:
    """Why something is missing, in one line: the message, with the type of the error unless flatmin refused on purpose.

    Of an error from elsewhere it also says which line raised it: that of a person's own code, if there is one.
    """
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} ..."
    if isinstance(error, ValueError) and explained(error):
        return text
    named = type(error).__name__ + (f": {text}" if text else "")
    if explained(error):
        return named
    lines = traceback.extract_tb(error.__traceback__)
    own = [line for line in lines if not {"site-packages", "flatmin"} & set(Path(line.filename).parts)]
    at = (own or lines)[-1:]
    return named + "".join(f" ({Path(line.filename).name}, line {line.lineno})" for line in at)


def _raised_here(trace: TracebackType | None) -> bool:
    package = Path(__file__).resolve().parent
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and package in Path(trace.tb_frame.f_code.co_filename).resolve().parents
