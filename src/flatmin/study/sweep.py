"""Axes from overrides such as `key=a,b,c` and ranges, and the points of the grid that they span."""

from __future__ import annotations

import itertools
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flatmin.train.config import RunConfig
from flatmin.train.settings import field_types, split_override

# Settings whose value is itself a list, such as milestones; their axes have "/" between the values.
LISTS = tuple(key for key, kind in field_types(RunConfig).items() if typing.get_origin(kind) is tuple)

_WHOLE = re.compile(r"-?\d+")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
MULTIPLE = re.compile(r"(\d+\.?\d*|\.\d+)x")
_MOST = 10_000


@dataclass(frozen=True)
class Axis:
    """A key and the values that it takes, as text.

    Raises:
        ValueError: no value, or the same value twice.
    """

    in_files: ClassVar = "table of lists"

    key: str
    values: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(map(tidy, self.values)))
        if not self.values:
            raise ValueError(f"{self.key}= has no value.")
        double = [value for i, value in enumerate(self.values) if value in self.values[:i]]
        if double:
            raise ValueError(f"{self.key} has the value {double[0]} twice.")


def read_axis(word: str, *, lists: Sequence[str] = LISTS) -> Axis:
    """The axis of an override such as "rho=0.1,0.2" or "seed=0..4", with both ends included.

    Args:
        word: the override.
        lists: keys whose axes have "/" between the values. Default: `LISTS`.

    Raises:
        ValueError: the override has no "=" or no value, has a value twice, or has a range that runs backwards.

    Examples:
        >>> read_axis("seed=0..2,7").values
        ('0', '1', '2', '7')
    """
    key, text = split_override(word)
    if key in lists:
        return Axis(key, tuple(part.strip() for part in text.split("/") if part.strip()))
    values: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        span = _RANGE.fullmatch(part)
        if span is None:
            values += [part] if part else []
            continue
        first, last = int(span[1]), int(span[2])
        if last < first or last - first >= _MOST:
            raise ValueError(
                f"{key}={part} is not a valid range; write the smaller end first, at most {_MOST} numbers."
            )
        values += [str(number) for number in range(first, last + 1)]
    return Axis(key, tuple(values))


def is_multiple(text: str) -> bool:
    """Whether a value is a multiple of another, such as "2x"."""
    return MULTIPLE.fullmatch(text) is not None


def tidy(word: str) -> str:
    """A number in a standard form, so that ".1" and "0.1" are the same point; other text is returned unchanged.

    Examples:
        >>> tidy(".10"), tidy("1e-3"), tidy("28"), tidy("resnet18")
        ('0.1', '0.001', '28', 'resnet18')
    """
    try:
        number = float(word)
    except ValueError:
        return word
    if not math.isfinite(number):
        return word
    if _WHOLE.fullmatch(word):
        return str(int(word))
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)


def points(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """All combinations of values; the last axis varies fastest.

    Raises:
        ValueError: two axes have the same key.

    Examples:
        >>> points([Axis("rho", ("1", "2")), Axis("seed", ("0",))])
        [{'rho': '1', 'seed': '0'}, {'rho': '2', 'seed': '0'}]
    """
    keys = [axis.key for axis in axes]
    double = [key for i, key in enumerate(keys) if key in keys[:i]]
    if double:
        raise ValueError(f"{double[0]} is an axis twice.")
    return [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*(axis.values for axis in axes))]


def overrides(settings: Mapping[str, str]) -> list[str]:
    """Settings as `key=value` overrides."""
    return [f"{key}={value}" for key, value in settings.items()]
