"""Read settings: `key=value` words and TOML tables become typed fields of frozen dataclasses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from flatmin.words import read_text, suggest

T = TypeVar("T")
_UNIONS = (typing.Union, types.UnionType)


def field_types(cls: type) -> Mapping[str, Any]:
    """The resolved type of every field of a dataclass."""
    return _field_types(cls)


@cache
def _field_types(cls: type) -> Mapping[str, Any]:
    hints = typing.get_type_hints(cls)
    return types.MappingProxyType({field.name: hints[field.name] for field in dataclasses.fields(cls)})


def describe(kind: Any) -> str:
    """A field's type in words."""
    if _optional(kind) is not None:
        return f"{describe(_optional(kind))} or none"
    if typing.get_origin(kind) is tuple:
        if words := getattr(typing.get_args(kind)[0], "in_files", None):  # a class may describe how files list it
            return str(words)
        item = describe(typing.get_args(kind)[0])
        return f"list of {item}{'s' * item.endswith(('number', 'table'))}"
    if typing.get_origin(kind) in _UNIONS:
        return " or ".join(dict.fromkeys(map(describe, typing.get_args(kind))))
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    return names.get(kind, "table")


def articled(words: str) -> str:
    """A type in words, with its article.

    Examples:
        >>> articled("whole number"), articled("int"), articled("true or false"), articled("text")
        ('a whole number', 'an int', 'true or false', 'text')
    """
    if words.startswith(("text", "true or false", "auto")):
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def parse(key: str, text: str, kind: Any) -> Any:
    """Parse text as a value of a field's type.

    Args:
        key: name of the field, for the error message.
        text: as typed, e.g. "0.1", "true", "sam,asam", "none".
        kind: the field's type: int, float, bool, str, X | None, X | Y, Literal[...] or tuple[X, ...].

    Raises:
        ValueError: the text is not a value of this type.
    """
    inner = _optional(kind)
    if inner is not None:
        return None if text.strip().lower() in {"none", ""} else parse(key, text, inner)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(parse(key, word.strip(), item) for word in text.split(",") if word.strip())
    if typing.get_origin(kind) is Literal and text.strip() in typing.get_args(kind):
        return text.strip()
    if typing.get_origin(kind) in _UNIONS:
        for one in typing.get_args(kind):
            with suppress(ValueError):
                return parse(key, text, one)
    try:
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.strip().lower()]
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
    except (ValueError, KeyError):
        raise ValueError(f"{key}={text} is not {articled(describe(kind))}.") from None
    if kind is str:
        return text
    if typing.get_origin(kind) in (Literal, *_UNIONS):
        raise ValueError(f"{key}={text} is not {describe(kind)}.")
    raise ValueError(f"{key} is a table; set one of its entries with {key}.NAME=value.")


def guess(text: str) -> bool | int | float | str:
    """Parse text without knowing the expected type: as bool, int, float, or else as text."""
    word = text.strip()
    if word.lower() in {"true", "false"}:
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def coerce(key: str, value: Any, kind: Any) -> Any:
    """Convert a TOML value to the field's type.

    Raises:
        ValueError: the value has another type.
    """
    inner = _optional(kind)
    if inner is not None:
        return None if value is None else coerce(key, value, inner)
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(coerce(key, item, typing.get_args(kind)[0]) for item in value)
    if kind is Any:
        return value
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        item = typing.get_args(kind)[1]
        return {name: coerce(f"{key}.{name}", one, item) for name, one in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is Literal and value in typing.get_args(kind):
        return value
    for one in typing.get_args(kind) if origin in _UNIONS else ():
        with suppress(ValueError):
            return coerce(key, value, one)
    if type(value) is kind and kind in (bool, int, float, str):
        return value
    found = articled(type(value).__name__)
    raise ValueError(f"{key} = {value!r} is {found}, expected {articled(describe(kind))}.")


def read_preset(name: str, kind: str = "train") -> dict[str, Any]:
    """Read the table of a preset: one of the package by name, or a file by path.

    Args:
        name: name such as "digits", or a path that ends in .toml.
        kind: command that the preset is for: "train" or "study".

    Raises:
        ValueError: the name is unknown, the file is missing, in another encoding (see `flatmin.words.read_text`), or
            not valid TOML.
    """
    if name.lower().endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"preset file {name!r} does not exist.")
        text = read_text(path)
    else:
        presets = preset_names(kind)
        if name not in presets:
            raise ValueError(
                f"unknown preset {name!r}{suggest(name, presets)} (presets: {', '.join(presets)}, or a .toml file)"
            )
        text = read_text(resources.files("flatmin") / "presets" / kind / f"{name}.toml")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"preset {name!r} is not valid TOML: {error}.") from error


def preset_names(kind: str = "train") -> list[str]:
    """The names of the package's presets for a command."""
    folder = resources.files("flatmin") / "presets" / kind
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def fill(cls: type[T], table: Mapping[str, Any], *, origin: str = "settings") -> T:
    """Make a dataclass from a table of plain values.

    Raises:
        ValueError: a key is unknown, or a value has another type.
    """
    kinds = field_types(cls)
    for key in table:
        if key not in kinds:
            raise ValueError(f"{origin}: unknown option {key!r}{suggest(key, kinds)} (options: {', '.join(kinds)})")
    return cls(**{key: coerce(key, value, kinds[key]) for key, value in table.items()})


def split_override(word: str) -> tuple[str, str]:
    """Split "key=value" into ("key", "value").

    Raises:
        ValueError: the word has no "=" or no key.
    """
    key, equals, value = word.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"{word!r} is not a setting; write KEY=VALUE, for example epochs=10.")
    return key.strip(), value.strip()


def read_words(words: Iterable[str], kinds: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read `key=value` words: typed values for the known keys, and the text for the others.

    If a key is given several times, the last value counts.

    Args:
        words: such as "epochs=10", or "extra.NAME=value" for an entry of a table.
        kinds: the known keys with their types, see `field_types`.

    Raises:
        ValueError: a word is not `key=value`, or a value has another type.

    Examples:
        >>> read_words(["epochs=3", "theta=0.8", "epochs=4"], {"epochs": int})
        ({'epochs': 4}, {'theta': '0.8'})
    """
    values: dict[str, Any] = {}
    rest: dict[str, str] = {}
    for word in words:
        key, text = split_override(word)
        table, dot, entry = key.partition(".")
        if key in kinds:
            values[key] = parse(key, text, kinds[key])
        elif dot and typing.get_origin(kinds.get(table)) in (dict, Mapping):
            values.setdefault(table, {})[entry] = parse(key, text, typing.get_args(kinds[table])[1])
        else:
            rest[key] = text
    return values, rest


def read_table(cls: type, words: Iterable[str], *, unknown: str = "unknown setting") -> dict[str, Any]:
    """Read `key=value` words as typed fields of a dataclass.

    Args:
        cls: the dataclass.
        words: its settings.
        unknown: beginning of the error message about an unknown key.

    Raises:
        ValueError: a word is not `key=value`, a key is unknown, or a value has another type.
    """
    kinds = field_types(cls)
    values, rest = read_words(words, kinds)
    for key in rest:
        listed = f" (settings: {', '.join(kinds)})" if kinds else "; there are no settings here."
        raise ValueError(f"{unknown} {key!r}{suggest(key, kinds)}{listed}")
    return values


def written(value: Any) -> str:
    """Format a value as it is typed on the command line; `parse` reads it back.

    Examples:
        >>> written(True), written(1.0), written(5e-4), written((60, 120)), written(None)
        ('true', '1', '0.0005', '60,120', 'none')
    """
    if isinstance(value, (list, tuple)):
        return ",".join(map(written, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def canonical(value: Any) -> Any:
    """Convert dataclasses, mappings and tuples to plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: canonical(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): canonical(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(one) for one in value]
    return value


def content_hash(*values: Any) -> str:
    """Hex digest of values; it does not depend on the order of keys. NaN raises a ValueError."""
    text = json.dumps(canonical(values), sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def at_least(owner: Any, name: str, low: float, *, open_low: bool = False, high: float = math.inf) -> None:
    """Raise ValueError unless the field is a finite number within the range."""
    value = getattr(owner, name)
    good = isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
    if not good or (open_low and value == low):
        upper = f" and at most {high:g}" if math.isfinite(high) else ""
        raise ValueError(f"{name} must be {'above' if open_low else 'at least'} {low:g}{upper}, got {value!r}.")


def one_of(owner: Any, name: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless the field is one of the choices."""
    value = getattr(owner, name)
    if value not in choices:
        raise ValueError(f"{name}={value} is not known{suggest(str(value), choices)} ({name}: {', '.join(choices)})")


def _optional(kind: Any) -> Any:
    """X if the type is X | None, else None."""
    if typing.get_origin(kind) in _UNIONS:
        rest = [one for one in typing.get_args(kind) if one is not type(None)]
        if len(rest) == 1 and len(typing.get_args(kind)) == 2:
            return rest[0]
    return None
