"""The figures of a study's records: every diagnostic over the updates, every measurement over the epochs.

Each builder gives None where the study has nothing for its figure. What a study records is drawn under its own name, so
that a new number needs nothing here.
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

POINTS = 60  # of a curve over the updates; where there are more lines, each point is a mean
_NOT_MEASURED = ("epoch", "step")


def over_updates(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """The optimizer's diagnostics and the loss of the updates, but for what has a section of its own."""

    def read(name: str) -> Callable[[StudyRow, FinishedRun], Points]:
        return lambda row, run: _blocks(run, name)

    lines = [line for run in _runs(table) for line in run.steps]
    names = names_of(lines, without=(*NOT_A_DIAGNOSTIC, *COUNTED))
    return section(
        table,
        style,
        "Over the updates",
        "Of the updates that were logged, as SAM.diagnostics() names them; loss is the mean since the one before. If "
        f"more than {POINTS} were logged, a point is the mean of neighbours, at the last of them.",
        [Curve(title=name, y=name, x="update", read=read(name), ends=ends_of(name)) for name in names],
    )


def while_training(table: StudyTable, style: StudyStyle) -> FigureSection | None:
    """What was measured between epochs."""

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
        "Named as in the report of a network; of the weights after an epoch, in eval mode, on "
        f"{record.measure_examples} training samples.{radius}{groups}",
        [Curve(title=name, y=name, read=read(name), log=True, ends=ends_of(name)) for name in names],
    )


def _runs(table: StudyTable) -> list[FinishedRun]:
    return [run for row in table.rows for run in row.runs.values()]


def _blocks(run: FinishedRun, name: str) -> Iterator[tuple[float, float]]:
    """Means over so many neighbouring lines that the curve has no more than its points."""
    size = math.ceil(len(run.steps) / POINTS)
    for start in range(0, len(run.steps), max(size, 1)):
        part = run.steps[start : start + size]
        values = [float(v) for line in part if (v := line.get(name)) is not None and math.isfinite(v)]
        if values:
            yield float(part[-1]["step"]), math.fsum(values) / len(values)
