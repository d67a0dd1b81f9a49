"""The dimensions of a search: intervals and choices, written as `key=value` on the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flatmin.study.sweep import LISTS, read_axis, tidy
from flatmin.train.config import RunConfig
from flatmin.train.settings import field_types, split_override

_LOG = 10.0


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """A setting that is searched, over an interval or a list of values.

    Args:
        key: name of the setting.
        low, high: ends of the interval, included.
        whole: whether only whole numbers are tried.
        values: the values to try, in place of an interval.
    """

    key: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    values: tuple[str, ...] = ()

    @property
    def log(self) -> bool:
        """Whether the interval is searched on a logarithmic scale: if 0 < low <= high / 10."""
        return 0 < self.low <= self.high / _LOG

    def ask(self, trial: Any) -> str:
        """A value from an Optuna trial, as text with three significant digits."""
        if self.values:
            return str(trial.suggest_categorical(self.key, self.values))
        if self.whole:
            return str(trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log))
        return tidy(f"{trial.suggest_float(self.key, self.low, self.high, log=self.log):.3g}")


def read_dimension(word: str) -> Dimension:
    """The dimension of an override: "lr=0.01..1", or "batch_size=64,128".

    Raises:
        ValueError: the override has another form, its interval runs backwards, or it has a single value.

    Examples:
        >>> read_dimension("rho=0.01..0.5").log, read_dimension("model=conv,mlp").values
        (True, ('conv', 'mlp'))
    """
    key, text = split_override(word)
    low, dots, high = text.partition("..")
    if not dots or "," in text:
        values = read_axis(word).values
        if len(values) < 2:
            raise ValueError(
                f"{word} has a single value, so there is nothing to search; write LOW..HIGH or several values."
            )
        return Dimension(key=key, values=values)
    try:
        ends = float(low), float(high)
    except ValueError:
        raise ValueError(f"{word} is not an interval of numbers; write {key}=LOW..HIGH, e.g. lr=0.01..1.") from None
    if not (math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] < ends[1]):
        raise ValueError(f"{word} is not an interval; write the smaller end first.")
    whole = field_types(RunConfig).get(key) is int
    if whole and not all(end.is_integer() for end in ends):
        raise ValueError(f"{word}: {key} must have whole numbers as ends.")
    return Dimension(key=key, low=ends[0], high=ends[1], whole=whole)


def read_overrides(overrides: Sequence[str]) -> tuple[list[Dimension], list[str]]:
    """The dimensions among the overrides, and the other overrides, which apply to all runs.

    An override is a dimension if its value is LOW..HIGH or several values separated by commas. Seeds, and settings
    whose value is a list, are never searched.

    Raises:
        ValueError: see `read_dimension`.
    """
    dimensions, rest = [], []
    for override in overrides:
        key, text = split_override(override)
        low, dots, high = text.partition("..")
        interval = bool(low and dots and high) and "/" not in text and field_types(RunConfig).get(key) is not str
        if key not in ("seed", *LISTS) and (interval or "," in text):
            dimensions.append(read_dimension(override))
        else:
            rest.append(override)
    return dimensions, rest
