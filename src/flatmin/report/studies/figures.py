"""The figures of a study with a point for each row or run: accuracy over rho and cost, sharpness, and the radar.

Each builder returns None if the study has no values for its figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from flatmin.report.figures.chart import Axis, Chart, Radar, Series
from flatmin.report.figures.scales import aside, shifts
from flatmin.report.studies.style import EVERY, FigureSection, StudyStyle, every_row, tried_rows
from flatmin.report.style import interval, number
from flatmin.stats import Stat
from flatmin.study.tabulate import StudyRow, StudyTable
from flatmin.train.trainer import build_recipe

_SHARPNESS = ("lambda_max", "lambda_1")
_SPOKES = ("data", "model")
_INNER = 0.15  # where the smallest mean of an axis is, as a share of the radar's radius
_ASIDE, _ROOM = 0.025, 0.16  # distance between marks at one place, and of all of them, as shares of the axis
_LOG_FROM = 8.0  # budgets that differ by more than this factor get a logarithmic axis
_ROWS = 24  # the most rows that fit below each other
_APART = 0.2  # distance of the two kinds of marks from the middle of a row, in rows
_BELOW = 0.17  # distance of the seeds' marks from the mean, in rows
_TICKS = 12  # up to this number, each radius has a tick


def over_rho(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """Accuracy over the radius: a figure for each geometry, a line for each arm and point of its other axes."""
    chosen = any(row.grid_point is not None and "rho" in row.grid_point.choose for row in table.rows)
    metric, name = ("val_acc", "validation accuracy") if chosen else ("test_acc", "test accuracy")
    geometries: dict[str, dict[tuple[object, ...], list[tuple[float, StudyRow]]]] = {}
    flat: list[StudyRow] = []
    for row in tried_rows(table) if chosen else every_row(table):
        if not row.columns[metric].stat.n:
            continue
        rho = _radius(row)
        if rho is None:
            flat.append(row)
        else:
            key = (row.arm, *(item for item in row.values.items() if item[0] != "rho"))
            geometries.setdefault(_geometry(row), {}).setdefault(key, []).append((rho, row))
    lines_of = {
        geometry: list(lines.values())
        for geometry, lines in geometries.items()
        if any(len({rho for rho, _ in line}) > 1 for line in lines.values())
    }
    if not lines_of:
        return None
    why = ", by which rho was chosen" if chosen else ""
    level = " Arms without a radius are horizontal lines." if flat else ""
    apart = (
        " Radii in different geometries cannot be compared, so each geometry has its own figure."
        if len(lines_of) > 1
        else ""
    )
    return FigureSection(
        title="Accuracy over the radius",
        caption=f"Mean {name}{why}. Bars are 95 % intervals over the seeds, cut at 0 and 100. Marks of different arms "
        f"at the same radius are drawn side by side.{level}{apart}",
        figures=[
            _over_one_rho(lines, flat, style, metric, f"{name}, %", geometry if len(lines_of) > 1 else "")
            for geometry, lines in lines_of.items()
        ],
    )


def _over_one_rho(
    lines: Sequence[list[tuple[float, StudyRow]]],
    flat: Sequence[StudyRow],
    style: StudyStyle,
    metric: str,
    ylabel: str,
    geometry: str,
) -> Chart:
    radii = sorted({rho for line in lines for rho, _ in line})
    low, high, log = radii[0], radii[-1], radii[0] > 0
    series: list[Series] = []
    for row in flat:
        stat = row.columns[metric].stat
        hover = [_hover(row.label, "no radius", stat)] * 2
        level: dict[str, Any] = {"y": [stat.mean] * 2, "y_interval": interval([stat] * 2), "band": True, "width": 1.5}
        series.append(Series(**style.of(row), **level, x=[low, high], hover=hover))
    arms = list(dict.fromkeys(line[0][1].arm for line in lines))
    places = dict(zip(arms, shifts(len(arms), _ASIDE / 2, _ROOM / 2), strict=True))
    for line in lines:
        line.sort(key=lambda item: item[0])
        row = line[0][1]
        stats = [one.columns[metric].stat for _, one in line]
        own = style.of(row, without=("rho",))
        series.append(
            Series(
                **own,
                kind="both",
                size=9.0,
                x=[aside(rho, places[row.arm], low, high, log) for rho, _ in line],
                y=[stat.mean for stat in stats],
                y_interval=interval(stats),
                hover=[_hover(own["label"], f"rho {rho:g}", stat) for (rho, _), stat in zip(line, stats, strict=True)],
            )
        )
    ticks = {rho: f"{rho:g}" for rho in radii} if len(radii) <= _TICKS else None
    return Chart(
        title="Accuracy over the radius" + (f", {geometry}" if geometry else ""),
        x=Axis(label=f"rho ({geometry})" if geometry else "rho", log=log, ticks=ticks),
        y=Axis(label=ylabel),
        series=series,
    )


def _geometry(row: StudyRow) -> str:
    """The name of the geometry in which a row's method measures rho."""
    return "" if row.grid_point is None else type(build_recipe(row.grid_point.config).geometry).__name__


def _radius(row: StudyRow) -> float | None:
    for run in row.runs.values():
        if run.result.rho is not None and math.isfinite(run.result.rho):
            return float(run.result.rho)
    return None


def over_cost(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """Test accuracy over the gradient evaluations of a run, with the Pareto front; None if all costs are equal."""
    rows = [row for row in table.rows if row.columns["test_acc"].stat.n and row.budget > 0 and row.budget < math.inf]
    if len({round(row.budget) for row in rows}) < 2:
        return None
    series: list[Series] = []
    for i, point in enumerate(style.points):
        here = [row for row in rows if row.point.items() <= point.items()]
        steps = front([(row.budget, row.columns["test_acc"].stat.mean) for row in here])
        if len(here) > 1:
            x, y = [x for x, _ in steps], [y for _, y in steps]
            line = Series(x=x, y=y, kind="steps", tone="soft", dash="dot", width=1.5, points=[str(i)])
            series.append(line)
    budgets = [row.budget for row in rows]
    log = max(budgets) > _LOG_FROM * min(budgets)
    low = min(budgets) if log else 0.0
    for row, shift in zip(rows, _beside(rows, style), strict=True):
        stat = row.columns["test_acc"].stat
        text = f"{row.budget:,.0f} gradient evaluations".replace(",", " ")
        series.append(
            Series(
                **style.of(row),
                kind="marks",
                size=9.0,
                x=[aside(row.budget, shift, low, max(budgets), log)],
                y=[stat.mean],
                y_interval=interval([stat]),
                hover=[_hover(row.label, text, stat)],
            )
        )
    chart = Chart(
        title="Accuracy over cost",
        x=Axis(label="gradient evaluations of a run", log=log, from_zero=not log),
        y=Axis(label="test accuracy, %"),
        series=series,
    )
    return FigureSection(
        title="Accuracy and cost",
        caption="Mean test accuracy over the number of gradient evaluations of a run, each on one batch. Bars are 95 % "
        "intervals over the seeds, cut at 0 and 100. The dotted line is the Pareto front of the means. The "
        "bars do not show paired differences; for these, see the column 'vs ...'. Marks of equal cost are drawn side "
        "by side.",
        figures=[chart],
    )


def _beside(rows: Sequence[StudyRow], style: StudyStyle) -> list[float]:
    """Offsets of the rows' marks, as shares of the axis, so that rows of equal cost do not hide each other."""
    together = style.choices()[1] == EVERY
    keys = [(round(row.budget), *(() if together else row.point.items())) for row in rows]
    places = {key: iter(shifts(keys.count(key), _ASIDE, _ROOM)) for key in keys}
    return [next(places[key]) for key in keys]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front of points (cost, value): those that no other point beats in both, by ascending cost.

    Examples:
        >>> front([(2, 5.0), (1, 3.0), (2, 4.0), (3, 4.5)])
        [(1, 3.0), (2, 5.0)]
    """
    corners: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not corners or value > corners[-1][1]:
            corners.append((cost, value))
    return corners


def by_seed(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """Test accuracy of every seed, with mean and interval of each row; also at the best epoch if that is a column."""
    rows = [row for row in table.rows if row.columns["test_acc"].stat.n]
    if len(style.points) > 1 or not 2 <= len(rows) <= _ROWS or all(row.columns["test_acc"].stat.n < 2 for row in rows):
        return None
    both = "test_best" in table.metrics
    kinds = [("test_acc", "", True, -_APART if both else 0.0)]
    kinds += [("test_best", ", best epoch", False, _APART)] if both else []
    series: list[Series] = []
    for i, row in enumerate(rows):
        for metric, word, filled, shift in kinds:
            stat = row.columns[metric].stat
            if not stat.n:
                continue
            look: dict[str, Any] = {**style.of(row), "kind": "marks", "filled": filled}
            seeds = [(seed, x) for seed, run in row.runs.items() if (x := run.number(metric)) is not None]
            hover = [f"{row.label}{word}, seed {seed}: {x:.2f} %" for seed, x in seeds]
            # Below the interval's line, which would hide them.
            small: dict[str, Any] = {**look, "label": "", "size": 7.0, "opacity": 0.7, "hover": hover}
            series.append(Series(**small, x=[x for _, x in seeds], y=[i + shift + _BELOW] * len(seeds)))
            mean: dict[str, Any] = {**look, "size": 12.0, "hover": [_hover(row.label + word, "mean", stat)]}
            mean |= {"x_interval": interval([stat])} | ({} if filled else {"label": ""})
            series.append(Series(**mean, x=[stat.mean], y=[i + shift]))
    names = {float(i): name for i, name in enumerate(row.label for row in rows)}
    open_marks = (
        " Filled marks are for the weights that a run keeps, open marks for the epoch with the best validation "
        "accuracy."
        if both
        else ""
    )
    return FigureSection(
        title="Accuracy of each seed",
        caption=f"Small marks are single seeds; large marks are means with their 95 % intervals.{open_marks}",
        figures=[
            Chart(
                title="Accuracy of each seed",
                x=Axis(label="test accuracy, %"),
                y=Axis(ticks=names, range=(len(rows) - 0.5, -0.5), grid=False),
                series=series,
                height=90 + 44 * max(len(rows), 3),
            )
        ],
    )


def over_sharpness(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """The largest Hessian eigenvalue over training loss and test accuracy, with one point for each run."""
    for metric in _SHARPNESS:
        charts = [
            _sharpness(table, style, metric, "train_ce", "training loss at the end", "Sharpness and train loss"),
            _sharpness(table, style, metric, "test_acc", "test accuracy, %", "Sharpness and accuracy"),
        ]
        figures = [chart for chart in charts if chart is not None]
        if figures:
            return FigureSection(
                title="Sharpness",
                caption="The largest eigenvalue of the Hessian of the loss, with one mark for each run. It falls with "
                "the training loss, so compare it at equal loss; a small value alone does not show a flat minimum.",
                figures=figures,
            )
    return None


def _sharpness(
    table: StudyTable, style: StudyStyle, metric: str, against: str, xlabel: str, title: str
) -> Chart | None:
    log = against == "train_ce"
    series: list[Series] = []
    for row in table.rows:
        pairs = [
            (seed, x, y)
            for seed, run in row.runs.items()
            if (x := run.number(against)) is not None and (y := run.number(metric)) is not None and y > 0
        ]
        pairs = [pair for pair in pairs if pair[1] > 0 or not log]
        if pairs:
            series.append(
                Series(
                    **style.of(row),
                    kind="marks",
                    size=10.0,
                    opacity=0.85,
                    edge="paper",
                    x=[x for _, x, _ in pairs],
                    y=[y for _, _, y in pairs],
                    hover=[f"{row.label}, seed {seed}\n{against} {x:.4g}, {metric} {y:.4g}" for seed, x, y in pairs],
                )
            )
    if not series:
        return None
    vertical = Axis(label=metric, log=True)
    return Chart(title=title, x=Axis(label=xlabel, log=log), y=vertical, series=series)


def radar(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """A polygon for each arm over networks and data sets, with axes from the smallest mean to the largest."""
    rows = [row for row in table.rows if row.columns["test_acc"].stat.n]
    spokes = list(dict.fromkeys(_spoke(row) for row in rows))
    if len(spokes) < 3 or () in spokes or len({row.arm for row in rows}) < 2:
        return None
    means = {spoke: [row.columns["test_acc"].stat.mean for row in rows if _spoke(row) == spoke] for spoke in spokes}
    polygons: dict[tuple[object, ...], dict[tuple[str, ...], StudyRow]] = {}
    for row in rows:
        key = (row.arm, *(item for item in row.point.items() if item[0] not in _SPOKES))
        polygons.setdefault(key, {})[_spoke(row)] = row
    series: list[Series] = []
    for polygon in polygons.values():
        corners = [(i, polygon[spoke]) for i, spoke in enumerate(spokes) if spoke in polygon]
        corners += corners[:1] if len(corners) == len(spokes) else []
        stats = [row.columns["test_acc"].stat for _, row in corners]
        series.append(
            Series(
                **style.of(corners[0][1], without=_SPOKES),
                kind="both",
                size=7.0,
                x=[i for i, _ in corners],
                y=[_scaled(stat.mean, means[_spoke(row)]) for (_, row), stat in zip(corners, stats, strict=True)],
                hover=[_hover(row.label, "test", stat) for (_, row), stat in zip(corners, stats, strict=True)],
            )
        )
    names = [f"{', '.join(spoke)}\n{min(means[spoke]):.2f}–{max(means[spoke]):.2f}" for spoke in spokes]
    return FigureSection(
        title="Radar",
        caption="Mean test accuracy in %. Each axis has its own scale, from the smallest mean (inner ring) to the "
        "largest (outer ring). Distances on different axes cannot be compared, and small differences look large. "
        "Hover over a mark to see the mean with its 95 % interval over the seeds.",
        figures=[Radar(title="Radar", spokes=names, series=series, ring=_INNER)],
    )


def _spoke(row: StudyRow) -> tuple[str, ...]:
    return tuple(row.values[key] for key in _SPOKES if key in row.values)


def _scaled(value: float, among: Sequence[float]) -> float:
    low, high = min(among), max(among)
    return 1.0 if high == low else _INNER + (1 - _INNER) * (value - low) / (high - low)


def _hover(label: str, where: str, stat: Stat) -> str:
    return f"{label}\n{where}: {number(stat, 2)} % (n = {stat.n})"
