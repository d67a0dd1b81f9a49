"""The figures of a study that have a point for each row or run: accuracy over rho and cost, sharpness, and the radar.

Each builder gives None where the study has nothing for its figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from flatmin.report.html import Figure, plot_text
from flatmin.report.studies.style import EVERY, FigureSection, StudyStyle, every_row, listed, point_of, tried_rows
from flatmin.report.style import band, broken, error_bars, log_axis, number
from flatmin.stats import Stat
from flatmin.study.tabulate import StudyRow, StudyTable

_SHARPNESS = ("lambda_max", "lambda_1")
_SPOKES = ("data", "model")
_INNER = 0.15  # of the radar's radius, where the smallest mean of an axis is
_ASIDE = 0.012  # of the place, between marks that would hide each other
_ROOM = 0.1  # of the place, for all of them together
_LOG_FROM = 8.0  # budgets that differ by more than this factor have a logarithmic axis


def over_rho(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """Accuracy over the radius, a line for each arm and values of its other axes."""
    chosen = any(row.grid_point is not None and "rho" in row.grid_point.choose for row in table.rows)
    metric, name = ("val_acc", "validation accuracy") if chosen else ("test_acc", "test accuracy")
    lines: dict[tuple[object, ...], list[tuple[float, StudyRow]]] = {}
    flat: list[StudyRow] = []
    for row in tried_rows(table) if chosen else every_row(table):
        if not row.columns[metric].stat.n:
            continue
        rho = _radius(row)
        if rho is None:
            flat.append(row)
        else:
            key = (row.arm, *(item for item in row.values.items() if item[0] != "rho"))
            lines.setdefault(key, []).append((rho, row))
    radii = sorted({rho for line in lines.values() for rho, _ in line})
    if not any(len({rho for rho, _ in line}) > 1 for line in lines.values()):
        return None
    data: list[dict[str, Any]] = []
    for row in flat:
        row_style, stat = style.of(row), row.columns[metric].stat
        ends = [radii[0], radii[-1]]
        shared = style.shared(row)
        if not math.isnan(stat.half):
            data.append(shared | band(ends, [stat.low] * 2, [stat.high] * 2, row_style.color, 0.12))
        data.append(
            shared
            | _scatter("lines", ends, [stat.mean] * 2, [_hover(row.label, "no radius", stat)] * 2)
            | {"line": {"color": row_style.color, "dash": row_style.dash, "width": 1.5}}
        )
    arms = list(dict.fromkeys(line[0][1].arm for line in lines.values()))
    for line in lines.values():
        line.sort(key=lambda item: item[0])
        row = line[0][1]
        stats = [one.columns[metric].stat for _, one in line]
        values = {key: value for key, value in point_of(row).items() if key != "rho"}
        others = listed({key: value for key, value in row.values.items() if key != "rho"})
        label = f"{row.arm}, {others}" if others else row.arm
        row_style = style.at(row.arm, values)
        xs = [rho for rho, _ in line]
        aside = 1 + (_shift(arms.index(row.arm), len(arms)) if radii[0] > 0 else 0.0)
        texts = [_hover(label, f"rho {rho:g}", stat) for rho, stat in zip(xs, stats, strict=True)]
        data.append(
            style.shared(row, values)
            | _scatter("lines+markers", [rho * aside for rho in xs], [stat.mean for stat in stats], texts)
            | {
                "error_y": error_bars(stats, row_style.color),
                "line": {"color": row_style.color, "dash": row_style.dash, "width": 2},
                "marker": {"color": row_style.color, "symbol": row_style.symbol, "size": 9},
            }
        )
    axis: dict[str, Any] = {"title": {"text": "rho"}}
    if len(radii) <= 10:
        axis |= {"tickvals": radii, "ticktext": [f"{rho:g}" for rho in radii]}
    if radii[0] > 0:
        axis["type"] = "log"
    why = ": rho was chosen by it, so test accuracy would flatter" if chosen else ""
    level = " An arm without a radius is level." if flat else ""
    return FigureSection(
        title="Accuracy over the radius",
        caption=f"Mean {name}{why}; bars: 95 % intervals over the seeds, cut at 0 and 100. Arms stand a little "
        f"beside each other.{level}",
        figures={"Accuracy over the radius": Figure(data, {"xaxis": axis, "yaxis": _title(f"{name}, %")})},
    )


def _radius(row: StudyRow) -> float | None:
    for run in row.runs.values():
        if run.result.rho is not None and math.isfinite(run.result.rho):
            return float(run.result.rho)
    return None


def over_cost(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """Test accuracy over the gradient evaluations of a run, and the Pareto front of the means; not for one cost."""
    rows = [row for row in table.rows if row.columns["test_acc"].stat.n and row.budget > 0 and row.budget < math.inf]
    if len({round(row.budget) for row in rows}) < 2:
        return None
    data: list[dict[str, Any]] = []
    for i, point in enumerate(style.points):
        here = [row for row in rows if point_of(row).items() <= point.items()]
        steps = front([(row.budget, row.columns["test_acc"].stat.mean) for row in here])
        if len(here) > 1:
            data.append(
                {"points": [str(i)]}
                | _scatter("lines", [x for x, _ in steps], [y for _, y in steps], ["Pareto front"] * len(steps))
                | {"line": {"color": "var:soft", "dash": "dot", "width": 1.5, "shape": "hv"}}
            )
    for row, aside in zip(rows, _aside(rows, style), strict=True):
        row_style, stat = style.of(row), row.columns["test_acc"].stat
        text = f"{row.budget:,.0f} gradients of a batch".replace(",", " ")
        data.append(
            style.shared(row)
            | _scatter("markers", [row.budget * (1 + aside)], [stat.mean], [_hover(row.label, text, stat)])
            | {
                "error_y": error_bars([stat], row_style.color),
                "marker": {"color": row_style.color, "symbol": row_style.symbol, "size": 11},
            }
        )
    budgets = [row.budget for row in rows]
    name = "gradient evaluations of a run"
    wide = max(budgets) > _LOG_FROM * min(budgets)
    axis = log_axis(budgets, name) if wide else _title(name) | {"rangemode": "tozero"}
    return FigureSection(
        title="What the accuracy costs",
        caption="Mean test accuracy; bars: 95 % intervals over the seeds, cut at 0 and 100. Dotted: the Pareto front "
        "of the means; differences inside the bars are not significant. Marks of equal cost stand a little beside "
        "each other.",
        figures={"Accuracy over cost": Figure(data, {"xaxis": axis, "yaxis": _title("test accuracy, %")})},
    )


def _aside(rows: Sequence[StudyRow], style: StudyStyle) -> list[float]:
    """By what share of its cost a row's mark is moved, so that rows of equal cost do not hide each other."""
    together = style.choices()[1] == EVERY
    keys = [(round(row.budget), *(() if together else point_of(row).items())) for row in rows]
    shifts = []
    for i, key in enumerate(keys):
        count = keys.count(key)
        shifts.append(_shift(keys[:i].count(key), count))
    return shifts


def _shift(i: int, count: int) -> float:
    """By what share of its place the i-th of so many marks is moved."""
    return (i - (count - 1) / 2) * min(_ASIDE, _ROOM / count)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (cost, value) that no other one beats in both, by rising cost.

    Example:
        >>> front([(2, 5.0), (1, 3.0), (2, 4.0), (3, 4.5)])
        [(1, 3.0), (2, 5.0)]
    """
    corners: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not corners or value > corners[-1][1]:
            corners.append((cost, value))
    return corners


def over_sharpness(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """The largest Hessian eigenvalue against test accuracy, one point a run."""
    for metric in _SHARPNESS:
        data: list[dict[str, Any]] = []
        for row in table.rows:
            pairs = [
                (seed, x, y)
                for seed, run in row.runs.items()
                if (x := run.number("test_acc")) is not None and (y := run.number(metric)) is not None and y > 0
            ]
            if not pairs:
                continue
            row_style = style.of(row)
            texts = [f"{plot_text(row.label)}, seed {seed}<br>test {x:.2f} %, {metric} {y:.4g}" for seed, x, y in pairs]
            marker = {"color": row_style.color, "symbol": row_style.symbol, "size": 10, "opacity": 0.85}
            data.append(
                style.shared(row)
                | _scatter("markers", [x for _, x, _ in pairs], [y for _, _, y in pairs], texts)
                | {"marker": marker | {"line": {"color": "var:paper", "width": 1}}}
            )
        if data:
            axis = log_axis([y for trace in data for y in trace["y"]], f"{metric} of the loss")
            return FigureSection(
                title="Sharpness against accuracy",
                caption="The largest eigenvalue of the Hessian and the test accuracy of each run, one mark a seed; the "
                "vertical axis is logarithmic.",
                figures={"Sharpness": Figure(data, {"xaxis": _title("test accuracy, %"), "yaxis": axis})},
            )
    return None


def radar(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """A polygon for each arm over networks and data sets, each axis from its smallest mean to its largest."""
    rows = [row for row in table.rows if row.columns["test_acc"].stat.n]
    spokes = list(dict.fromkeys(_spoke(row) for row in rows))
    if len(spokes) < 3 or () in spokes or len({row.arm for row in rows}) < 2:
        return None
    means = {spoke: [row.columns["test_acc"].stat.mean for row in rows if _spoke(row) == spoke] for spoke in spokes}
    polygons: dict[tuple[object, ...], dict[tuple[str, ...], StudyRow]] = {}
    for row in rows:
        key = (row.arm, *(item for item in point_of(row).items() if item[0] not in _SPOKES))
        polygons.setdefault(key, {})[_spoke(row)] = row
    data: list[dict[str, Any]] = []
    for polygon in polygons.values():
        corners = [(i, spoke) for i, spoke in enumerate(spokes) if spoke in polygon]
        corners += corners[:1] if len(corners) == len(spokes) else []
        row = next(iter(polygon.values()))
        values = {key: value for key, value in point_of(row).items() if key not in _SPOKES}
        row_style = style.at(row.arm, values)
        data.append(
            style.shared(row, values)
            | {
                "type": "scatterpolar",
                "mode": "lines+markers",
                "cliponaxis": False,
                "theta": [360.0 * i / len(spokes) for i, _ in corners],
                "r": [_scaled(polygon[spoke].columns["test_acc"].stat.mean, means[spoke]) for _, spoke in corners],
                "hoverinfo": "text",
                "hovertext": [
                    _hover(polygon[s].label, "test", polygon[s].columns["test_acc"].stat) for _, s in corners
                ],
                "line": {"color": row_style.color, "dash": row_style.dash, "width": 2},
                "marker": {"color": row_style.color, "symbol": row_style.symbol, "size": 7},
            }
        )
    small = {"showticklabels": False, "ticks": "", "gridcolor": "var:grid", "linecolor": "var:line"}
    layout = {
        "polar": {
            "bgcolor": "var:paper",
            "radialaxis": small | {"range": [0, 1], "showline": False, "tickvals": [_INNER]},
            "angularaxis": {
                "tickvals": [360.0 * i / len(spokes) for i in range(len(spokes))],
                "ticktext": [
                    f"{broken(', '.join(spoke), 16, 2)}<br>{min(means[spoke]):.2f}–{max(means[spoke]):.2f}"
                    for spoke in spokes
                ],
                "rotation": 90,
                "direction": "clockwise",
                "gridcolor": "var:grid",
                "linecolor": "var:line",
            },
        },
        "margin": {"l": 90, "r": 90, "t": 50, "b": 50},
    }
    return FigureSection(
        title="Radar",
        caption="Mean test accuracy in %. Each axis has a scale of its own, from the smallest mean (inner ring) to the "
        "largest (outer ring), so that distances on different axes do not compare and small differences look large; "
        "hovering shows the means with their 95 % intervals over the seeds.",
        figures={"Radar": Figure(data, layout, 460, {"l": 84, "r": 84, "t": 44, "b": 44})},
    )


def _spoke(row: StudyRow) -> tuple[str, ...]:
    return tuple(row.values[key] for key in _SPOKES if key in row.values)


def _scaled(value: float, among: Sequence[float]) -> float:
    low, high = min(among), max(among)
    return 1.0 if high == low else _INNER + (1 - _INNER) * (value - low) / (high - low)


def _scatter(mode: str, xs: Sequence[float], ys: Sequence[float], texts: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": mode,
        "x": list(xs),
        "y": list(ys),
        "hoverinfo": "text",
        "hovertext": list(texts),
    }


def _hover(label: str, where: str, stat: Stat) -> str:
    return f"{plot_text(label)}<br>{where}: {number(stat, 2)} % (n = {stat.n})"


def _title(text: str) -> dict[str, Any]:
    return {"title": {"text": text}}
