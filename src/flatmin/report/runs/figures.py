"""A figure of runs as plain data for `flatmin.report.html`.

Several runs have a colour each, which the page's legend shows and hides everywhere, and a kind of line for each
quantity of a figure; the quantities of a single run have a colour each, and the figure its own legend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatmin.report.runs.history import History
from flatmin.report.html import Figure, plot_text
from flatmin.report.style import DASHES, DASHES_IN_WORDS, WIDE, tone

POINTS = 1500  # of a curve; where there are more, each is a mean
_NARROW = {"l": 48, "r": 8}

Points = tuple[Sequence[float], Sequence[float]]
Curves = Mapping[str, Callable[[History], Points]]


@dataclass(frozen=True)
class Wanted:
    """What a figure is to show.

    Args:
        title: of the figure.
        caption: under the title.
        curves: by name; each reads its points off a run.
        y: what the vertical axis is.
        x: what the horizontal axis is.
        height: in pixels.
        marked: the epoch that counts is marked on the first curve.
        zero: the vertical axis begins at 0.
        log: it is logarithmic where the values ask for it.
    """

    title: str
    caption: str
    curves: Curves
    y: str
    x: str = "epoch"
    height: int = 420
    marked: bool = False
    zero: bool = False
    log: bool = False


@dataclass(frozen=True)
class Drawn:
    """A figure with its title and caption."""

    title: str
    caption: str
    figure: Figure


def tones(runs: Sequence[History]) -> dict[str, str]:
    """A colour of the style sheet for each run by name."""
    return {run.name: tone(i) for i, run in enumerate(runs)}


def draw(runs: Sequence[History], wanted: Wanted) -> Drawn | None:
    """The figure; None if no run has values for it."""
    several, own = len(runs) > 1, tones(runs)
    names = [name for name, read in wanted.curves.items() if any(read(run)[0] for run in runs)]
    if not names:
        return None
    data: list[dict[str, Any]] = []
    for run in runs:
        for i, name in enumerate(names):
            points = _thinned(*wanted.curves[name](run))
            if not points[0]:
                continue
            color = f"var:{own[run.name] if several else tone(i)}"
            group = run.name if several else name
            dash = DASHES[i % len(DASHES)] if several else "solid"
            data.append(_trace(run if several else None, name, points, group, color, dash, wanted.x))
            if wanted.marked and i == 0:
                data += _mark(run, color, group)
    caption = wanted.caption
    if several and len(names) > 1:
        kinds = "; ".join(f"{word}: {name}" for word, name in zip(DASHES_IN_WORDS, names, strict=False))
        caption = f"{caption} {kinds[0].upper()}{kinds[1:]}.".strip()
    layout: dict[str, Any] = {"xaxis": {"title": {"text": wanted.x}}, "yaxis": _axis(data, wanted)}
    if several or len(names) == 1:
        return Drawn(wanted.title, caption, Figure(data, layout, wanted.height))
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    room = {"t": 48 if len(names) < 4 else 90}  # for names that need two lines on a phone
    layout |= {"showlegend": True, "legend": legend, "margin": room}
    return Drawn(wanted.title, caption, Figure(data, layout, wanted.height, _NARROW | room))


def _trace(run: History | None, name: str, points: Points, group: str, color: str, dash: str, x: str) -> dict[str, Any]:
    who = "" if run is None else f"{plot_text(run.name)}<br>"
    return {
        "legendgroup": group,
        "name": plot_text(name),
        "type": "scatter",
        "mode": "lines" if len(points[0]) > 1 else "markers",
        "x": list(points[0]),
        "y": list(points[1]),
        "line": {"color": color, "dash": dash, "width": 2},
        "marker": {"color": color, "size": 7},
        "hoverinfo": "text",
        "hovertext": [f"{who}{x} {a:g}, {plot_text(name)}: {b:.5g}" for a, b in zip(*points, strict=True)],
    }


def _mark(run: History, color: str, group: str) -> list[dict[str, Any]]:
    """The epoch that counts, on the curve of validation accuracy."""
    chosen = run.chosen
    line = next((line for line in run.lines if chosen is not None and line.epoch == chosen.epoch), None)
    if chosen is None or line is None:
        return []
    return [
        {
            "legendgroup": group,
            "showlegend": False,
            "type": "scatter",
            "mode": "markers",
            "x": [line.epoch],
            "y": [line.val_acc],
            "marker": {"color": color, "symbol": "star", "size": 13, "line": {"color": "var:paper", "width": 1}},
            "hoverinfo": "text",
            "hovertext": [
                f"{plot_text(run.name)}<br>weights of epoch {plot_text(chosen.text)}: validation {line.val_acc:.2f} %"
            ],
        }
    ]


def _axis(data: Sequence[Mapping[str, Any]], wanted: Wanted) -> dict[str, Any]:
    values = [value for trace in data for value in trace["y"]]
    axis: dict[str, Any] = {"title": {"text": plot_text(wanted.y)}}
    if wanted.zero and min(values) >= 0:
        axis["rangemode"] = "tozero"
    elif wanted.log and min(values) > 0 and max(values) > WIDE * min(values):
        axis |= {"type": "log", "exponentformat": "power", "dtick": 1 if max(values) > 100 * min(values) else "D2"}
    return axis


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> Points:
    """At most `POINTS` points, each the mean of as many neighbours as the others."""
    size = math.ceil(len(xs) / POINTS)
    if size <= 1:
        return xs, ys
    starts = range(0, len(xs), size)
    mean = [[sum(part) / len(part) for i in starts if (part := row[i : i + size])] for row in (xs, ys)]
    return mean[0], mean[1]
