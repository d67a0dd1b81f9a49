"""What a figure shows, as plain numbers and words; `interactive` draws it in pages and `static` for papers.

Texts are plain: each renderer escapes what it would read as markup, and breaks lines. Colours are names of the page's
style sheet ("tone-1", "ink"), see `flatmin.report.style`, or "#rrggbb" where they are to be the same in every theme.

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
        label: with its unit.
        log: whether it is logarithmic. Its range and ticks are given as values, not as logarithms.
        ticks: {place: text}; None for numbers that the renderer chooses.
        range: its ends, from the left or from below; None to follow the data. Ends that fall turn the axis round.
        from_zero: the axis begins at 0 if no value is negative.
        grid: whether there are lines at the ticks.
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
        x, y: NaN is a gap; without any point it stands in the legend of a file only. In a radar, x is the number of the
            spoke and y lies in [0, 1].
        label: for the legend; "" leaves it out of the legend.
        kind: "steps" is a line that goes sideways first.
        tone: its colour.
        dash: of `flatmin.report.style.DASHES`.
        width: of the line, pixels.
        symbol: of `flatmin.report.style.SYMBOLS`.
        filled: whether marks are filled or open.
        size: of the marks, pixels.
        edge: colour of the marks' outlines; "" for none.
        opacity: of lines and marks, in (0, 1].
        x_interval, y_interval: the lower and the upper ends of intervals; NaN where there is none.
        band: whether y_interval is drawn as a band rather than as error bars.
        lost: x of points whose value is not finite, drawn as crosses at the upper edge.
        hover: a text for each point, shown in pages; none by default.
        group: the key by which a page's legend hides it.
        points: keys of the choices in a page's legend that show it; None: all of them.

    Raises:
        ValueError: lengths that differ.
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
            raise ValueError(f"x, y, intervals and hover of {self.label!r} must have one length, got {lengths}.")

    @property
    def marked(self) -> bool:
        """Whether points are marked: by its kind, or because a single point makes no line."""
        return self.kind in ("marks", "both") or len(self.x) == 1

    @property
    def lined(self) -> bool:
        """Whether points are joined."""
        return self.kind != "marks" and len(self.x) != 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Chart:
    """Series on a horizontal and a vertical axis.

    Args:
        title: its heading in a page, and the name of its file; not drawn.
        x, y: the axes.
        series: in the order in which they are drawn, later ones on top.
        levels: {height: text} of dotted horizontal lines.
        note: what a reader must know besides; drawn above the figure.
        caption: a sentence under its heading in a page; not drawn.
        legend: whether it has a legend of its own in a page. A file has one wherever series have labels.
        height: in a page, pixels; files have the same proportions.
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
    """Heights over a plane, as a map with contour lines or in perspective.

    Args:
        title, note, caption, height: see `Chart`.
        xs, ys: of the grid.
        z: z[j, i] at (xs[i], ys[j]); NaN where nothing is known or finite.
        x, y, z_axis: the axes; the last is that of the heights.
        levels: of the contours, rising; the ends are those of the colours.
        series: lines and marks on a map, such as a trajectory; not drawn in perspective.
        view: elevation and azimuth of the eye in degrees for a picture in perspective; None for a map.
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
        spokes: their names, clockwise from the top.
        series: x is the number of a spoke, y lies in [0, 1]; a polygon is closed if its last corner is its first.
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
    """What is seen of a figure at one of the choices of a page's legend, with series named by their groups."""
    seen = [one for one in shown.series if one.points is None or point in one.points]
    return replace(shown, series=[replace(one, label=one.group if one.label else "") for one in seen])


def reach(shown: Chart, way: Literal["x", "y"]) -> list[float]:
    """All values on an axis of a chart, ends of intervals among them."""
    return [
        value
        for one in shown.series
        for part in (getattr(one, way), *(getattr(one, f"{way}_interval") or ()))
        for value in part
    ]


def entries(shown: Drawable) -> list[Series]:
    """The series that stand in the figure's legend: one for each label."""
    return list({one.label: one for one in reversed(shown.series) if one.label}.values())[::-1]
