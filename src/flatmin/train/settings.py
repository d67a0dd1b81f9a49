"""Typed settings: frozen dataclasses, filled from a TOML preset, then from `key=value` overrides."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from flatmin.words import read_text, suggest

T = TypeVar("T")
_UNIONS = (typing.Union, types.UnionType)


def field_types(cls: type) -> dict[str, Any]:
    """Resolved type of every field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def describe(kind: Any) -> str:
    """A field's type in words."""
    if _optional(kind) is not None:
        return f"{describe(_optional(kind))} or none"
    if typing.get_origin(kind) is tuple:
        return f"list of {describe(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) in _UNIONS:
        return ", ".join(map(describe, typing.get_args(kind)))
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    return names.get(kind, "table")


def parse(key: str, text: str, kind: Any) -> Any:
    """The value that a word of text means for a field of this type.

    Args:
        key: the field, for the error.
        text: as typed, e.g. "0.1", "true", "sam,asam", "none".
        kind: the field's type: int, float, bool, str, X | None, or tuple[X, ...].

    Raises:
        ValueError: text that is no such value.
    """
    inner = _optional(kind)
    if inner is not None:
        return None if text.strip().lower() in {"none", ""} else parse(key, text, inner)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(parse(key, word.strip(), item) for word in text.split(",") if word.strip())
    try:
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.strip().lower()]
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
    except (ValueError, KeyError):
        raise ValueError(f"{key}={text} is not a {describe(kind)}.") from None
    if kind is str:
        return text
    raise ValueError(f"{key} is a table: set one entry of it with {key}.NAME=value.")


def guess(text: str) -> bool | int | float | str:
    """A value whose type is known only to the part that takes it: bool, int, float or text."""
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
    """A TOML value as the field's type.

    Raises:
        ValueError: a value of another type.
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
    allowed = typing.get_args(kind) if origin in _UNIONS else (kind,)
    if type(value) in allowed and type(value) in (bool, int, float, str):
        return value
    raise ValueError(f"{key} = {value!r} is a {type(value).__name__}, expected a {describe(kind)}.")


def read_preset(name: str, kind: str = "compare") -> dict[str, Any]:
    """A preset's table, from the package by name or from a file by path.

    Args:
        name: "digits", or a path that ends in .toml.
        kind: "compare" or "train": the command that it is for.

    Raises:
        ValueError: unknown name, missing file, a file in another encoding (see `flatmin.words.read_text`), or no TOML.
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


def preset_names(kind: str = "compare") -> list[str]:
    """Names of the presets inside the package for a command."""
    folder = resources.files("flatmin") / "presets" / kind
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def fill(cls: type[T], table: Mapping[str, Any], *, origin: str = "settings") -> T:
    """A dataclass from a table of plain values.

    Raises:
        ValueError: an unknown key or a value of another type.
    """
    kinds = field_types(cls)
    for key in table:
        if key not in kinds:
            raise ValueError(f"{origin}: unknown option {key!r}{suggest(key, kinds)} (options: {', '.join(kinds)})")
    return cls(**{key: coerce(key, value, kinds[key]) for key, value in table.items()})


def split_override(word: str) -> tuple[str, str]:
    """("key", "value") of "key=value".

    Raises:
        ValueError: a word without "=" or without a key.
    """
    key, equals, value = word.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"{word!r} is not an override; write key=value, for example epochs=10.")
    return key.strip(), value.strip()


def canonical(value: Any) -> Any:
    """Dataclasses, mappings and tuples as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: canonical(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): canonical(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(one) for one in value]
    return value


def content_hash(*values: Any) -> str:
    """Hex digest that depends on content only, not on the order of keys. NaN is refused."""
    text = json.dumps(canonical(values), sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def at_least(owner: Any, name: str, low: float, *, open_low: bool = False, high: float = math.inf) -> None:
    """Raise ValueError unless the field is a finite number in the range."""
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
    """X for X | None, else None."""
    if typing.get_origin(kind) in _UNIONS:
        rest = [one for one in typing.get_args(kind) if one is not type(None)]
        if len(rest) == 1 and len(typing.get_args(kind)) == 2:
            return rest[0]
    return None
