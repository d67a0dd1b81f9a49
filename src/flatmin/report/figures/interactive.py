"""Figures in pages: data for plotly.js, which draws them in the browser. Python's plotly is not needed here.

Colours are names of the style sheet, so that figures follow the page's theme. HTML and TeX in texts are escaped,
because plotly would interpret them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flatmin.report import html
from flatmin.report.figures import scales
from flatmin.report.figures.chart import Axis, Chart, Drawable, Field, Radar, Series, entries, reach
from flatmin.report.html import Figure, Markup, plot_text

_WIDTH = 44  # characters of an axis label before it is broken
_DECADES = 3  # axes over more decades have ticks at powers of ten only
_BAND = 0.15  # opacity of a band
_SIDES = {"l": 64, "r": 16, "b": 48}
_NARROW = {"l": 48, "r": 8}


def embed(shown: Drawable) -> Markup:
    """A figure of a page."""
    return html.figure(figure(shown), shown.title)


def panels(shown: Sequence[Drawable]) -> Markup:
    """Figures of a page with their titles, side by side if the page is wide enough."""
    return html.panels({one.title: figure(one) for one in shown})


def figure(shown: Drawable) -> Figure:
    """The data that plotly.js draws."""
    if isinstance(shown, Radar):
        return _radar(shown)
    if isinstance(shown, Field):
        return _map(shown) if shown.view is None else _relief(shown)
    bands = sum(one.band for one in shown.series)
    data = [trace for one in shown.series if len(one.x) for trace in _traces(one, min(_BAND, 1 / max(bands, 1)))]
    for one in shown.series:
        if len(one.lost):
            data.append(_lost(one, shown))
    layout: dict[str, Any] = {
        "xaxis": _axis(shown.x, reach(shown, "x"), sideways=True),
        "yaxis": _axis(shown.y, reach(shown, "y")),
    }
    if shown.levels:
        line = {"color": "var:soft", "width": 1, "dash": "dot"}
        layout["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height, "line": line}
            for height in shown.levels
        ]
        place = {"xref": "paper", "x": 1, "xanchor": "right", "yanchor": "bottom", "showarrow": False}
        layout["annotations"] = [
            place | {"y": math.log10(height) if shown.y.log else height, "text": plot_text(text)}
            for height, text in shown.levels.items()
            if text
        ]
    return _framed(shown, data, layout, legend=shown.legend)


def _traces(one: Series, opacity: float) -> list[dict[str, Any]]:
    """The traces of a series, with its band first if it has one."""
    shared: dict[str, Any] = {"type": "scatter", "showlegend": False}
    if one.group:
        shared["legendgroup"] = one.group
    if one.points is not None:
        shared["points"] = list(one.points)
    color = _color(one.tone)
    marker: dict[str, Any] = {"color": color, "symbol": one.symbol + ("" if one.filled else "-open"), "size": one.size}
    if one.edge:
        marker["line"] = {"color": _color(one.edge), "width": 1}
    mode = ["lines"] * one.lined + ["markers"] * one.marked
    trace = shared | {
        "mode": "+".join(mode),
        "name": plot_text(one.label),
        "showlegend": bool(one.label),
        "x": list(one.x),
        "y": list(one.y),
        "opacity": one.opacity,
        "line": {"color": color, "dash": one.dash, "width": one.width}
        | ({"shape": "hv"} if one.kind == "steps" else {}),
        "marker": marker,
        "hoverinfo": "text" if one.hover else "skip",
        "hovertext": [_lines(text) for text in one.hover],
    }
    if one.x_interval is not None:
        trace["error_x"] = _bars(one.x, one.x_interval, color)
    if one.y_interval is not None and not one.band:
        trace["error_y"] = _bars(one.y, one.y_interval, color)
    if one.y_interval is None or not one.band:
        return [trace]
    outline = _outline(one.x, *one.y_interval)
    if not outline[0]:
        return [trace]
    shade = {"x": outline[0], "y": outline[1], "mode": "lines", "fill": "toself", "fillcolor": color}
    return [shared | shade | {"line": {"color": color, "width": 0}, "opacity": opacity, "hoverinfo": "skip"}, trace]


def _bars(at: Sequence[float], ends: tuple[Sequence[float], Sequence[float]], color: str) -> dict[str, Any]:
    """Error bars."""
    under, over = ([0.0 if math.isnan(b - a) else max(0.0, b - a) for a, b in pairs] for pairs in (
        zip(ends[0], at, strict=True), zip(at, ends[1], strict=True)
    ))  # fmt: skip
    shape = {"type": "data", "symmetric": False, "thickness": 2, "width": 5, "color": color}
    return shape | {"array": over, "arrayminus": under, "visible": any(over) or any(under)}


def _outline(
    xs: Sequence[float], lows: Sequence[float], highs: Sequence[float]
) -> tuple[list[float | None], list[float | None]]:
    """The outline of the area between two curves, with a gap where one of them is unknown."""
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
    return x, y


def _lost(one: Series, shown: Chart) -> dict[str, Any]:
    """Crosses at the height of the highest point, for points whose value is not finite."""
    top = max((y for other in shown.series for y in other.y if math.isfinite(y)), default=1.0)
    crosses = Series(
        x=one.lost, y=[top] * len(one.lost), kind="marks", symbol="x", tone=one.tone, group=one.group,
        hover=[f"{one.label}: not finite".removeprefix(": ")] * len(one.lost), points=one.points,
    )  # fmt: skip
    return _traces(crosses, 1.0)[0]


def _map(field: Field) -> Figure:
    height, ends = _heights(field)
    ground = {
        "type": "contour",
        "x": field.xs.tolist(),
        "y": field.ys.tolist(),
        "z": height,
        "colorscale": "Viridis",
        # plotly.js supports equal steps only.
        "contours": {"start": ends[0], "end": ends[1], "size": (ends[1] - ends[0]) / (len(field.levels) - 1)},
        "autocontour": False,
        "showlegend": False,
        "line": {"width": 0.4, "color": "rgba(255,255,255,0.6)"},
        "colorbar": _color_bar(field),
        "hoverinfo": "text",
        "text": _hover(field),
    }
    data = [ground, *(trace for one in field.series for trace in _traces(one, _BAND))]
    layout = {
        "xaxis": _axis(field.x, field.xs.tolist()) | {"range": [float(field.xs[0]), float(field.xs[-1])]},
        "yaxis": _axis(field.y, field.ys.tolist()) | {"range": [float(field.ys[0]), float(field.ys[-1])]},
    }
    return _framed(field, data, layout, legend=bool(entries(field)))


def _relief(field: Field) -> Figure:
    """A surface in perspective, which can be turned with the mouse."""
    height, ends = _heights(field)
    data = [
        {
            "type": "surface",
            "x": field.xs.tolist(),
            "y": field.ys.tolist(),
            "z": height,
            "colorscale": "Viridis",
            "cmin": ends[0],
            "cmax": ends[1],
            "colorbar": _color_bar(field),
            "hoverinfo": "text",
            "text": _hover(field),
        }
    ]
    assert field.view is not None
    elevation, azimuth = map(math.radians, field.view)
    eye = {
        "x": 2.38 * math.cos(elevation) * math.cos(azimuth),
        "y": 2.38 * math.cos(elevation) * math.sin(azimuth),
        "z": 2.38 * math.sin(elevation),
    }
    axis = {"gridcolor": "var:grid", "zerolinecolor": "var:grid", "color": "var:ink", "showbackground": False}
    titled = [
        {"title": {"text": _lines(one.label, 32), "font": {"size": 11}}} for one in (field.x, field.y, field.z_axis)
    ]
    scene = {
        "xaxis": axis | titled[0],
        "yaxis": axis | titled[1],
        "zaxis": axis | titled[2] | {"range": ends, **_height_ticks(field)},
        "aspectmode": "manual",
        "aspectratio": {"x": 1.15, "y": 1.15, "z": 0.8},
        "camera": {"eye": eye, "center": {"x": 0, "y": 0, "z": -0.22}},
    }
    return _framed(field, data, {"scene": scene}, legend=False, sides={"l": 0, "r": 0, "b": 8})


def _heights(field: Field) -> tuple[list[list[float]], list[float]]:
    """The values to draw (logarithms for a logarithmic axis), and the ends of their scale."""
    levels, z = (np.log10(values) if field.z_axis.log else values for values in (field.levels, field.z))
    return z.tolist(), [float(levels[0]), float(levels[-1])]


def _height_ticks(field: Field) -> dict[str, Any]:
    values = scales.ticks(float(field.levels[0]), float(field.levels[-1]), field.z_axis.log)
    at = np.log10(values).tolist() if field.z_axis.log else values
    return {"tickvals": at, "ticktext": [scales.number(v) for v in values]}


def _color_bar(field: Field) -> dict[str, Any]:
    title = {"text": plot_text(field.z_axis.label), "side": "right"}
    return {"title": title, "thickness": 14, "outlinewidth": 0, **_height_ticks(field)}


def _hover(field: Field) -> list[list[str]]:
    return [
        [f"({x:.3g}, {y:.3g}): {v:.6g}" if np.isfinite(v) else "" for x, v in zip(field.xs, row, strict=True)]
        for y, row in zip(field.ys, field.z, strict=True)
    ]


def _radar(radar: Radar) -> Figure:
    turn = 360.0 / len(radar.spokes)
    data = []
    for one in radar.series:
        (trace,) = _traces(one, _BAND)
        angles = [turn * spoke for spoke in trace.pop("x")]
        data.append(trace | {"type": "scatterpolar", "theta": angles, "r": trace.pop("y"), "cliponaxis": False})
    lines = {"gridcolor": "var:grid", "linecolor": "var:line"}
    radial = {"range": [0, 1], "showline": False, "tickvals": [radar.ring], "showticklabels": False, "ticks": ""}
    angular = {
        "tickvals": [turn * i for i in range(len(radar.spokes))],
        "ticktext": [_lines(scales.tick(name)) for name in radar.spokes],
        "rotation": 90,
        "direction": "clockwise",
    }
    layout = {"polar": {"bgcolor": "var:paper", "radialaxis": lines | radial, "angularaxis": lines | angular}}
    return _framed(radar, data, layout, legend=False, sides={"l": 84, "r": 84, "b": 44}, top=44)


def _axis(axis: Axis, values: Sequence[float], *, sideways: bool = False) -> dict[str, Any]:
    made: dict[str, Any] = {"title": {"text": _lines(axis.label, _WIDTH)}, "showgrid": axis.grid}
    low, high = scales.ends(axis, values)
    ticks = axis.ticks
    if axis.log:
        made["type"] = "log"
        decades = math.log10(high / low)
        if decades > _DECADES:
            made |= {"exponentformat": "power", "dtick": math.ceil(decades / 8)}
        elif ticks is None:
            # Full numbers as labels; plotly would write bare digits beside a power of ten.
            room = min(1.2, max((high / low) ** 0.08, 1.005))
            ticks = {value: scales.number(value) for value in scales.ticks(low / room, high * room, log=True)}
    if axis.range != (None, None):
        made["range"] = [math.log10(end) if end is not None and axis.log else end for end in axis.range]
    elif axis.from_zero and low >= 0:
        made["rangemode"] = "tozero"
    if ticks is not None:
        shown = scales.readable(ticks, low, high, axis.log) if sideways else ticks
        made |= {"tickvals": list(shown), "ticktext": [_lines(scales.tick(text)) for text in shown.values()]}
    return made


def _framed(
    shown: Drawable,
    data: list[dict[str, Any]],
    layout: dict[str, Any],
    *,
    legend: bool,
    sides: Mapping[str, int] | None = None,
    top: int = 16,
) -> Figure:
    """The figure with its note at the top and its legend below the note."""
    wide, narrow = ((_legend_rows(shown, width) if legend else 0) for width in (120, 38))
    note = 20 if shown.note else 0
    if legend:
        layout |= {"showlegend": True, "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"}}
    if shown.note:
        font = {"size": 12, "color": "var:soft"}
        title = {"text": plot_text(shown.note), "font": font, "x": 0, "xref": "paper", "yref": "container"}
        layout["title"] = title | {"y": 0.985, "yanchor": "top"}
    layout["margin"] = {**(sides or _SIDES), "t": top + note + 22 * wide}
    closer = {side: min(room, 64) for side, room in (sides or _NARROW).items()}
    return Figure(data, layout, shown.height, closer | {"t": max(top, 12) + note + 20 * narrow})


def _legend_rows(shown: Drawable, width: int) -> int:
    """The number of rows of a legend with at most `width` characters per row."""
    rows, used = 1, 0
    for one in entries(shown):
        size = len(one.label) + 8
        rows, used = (rows + 1, size) if used and used + size > width else (rows, used + size)
    return rows


def _color(tone: str) -> str:
    return tone if tone.startswith("#") else f"var:{tone}"


def _lines(text: str, width: int = 0) -> str:
    """Plain text for plotly, broken into lines."""
    broken = scales.broken(text, width) if width else text
    return "<br>".join(plot_text(line) for line in broken.split("\n"))
