"""What a setting is: name, type, default, allowed values and help, from a field of a dataclass and its docstring."""

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
    """The numbers that a field may have, as in `epochs: Annotated[int, Range(1)]`.

    Args:
        low: the least one.
        high: the greatest one. Default: none.
        open_low: whether `low` itself is excluded. Default False.
    """

    low: float
    high: float = math.inf
    open_low: bool = False


@dataclass(frozen=True)
class OneOf:
    """The words that a field may have, as in `device: Annotated[str, OneOf(("cpu", "cuda"))]`."""

    choices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Key:
    """A setting.

    Args:
        name: as one types it before "=".
        kind: its type in words.
        default: as one types it; empty if there is none.
        help: what it does.
        group: heading under which it is listed.
        choices: the words that it can have; none if it can have others.
    """

    name: str
    kind: str
    default: str
    help: str
    group: str = ""
    choices: tuple[str, ...] = ()


@cache
def rules_of(cls: type) -> Mapping[str, Range | OneOf]:
    """What `Annotated` says of the fields of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rules: dict[str, Range | OneOf] = {}
    for field in dataclasses.fields(cls):
        for note in getattr(hints[field.name], "__metadata__", ()):
            if isinstance(note, (Range, OneOf)):
                rules[field.name] = note
    return rules


def check(owner: Any) -> None:
    """Raise ValueError unless every field has a value that its `Range` or `OneOf` allows; None where it is optional."""
    cls: Any = type(owner)
    for name, rule in rules_of(cls).items():
        if getattr(owner, name) is None:
            continue
        if isinstance(rule, OneOf):
            one_of(owner, name, rule.choices)
        else:
            at_least(owner, name, rule.low, open_low=rule.open_low, high=rule.high)


def keys_of(cls: type, *, values: Mapping[str, Iterable[str]] | None = None, like: Any = None) -> list[Key]:
    """The settings that the fields of a dataclass are.

    Args:
        cls: the dataclass. Every field has an entry under "Args:" in its docstring, or in that of a base class; a line
            there without a colon is the heading of the entries below it.
        values: further words that a field can have, by field.
        like: an object of the class whose values are the defaults. Default: the class's own defaults.

    Raises:
        ValueError: a field without an entry.
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
                help=text.replace("None:", "none:"),  # as one types it
                group=group,
                choices=words or tuple((values or {}).get(field.name, ())),
            )
        )
    return keys


def keywords_of(function: Callable[..., Any]) -> list[Key]:
    """The settings that the keywords of a function are whose default is a number, text or a truth value."""
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
    """Heading and text of each entry under "Args:" of a docstring.

    Args:
        doc: as written: each entry is "name: text" or "name, name: text"; a line without a colon is a heading.
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
    """Those of a class and its bases; the class's own win."""
    out: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__):
        out |= entries(base.__dict__.get("__doc__"))
    return out


def _literals(kind: Any) -> tuple[str, ...]:
    if typing.get_origin(kind) is Literal:
        return tuple(map(str, typing.get_args(kind)))
    return ()


def _default(field: dataclasses.Field[Any]) -> str:
    """As one types it; empty for none, an empty list and a table."""
    if field.default is dataclasses.MISSING or field.default in ((), ""):
        return ""
    return written(field.default)
