"""The figures of `draw` for the report page: plain data for `page.figure`, drawn by plotly.js in the reader's browser.

No plotly is needed to build them. Colours follow the page's theme.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from flatmin.measure.follow import Point
from flatmin.measure.krylov import Spectrum
from flatmin.measure.landscape import Slice
from flatmin.measure.record import Landscape
from flatmin.measure.trace import Density
from flatmin.report.figures import content as plots
from flatmin.report.figures.content import Field, Lines, Unit, Value
from flatmin.report.html import Figure, heading, page, plot_text, write
from flatmin.report.html import figure as _embedded
from flatmin.report.style import SYMBOLS, tone

_DASHES = ("solid", "dash", "dashdot", "dot")
_MAP = "Viridis"


def profile(
    shown: Landscape | Mapping[str, Landscape],
    *,
    value: Value = "loss",
    unit: Unit = "auto",
    log: bool | None = None,
) -> Figure:
    """Loss, accuracy or error along one direction or along paths; see `plots.profile`."""
    return _lines(plots.profile(shown, value, unit, log))


def contour(
    shown: Slice,
    *,
    value: Value = "loss",
    unit: Unit = "auto",
    log: bool | None = None,
    levels: int = 24,
) -> Figure:
    """A slice of two directions from above, with the trajectory that it holds; see `plots.field`.

    Levels are equal steps: plotly.js knows no others.
    """
    field = plots.field(shown, value, unit, log, levels)
    height, ends = _height(field)
    data: list[dict[str, Any]] = [
        {
            "type": "contour",
            "x": field.x.tolist(),
            "y": field.y.tolist(),
            "z": height,
            "colorscale": _MAP,
            "contours": {"start": ends[0], "end": ends[1], "size": (ends[1] - ends[0]) / (len(field.levels) - 1)},
            "autocontour": False,
            "line": {"width": 0.4, "color": "rgba(255,255,255,0.6)"},
            "colorbar": _bar(field),
            "hoverinfo": "text",
            "text": _hover(field),
        }
    ]
    if field.trajectory is not None:
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "checkpoints, projected",
                "x": field.trajectory[:, 0].tolist(),
                "y": field.trajectory[:, 1].tolist(),
                "line": {"color": "white", "width": 2},
                "marker": {
                    "color": "white",
                    "symbol": ["square", *["circle"] * (len(field.trajectory) - 1)],
                    "size": [11, *[7] * (len(field.trajectory) - 1)],
                    "line": {"color": "black", "width": 1},
                },
                "hoverinfo": "text",
                "hovertext": [f"checkpoint {k + 1} of {len(field.trajectory)}" for k in range(len(field.trajectory))],
            }
        )
    if len(field.lost):
        data.append(_dots(field.lost, "not finite", {"color": "var:bad", "symbol": "x", "size": 8}))
    if field.model:
        star = {"color": "#ff8c42", "symbol": "star", "size": 14, "line": {"color": "black", "width": 1}}
        data.append(_dots(np.zeros((1, 2)), "the model", star))
    layout = {
        "xaxis": _axis(field.xlabel) | {"range": [float(field.x[0]), float(field.x[-1])], "showgrid": False},
        "yaxis": _axis(field.ylabel) | {"range": [float(field.y[0]), float(field.y[-1])], "showgrid": False},
    }
    return _figure(data, layout, field.note, legend=len(data) > 1, height=520)


def surface(
    shown: Slice,
    *,
    value: Value = "loss",
    unit: Unit = "auto",
    log: bool | None = None,
) -> Figure:
    """A slice of two directions in perspective, to be turned with the mouse; see `plots.field`."""
    field = plots.field(shown, value, unit, log)
    height, ends = _height(field)
    data = [
        {
            "type": "surface",
            "x": field.x.tolist(),
            "y": field.y.tolist(),
            "z": height,
            "colorscale": _MAP,
            "cmin": ends[0],
            "cmax": ends[1],
            "colorbar": _bar(field),
            "hoverinfo": "text",
            "text": _hover(field),
        }
    ]
    axis = {"gridcolor": "var:grid", "zerolinecolor": "var:grid", "color": "var:ink", "showbackground": False}
    small = {"font": {"size": 11}}
    scene = {
        "xaxis": axis | {"title": {"text": _words(field.xlabel, 32)} | small},
        "yaxis": axis | {"title": {"text": _words(field.ylabel, 32)} | small},
        "zaxis": axis | {"title": {"text": plot_text(field.zlabel)} | small, "range": ends, **_ticks(field)},
        "aspectmode": "manual",
        "aspectratio": {"x": 1.15, "y": 1.15, "z": 0.8},
        "camera": {"eye": {"x": 1.4, "y": -1.65, "z": 1.0}, "center": {"x": 0, "y": 0, "z": -0.22}},
    }
    return _figure(data, {"scene": scene}, field.note, legend=False, height=560, margin={"l": 0, "r": 0, "b": 8})


def density(shown: Density | Mapping[str, Density], *, width: float | None = None) -> Figure:
    """Smoothed spectral densities on a logarithmic axis; see `plots.density`."""
    return _lines(plots.density(shown, width))


def eigenvalues(shown: Spectrum | Mapping[str, Spectrum]) -> Figure:
    """The ends of spectra with their residuals; see `plots.eigenvalues`."""
    return _lines(plots.eigenvalues(shown))


def curve(
    shown: Mapping[str, Sequence[Any]], *, xlabel: str, ylabel: str, log_x: bool = False, log_y: bool = False
) -> Figure:
    """Lines with error bars, such as a sharpness over rho; see `plots.curve`."""
    return _lines(plots.curve(shown, xlabel=xlabel, ylabel=ylabel, log_x=log_x, log_y=log_y))


def followed(points: Sequence[Point]) -> Figure:
    """lambda_max through training, beside the edges of stability; see `plots.followed`."""
    return _lines(plots.followed(points))


def save(figures: Mapping[str, Figure], path: str | os.PathLike[str], *, title: str) -> FilePath:
    """Write figures under their headings as one HTML page that works without a network.

    Raises:
        ValueError: no figure.
        ModuleNotFoundError: plotly is not installed (extra "report").
        OSError: the file cannot be written.
    """
    if not figures:
        raise ValueError("there is no figure to write.")
    text = page(title, [heading(name) + _embedded(figure, name) for name, figure in figures.items()])
    return write(text, path)


def _lines(drawn: Lines) -> Figure:
    data: list[dict[str, Any]] = []
    heights = [v for line in drawn.lines for v in line.y.tolist() if np.isfinite(v)]
    for i, line in enumerate(drawn.lines):
        color = f"var:{tone(i)}"
        error = (
            {} if line.error is None else {"error_y": {"type": "data", "array": line.error.tolist(), "color": color}}
        )
        data.append(
            {
                "type": "scatter",
                "mode": "+".join(["lines"] * drawn.joined + ["markers"] * drawn.points),
                "name": plot_text(line.label),
                "legendgroup": line.label,
                "x": line.x.tolist(),
                "y": line.y.tolist(),
                "line": {"color": color, "dash": _DASHES[i % len(_DASHES)], "width": 2},
                "marker": {"color": color, "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 8},
                "hoverinfo": "text",
                "hovertext": [
                    f"{plot_text(line.label)}<br>{x:.4g}: {y:.6g}" for x, y in zip(line.x, line.y, strict=True)
                ],
                **error,
            }
        )
        if len(line.lost):
            at = np.stack([line.lost, np.full(len(line.lost), max(heights))], axis=1)
            crosses = _dots(at, f"{line.label}: not finite", {"color": color, "symbol": "x", "size": 8})
            data.append(crosses | {"legendgroup": line.label, "showlegend": False})
    xs = [v for line in drawn.lines for v in line.x.tolist()]
    yaxis = _axis(drawn.ylabel) | (_log_axis(heights) if drawn.log_y else {})
    if drawn.low is not None:
        ends = np.log10([drawn.low, max(heights) * 2]) if drawn.log_y else [drawn.low, max(heights)]
        yaxis["range"] = list(map(float, ends))
    xaxis = _axis(drawn.xlabel) | (_log_axis(xs) if drawn.log_x else {})
    if drawn.ticks is not None:
        margin = 0.04 * (max(xs) - min(xs) or 1.0)
        xaxis |= {"tickvals": drawn.ticks[0], "ticktext": [plot_text(t) for t in drawn.ticks[1]]}
        xaxis["range"] = [min(xs) - margin, max(xs) + margin]
    show = len(drawn.lines) > 1 or any("(" in line.label for line in drawn.lines)
    return _figure(data, {"xaxis": xaxis, "yaxis": yaxis}, drawn.note, legend=show)


def _height(field: Field) -> tuple[list[list[float]], list[float]]:
    """The heights as plotly is to see them, NaN where there are none, and the ends of their scale."""
    levels = np.log10(field.levels) if field.log else field.levels
    z = np.log10(field.z) if field.log else field.z
    return z.tolist(), [float(levels[0]), float(levels[-1])]


def _ticks(field: Field) -> dict[str, Any]:
    values = plots.ticks(field.levels, field.log)
    at = np.log10(values).tolist() if field.log else values
    return {"tickvals": at, "ticktext": [plots.number(v) for v in values]}


def _bar(field: Field) -> dict[str, Any]:
    title = {"text": plot_text(field.zlabel), "side": "right"}
    return {"title": title, "thickness": 14, "outlinewidth": 0, **_ticks(field)}


def _hover(field: Field) -> list[list[str]]:
    return [
        [f"({x:.3g}, {y:.3g}): {v:.6g}" if np.isfinite(v) else "" for x, v in zip(field.x, row, strict=True)]
        for y, row in zip(field.y, field.z, strict=True)
    ]


def _dots(at: Any, name: str, marker: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plot_text(name),
        "x": at[:, 0].tolist(),
        "y": at[:, 1].tolist(),
        "marker": dict(marker),
        "hoverinfo": "text",
        "hovertext": [plot_text(name)] * len(at),
    }


def _axis(label: str) -> dict[str, Any]:
    return {"title": {"text": _words(label)}}


def _words(label: str, width: int = 0) -> str:
    text = plots.broken(label.replace("\n", " "), width) if width else label
    return "<br>".join(plot_text(line) for line in text.split("\n"))


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    positive = [v for v in values if v > 0] or [1.0]
    spread = max(positive) / min(positive)
    return {"type": "log", "exponentformat": "power", "dtick": 1 if spread > 30 else "D2"}


def _figure(
    data: list[dict[str, Any]],
    layout: dict[str, Any],
    note: str,
    *,
    legend: bool,
    height: int = 420,
    margin: Mapping[str, int] | None = None,
) -> Figure:
    """The figure with a note above it and the legend under that."""
    layout = dict(layout)
    top = {"t": (64 if legend else 36) if note else 16}
    if legend:
        layout |= {"showlegend": True, "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"}}
    if note:
        font = {"size": 12, "color": "var:soft"}
        title = {"text": plot_text(note), "font": font, "x": 0, "xref": "paper", "yref": "container"}
        layout["title"] = title | {"y": 0.985, "yanchor": "top"}
    layout["margin"] = {**(margin or {}), **top}
    return Figure(data, layout, height, narrow_margin={"l": 48, "r": 8, **(margin or {}), **top})
