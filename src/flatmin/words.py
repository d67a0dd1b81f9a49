"""Words for error messages; imports nothing heavy."""

import difflib
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str]) -> str:
    """The words "; did you mean 'x'?" if something known begins with the word or is close to it, else nothing."""
    names = list(known)
    close = [k for k in names if word and k.startswith(word)] or difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
