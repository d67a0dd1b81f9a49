"""The style of a study's rows: a colour for each arm, a symbol and a dash for each point of the axes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatmin.report.figures.chart import Drawable
from flatmin.report.html import NUM_TONES
from flatmin.report.style import DASHES, DASHES_IN_WORDS, SYMBOLS, Style, styles
from flatmin.study.tabulate import StudyRow, StudyTable

EVERY = ""  # the choice that shows all points
_FEW = 8  # the most rows that are readable in one figure
_NAMED = min(6, len(DASHES))  # the most symbols that are explained


@dataclass(frozen=True, kw_only=True)
class FigureSection:
    """Figures under one heading.

    Args:
        title: the heading.
        caption: what the figures show, and what their error bars are.
        figures: the figures, each with its own title.
    """

    title: str
    caption: str
    figures: Sequence[Drawable]


class StudyStyle:
    """Colours, symbols and points of a study.

    A point is a combination of values of the axes that are not chosen on validation data. An arm without an axis, such
    as plain training in a study of radii, belongs to all points that agree with its values.

    Args:
        table: the study's table.
    """

    def __init__(self, table: StudyTable) -> None:
        arms = list(dict.fromkeys(row.arm for row in table.rows))
        others = [arm for arm in arms if arm != table.spec.baseline]
        self._turn = {arm: others.index(arm) if arm in others else 0 for arm in arms}
        self.tones = {arm: style.tone for arm, style in styles(arms, table.spec.baseline).items()}
        points: list[Mapping[str, str]] = []
        for row in table.rows:
            if row.point not in points:
                points.append(row.point)
        self.points = [point for point in points if not any(point.items() < other.items() for other in points)]
        self._arms = arms
        self._cycles = len(others) >= NUM_TONES
        self.num_rows = len(table.rows)

    def at(self, arm: str, values: Mapping[str, str]) -> Style:
        """The style of an arm at a point; arms beyond the number of colours differ by symbol and dash."""
        place = next((i for i, point in enumerate(self.points) if values.items() <= point.items()), 0)
        cycle = self._turn[arm] // (NUM_TONES - 1)
        symbol = self._arms.index(arm) if len(self.points) < 2 else place + 3 * cycle
        return Style(
            tone=self.tones[arm], symbol=SYMBOLS[symbol % len(SYMBOLS)], dash=DASHES[(place + cycle) % len(DASHES)]
        )

    def of(self, row: StudyRow, without: Collection[str] = ()) -> dict[str, Any]:
        """Arguments of a row's `Series`: label, style, and the keys by which the page shows and hides it.

        Args:
            row: the row.
            without: axes along which the series runs, or that the figure shows in another way.
        """
        values = {key: value for key, value in row.point.items() if key not in without}
        style = self.at(row.arm, values)
        named = [f"{key}={value}" for key, value in row.values.items() if key not in without]
        shown = [str(i) for i, point in enumerate(self.points) if values.items() <= point.items()]
        return {
            "label": " ".join([row.arm, *named]),
            "tone": style.tone,
            "symbol": style.symbol,
            "dash": style.dash,
            "group": row.arm,
            "points": shown,
        }

    def choices(self) -> tuple[dict[str, str], str]:
        """The points by key, and the key that is chosen initially; empty for a single point."""
        if len(self.points) < 2:
            return {}, EVERY
        named = {str(i): listed(point) for i, point in enumerate(self.points)}
        every = {EVERY: f"all {len(self.points)} points"}
        return (every | named, EVERY) if self.num_rows <= _FEW else (named | every, "0")

    def explained(self) -> str:
        """A sentence on what symbols and dashes mean; empty if colours are enough."""
        many = (
            "Arms with the same colour differ by symbol and dash; hover over a mark for its name."
            if self._cycles
            else ""
        )
        if len(self.points) < 2:
            return many
        if many or len(self.points) > _NAMED:
            return many or "Points of the axes differ by symbol and dash; hover over a mark for its name."
        kinds = zip(SYMBOLS, DASHES_IN_WORDS, self.points, strict=False)
        return "; ".join(f"{symbol}, {dash}: {listed(point)}" for symbol, dash, point in kinds).capitalize() + "."


def listed(values: Mapping[str, str]) -> str:
    """Values as text, such as "rho = 0.1, epochs = 20"."""
    return ", ".join(f"{key} = {value}" for key, value in values.items())


def tried_rows(table: StudyTable) -> list[StudyRow]:
    """The rows from which a choice was made, and the rows without a choice."""
    return [one for row in table.rows for one in table.tried.get(row.label, [row])]


def every_row(table: StudyTable) -> list[StudyRow]:
    """All rows, including those that were not chosen. Rows of a choice on separate seeds come before the chosen row."""
    found: list[StudyRow] = []
    for row in table.rows:
        tried = table.tried.get(row.label, [row])
        # The chosen row has the grid point of one of those that were tried, unless these have seeds of their own.
        found += [row if one.grid_point is row.grid_point else one for one in tried]
        found += [] if any(one.grid_point is row.grid_point for one in tried) else [row]
    return found
