"""Settings as data: name, type, default, allowed values and help, read from dataclass fields and their docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from flatmin.train.settings import at_least, describe, one_of, written


@dataclass(frozen=True)
class Range:
    """The range of a number field, as in `epochs: Annotated[int, Range(1)]`.

    Args:
        low: smallest value.
        high: largest value. Default: no limit.
        open_low: whether `low` itself is excluded. Default False.
    """

    low: float
    high: float = math.inf
    open_low: bool = False


@dataclass(frozen=True)
class OneOf:
    """The allowed values of a text field, as in `device: Annotated[str, OneOf(("cpu", "cuda"))]`."""

    choices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Key:
    """A setting.

    Args:
        name: name to type before "=".
        kind: type in words.
        default: default as it is typed; empty if there is none.
        help: what the setting does.
        group: heading under which the setting is listed.
        choices: the allowed values; empty if other values are possible.
    """

    name: str
    kind: str
    default: str
    help: str
    group: str = ""
    choices: tuple[str, ...] = ()


@cache
def rules_of(cls: type) -> Mapping[str, Range | OneOf]:
    """The `Range` and `OneOf` rules of a dataclass's fields, by field name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rules: dict[str, Range | OneOf] = {}
    for field in dataclasses.fields(cls):
        for note in getattr(hints[field.name], "__metadata__", ()):
            if isinstance(note, (Range, OneOf)):
                rules[field.name] = note
    return rules


def check(owner: Any) -> None:
    """Raise ValueError unless every field satisfies its `Range` or `OneOf`; a field that is None is not checked."""
    cls: Any = type(owner)
    for name, rule in rules_of(cls).items():
        if getattr(owner, name) is None:
            continue
        if isinstance(rule, OneOf):
            one_of(owner, name, rule.choices)
        else:
            at_least(owner, name, rule.low, open_low=rule.open_low, high=rule.high)


def keys_of(cls: type, *, values: Mapping[str, Iterable[str]] | None = None, like: Any = None) -> list[Key]:
    """The fields of a dataclass as settings.

    Args:
        cls: the dataclass. Every field needs an entry under "Args:" in its docstring, or in that of a base class; a
            line there without a colon is the heading of the entries below it.
        values: allowed values by field, for fields without a `OneOf`.
        like: an object of the class whose values are taken as defaults. Default: the defaults of the class.

    Raises:
        ValueError: a field has no entry.
    """
    hints, helps, rules = typing.get_type_hints(cls), _entries(cls), rules_of(cls)
    keys = []
    for field in dataclasses.fields(cls):
        if field.name not in helps:
            raise ValueError(f"{cls.__name__}.{field.name} has no entry under Args: in the docstring.")
        rule, kind = rules.get(field.name), hints[field.name]
        words = rule.choices if isinstance(rule, OneOf) else _literals(kind)
        group, text = helps[field.name]
        keys.append(
            Key(
                name=field.name,
                kind=describe(kind),
                default=_default(field) if like is None else written(getattr(like, field.name)),
                help=text.replace("None:", "none:"),  # as it is typed on the command line
                group=group,
                choices=words or tuple((values or {}).get(field.name, ())),
            )
        )
    return keys


def keywords_of(function: Callable[..., Any]) -> list[Key]:
    """The keyword arguments of a function as settings; only those whose default is a number, a text or a bool."""
    made: Any = getattr(function, "func", function)  # of functools.partial
    fixed = len(getattr(function, "args", ()))
    helps = entries(made.__doc__)
    keys = []
    for name, parameter in list(inspect.signature(made).parameters.items())[fixed:]:
        default = parameter.default
        if isinstance(default, (bool, int, float, str)):
            text = helps.get(name, ("", ""))[1]
            keys.append(Key(name=name, kind=describe(type(default)), default=written(default), help=text))
    return keys


def entries(doc: str | None) -> dict[str, tuple[str, str]]:
    """The heading and the text of each entry under "Args:" of a docstring, by name.

    Args:
        doc: the docstring. Each entry is "name: text" or "name, name: text"; a line without a colon is a heading.
    """
    found = re.search(r"^Args:\n((?:    .*\n|\n)*)", inspect.cleandoc(doc or "") + "\n", re.MULTILINE)
    group, out = "", dict[str, tuple[str, str]]()
    for item in re.split(r"\n(?=    \S)", found[1] if found else ""):
        text = " ".join(item.split())
        names, colon, rest = text.partition(": ")
        if not colon:
            group = text or group
            continue
        out |= dict.fromkeys((name.strip() for name in names.split(",")), (group, rest))
    return out


def _entries(cls: type) -> dict[str, tuple[str, str]]:
    """The entries of a class and its bases; those of the class replace those of its bases."""
    out: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__):
        out |= entries(base.__dict__.get("__doc__"))
    return out


def _literals(kind: Any) -> tuple[str, ...]:
    if typing.get_origin(kind) is Literal:
        return tuple(map(str, typing.get_args(kind)))
    return ()


def _default(field: dataclasses.Field[Any]) -> str:
    """The default as it is typed; empty if there is none, or if it is an empty list or a table."""
    if field.default is dataclasses.MISSING or field.default in ((), ""):
        return ""
    return written(field.default)
