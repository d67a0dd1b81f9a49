"""Read the command lines of research repositories; the flags are the fields of a dataclass."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from flatmin.train import settings
from flatmin.words import suggest

F = TypeVar("F")
V = TypeVar("V")


def read_flags(cls: type[F], arguments: Sequence[str], *, script: str) -> tuple[F, frozenset[str]]:
    """Read the flags of a command line, as argparse does.

    Flags have the form `--name value` or `--name=value`. An unambiguous prefix of a name is enough, and the last one of
    several counts. A flag of type bool means true, or is followed by true or false; a tuple takes all values up to the
    next flag.

    Args:
        cls: a frozen dataclass whose fields are the flags, with the defaults of the script.
        arguments: the words of the line after the script's name.
        script: script that the flags belong to, for error messages.

    Returns:
        The flags, and the names of those that were given.

    Raises:
        ValueError: a flag is unknown or ambiguous, a word belongs to no flag, or a value is missing or of another type.
    """
    kinds = settings.field_types(cls)
    rest, values = list(arguments), {}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            guess = (
                "; put --set before a setting of flatmin"
                if "=" in word
                else suggest(f"--{word.lstrip('-')}", _flags(kinds))
            )
            raise ValueError(f"unexpected word {word!r}: expected a flag of {script}{guess}")
        name, equals, text = word.partition("=")
        key = _known(name, kinds, script)
        texts = [text] if equals else _values(rest, kinds[key])
        values[key] = _parse(key, texts, kinds[key])
    return cls(**values), frozenset(values)


def strip_script(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Remove `VARIABLE=value`, `python` and the script's name from a pasted line; returns the rest and the variables.

    Raises:
        ValueError: the line starts several processes.
    """
    rest, variables = list(arguments), []
    while rest and not rest[0].startswith("--"):
        word = rest[0]
        if re.fullmatch(r"[A-Z_][A-Z0-9_]*=\S*", word):
            variables.append(word)
        elif word in ("-m", "torchrun", "accelerate", "deepspeed"):
            raise ValueError(
                f"{word!r} starts several processes; use torchrun with flatmin instead: torchrun --nproc-per-node N -m "
                "flatmin original PROJECT FLAGS."
            )
        elif not re.fullmatch(r"(.*/)?python[0-9.]*|-u|.*\.py", word):
            break
        rest.pop(0)
    return rest, variables


def choose(flag: str, value: str, choices: Mapping[str, V]) -> V:
    """Look up the value of a flag in a table.

    Raises:
        ValueError: the value is not in the table.
    """
    if value not in choices:
        raise ValueError(f"--{flag} expects one of {', '.join(choices)}, got {value!r}{suggest(value, choices)}")
    return choices[value]


def _flags(kinds: Mapping[str, Any]) -> list[str]:
    return [f"--{name}" for name in kinds]


def _known(word: str, kinds: Mapping[str, Any], script: str) -> str:
    flags = _flags(kinds)
    close = [name for name in kinds if f"--{name}".startswith(word)]
    if word.removeprefix("--") in kinds:
        return word.removeprefix("--")
    if not close or word == "--":
        raise ValueError(f"{word} is not a flag of {script}{suggest(word, flags)} (flags: {', '.join(flags)}).")
    if len(close) > 1:
        raise ValueError(f"{word} can mean {' or '.join(f'--{name}' for name in close)}; write the flag in full.")
    return close[0]


def _values(rest: list[str], kind: Any) -> list[str]:
    """Remove a flag's values from the rest of the line, and return them."""
    several, taken = typing.get_origin(_plain(kind)) is tuple, list[str]()
    while rest and not rest[0].startswith("--") and (several or not taken):
        taken.append(rest.pop(0))
    return taken


def _parse(key: str, texts: Sequence[str], kind: Any) -> Any:
    kind = _plain(kind)
    several = typing.get_origin(kind) is tuple
    item = typing.get_args(kind)[0] if several else kind
    if kind is bool and not texts:
        return True
    expected = f"one {settings.describe(item)} or more" if several else settings.articled(settings.describe(item))
    if not texts:
        raise ValueError(f"--{key} expects {expected}, but no value follows it.")
    try:
        values = tuple(settings.parse(key, text, item) for text in texts)
    except ValueError:
        raise ValueError(f"--{key} expects {expected}, got {' '.join(texts)!r}.") from None
    return values if several else values[0]


def _plain(kind: Any) -> Any:
    """X if the type is X | None, else the type itself."""
    rest = [one for one in typing.get_args(kind) if one is not type(None)]
    return rest[0] if type(None) in typing.get_args(kind) and len(rest) == 1 else kind
