"""Figures for papers with matplotlib (extra "plot"): new figures, or drawn onto existing axes.

matplotlib's global state is neither changed nor used, so a figure is the same on every machine. The colours are those
of the pages' light theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from flatmin.report.figures import scales
from flatmin.report.figures.chart import Axis, Chart, Drawable, Field, Radar, Series, entries, reach
from flatmin.report.style import light_colours
from flatmin.words import install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = 3.3
"""Width of a column of a paper, inches."""
_POINTS = 8.0  # size of text
_PIXEL = 0.6  # points per pixel of a line in a page
_MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v", "cross": "P", "x": "X",
    "star": "*", "pentagon": "p", "hexagon": "h",
}  # fmt: skip
_STYLES: dict[str, Any] = {
    "solid": "-", "dash": (0, (5, 2.5)), "dot": (0, (1, 1.5)), "dashdot": (0, (5, 2, 1, 2)), "longdash": (0, (9, 3)),
    "longdashdot": (0, (9, 2, 1, 2)),
}  # fmt: skip
_ROW = 0.17  # height of a row of a legend, inches


def require() -> None:
    """Check, before a long job starts, that figures can be drawn.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"figures need matplotlib, which is not installed; run: {install('plot')}") from error


@contextmanager
def defaults() -> Iterator[None]:
    """Use matplotlib's defaults and a fixed size of text inside, whatever the user's settings."""
    require()
    from matplotlib import rc_context, rcdefaults

    with rc_context():
        rcdefaults()
        with rc_context({"font.size": _POINTS, "svg.fonttype": "none", "svg.hashsalt": "flatmin", "pdf.fonttype": 42}):
            yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of the given size in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    require()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def figure(shown: Drawable, *, width: float = COLUMN) -> Figure:
    """A matplotlib figure without a title, with its legend below it.

    Args:
        shown: the figure to draw.
        width: width in inches. Default: that of a column of a paper.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    named = entries(shown) if not isinstance(shown, Field) or shown.view is None else []
    with defaults():
        columns = _columns([one.label for one in named], width)
        rows = math.ceil(len(named) / columns)
        share = 0.8 if isinstance(shown, Field | Radar) else 0.72 * min(shown.height, 420) / 420
        if isinstance(shown, Chart) and shown.height > 420:
            share *= shown.height / 420
        made = new_figure(width, max(width * share, 1.5) + _ROW * rows)
        axes = made.add_subplot(projection=projection(shown))
        draw(axes, shown)
        if rows:
            _legend(made, axes, named, loc="outside lower center", ncols=columns)
    return made


def projection(shown: Drawable) -> str | None:
    """The kind of axes that a figure needs, for `Figure.add_subplot`."""
    if isinstance(shown, Radar):
        return "polar"
    return "3d" if isinstance(shown, Field) and shown.view is not None else None


def draw(axes: Any, shown: Drawable, *, legend: bool = False) -> None:
    """Draw onto axes; see `projection` for their kind.

    Args:
        axes: axes of matplotlib.
        shown: the figure to draw.
        legend: whether to add a legend, at the place where it covers least.
    """
    with defaults():
        if isinstance(shown, Radar):
            _radar(axes, shown)
        elif isinstance(shown, Field):
            (_map if shown.view is None else _relief)(axes, shown)
        else:
            _chart(axes, shown)
        named = entries(shown)
        if legend and named:
            _legend(axes, axes, named, loc="best")


def _chart(axes: Axes, chart: Chart) -> None:
    for name, axis in (("x", chart.x), ("y", chart.y)):
        if axis.log:
            axes.set(**{f"{name}scale": "log"})
    opacity = min(0.15, 1 / max(sum(one.band for one in chart.series), 1))
    for one in chart.series:
        _series(axes, one, opacity)
        if len(one.lost):
            axes.plot(
                one.lost, np.full(len(one.lost), 0.985), "x", color=_color(one.tone), markersize=5, clip_on=False,
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
    for height, text in chart.levels.items():
        axes.axhline(height, color=_color("soft"), linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        if text:
            axes.annotate(
                plain(text), (0.985, height), xycoords=("axes fraction", "data"), xytext=(0, 2), zorder=5,
                textcoords="offset points", ha="right", fontsize=_POINTS - 1, color=_color("ink"),
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
            )  # fmt: skip
    _dress(axes, chart)
    _scale(axes, "x", chart.x, reach(chart, "x"))
    _scale(axes, "y", chart.y, reach(chart, "y"))


def _series(axes: Axes, one: Series, opacity: float) -> None:
    color = _color(one.tone)
    x, y = (np.asarray(values, dtype=np.float64) for values in (one.x, one.y))
    if one.band and one.y_interval is not None:
        axes.fill_between(x, *one.y_interval, color=color, alpha=opacity, linewidth=0)
    bars: dict[str, Any] = {}
    for name, ends, at in (("xerr", one.x_interval, x), ("yerr", None if one.band else one.y_interval, y)):
        if ends is not None:
            low, high = (np.asarray(end, dtype=np.float64) for end in ends)
            bars[name] = np.nan_to_num(np.clip([at - low, high - at], 0.0, None))
    if bars:
        axes.errorbar(x, y, **bars, fmt="none", ecolor=color, elinewidth=1.0, capsize=2, alpha=one.opacity)
    style = _style(one)
    axes.plot(x, y, drawstyle="steps-post" if one.kind == "steps" else "default", **style)


def _style(one: Series) -> dict[str, Any]:
    """The style of a series as arguments of matplotlib, for the figure and the legend."""
    color = _color(one.tone)
    return {
        "color": color,
        "alpha": one.opacity,
        "linestyle": _STYLES[one.dash] if one.lined else "none",
        "linewidth": _PIXEL * one.width,
        "marker": _MARKERS[one.symbol] if one.marked else "none",
        "markersize": one.size * (0.8 if one.symbol == "star" else 0.5),
        "markerfacecolor": color if one.filled else "white",
        "markeredgecolor": _color(one.edge) if one.edge else color,
        "markeredgewidth": 0.5 if one.edge and one.filled else 0.8,
    }


def _map(axes: Axes, field: Field) -> None:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = float(field.levels[0]), float(field.levels[-1])
    axes.set_facecolor(_color("line"))
    inside = low <= np.nanmin(field.z) and np.nanmax(field.z) <= high
    shared: dict[str, Any] = {
        "levels": field.levels,
        "norm": (LogNorm if field.z_axis.log else Normalize)(low, high),
        "extend": "neither" if inside else "both",
    }
    z = np.ma.masked_invalid(field.z)
    filled = axes.contourf(field.xs, field.ys, z, cmap="viridis", **shared)
    axes.contour(field.xs, field.ys, z, colors="white", linewidths=0.3, alpha=0.6, **shared)
    places = FixedLocator(scales.ticks(low, high, field.z_axis.log))
    bar = axes.figure.colorbar(
        filled, ax=axes, pad=0.02, ticks=places, format=FuncFormatter(lambda v, _: scales.number(v))
    )
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(colors=_color("soft"), labelsize=_POINTS - 1)
    bar.set_label(_label(field.z_axis.label, axes, "y"), color=_color("ink"))
    for one in field.series:
        _series(axes, one, 1.0)
    _dress(axes, field)
    axes.grid(False)
    axes.set_xlim(field.xs[0], field.xs[-1])
    axes.set_ylim(field.ys[0], field.ys[-1])


def _relief(axes: Any, field: Field) -> None:
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    log = field.z_axis.log
    # mplot3d has no logarithmic axes.
    height, levels = (np.log10(values) if log else values for values in (field.z, field.levels))
    low, high = float(levels[0]), float(levels[-1])
    x, y = np.meshgrid(field.xs, field.ys)
    axes.plot_surface(
        x, y, np.ma.masked_invalid(height), cmap="viridis", norm=Normalize(low, high), rcount=200, ccount=200,
        linewidth=0.2, edgecolor=(1, 1, 1, 0.35), antialiased=True,
    )  # fmt: skip
    axes.set_zlim(low, high)
    for axis, grid in ((axes.xaxis, field.xs), (axes.yaxis, field.ys)):
        axis.set_view_interval(grid[0], grid[-1], ignore=True)
        axis.set_major_locator(MaxNLocator(4, prune="both"))
    if log:
        at = scales.ticks(float(field.levels[0]), float(field.levels[-1]), log=True)
        axes.zaxis.set_major_locator(FixedLocator(np.log10(at).tolist()))
        axes.zaxis.set_major_formatter(FuncFormatter(lambda v, _: scales.number(10.0**v)))
    assert field.view is not None
    axes.view_init(*field.view)
    axes.set_box_aspect((1, 1, 0.72), zoom=0.72)
    small = _POINTS - 1.5
    axes.tick_params(labelsize=small, pad=-2, colors=_color("soft"))
    axes.set_xlabel(plain(scales.broken(field.x.label, 32)), labelpad=4, fontsize=small)
    axes.set_ylabel(plain(scales.broken(field.y.label, 32)), labelpad=4, fontsize=small)
    axes.set_zlabel(plain(field.z_axis.label), labelpad=-2, fontsize=small)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((1, 1, 1, 0))
        axis._axinfo["grid"].update(color=_color("grid"))
    if field.note:
        axes.figure.text(0.02, 0.02, plain(field.note), color=_color("soft"), fontsize=small)


def _radar(axes: Any, radar: Radar) -> None:
    turn = 2 * math.pi / len(radar.spokes)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    for one in radar.series:
        axes.plot([turn * spoke for spoke in one.x], list(one.y), clip_on=False, **_style(one))
    axes.set_ylim(0.0, 1.0)
    axes.set_yticks([radar.ring], [""])
    axes.set_xticks([turn * i for i in range(len(radar.spokes))], [plain(scales.tick(name)) for name in radar.spokes])
    axes.tick_params(labelsize=_POINTS - 1, colors=_color("ink"), pad=9)
    axes.grid(True, color=_color("line"), linewidth=0.6)
    axes.spines["polar"].set_color(_color("line"))
    if radar.note:
        axes.set_title(_label(radar.note, axes, "x"), loc="left", fontsize=_POINTS - 1, color=_color("soft"))


def _dress(axes: Axes, shown: Chart | Field) -> None:
    """Apply the style of two-dimensional figures."""
    ink, soft = _color("ink"), _color("soft")
    axes.set_xlabel(_label(shown.x.label, axes, "x"), color=ink)
    axes.set_ylabel(_label(shown.y.label, axes, "y"), color=ink)
    axes.set_axisbelow(True)
    axes.tick_params(colors=soft, labelsize=_POINTS - 1)
    axes.tick_params(which="minor", length=0)
    for name, axis in (("x", shown.x), ("y", shown.y)):
        if axis.grid:
            axes.grid(True, axis=name, color=_color("grid"), linewidth=0.6)  # type: ignore[arg-type]
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(soft)
    if shown.note:
        axes.set_title(_label(shown.note, axes, "x"), loc="left", fontsize=_POINTS - 1, color=soft)


def _scale(axes: Axes, name: str, axis: Axis, values: Sequence[float]) -> None:
    """Set range and ticks, which depend on what is drawn."""
    from matplotlib.ticker import NullLocator

    line = axes.xaxis if name == "x" else axes.yaxis
    if axis.range != (None, None):
        line.axes.set(**{f"{name}lim": axis.range})
    elif axis.from_zero and scales.ends(axis, values)[0] >= 0:
        line.axes.set(**{f"{name}lim": (0.0, None)})
    low, high = sorted(map(float, line.get_view_interval()))
    ticks = axis.ticks
    if ticks is None and axis.log:
        ticks = {value: scales.number(value) for value in scales.ticks(low, high, log=True)}
    if ticks is not None:
        shown = scales.readable(ticks, low, high, axis.log) if name == "x" else ticks
        line.set_ticks(list(shown), [plain(scales.tick(text)) for text in shown.values()])
        line.set_minor_locator(NullLocator())
    else:
        axes.locator_params(axis=name, nbins=6 if name == "x" else 8, steps=[1, 2, 5, 10])  # type: ignore[arg-type]


def _legend(owner: Any, axes: Any, named: Sequence[Series], **where: Any) -> None:
    """Add a legend of series. Its texts are set afterwards, because matplotlib hides labels that begin with "_"."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_style(one)) for one in named]
    made = owner.legend(
        handles, ["x"] * len(handles), frameon="ncols" not in where, framealpha=0.8, edgecolor="none",
        fontsize=_POINTS - 1, handlelength=2.2, columnspacing=1.2, borderpad=0.2, **where,
    )  # fmt: skip
    for text, one in zip(made.get_texts(), named, strict=True):
        text.set_text(plain(scales.broken(one.label, 48, 2)))
        text.set_color(_color("ink"))


def _columns(labels: Sequence[str], width: float) -> int:
    """The number of columns of a legend that fit into a width."""
    room = width * 72 / (0.55 * (_POINTS - 1))
    return max(1, min(len(labels), int(room / (max(map(len, labels), default=1) + 8))))


def _label(text: str, axes: Axes, name: str) -> str:
    """A label of an axis, broken into lines that fit beside it."""
    size = axes.get_window_extent().size[0 if name == "x" else 1] / axes.figure.dpi
    return plain(scales.broken(text, max(int(size * 72 / (0.65 * _POINTS)), 16)))


def _color(tone: str) -> str:
    return tone if tone.startswith("#") else light_colours()[tone]


def plain(text: str) -> str:
    """Text with "$" escaped, which matplotlib would read as a formula."""
    return text.replace("$", r"\$")
