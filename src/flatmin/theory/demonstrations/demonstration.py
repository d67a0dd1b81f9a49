"""A demonstration: a table, the panels of a figure, and claims that are checked against runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

PAPER = (
    "Khanh, Luong, Mordukhovich & Tran, Fundamental Convergence Analysis of Sharpness-Aware Minimization, NeurIPS 2024"
)
Cell = str | int | float
LETTERS = {"follows": "F", "not shown": "n", "fails": "X"}
"""One letter for each status of a property, as tables print the five of a verdict."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement about a measured number or word.

    Attributes:
        text: the statement.
        measured: a number or a word of the runs.
        expected: the value by the theory.
        relation: "equals" (|measured - expected| <= tolerance; words must be the same), "below" (<=) or "above" (>=).
        tolerance: of "equals", absolute. Default 0.0.
    """

    text: str
    measured: float | str
    expected: float | str
    relation: Literal["equals", "below", "above"] = "equals"
    tolerance: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the claim holds; False where a number is nan."""
        measured, expected = self.measured, self.expected
        if isinstance(measured, str) or isinstance(expected, str):
            return measured == expected
        if self.relation == "equals":
            return abs(measured - expected) <= self.tolerance
        return measured <= expected if self.relation == "below" else measured >= expected

    def __str__(self) -> str:
        sign = {"equals": "expected", "below": "at most", "above": "at least"}[self.relation]
        within = f" ± {self.tolerance:.2g}" if self.tolerance else ""
        return f"{self.text}: {shown(self.measured)}, {sign} {shown(self.expected)}{within}"


def near(text: str, measured: float, expected: float, *, rel: float = 0.0, tol: float = 0.0) -> Claim:
    """The claim |measured - expected| <= max(rel |expected|, tol)."""
    return Claim(text=text, measured=measured, expected=expected, tolerance=max(rel * abs(expected), tol))


def seen(y: np.ndarray, least: float = 1e-16) -> np.ndarray:
    """The values, with gaps where they are below `least`, for logarithmic axes."""
    return np.where(y >= least, y, np.nan)


def below(text: str, measured: float, bound: float) -> Claim:
    """The claim measured <= bound."""
    return Claim(text=text, measured=measured, expected=bound, relation="below")


def above(text: str, measured: float, bound: float) -> Claim:
    """The claim measured >= bound."""
    return Claim(text=text, measured=measured, expected=bound, relation="above")


def same(text: str, measured: str, expected: str) -> Claim:
    """The claim that two words are the same."""
    return Claim(text=text, measured=measured, expected=expected)


@dataclass(frozen=True, kw_only=True)
class PanelCurve:
    """A line of a panel.

    Attributes:
        label: for the legend; "" leaves it out.
        x, y: of the points, shape (m,).
        style: a "run" is a solid line, "theory" a dashed one, "points" are not joined.
        color: number of the colour; None: the next one, and dark for theory.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    style: Literal["run", "theory", "points"] = "run"
    color: int | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    Attributes:
        title, xlabel, ylabel: words; labels with units where there are any.
        curves: the curves.
        levels: heights and names of horizontal dashed lines.
        log_x, log_y: whether an axis is logarithmic.
        low, high: ends of the y axis; None to follow the data.
    """

    title: str
    xlabel: str
    ylabel: str
    curves: tuple[PanelCurve, ...]
    levels: tuple[tuple[float, str], ...] = ()
    log_x: bool = False
    log_y: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Marks:
    """A matrix of letters F, n and X: what follows, is not shown, and fails.

    Attributes:
        rows, columns: their names.
        letters: a word of `len(columns)` letters for each row.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    letters: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DemonstrationResult:
    """The result of a demonstration.

    Attributes:
        title: of the figure and the table.
        statement: the claim in one or two sentences.
        columns: names of the columns.
        rows: cells, numbers as numbers.
        claims: statements that must hold.
        panels: of the figure, in reading order.
    """

    title: str
    statement: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    claims: tuple[Claim, ...]
    panels: tuple[Panel | Marks, ...]

    def column(self, name: str) -> list[Cell]:
        """The cells of a column."""
        place = self.columns.index(name)
        return [row[place] for row in self.rows]


@dataclass(frozen=True)
class Demonstration:
    """A line of the table of demonstrations.

    Attributes:
        name: name on the command line.
        title: one line.
        source: source of the statement, or that it is derived here.
        run: computes the result, in seconds.
    """

    name: str
    title: str
    source: str
    run: Callable[[], DemonstrationResult]


def shown(value: Cell) -> str:
    """A cell as text: words as they are, numbers with up to seven digits."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.7g}"
    return str(value)


def brief(theorem: str | None) -> str:
    """A theorem without its title; "none" for none."""
    return "none" if theorem is None else theorem.partition(" (")[0]


def slope(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """The slope of the line through points, by least squares."""
    return float(np.polyfit(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), 1)[0])
