"""The page of `flatmin study`: conclusions, tables, figures and notes."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence

from flatmin.report.figures.interactive import panels
from flatmin.report.html import (
    Cell,
    Column,
    Markup,
    code,
    facts,
    flat,
    heading,
    legend,
    notes,
    page,
    paragraph,
    table,
    verdicts,
)
from flatmin.report.studies import curves as study_curves
from flatmin.report.studies import figures as study_figures
from flatmin.report.studies import recorded as study_recorded
from flatmin.report.studies.phi import phi
from flatmin.report.studies.style import FigureSection, StudyStyle, every_row
from flatmin.report.style import number
from flatmin.stats import summarise
from flatmin.study import conclusions, tables
from flatmin.study.tabulate import StudyRow, StudyTable
from flatmin.words import reason

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_AFTER = re.compile(" (?=[±(])")  # before an interval
_NONE = "–"
_HINTS = {
    "n": "number of seeds with a result",
    "grads/step": "gradient evaluations per update",
    "rho": "radius of the perturbation, in the method's own norm",
    "time/step": "time of a training step relative to plain training; median with quartiles",
    "p": "p value of the paired t test of the difference",
    "p, equal grads": "p value of the paired t test of the difference at equal cost",
    "vs plain, equal grads": "difference from plain training with as many gradient evaluations, paired by seed",
}


def render(shown: StudyTable, *, command: Sequence[str] = ()) -> str:
    """The page as HTML text.

    Args:
        shown: the study's table; see `flatmin.study.tabulate.tabulate`.
        command: the command that made the page.

    Raises:
        ModuleNotFoundError: there are figures and plotly is not installed (extra "report").
    """
    style = StudyStyle(shown)
    drawn, failed = sections(shown, style)
    body = [paragraph(sentence(shown), "lead"), notes(tables.troubles(shown)), verdicts(conclusions.verdicts(shown))]
    body.append(_tables(shown, style))
    if drawn:
        points, at = style.choices()
        body.append(legend({arm: (arm, tone) for arm, tone in style.tones.items()}, points, at=at))
        body.append(paragraph(explanation, "caption") if (explanation := style.explained()) else Markup(""))
    for section in drawn:
        body += [heading(section.title, section.caption), panels(section.figures)]
    body += _published(shown, style)
    if not drawn:
        body.append(paragraph("There are no values for figures yet."))
    body += [heading("How to read the tables"), notes([*tables.remarks(shown), *failed], "")]
    return page(shown.spec.title, body, _foot(shown, command))


def sentence(shown: StudyTable) -> str:
    """A sentence on the numbers of arms, rows, runs and seeds, and on the source."""
    spec = shown.spec
    rows = [(row, row.grid_point.configs) for row in every_row(shown) if row.grid_point is not None]
    # Rows with the same settings share their runs.
    planned = len({repr(config) for _, configs in rows for config in configs.values()})
    ended = len({repr(config) for row, configs in rows for seed, config in configs.items() if seed in row.runs})
    seeds = ", ".join(map(str, spec.seeds))
    if spec.choose_seeds:
        seeds += f"; values chosen with seed {', '.join(map(str, spec.choose_seeds))}"
    source = f" Source: {spec.source}." if spec.source else ""
    return (
        f"{_counted(len(spec.every_arm), 'arm')}, {_counted(len(shown.rows), 'row')}, {ended} of "
        f"{_counted(planned, 'run')} with a result, seed{'s' * (len(spec.seeds) > 1)} {seeds}.{source}"
    )


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _tables(shown: StudyTable, style: StudyStyle) -> Markup:
    """The table; a wide table is split in two, the first of which shows test accuracy."""
    names, rows = tables.header(shown), tables.body(shown)
    made = []
    for title, places in tables.groups(shown):
        own = [[row[i] for i in places] for row in rows]
        text = [k == 0 or not all(_plain(row[k]) for row in own) for k in range(len(places))]
        columns = [
            Column(names[i], _hint(names[i], shown), text=is_text) for i, is_text in zip(places, text, strict=True)
        ]
        cells = [_cells(row, one, text, style) for row, one in zip(shown.rows, own, strict=True)]
        made.append((heading(title) if title else Markup("")) + table(columns, cells))
    return sum(made, Markup(""))


def _plain(cell: str) -> bool:
    """Whether a cell is a number, with or without an interval, or empty."""
    return cell == tables.ABSENT or sort_key(cell) is not None


def sort_key(cell: str) -> float | None:
    """The number that a cell begins with, alone or before a space or comma; None if there is none.

    Examples:
        >>> sort_key("+1.25 ±0.40"), sort_key("95.1, 94"), sort_key("-"), sort_key("3x3")
        (1.25, 95.1, None, None)
    """
    match = _NUMBER.match(cell)
    if match is None or cell[match.end() : match.end() + 1] not in ("", " ", ","):
        return None
    return float(match.group())


def _cells(row: StudyRow, cells: Sequence[str], text: Sequence[bool], style: StudyStyle) -> list[Cell]:
    made = [Cell(cells[0], tone=style.tones[row.arm], flag="; ".join(row.flags))]
    for cell, is_text in zip(cells[1:], text[1:], strict=True):
        if is_text or cell == tables.ABSENT:
            made.append(Cell(_NONE if cell == tables.ABSENT else cell))
            continue
        made.append(_with_interval(cell))
    return made


def _with_interval(cell: str) -> Cell:
    """A cell with a number, and its interval less prominent."""
    value, *rest = _AFTER.split(cell, maxsplit=1)
    return Cell(value, sort=sort_key(cell), minor=re.sub("± ?", "± ", "".join(rest)))


def _hint(name: str, shown: StudyTable) -> str:
    if name in _HINTS:
        return _HINTS[name]
    if name.startswith("p (Holm"):
        return "p value with Holm's correction for all tests of the column"
    if name == f"vs {shown.spec.baseline} (paired)":
        return "difference at the same point of the axes, paired by seed, with its 95 % interval"
    if name.startswith("published "):
        return "the source's number, with its spread as printed"
    return "mean over the seeds and half width of the 95 % t interval" if name.endswith("±95 %") else ""


def sections(shown: StudyTable, style: StudyStyle) -> tuple[list[FigureSection], list[str]]:
    """The figures, and a sentence for each kind of figure that could not be drawn."""
    makers: dict[str, Callable[[StudyTable, StudyStyle], FigureSection | None]] = {
        "the accuracy of each seed": study_figures.by_seed,
        "accuracy over the radius": study_figures.over_rho,
        "accuracy over cost": study_figures.over_cost,
        "the radar": study_figures.radar,
        "curves over the epochs": study_curves.over_epochs,
        "measurements while training": study_recorded.while_training,
        "sharpness": study_figures.over_sharpness,
        "the eigenvalue density": study_curves.spectra,
        "slices of the loss": study_curves.slices,
        "counts under perturbation": study_curves.under_perturbation,
        "ratios of gradients": study_curves.ratios,
        "curves over the updates": study_recorded.over_updates,
        "BiSAM's φ": lambda shown, style: phi(shown),
    }
    made, failed = [], []
    for what, make in makers.items():
        try:
            section = make(shown, style)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            failed.append(f"{what} could not be drawn: {reason(error)}")
            continue
        if section is not None:
            made.append(section)
    return made, failed


def _published(shown: StudyTable, style: StudyStyle) -> list[Markup]:
    """A table of the measures of other publications, if the reports have them."""
    by_row: list[dict[str, list[float]]] = []
    for row in shown.rows:
        values: dict[str, list[float]] = {}
        for run in row.runs.values():
            section = (run.report or {}).get("sections", {}).get("published", {})
            for name, quantity in section.get("quantities", {}).items():
                if quantity["value"] is not None and math.isfinite(quantity["value"]):
                    values.setdefault(name, []).append(float(quantity["value"]))
        by_row.append(values)
    names = list(dict.fromkeys(name for values in by_row for name in values))
    if not names:
        return []
    rows = []
    for row, values in zip(shown.rows, by_row, strict=True):
        cells = [Cell(row.label, tone=style.tones[row.arm])]
        for name in names:
            cells.append(_with_interval(number(summarise(values.get(name, [])), 2)))
        rows.append(cells)
    caption = (
        "Eigenvalues computed on the data and with the statistic of each source: mean over the seeds ± half width of "
        "the 95 % t interval."
    )
    return [heading("Sharpness as in other publications", caption), table([Column("row"), *map(Column, names)], rows)]


def _foot(shown: StudyTable, command: Sequence[str]) -> list[Markup]:
    made = [heading("How this was made")]
    if command:
        made.append(code(shlex.join(command)))
    spec = shown.spec
    about = {"study": spec.name, "settings from": f"flatmin train {spec.train}", "source": spec.source}
    return [*made, facts({key: value for key, value in about.items() if value}), facts(flat(shown.environment))]
