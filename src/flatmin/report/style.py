"""What figures have in common: colours, symbols, dashes, error bars, bands and logarithmic axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from flatmin.report.html import NUM_TONES, plot_text
from flatmin.stats import Stat

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
DASHES_IN_WORDS = ("solid", "dashed", "dotted", "dash-dotted", "long dashes", "long dashes with dots")
WIDE = 50.0  # a curve that spans more than this factor has a logarithmic axis


def tone(i: int) -> str:
    """The colour of the style sheet for the i-th of several; grey is left out."""
    return f"tone-{1 + i % (NUM_TONES - 1)}"


def number(stat: Stat, digits: int = 1) -> str:
    """The mean with its interval as `Stat.text` has it, "–" for none."""
    return "–" if not stat.n or math.isnan(stat.mean) else stat.text(f".{digits}f", gap=" ")


def error_bars(stats: Sequence[Stat], color: str) -> dict[str, Any]:
    """Error bars of the intervals, thick enough to be seen and never in the way.

    Args:
        stats: one for each point.
        color: as figures name it.
    """
    over = [0.0 if math.isnan(stat.half) else max(0.0, stat.high - stat.mean) for stat in stats]
    under = [0.0 if math.isnan(stat.half) else max(0.0, stat.mean - stat.low) for stat in stats]
    visible = any(over) or any(under)
    bars: dict[str, Any] = {"type": "data", "visible": visible, "thickness": 2, "width": 5, "color": color}
    if not any(stat.cut for stat in stats):
        return bars | {"array": over}
    return bars | {"array": over, "arrayminus": under, "symmetric": False}


def band(
    xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], color: str, opacity: float = 0.15
) -> dict[str, Any]:
    """A trace that fills the room between two curves; where one of them is not known there is a gap.

    Args:
        xs: places.
        lows: the lower curve at them.
        highs: the upper one.
        color: as figures name it.
        opacity: of the filling.
    """
    parts: list[list[tuple[float, float, float]]] = [[]]
    for place in zip(xs, lows, highs, strict=True):
        if all(map(math.isfinite, place)):
            parts[-1].append(place)
        elif parts[-1]:
            parts.append([])
    x: list[float | None] = []
    y: list[float | None] = []
    for part in filter(None, parts):
        gap: list[None] = [None] if x else []
        x += [*gap, *(at for at, _, _ in part), *(at for at, _, _ in reversed(part))]
        y += [*gap, *(high for _, _, high in part), *(low for _, low, _ in reversed(part))]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": y,
        "fill": "toself",
        "fillcolor": color,
        "line": {"color": color, "width": 0},
        "opacity": opacity,
        "hoverinfo": "skip",
        "showlegend": False,
    }


def log_axis(values: Sequence[float], title: str) -> dict[str, Any]:
    """Powers of ten as ticks where there are several of them, else whatever fits into what is shown."""
    steps = {"dtick": 1} if max(values) > 100 * min(values) else {"nticks": 8}
    return {"type": "log", "exponentformat": "power", "title": {"text": title}, **steps}


def broken(label: str, width: int = 20, lines: int = 3) -> str:
    """A long label in short lines, so that it leaves room for the plot."""
    pieces = textwrap.wrap(label, width) or [label]
    if len(pieces) > lines:
        pieces = [*pieces[: lines - 1], pieces[lines - 1][: width - 1] + "…"]
    return "<br>".join(plot_text(piece) for piece in pieces)
