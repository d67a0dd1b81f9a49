"""The content of a figure as plain data; `interactive` draws it in pages and `static` for papers.

Texts are plain: each renderer escapes what it would read as markup, and breaks lines. Colours are names of the page's
style sheet ("tone-1", "ink"), see `flatmin.report.style`, or "#rrggbb" for a colour that is the same in every theme.

    >>> loss = Series(label="SAM", x=[1, 2], y=[0.9, 0.4], y_interval=([0.8, 0.3], [1.0, 0.5]))
    >>> chart = Chart(title="Loss", x=Axis(label="epoch"), y=Axis(label="loss", log=True), series=[loss])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

Numbers = Sequence[float]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis.

    Args:
        label: label with the unit.
        log: whether the axis is logarithmic. Range and ticks are values, not logarithms.
        ticks: {place: text}; None to let the renderer choose.
        range: the ends, from left to right or from bottom to top; None to follow the data. Descending ends reverse the
            axis.
        from_zero: whether the axis begins at 0 if no value is negative.
        grid: whether there are grid lines at the ticks.
    """

    label: str = ""
    log: bool = False
    ticks: Mapping[float, str] | None = None
    range: tuple[float | None, float | None] = (None, None)
    from_zero: bool = False
    grid: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """A line, a row of marks, or both.

    Args:
        x, y: coordinates; NaN leaves a gap. A series without points appears only in the legend of a file. In a radar,
            x is the number of the spoke and y is in [0, 1].
        label: text in the legend; "" to leave the series out of it.
        kind: "line", "marks", "both", or "steps" for a line of horizontal and vertical pieces.
        tone: colour.
        dash: one of `flatmin.report.style.DASHES`.
        width: width of the line in pixels.
        symbol: one of `flatmin.report.style.SYMBOLS`.
        filled: whether marks are filled or open.
        size: size of the marks in pixels.
        edge: colour of the marks' outlines; "" for none.
        opacity: opacity of lines and marks, in (0, 1].
        x_interval, y_interval: the lower and the upper ends of intervals; NaN where there is none.
        band: whether y_interval is drawn as a band rather than as error bars.
        lost: x of points whose value is not finite, drawn as crosses at the upper edge.
        hover: a text for each point, shown in pages. Default: none.
        group: the key by which a page's legend hides the series.
        points: keys of the choices in a page's legend that show the series; None for all.

    Raises:
        ValueError: the lengths differ.
    """

    x: Numbers
    y: Numbers
    label: str = ""
    kind: Literal["line", "steps", "marks", "both"] = "line"
    tone: str = "tone-1"
    dash: str = "solid"
    width: float = 2.0
    symbol: str = "circle"
    filled: bool = True
    size: float = 8.0
    edge: str = ""
    opacity: float = 1.0
    x_interval: tuple[Numbers, Numbers] | None = None
    y_interval: tuple[Numbers, Numbers] | None = None
    band: bool = False
    lost: Numbers = ()
    hover: Sequence[str] = ()
    group: str = ""
    points: Sequence[str] | None = None

    def __post_init__(self) -> None:
        intervals = (*(self.x_interval or ()), *(self.y_interval or ()))
        lengths = [len(part) for part in (self.x, self.y, *intervals, self.hover or self.x)]
        if len(set(lengths)) > 1:
            raise ValueError(f"x, y, intervals and hover of {self.label!r} must have the same length, got {lengths}.")

    @property
    def marked(self) -> bool:
        """Whether points are marked: because of the kind, or because a single point makes no line."""
        return self.kind in ("marks", "both") or len(self.x) == 1

    @property
    def lined(self) -> bool:
        """Whether points are joined by a line."""
        return self.kind != "marks" and len(self.x) != 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Chart:
    """Series on a horizontal and a vertical axis.

    Args:
        title: heading in a page, and base of the file's name; not drawn.
        x, y: the axes.
        series: the series in drawing order, later ones on top.
        levels: {height: text} of dotted horizontal lines.
        note: a note drawn above the figure.
        caption: text under the heading in a page; not drawn.
        legend: whether the figure has its own legend in a page. A file has a legend if series have labels.
        height: height in a page, in pixels; files have the same proportions.
    """

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    levels: Mapping[float, str] = field(default_factory=dict)
    note: str = ""
    caption: str = ""
    legend: bool = False
    height: int = 420


@dataclass(frozen=True, kw_only=True, eq=False)
class Field:
    """Values over a plane, as a map with contour lines or as a surface in perspective.

    Args:
        title, note, caption, height: see `Chart`.
        xs, ys: coordinates of the grid.
        z: z[j, i] is the value at (xs[i], ys[j]); NaN if it is unknown or not finite.
        x, y, z_axis: the axes; the last is that of the values.
        levels: levels of the contours in ascending order; the ends are those of the colour scale.
        series: lines and marks on a map, such as a trajectory; not drawn in perspective.
        view: elevation and azimuth of the eye in degrees for a surface in perspective; None for a map.
    """

    title: str
    xs: Array
    ys: Array
    z: Array
    x: Axis
    y: Axis
    z_axis: Axis
    levels: Array
    series: Sequence[Series] = ()
    note: str = ""
    caption: str = ""
    view: tuple[float, float] | None = None
    height: int = 520


@dataclass(frozen=True, kw_only=True, eq=False)
class Radar:
    """Polygons over spokes.

    Args:
        title, note, caption, height: see `Chart`.
        spokes: names of the spokes, clockwise from the top.
        series: x is the number of a spoke, y is in [0, 1]; a polygon is closed if its last corner equals its first.
        ring: radius of the inner ring.
    """

    title: str
    spokes: Sequence[str]
    series: Sequence[Series]
    ring: float
    note: str = ""
    caption: str = ""
    height: int = 460


Drawable = Chart | Field | Radar
D = TypeVar("D", bound=Drawable)


def at(shown: D, point: str) -> D:
    """A figure with only the series shown for one choice of a page's legend, labelled by their groups."""
    seen = [one for one in shown.series if one.points is None or point in one.points]
    return replace(shown, series=[replace(one, label=one.group if one.label else "") for one in seen])


def reach(shown: Chart, way: Literal["x", "y"]) -> list[float]:
    """All values on an axis of a chart, including the ends of intervals."""
    return [
        value
        for one in shown.series
        for part in (getattr(one, way), *(getattr(one, f"{way}_interval") or ()))
        for value in part
    ]


def entries(shown: Drawable) -> list[Series]:
    """The series in the figure's legend, one for each label."""
    return list({one.label: one for one in reversed(shown.series) if one.label}.values())[::-1]
