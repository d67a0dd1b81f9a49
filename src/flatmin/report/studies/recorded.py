"""The figures of a study's records: every diagnostic over the updates, every measurement over the epochs.

Each builder returns None if the study has no values for its figure. Quantities are drawn under their own names, so a
new quantity needs no change here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from flatmin.measure.report import chosen
from flatmin.report.runs.curves import NOT_A_DIAGNOSTIC
from flatmin.report.runs.history import names_of
from flatmin.report.studies.curves import COUNTED, Curve, Points, section
from flatmin.report.studies.style import FigureSection, StudyStyle
from flatmin.study.finished import FinishedRun, ends_of
from flatmin.study.tabulate import StudyRow, StudyTable

POINTS = 60  # the most points of a curve over the updates; if there are more lines, each point is a mean
_NOT_MEASURED = ("epoch", "step")


def over_updates(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """The optimizer's diagnostics and the loss of the updates, except those with a section of their own."""

    def read(name: str) -> Callable[[StudyRow, FinishedRun], Points]:
        return lambda row, run: _blocks(run, name)

    lines = [line for run in _runs(table) for line in run.steps]
    names = names_of(lines, without=(*NOT_A_DIAGNOSTIC, *COUNTED))
    return section(
        table,
        style,
        "Over the updates",
        "Diagnostics of the recorded updates, under the names of SAM.diagnostics(); loss is the mean since the "
        f"previous recorded update. If more than {POINTS} updates were recorded, each point is the mean of several "
        "consecutive ones, drawn at the last.",
        [Curve(title=name, y=name, x="update", read=read(name), ends=ends_of(name)) for name in names],
    )


def while_training(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """The measurements between epochs."""

    def read(name: str) -> Callable[[StudyRow, FinishedRun], Points]:
        return lambda row, run: [
            (line["epoch"], line[name]) for line in run.measures if isinstance(line.get(name), (int, float))
        ]

    record = table.spec.record
    radius = f" The l2 radius is {record.measure_rho:g}." if "sharpness" in chosen(record.measures) else ""
    groups = f" m_sharpness is the mean over groups of {record.measure_m}." if record.measure_m else ""
    names = names_of([line for run in _runs(table) for line in run.measures], without=_NOT_MEASURED)
    return section(
        table,
        style,
        "Measured while training",
        f"Measured after an epoch, in eval mode, on {record.measure_examples} training samples. The names are those of "
        f"flatmin measure.{radius}{groups}",
        [Curve(title=name, y=name, read=read(name), log=True, ends=ends_of(name)) for name in names],
    )


def _runs(table: StudyTable) -> list[FinishedRun]:
    return [run for row in table.rows for run in row.runs.values()]


def _blocks(run: FinishedRun, name: str) -> Iterator[tuple[float, float]]:
    """Means over consecutive lines, so that the curve has at most `POINTS` points."""
    size = math.ceil(len(run.steps) / POINTS)
    for start in range(0, len(run.steps), max(size, 1)):
        part = run.steps[start : start + size]
        values = [float(v) for line in part if (v := line.get(name)) is not None and math.isfinite(v)]
        if values:
            yield float(part[-1]["step"]), math.fsum(values) / len(values)
