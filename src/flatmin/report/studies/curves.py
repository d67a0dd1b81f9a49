"""The figures of a study with curves: over the epochs, along directions, and spectra.

Each builder returns None if the study has no values for its figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flatmin.measure.trace import Density
from flatmin.report.figures.chart import Axis, Chart, Series
from flatmin.report.figures.scales import epochs, is_wide
from flatmin.report.figures.spectra import density as density_chart
from flatmin.report.studies.style import FigureSection, StudyStyle
from flatmin.report.style import interval
from flatmin.stats import PERCENT, UNBOUNDED, Ends, Stat, summarise
from flatmin.study.finished import FinishedRun
from flatmin.study.tabulate import StudyRow, StudyTable

Points = Iterable[tuple[float, float]]
_BANDS = "Lines are means over the seeds; bands are 95 % intervals, cut at the edges of the figure."
_ROOM = 0.25  # how far bands may leave the range of the means, as a share of it
_HEIGHT = 360
_DENSITY_POINTS = 3  # every third point of a density is drawn
_RATIOS = {
    "|r| > 1": "ratio_larger",
    "r > 1": "ratio_above_1",
    "0 < r ≤ 1": "ratio_0_to_1",
    "-1 ≤ r < 0": "ratio_minus_1_to_0",
    "r < -1": "ratio_below_minus_1",
}
COUNTED = ("misclassified", "flipped", *_RATIOS.values())
"""Diagnostics that are drawn over the epochs."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A figure with one curve for each row.

    Args:
        title: title of the figure.
        y: label of the vertical axis.
        read: returns the points of one run of a row.
        x: label of the horizontal axis.
        log: whether the vertical axis is logarithmic if the values span a wide range.
        ends: smallest and largest possible value.
        metric: the metric whose steps the values have; see `StudyRow`.
    """

    title: str
    y: str
    read: Callable[[StudyRow, FinishedRun], Points]
    x: str = "epoch"
    log: bool = False
    ends: Ends = UNBOUNDED
    metric: str = ""


def curve(table: StudyTable, style: StudyStyle, wanted: Curve) -> Chart | None:
    """The figure of a curve; None if no run has points for it."""
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
    log = wanted.log and is_wide(means)
    room = _ROOM * (high - low) or _ROOM * abs(high) or 1.0
    ends = (low / 2, high * 2) if log else (max(low - room, wanted.ends[0]), min(high + room, wanted.ends[1]))
    last = max(x for _, stats in curves for x in stats)
    return Chart(
        title=wanted.title,
        x=Axis(label=wanted.x, ticks=epochs(last) if wanted.x == "epoch" else None),
        y=Axis(label=wanted.y, log=log),
        series=[_line(row, stats, style, wanted.x, ends) for row, stats in curves],
        height=_HEIGHT,
    )


def _line(row: StudyRow, stats: Mapping[float, Stat], style: StudyStyle, x: str, ends: Ends) -> Series:
    """The line of the means, with a band of the intervals if any is known."""
    lows, highs = interval(list(stats.values()))
    band = not all(map(math.isnan, lows))
    cut = [_short(max(low, ends[0])) for low in lows], [_short(min(high, ends[1])) for high in highs]
    return Series(
        **style.of(row),
        x=list(stats),
        y=[_short(stat.mean) for stat in stats.values()],
        y_interval=cut if band else None,
        band=band,
        hover=[
            f"{row.label}\n{x} {at:g}: {stat.text('.4g', width='.2g', gap=' ')} (n = {stat.n})"
            for at, stat in stats.items()
        ],
    )


def _short(value: float) -> float:
    """A value rounded to six digits, to keep pages small."""
    return float(f"{value:.6g}")


def section(
    table: StudyTable, style: StudyStyle, title: str, caption: str, wanted: Iterable[Curve]
) -> FigureSection | None:
    """The figures that have values; None if there are none."""
    drawn = [chart for one in wanted if (chart := curve(table, style, one)) is not None]
    if not drawn:
        return None
    return FigureSection(title=title, caption=f"{caption} {_BANDS}", figures=drawn)


def over_epochs(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """Training loss, accuracies and memorisation over the epochs."""

    def line(name: str) -> Callable[[StudyRow, FinishedRun], Points]:
        def read(row: StudyRow, run: FinishedRun) -> Points:
            values = ((line.epoch, getattr(line, name)) for line in run.lines)
            return [(epoch, value) for epoch, value in values if value is not None]

        return read

    def percent(title: str, y: str, name: str) -> Curve:
        return Curve(title=title, y=y, read=line(name), ends=PERCENT, metric=name)

    return section(
        table,
        style,
        "Training",
        "The training loss is the mean over the updates of an epoch, at the weights w, or at w + ε for methods whose "
        "first pass is at perturbed weights. Accuracies are measured after the epoch.",
        [
            Curve(title="Train loss", y="training loss", read=line("train_loss"), ends=(0.0, math.inf), log=True),
            percent("Validation accuracy", "validation accuracy, %", "val_acc"),
            percent("Test accuracy", "test accuracy, %", "test_acc"),
            percent("Memorised wrong labels", "memorised, %", "memorised"),
        ],
    )


def under_perturbation(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """How many training samples are misclassified at w + eps, and how many only there."""

    def count(title: str, name: str) -> Curve:
        def read(row: StudyRow, run: FinishedRun) -> Points:
            return [(epoch, mean * _updates(row, run)) for epoch, mean in _by_epoch(run, name)]

        return Curve(title=title, y="samples per epoch", read=read, ends=(0.0, math.inf))

    return section(
        table,
        style,
        "Misclassified under perturbation",
        "Training samples that the network misclassifies at w + ε, and those of them that it classifies correctly at "
        "w. They are counted in the recorded updates and scaled to all updates of an epoch.",
        [count("Misclassified at w + ε", "misclassified"), count("Misclassified only at w + ε", "flipped")],
    )


def _updates(row: StudyRow, run: FinishedRun) -> float:
    """The number of updates per epoch."""
    return row.budget / row.gradients / run.result.epochs if run.result.epochs else math.nan


def _by_epoch(run: FinishedRun, name: str) -> list[tuple[int, float]]:
    """The mean of a diagnostic over the recorded updates of each epoch."""
    values: dict[int, list[float]] = {}
    for step in run.steps:
        value = step.get(name)
        if value is not None and math.isfinite(value):
            values.setdefault(int(step["epoch"]), []).append(float(value))
    return [(epoch, math.fsum(numbers) / len(numbers)) for epoch, numbers in values.items()]


def ratios(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """The elementwise ratio of the gradient at w + eps to that at w, over the epochs."""

    def share(title: str, name: str) -> Curve:
        def read(row: StudyRow, run: FinishedRun) -> Points:
            return [(epoch, 100.0 * mean) for epoch, mean in _by_epoch(run, name)]

        return Curve(title=title, y="share of entries, %", read=read, ends=PERCENT)

    return section(
        table,
        style,
        "SAM's gradient relative to SGD's",
        "Shares of the gradient's entries by the ratio r = gₛ / g of the gradient at w + ε to that at w. Each point is "
        "the mean over the recorded updates of an epoch.",
        [share(title, name) for title, name in _RATIOS.items()],
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
        "The loss along a line through the trained weights; points where it is not finite are left out.",
        [
            Curve(title="Along the first eigenvector", y="loss", x="distance / ‖w‖", read=along("along_v1"), log=True),
            Curve(
                title="Along a random direction",
                y="loss",
                x="multiples of a filter-normalised direction",
                read=along("along_random"),
                log=True,
            ),
        ],
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
    drawn = density_chart({str(i): density for i, (_, density) in enumerate(densities)})
    peak = max(y for one in drawn.series for y in one.y)
    assert drawn.y.range[0] is not None
    # A tenth of the peak of a single eigenvalue of the largest network.
    floor = drawn.y.range[0] * 1e8 * 0.1 / max(sizes) if sizes else peak * 1e-8
    series = []
    for (row, density), line in zip(densities, drawn.series, strict=True):
        pairs = list(zip(line.x, line.y, strict=True))[::_DENSITY_POINTS]
        text = f"{row.label} (n = {density.runs})"
        series.append(
            Series(
                **style.of(row),
                width=1.8,
                x=[_short(x) for x, _ in pairs],
                y=[_short(y) if y >= floor else math.nan for _, y in pairs],
                hover=[f"{text}\nλ {x:.4g}: {y:.3g}" if y >= floor else "" for x, y in pairs],
            )
        )
    chart = replace(
        drawn, title="Eigenvalue density", y=replace(drawn.y, range=(floor, 2 * peak)), series=series, legend=False
    )
    return FigureSection(
        title="Eigenvalue density",
        caption="Density of the Hessian's eigenvalues, smoothed for the figure. It is the mean over the networks of "
        "all seeds, cut at a tenth of the density of a single eigenvalue, and has no error bars.",
        figures=[chart],
    )


def _mean_density(reports: Sequence[Mapping[str, Any]]) -> Density:
    """The mean of densities; `runs` is their number."""
    nodes = torch.tensor([x for one in reports for x in one["nodes"]], dtype=torch.float64)
    weights = torch.tensor([x / len(reports) for one in reports for x in one["weights"]], dtype=torch.float64)
    return Density(nodes=nodes, weights=weights, runs=len(reports), steps=0, products=0, conventions=None)


def _measured(run: FinishedRun, section: str, name: str) -> Mapping[str, Any] | None:
    result = (run.report or {}).get("sections", {}).get(section, {}).get("results", {}).get(name)
    return result if isinstance(result, Mapping) else None
