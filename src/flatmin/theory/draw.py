"""Figures of the demonstrations with matplotlib (extra "plot"), in colours for colour-blind readers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from flatmin.report.figures.chart import Axis, Chart, Series
from flatmin.report.figures.files import write_figure as save
from flatmin.report.figures.static import defaults, draw, new_figure, require
from flatmin.report.style import SYMBOLS, tone
from flatmin.theory.demonstrations.demonstration import DemonstrationResult, Marks, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure", "require", "save"]

_INK = "#1b1f24"
_FILLS = {"F": ("#d3ebf7", "follows"), "n": ("#f2f3f5", "not shown"), "X": ("#f7cdb5", "fails")}
_SIZE = (4.3, 3.7)  # inches of one panel
_ROW = 0.27  # inches of one row of marks


def figure(shown: DemonstrationResult) -> Figure:
    """The figure of a demonstration: its panels side by side, or in two rows if there are four.

    Args:
        shown: the result of the demonstration.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    panels = shown.panels
    columns = 2 if len(panels) == 4 else len(panels)
    rows = -(-len(panels) // columns)
    width, height = _SIZE[0] * columns, _SIZE[1] * rows
    if isinstance(panels[0], Marks):
        width, height = 7.4, 1.3 + _ROW * len(panels[0].rows)
    elif len(panels) == 1:
        width = 6.4
    drawn = new_figure(width, height)
    with defaults():
        drawn.suptitle(shown.title, x=0.01, ha="left", fontsize=12, color=_INK, fontweight="bold")
        for number, panel in enumerate(panels):
            axes = drawn.add_subplot(rows, columns, number + 1)
            if isinstance(panel, Marks):
                _marks_onto(axes, panel)
            else:
                draw(axes, chart(panel), legend=True)
    return drawn


def chart(panel: Panel) -> Chart:
    """A panel as a chart, with its title as the note above it."""
    series, taken = [], 0
    for place, curve in enumerate(panel.curves):
        color = curve.color
        if color is None and curve.style != "theory":
            color, taken = taken, taken + 1
        # Curves on top of each other stay visible by their different widths.
        own: dict[str, Any] = {"width": max(4.0 - 0.5 * place, 2.0)}
        if curve.style == "theory":
            own = {"width": 2.3, "dash": "dash"}
        elif curve.style == "points":
            own = {"kind": "marks", "symbol": SYMBOLS[(color or 0) % len(SYMBOLS)], "size": 13.0, "edge": "#ffffff"}
        series.append(
            Series(
                label=curve.label,
                x=np.asarray(curve.x, dtype=np.float64).tolist(),
                y=[y if math.isfinite(y) else math.nan for y in map(float, curve.y)],
                tone="ink" if color is None else tone(color),
                **own,
            )
        )
    return Chart(
        title=panel.title,
        note=panel.title,
        x=Axis(label=panel.xlabel, log=panel.log_x),
        y=Axis(label=panel.ylabel, log=panel.log_y, range=(panel.low, panel.high)),
        series=series,
        levels=dict(panel.levels),
    )


def _marks_onto(axes: Axes, marks: Marks) -> None:
    from matplotlib.patches import Patch, Rectangle

    for j, letters in enumerate(marks.letters):
        for i, letter in enumerate(letters):
            axes.add_patch(Rectangle((i, j), 1, 1, facecolor=_FILLS[letter][0], edgecolor="white", linewidth=2))
            axes.text(i + 0.5, j + 0.52, letter, ha="center", va="center", fontsize=9, color=_INK)
    axes.set_xlim(0, len(marks.columns))
    axes.set_ylim(len(marks.rows), 0)
    axes.set_xticks(np.arange(len(marks.columns)) + 0.5, marks.columns)
    axes.set_yticks(np.arange(len(marks.rows)) + 0.5, marks.rows)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8.5, colors=_INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles = [Patch(facecolor=color, label=f"{letter}  {name}") for letter, (color, name) in _FILLS.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.005), ncols=3, frameon=False, fontsize=8.5)
