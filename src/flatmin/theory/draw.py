"""Figures of the demonstrations with matplotlib (extra "plot"), in colours for colour-blind readers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flatmin.report.figures.content import Lines
from flatmin.report.figures.static import COLORS, MARKERS, lines_onto, new_figure, save
from flatmin.theory.demonstrations.demonstration import DemonstrationResult, Marks, Panel, PanelCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure", "new_figure", "save"]

_INK, _SOFT = "#1b1f24", "#5b6470"
_FILLS = {"F": ("#d3ebf7", "follows"), "n": ("#f2f3f5", "not shown"), "X": ("#f7cdb5", "fails")}
_SIZE = (4.3, 3.7)  # inches of one panel
_ROW = 0.27  # inches of one row of marks


def figure(shown: DemonstrationResult) -> Figure:
    """The figure of a demonstration: its panels side by side, four in two rows.

    Args:
        shown: what it found.

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
    drawn.suptitle(shown.title, x=0.01, ha="left", fontsize=12, color=_INK, fontweight="bold")
    for number, panel in enumerate(panels):
        axes = drawn.add_subplot(rows, columns, number + 1)
        if isinstance(panel, Marks):
            _marks_onto(axes, panel)
        else:
            _panel_onto(axes, panel)
    return drawn


def _panel_onto(axes: Axes, panel: Panel) -> None:
    taken = 0
    for place, curve in enumerate(panel.curves):
        color = curve.color
        if color is None and curve.style != "theory":
            color, taken = taken, taken + 1
        _curve_onto(axes, curve, _INK if color is None else COLORS[color % len(COLORS)], color or 0, place)
    lines_onto(
        axes,
        Lines(
            lines=(), xlabel=panel.xlabel, ylabel=panel.ylabel, note=panel.title, log_x=panel.log_x, log_y=panel.log_y
        ),
    )
    axes.title.set_color(_INK)
    axes.set_ylim(panel.low, panel.high)
    for height, name in panel.levels:
        axes.axhline(height, color=_SOFT, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        if name:
            axes.annotate(
                name, (0.985, height), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                ha="right", fontsize=8, color=_INK, zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
            )  # fmt: skip
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=True, framealpha=0.85, edgecolor="none", borderpad=0.2)


def _curve_onto(axes: Axes, curve: PanelCurve, color: str, number: int, place: int) -> None:
    # Curves that lie on each other show by their widths.
    style: dict[str, Any] = {"linewidth": max(2.4 - 0.3 * place, 1.2), "zorder": 2}
    if curve.style == "theory":
        style = {"linewidth": 1.4, "linestyle": (0, (5, 2.5)), "zorder": 3}
    elif curve.style == "points":
        marker = MARKERS[number % len(MARKERS)]
        style = {
            "linestyle": "none",
            "marker": marker,
            "markersize": 7.5,
            "markeredgecolor": "white",
            "markeredgewidth": 0.5,
            "zorder": 4,
        }
    finite = np.where(np.isfinite(curve.y), curve.y, np.nan)
    axes.plot(curve.x, finite, color=color, label=curve.label or "_nolegend_", **style)


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
