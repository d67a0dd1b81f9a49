"""The figures of a study that are curves with bands: over the epochs, along directions, and spectra.

Each builder gives None where the study has nothing for its figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flatmin.measure.trace import Density
from flatmin.report.figures import content as plots
from flatmin.report.html import Figure, plot_text
from flatmin.report.studies.style import FigureSection, StudyStyle
from flatmin.report.style import WIDE, band, log_axis
from flatmin.stats import PERCENT, UNBOUNDED, Ends, Stat, summarise
from flatmin.study.finished import FinishedRun
from flatmin.study.tabulate import StudyRow, StudyTable

Points = Iterable[tuple[float, float]]
_BANDS = "Lines are means over the seeds, bands their 95 % intervals, cut where they leave the figure."
_ROOM = 0.25  # of the range of the means that bands may leave it by
_HEIGHT = 360
_EPOCHS = 10  # up to so many have a tick each
_DENSITY_POINTS = 3  # every third point of a density is drawn
_RATIOS = {
    "|r| > 1": "ratio_larger",
    "r > 1": "ratio_above_1",
    "0 < r ≤ 1": "ratio_0_to_1",
    "-1 ≤ r < 0": "ratio_minus_1_to_0",
    "r < -1": "ratio_below_minus_1",
}
COUNTED = ("misclassified", "flipped", *_RATIOS.values())
"""Diagnostics that are drawn by epochs."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A figure of one curve a row.

    Args:
        y: what the vertical axis is.
        read: the points of one run of a row.
        x: what the horizontal axis is.
        log: the vertical axis is logarithmic where the values ask for it.
        ends: of the values that there can be.
        metric: whose steps the values have; see `StudyRow`.
    """

    y: str
    read: Callable[[StudyRow, FinishedRun], Points]
    x: str = "epoch"
    log: bool = False
    ends: Ends = UNBOUNDED
    metric: str = ""


def curve(table: StudyTable, style: StudyStyle, wanted: Curve) -> Figure | None:
    """The figure; None if no run has points for it."""
    curves: list[tuple[StudyRow, dict[float, Stat]]] = []
    for row in table.rows:
        values: dict[float, list[float]] = {}
        for run in row.runs.values():
            for x, y in wanted.read(row, run):
                if math.isfinite(x) and math.isfinite(y):
                    values.setdefault(x, []).append(y)
        if values:
            step = row.steps.get(wanted.metric, 0.0)
            curves.append((row, {x: summarise(values[x], step=step, ends=wanted.ends) for x in sorted(values)}))
    if not curves:
        return None
    means = [stat.mean for _, stats in curves for stat in stats.values()]
    low, high = min(means), max(means)
    log = wanted.log and low > 0 and high > WIDE * low
    room = _ROOM * (high - low) or _ROOM * abs(high) or 1.0
    ends = (low / 2, high * 2) if log else (max(low - room, wanted.ends[0]), min(high + room, wanted.ends[1]))
    shades = [shade for row, stats in curves for shade in _band(row, stats, style, ends)]
    data = [*shades, *(_line(row, stats, style, wanted) for row, stats in curves)]
    axis = log_axis([low, high], plot_text(wanted.y)) if log else {"title": {"text": plot_text(wanted.y)}}
    few = wanted.x == "epoch" and max(x for _, stats in curves for x in stats) <= _EPOCHS
    xaxis = {"title": {"text": plot_text(wanted.x)}} | ({"dtick": 1} if few else {})
    return Figure(data, {"xaxis": xaxis, "yaxis": axis}, _HEIGHT)


def _band(row: StudyRow, stats: Mapping[float, Stat], style: StudyStyle, ends: Ends) -> list[dict[str, Any]]:
    """The intervals; nothing if none is known."""
    if all(math.isnan(stat.half) for stat in stats.values()):
        return []
    lows = [math.nan if math.isnan(stat.half) else _short(max(stat.low, ends[0])) for stat in stats.values()]
    highs = [_short(min(stat.high, ends[1])) for stat in stats.values()]
    return [style.shared(row) | band(list(stats), lows, highs, style.of(row).color, min(0.14, 1 / len(style.tones)))]


def _line(row: StudyRow, stats: Mapping[float, Stat], style: StudyStyle, wanted: Curve) -> dict[str, Any]:
    """The means."""
    row_style, label = style.of(row), plot_text(row.label)
    return style.shared(row) | {
        "type": "scatter",
        "mode": "lines" if len(stats) > 1 else "markers",
        "x": list(stats),
        "y": [_short(stat.mean) for stat in stats.values()],
        "hoverinfo": "text",
        "hovertext": [
            f"{label}<br>{plot_text(wanted.x)} {x:g}: {_told(stat)} (n = {stat.n})" for x, stat in stats.items()
        ],
        "line": {"color": row_style.color, "dash": row_style.dash, "width": 2},
        "marker": {"color": row_style.color, "symbol": row_style.symbol, "size": 8},
    }


def _told(stat: Stat) -> str:
    return stat.text(".4g", width=".2g", gap=" ")


def _short(value: float) -> float:
    """With the digits that a picture can show: a page holds many points."""
    return float(f"{value:.6g}")


def section(
    table: StudyTable, style: StudyStyle, title: str, caption: str, wanted: Mapping[str, Curve]
) -> FigureSection | None:
    """The figures that there are values for, by name; None if there is none."""
    drawn = {name: fig for name, one in wanted.items() if (fig := curve(table, style, one)) is not None}
    if not drawn:
        return None
    return FigureSection(title=title, caption=f"{caption} {_BANDS}", figures=drawn)


def over_epochs(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """Train loss, accuracies and memorisation through training."""

    def line(name: str) -> Callable[[StudyRow, FinishedRun], Points]:
        def read(row: StudyRow, run: FinishedRun) -> Points:
            values = ((line.epoch, getattr(line, name)) for line in run.lines)
            return [(epoch, value) for epoch, value in values if value is not None]

        return read

    def percent(title: str, name: str) -> Curve:
        return Curve(y=title, read=line(name), ends=PERCENT, metric=name)

    return section(
        table,
        style,
        "Training",
        "Train loss is that of the updates, averaged over the epoch: at w, or at w + ε for methods whose first pass is "
        "not at w. Accuracies are those after the epoch.",
        {
            "Train loss": Curve(y="train loss", read=line("train_loss"), ends=(0.0, math.inf), log=True),
            "Validation accuracy": percent("validation accuracy, %", "val_acc"),
            "Test accuracy": percent("test accuracy, %", "test_acc"),
            "Memorised wrong labels": percent("memorised, %", "memorised"),
        },
    )


def under_perturbation(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """How many training samples are wrong at w + eps, and how many the ascent turned."""

    def count(name: str) -> Callable[[StudyRow, FinishedRun], Points]:
        def read(row: StudyRow, run: FinishedRun) -> Points:
            return [(epoch, mean * _updates(row, run)) for epoch, mean in _by_epoch(run, name)]

        return read

    return section(
        table,
        style,
        "Misclassified under perturbation",
        "Training samples of an epoch that the network gets wrong at w + ε, and those of them that it has right at w: "
        "counted in the updates that were logged, and scaled to the updates of an epoch.",
        {
            "Misclassified at w + ε": Curve(y="samples an epoch", read=count("misclassified"), ends=(0.0, math.inf)),
            "Flipped by the ascent": Curve(y="samples an epoch", read=count("flipped"), ends=(0.0, math.inf)),
        },
    )


def _updates(row: StudyRow, run: FinishedRun) -> float:
    """Updates of an epoch."""
    return row.budget / row.gradients / run.result.epochs if run.result.epochs else math.nan


def _by_epoch(run: FinishedRun, name: str) -> list[tuple[int, float]]:
    """The mean of a diagnostic over the logged updates of each epoch."""
    values: dict[int, list[float]] = {}
    for step in run.steps:
        value = step.get(name)
        if value is not None and math.isfinite(value):
            values.setdefault(int(step["epoch"]), []).append(float(value))
    return [(epoch, math.fsum(numbers) / len(numbers)) for epoch, numbers in values.items()]


def ratios(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """The ratio of the perturbed gradient to the first one, entry by entry, through training."""

    def share(name: str) -> Curve:
        def read(row: StudyRow, run: FinishedRun) -> Points:
            return [(epoch, 100.0 * mean) for epoch, mean in _by_epoch(run, name)]

        return Curve(y="share of the entries, %", read=read, ends=PERCENT)

    return section(
        table,
        style,
        "SAM's gradient against SGD's",
        "Shares of the entries of the gradient by their ratio r = gₛ / g, at w + ε over at w: mean of the updates that "
        "were logged in an epoch.",
        {words: share(name) for words, name in _RATIOS.items()},
    )


def slices(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """The loss along directions from the trained weights."""

    def along(name: str) -> Callable[[StudyRow, FinishedRun], Points]:
        def read(row: StudyRow, run: FinishedRun) -> Points:
            line = _measured(run, "landscape", name)
            if not line or not line["loss"]:
                return []
            places = line["axes"][0]["points"]
            return [(x, y) for x, y in zip(places, line["loss"], strict=True) if y is not None]

        return read

    return section(
        table,
        style,
        "Slices of the loss",
        "The loss along a line through the trained weights; a point where it is not finite is left out.",
        {
            "Along the first eigenvector": Curve(y="loss", x="distance / ‖w‖", read=along("along_v1"), log=True),
            "Along a random direction": Curve(
                y="loss", x="multiples of a filter-normalised direction", read=along("along_random"), log=True
            ),
        },
    )


def spectra(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """The density of the Hessian's eigenvalues, a curve for each row."""
    densities: list[tuple[StudyRow, Density]] = []
    sizes: list[int] = []
    for row in table.rows:
        reports = [one for run in row.runs.values() if (one := _measured(run, "density", "density")) is not None]
        reports = [one for one in reports if one["nodes"] and None not in (*one["nodes"], *one["weights"])]
        if reports:
            densities.append((row, _mean_density(reports)))
            sizes += [one["conventions"]["size"] for one in reports if one.get("conventions")]
    if not densities:
        return None
    drawn = plots.density({str(i): density for i, (_, density) in enumerate(densities)})
    peak = max(float(line.y.max()) for line in drawn.lines)
    # A tenth of what a single eigenvalue of the largest network gives at the kernel's own peak.
    floor = drawn.low * 1e8 * 0.1 / max(sizes) if sizes and drawn.low is not None else peak * 1e-8
    data = []
    for (row, density), line in zip(densities, drawn.lines, strict=True):
        row_style = style.of(row)
        pairs = list(zip(line.x.tolist(), line.y.tolist(), strict=True))[::_DENSITY_POINTS]
        text = f"{plot_text(row.label)} (n = {density.runs})"
        data.append(
            style.shared(row)
            | {
                "type": "scatter",
                "mode": "lines",
                "x": [_short(x) for x, _ in pairs],
                "y": [_short(y) if y >= floor else None for _, y in pairs],
                "hoverinfo": "text",
                "hovertext": [f"{text}<br>λ {x:.4g}: {y:.3g}" if y >= floor else "" for x, y in pairs],
                "line": {"color": row_style.color, "dash": row_style.dash, "width": 1.8},
            }
        )
    axis = log_axis([floor, peak], plot_text(drawn.ylabel))
    return FigureSection(
        title="Eigenvalue density",
        caption="Density of the Hessian's eigenvalues, the mean of the networks of all seeds, smoothed for the picture "
        "and cut at a tenth of what a single eigenvalue gives; it has no error bars.",
        figures={"Eigenvalue density": Figure(data, {"xaxis": {"title": {"text": drawn.xlabel}}, "yaxis": axis})},
    )


def _mean_density(reports: Sequence[Mapping[str, Any]]) -> Density:
    """The mean of densities; `runs` is their number."""
    nodes = torch.tensor([x for one in reports for x in one["nodes"]], dtype=torch.float64)
    weights = torch.tensor([x / len(reports) for one in reports for x in one["weights"]], dtype=torch.float64)
    return Density(nodes=nodes, weights=weights, runs=len(reports), steps=0, products=0, conventions=None)


def _measured(run: FinishedRun, section: str, name: str) -> Mapping[str, Any] | None:
    result = (run.report or {}).get("sections", {}).get(section, {}).get("results", {}).get(name)
    return result if isinstance(result, Mapping) else None
