"""Write the figures of a study to files for papers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from flatmin.report.figures.chart import Drawable, at
from flatmin.report.figures.files import save_all
from flatmin.report.studies.page import sections
from flatmin.report.studies.style import EVERY, StudyStyle, listed
from flatmin.study.tabulate import StudyTable


def save_figures(
    shown: StudyTable,
    folder: str | os.PathLike[str],
    endings: Sequence[str],
    *,
    on_missing: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write every figure of a study's page to a file named after its title.

    If the page shows one point of the axes at a time, a figure that differs between points is written for each.

    Args:
        shown: the study's table.
        folder: the folder; made if it does not exist.
        endings: suffixes among ".svg", ".pdf" and ".png"; see `flatmin.report.figures.files.endings`.
        on_missing: called with a sentence for each kind of figure that could not be drawn.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra "plot").
        OSError: a file cannot be written.
    """
    style = StudyStyle(shown)
    drawn, failed = sections(shown, style)
    for text in failed:
        on_missing(text)
    apart = style.points if style.choices()[1] != EVERY else []
    figures = [one for section in drawn for figure in section.figures for one in _by_point(figure, apart)]
    return [path for ending in endings for path in save_all(figures, folder, ending)]


def _by_point(figure: Drawable, points: Sequence[Mapping[str, str]]) -> list[Drawable]:
    """The figure for each of the points, once for points that show the same series."""
    shown: dict[tuple[int, ...], list[int]] = {}
    for i in range(len(points)):
        seen = [k for k, one in enumerate(figure.series) if one.points is None or str(i) in one.points]
        shown.setdefault(tuple(seen), []).append(i)
    shown.pop((), None)
    if len(shown) < 2:
        return [figure]
    made = []
    for places in shown.values():
        common = set.intersection(*(set(points[i].items()) for i in places))
        named = {key: value for key, value in points[places[0]].items() if (key, value) in common}
        made.append(replace(at(figure, str(places[0])), title=f"{figure.title} {listed(named)}"))
    return made
