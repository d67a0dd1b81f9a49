"""The reader of the papers' command lines: flags are the fields of a dataclass."""

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
    """The flags of a command line, as argparse reads them.

    `--name value` and `--name=value`; an unambiguous prefix of a name stands for it; the last of several counts. A flag
    of type bool alone means true, or is followed by true or false; a tuple takes all values up to the next flag.

    Args:
        cls: a frozen dataclass whose fields are the flags, with the script's defaults.
        arguments: the words of the line after the script's name.
        script: whose flags they are, for the errors.

    Returns:
        The flags, and the names of those that were given.

    Raises:
        ValueError: an unknown or ambiguous flag, a word that belongs to none, a value of another type, or none.
    """
    kinds = settings.field_types(cls)
    rest, values = list(arguments), {}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            guess = (
                "; settings of flatmin follow --set" if "=" in word else suggest(f"--{word.lstrip('-')}", _flags(kinds))
            )
            raise ValueError(f"unexpected word {word!r}: expected a flag of {script}{guess}")
        name, equals, text = word.partition("=")
        key = _known(name, kinds, script)
        texts = [text] if equals else _values(rest, kinds[key])
        values[key] = _parse(key, texts, kinds[key])
    return cls(**values), frozenset(values)


def strip_script(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is left of a pasted line without `VARIABLE=value`, `python` and the script's name, and the variables.

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
                f"{word!r} starts other processes; put torchrun before flatmin: torchrun --nproc-per-node N -m flatmin "
                "original PROJECT FLAGS."
            )
        elif not re.fullmatch(r"(.*/)?python[0-9.]*|-u|.*\.py", word):
            break
        rest.pop(0)
    return rest, variables


def choose(flag: str, value: str, choices: Mapping[str, V]) -> V:
    """The entry of a table of the values that a flag may have.

    Raises:
        ValueError: another value.
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
        raise ValueError(f"{word} is no flag of {script}{suggest(word, flags)} (flags: {', '.join(flags)}).")
    if len(close) > 1:
        raise ValueError(f"{word} may be {' or '.join(f'--{name}' for name in close)}; write the flag in full.")
    return close[0]


def _values(rest: list[str], kind: Any) -> list[str]:
    """Take a flag's values off the rest of the line."""
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
        raise ValueError(f"--{key} expects {expected}, and there is none after it.")
    try:
        values = tuple(settings.parse(key, text, item) for text in texts)
    except ValueError:
        raise ValueError(f"--{key} expects {expected}, got {' '.join(texts)!r}.") from None
    return values if several else values[0]


def _plain(kind: Any) -> Any:
    """X for X | None."""
    rest = [one for one in typing.get_args(kind) if one is not type(None)]
    return rest[0] if type(None) in typing.get_args(kind) and len(rest) == 1 else kind
