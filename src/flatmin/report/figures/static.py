"""Landscapes, paths and spectra with matplotlib (extra "plot"). Every function returns a Figure; `save` writes it.

Colour-blind readers can distinguish the colours; no global state of matplotlib is read or written, and values are drawn
as they were measured: a point that is not finite is a gap with a cross.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import numpy as np

from flatmin.measure.follow import Point
from flatmin.measure.krylov import Spectrum
from flatmin.measure.landscape import Slice
from flatmin.measure.record import Landscape
from flatmin.measure.trace import Density
from flatmin.report.figures import content as plots
from flatmin.report.figures.content import Field, Lines, Unit, Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc3fa0", "#b58900", "#7a4fd0", "#1b9aaa", "#9b2226", "#4d7c0f", "#6b7280")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "p", "h")
STYLES = ("-", "--", "-.", ":")
_INK, _SOFT, _GRID, _HOLE = "#1b1f24", "#5b6470", "#e6e9ee", "#d9dde3"
_MAP = "viridis"
_FORMATS = (".png", ".svg", ".pdf")


def profile(
    shown: Landscape | Mapping[str, Landscape],
    *,
    value: Value = "loss",
    unit: Unit = "auto",
    log: bool | None = None,
) -> Figure:
    """Loss, accuracy or error along one direction or along paths; see `plots.profile`.

    Raises:
        ValueError: see `plots.profile`.
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    return _lines(plots.profile(shown, value, unit, log))


def contour(
    shown: Slice,
    *,
    value: Value = "loss",
    unit: Unit = "auto",
    log: bool | None = None,
    levels: int | Sequence[float] = 24,
) -> Figure:
    """A slice of two directions from above, with the trajectory that it holds; see `plots.field`.

    Raises:
        ValueError: see `plots.field`.
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    figure = new_figure(6.4, 5.2)
    axes = figure.add_subplot()
    plane_onto(axes, plots.field(shown, value, unit, log, levels))
    _legend(figure, axes)
    return figure


def plane_onto(axes: Axes, field: Field) -> None:
    """Draw a plane from above, with its scale, into a part of a figure."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_facecolor(_HOLE)
    inside = field.levels[0] <= np.nanmin(field.z) and np.nanmax(field.z) <= field.levels[-1]
    shared: dict[str, Any] = {
        "levels": field.levels, "norm": _norm(field), "extend": "neither" if inside else "both",
    }  # fmt: skip
    z = np.ma.masked_invalid(field.z)
    filled = axes.contourf(field.x, field.y, z, cmap=_MAP, **shared)
    axes.contour(field.x, field.y, z, colors="white", linewidths=0.4, alpha=0.6, **shared)
    ticks = FixedLocator(plots.ticks(field.levels, field.log))
    numbers = FuncFormatter(lambda v, _: plots.number(v))
    bar = axes.figure.colorbar(filled, ax=axes, pad=0.02, ticks=ticks, format=numbers)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(colors=_SOFT, labelsize=9)
    bar.set_label(_plain(field.zlabel), color=_INK)
    _dress(axes, field.xlabel, field.ylabel, field.note)
    axes.grid(False)
    if len(field.lost):
        axes.plot(*field.lost.T, "x", color="#9b2226", markersize=5, clip_on=False, label="not finite")
    if field.trajectory is not None:
        edge: dict[str, Any] = {"color": "#ffffff", "markeredgecolor": _INK, "markeredgewidth": 0.8}
        axes.plot(*field.trajectory.T, color=_INK, linewidth=2.6)
        axes.plot(*field.trajectory.T, "-o", linewidth=1.4, markersize=4.5, **edge, label="checkpoints, projected")
        axes.plot(*field.trajectory[0], "s", markersize=8, **edge, label="first")
    if field.model:
        axes.plot(0, 0, "*", color="#ff8c42", markeredgecolor=_INK, markersize=13, label="the model")
    axes.set_xlim(field.x[0], field.x[-1])
    axes.set_ylim(field.y[0], field.y[-1])


def surface(
    shown: Slice,
    *,
    value: Value = "loss",
    unit: Unit = "auto",
    log: bool | None = None,
    elevation: float = 28.0,
    azimuth: float = -52.0,
) -> Figure:
    """A slice of two directions in perspective; see `plots.field`.

    Args:
        shown: the slice.
        value: see `plots.profile`.
        unit: see `plots.profile`.
        log: see `plots.profile`.
        elevation: of the eye above the plane, degrees.
        azimuth: of the eye around it, degrees.

    Raises:
        ValueError: see `plots.field`.
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    field = plots.field(shown, value, unit, log)
    figure = new_figure(7.2, 5.6)
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    axes: Any = figure.add_subplot(projection="3d")
    # mplot3d has no logarithmic axes of its own.
    height = np.log10(field.z) if field.log else field.z
    low, high = (np.log10(field.levels[[0, -1]]) if field.log else field.levels[[0, -1]]).tolist()
    x, y = np.meshgrid(field.x, field.y)
    axes.plot_surface(
        x, y, np.ma.masked_invalid(height), cmap=_MAP, norm=Normalize(low, high), rcount=200, ccount=200,
        linewidth=0.2, edgecolor=(1, 1, 1, 0.35), antialiased=True,
    )  # fmt: skip
    axes.set_zlim(low, high)
    for axis, reach in ((axes.xaxis, field.x), (axes.yaxis, field.y)):
        axis.set_view_interval(reach[0], reach[-1], ignore=True)
        axis.set_major_locator(MaxNLocator(5, prune="both"))
    if field.log:
        axes.zaxis.set_major_locator(FixedLocator(np.log10(plots.ticks(field.levels, log=True)).tolist()))
        axes.zaxis.set_major_formatter(FuncFormatter(lambda v, _: plots.number(10.0**v)))
    axes.view_init(elevation, azimuth)
    axes.set_box_aspect((1, 1, 0.72), zoom=0.84)
    axes.tick_params(labelsize=8, pad=1)
    axes.set_xlabel(_plain(plots.broken(field.xlabel, 34)), labelpad=16, fontsize=8.5)
    axes.set_ylabel(_plain(plots.broken(field.ylabel, 34)), labelpad=16, fontsize=8.5)
    axes.set_zlabel(_plain(field.zlabel), labelpad=6, fontsize=9)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((1, 1, 1, 0))
        axis._axinfo["grid"].update(color=_GRID)
    if field.note:
        figure.text(0.02, 0.02, field.note, color=_SOFT, fontsize=8.5)
    return figure


def density(shown: Density | Mapping[str, Density], *, width: float | None = None) -> Figure:
    """Smoothed spectral densities on a logarithmic axis; see `plots.density`.

    Raises:
        ValueError: see `plots.density`.
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    return _lines(plots.density(shown, width))


def eigenvalues(shown: Spectrum | Mapping[str, Spectrum]) -> Figure:
    """The ends of spectra with their residuals; see `plots.eigenvalues`.

    Raises:
        ValueError: see `plots.eigenvalues`.
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    return _lines(plots.eigenvalues(shown))


def curve(
    shown: Mapping[str, Sequence[Any]], *, xlabel: str, ylabel: str, log_x: bool = False, log_y: bool = False
) -> Figure:
    """Lines with error bars, such as a sharpness over rho; see `plots.curve`.

    Raises:
        ValueError: see `plots.curve`.
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    return _lines(plots.curve(shown, xlabel=xlabel, ylabel=ylabel, log_x=log_x, log_y=log_y))


def followed(points: Sequence[Point]) -> Figure:
    """lambda_max through training, beside the edges of stability; see `plots.followed`.

    Raises:
        ValueError: see `plots.followed`.
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    return _lines(plots.followed(points))


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 160) -> FilePath:
    """Write a figure as .png, .svg or .pdf; the same figure gives the same bytes.

    Raises:
        ValueError: another ending.
        OSError: the file cannot be written.
    """
    target = FilePath(path)
    if target.suffix not in _FORMATS:
        raise ValueError(f"a figure is written as {', '.join(_FORMATS)}, got {target.name!r}.")
    from matplotlib import rc_context

    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    target.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "flatmin"}):
        figure.savefig(target, dpi=dpi, facecolor="white", metadata=dates.get(target.suffix))
    return target


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "figures need matplotlib, which is not installed; run: pip install 'flatmin[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _lines(drawn: Lines) -> Figure:
    figure = new_figure(6.4, 4.2)
    lines_onto(figure.add_subplot(), drawn)
    return figure


def lines_onto(axes: Axes, drawn: Lines) -> None:
    """Draw lines into a part of a figure."""
    handles: list[Any] = []
    for i, line in enumerate(drawn.lines):
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "label": _plain(line.label)}
        style["linestyle"] = STYLES[i % len(STYLES)] if drawn.joined else "none"
        style |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 5} if drawn.points else {}
        if line.error is None:
            handles += axes.plot(line.x, line.y, linewidth=1.8, **style)
        else:
            handles.append(axes.errorbar(line.x, line.y, line.error, elinewidth=1.2, capsize=3, **style))
        if len(line.lost):
            # At the upper edge: there is no height that they have.
            axes.plot(
                line.lost, np.full(len(line.lost), 0.985), "x", color=style["color"], markersize=6,
                transform=axes.get_xaxis_transform(), clip_on=False,
            )  # fmt: skip
    if drawn.log_x:
        axes.set_xscale("log")
    if drawn.log_y:
        axes.set_yscale("log")
    if drawn.low is not None:
        highest = max(float(np.nanmax(line.y)) for line in drawn.lines)
        axes.set_ylim(drawn.low, 2.0 * highest if drawn.log_y else None)
    if drawn.ticks is not None:
        axes.set_xticks(drawn.ticks[0], [_plain(name) for name in drawn.ticks[1]])
    _dress(axes, drawn.xlabel, drawn.ylabel, drawn.note)
    if len(drawn.lines) > 1 or any("(" in line.label for line in drawn.lines):
        axes.legend(handles=handles, frameon=False, fontsize=9)


def _dress(axes: Axes, xlabel: str, ylabel: str, note: str) -> None:
    """The style of every flat figure."""
    axes.set_xlabel(_plain(xlabel), color=_INK)
    axes.set_ylabel(_plain(ylabel), color=_INK)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_SOFT)
    if note:
        axes.set_title(_plain(note), loc="left", fontsize=9, color=_SOFT)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the plane, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)


def _norm(field: Field) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    return (LogNorm if field.log else Normalize)(float(field.levels[0]), float(field.levels[-1]))
