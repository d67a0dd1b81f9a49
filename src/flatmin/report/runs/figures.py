"""A figure of runs.

With several runs, each run has a colour, by which the page's legend shows and hides it, and each quantity of a figure
has a dash. With a single run, each quantity has a colour, and the figure has its own legend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatmin.methods import BASE
from flatmin.report.figures.chart import Axis, Chart, Series
from flatmin.report.figures.scales import epochs, is_wide
from flatmin.report.runs.history import History
from flatmin.report.style import DASHES, DASHES_IN_WORDS, styles, tone

POINTS = 1500  # the most points of a curve; if there are more, each drawn point is a mean

Points = tuple[Sequence[float], Sequence[float]]
Curves = Mapping[str, Callable[[History], Points]]


@dataclass(frozen=True)
class Wanted:
    """The definition of a figure.

    Args:
        title: title of the figure.
        caption: text under the title.
        curves: functions that return the points of a run, by name of the curve.
        y: label of the vertical axis.
        x: label of the horizontal axis.
        height: height in pixels.
        marked: whether the epoch whose weights are kept is marked on the first curve.
        zero: whether the vertical axis begins at 0.
        log: whether the vertical axis is logarithmic if the values span a wide range.
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


def tones(runs: Sequence[History]) -> dict[str, str]:
    """A colour of the style sheet for each run by name; grey for plain training if there is one such run."""
    plain = [run.name for run in runs if run.config.method == BASE]
    base = plain[0] if len(plain) == 1 < len(runs) else ""
    return {name: style.tone for name, style in styles([run.name for run in runs], base).items() if name}


def draw(runs: Sequence[History], wanted: Wanted) -> Chart | None:
    """The figure; None if no run has values for it."""
    several, own = len(runs) > 1, tones(runs)
    names = [name for name, read in wanted.curves.items() if any(read(run)[0] for run in runs)]
    if not names:
        return None
    series: list[Series] = []
    for run in runs:
        for i, name in enumerate(names):
            xs, ys = _thinned(*wanted.curves[name](run))
            if not xs:
                continue
            shared: dict[str, Any] = {
                "tone": own[run.name] if several else tone(i),
                "group": run.name if several else name,
            }
            label = run.name if several else name if len(names) > 1 else ""
            who = f"{run.name}\n" if several else ""
            hover = [f"{who}{wanted.x} {x:g}, {name}: {y:.5g}" for x, y in zip(xs, ys, strict=True)]
            dash = DASHES[i % len(DASHES)] if several else "solid"
            series.append(Series(label=label, x=xs, y=ys, dash=dash, hover=hover, **shared))
            if wanted.marked and i == 0:
                series += _mark(run, shared)
    caption = wanted.caption
    last = max(max(one.x) for one in series)
    if several and len(names) > 1:
        # The meaning of the dashes, for the legend of a file.
        dashes = zip(DASHES, names, strict=False)
        series += [Series(label=name, x=[], y=[], tone="ink", dash=dash) for dash, name in dashes]
        kinds = "; ".join(f"{word}: {name}" for word, name in zip(DASHES_IN_WORDS, names, strict=False))
        caption = f"{caption} {kinds[0].upper()}{kinds[1:]}.".strip()
    return Chart(
        title=wanted.title,
        caption=caption,
        x=Axis(label=wanted.x, ticks=epochs(last) if wanted.x == "epoch" else None),
        y=Axis(
            label=wanted.y,
            from_zero=wanted.zero,
            log=wanted.log and not wanted.zero and is_wide(y for one in series for y in one.y),
        ),
        series=series,
        legend=not several and len(names) > 1,
        height=wanted.height,
    )


def _mark(run: History, shared: Mapping[str, Any]) -> list[Series]:
    """A mark at the epoch whose weights are kept, on the curve of validation accuracy."""
    chosen = run.chosen
    line = next((line for line in run.lines if chosen is not None and line.epoch == chosen.epoch), None)
    if chosen is None or line is None:
        return []
    text = f"{run.name}\nweights of epoch {chosen.text}: validation {line.val_acc:.2f} %"
    star: dict[str, Any] = {"kind": "marks", "symbol": "star", "size": 13.0, "edge": "paper", "hover": [text]}
    return [Series(x=[line.epoch], y=[line.val_acc], **star, **shared)]


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> Points:
    """At most `POINTS` points, each the mean of the same number of consecutive points."""
    size = math.ceil(len(xs) / POINTS)
    if size <= 1:
        return xs, ys
    starts = range(0, len(xs), size)
    mean = [[sum(part) / len(part) for i in starts if (part := row[i : i + size])] for row in (xs, ys)]
    return mean[0], mean[1]
