"""The parts of a demonstration: a table, the panels of a figure, and claims that are checked with runs."""

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
"""One letter for each status of a property, for tables."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement about a measured value.

    Attributes:
        text: the statement.
        measured: the measured number or word.
        expected: the value that the theory predicts.
        relation: "equals" (|measured - expected| <= tolerance, or equal words), "below" (<=) or "above" (>=).
        tolerance: absolute tolerance of "equals". Default: 0.0.
    """

    text: str
    measured: float | str
    expected: float | str
    relation: Literal["equals", "below", "above"] = "equals"
    tolerance: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the claim holds; False if a number is nan."""
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
    """The values with nan in place of those below `least`, for logarithmic axes."""
    return np.where(y >= least, y, np.nan)


def below(text: str, measured: float, bound: float) -> Claim:
    """The claim measured <= bound."""
    return Claim(text=text, measured=measured, expected=bound, relation="below")


def above(text: str, measured: float, bound: float) -> Claim:
    """The claim measured >= bound."""
    return Claim(text=text, measured=measured, expected=bound, relation="above")


def same(text: str, measured: str, expected: str) -> Claim:
    """The claim that two words are equal."""
    return Claim(text=text, measured=measured, expected=expected)


@dataclass(frozen=True, kw_only=True)
class PanelCurve:
    """A line of a panel.

    Attributes:
        label: label in the legend; "" to leave it out.
        x, y: coordinates of the points, shape (m,).
        style: "run" for a solid line, "theory" for a dashed line, "points" for marks that are not joined.
        color: number of the colour; None for the next one, or dark for theory.
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
        title, xlabel, ylabel: texts; labels have units where there are any.
        curves: the curves.
        levels: heights and labels of horizontal dashed lines.
        log_x, log_y: whether the axes are logarithmic.
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
        rows, columns: names of the rows and columns.
        letters: for each row a string with one letter for each column.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    letters: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DemonstrationResult:
    """The result of a demonstration.

    Attributes:
        title: title of the figure and the table.
        statement: what the demonstration shows, in a few sentences.
        columns: names of the columns.
        rows: cells of the rows.
        claims: statements that must hold.
        panels: panels of the figure, in reading order.
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
    """A demonstration of the theory.

    Attributes:
        name: name on the command line.
        title: a line for lists.
        source: source of the statement, or a note that it is derived here.
        run: computes the result, which takes seconds.
    """

    name: str
    title: str
    source: str
    run: Callable[[], DemonstrationResult]


def shown(value: Cell) -> str:
    """A cell as text; numbers have up to seven digits."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.7g}"
    return str(value)


def brief(theorem: str | None) -> str:
    """The number of a theorem without its title; "none" for None."""
    return "none" if theorem is None else theorem.partition(" (")[0]


def slope(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """The slope of the least-squares line through points."""
    return float(np.polyfit(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), 1)[0])
