"""The page of `flatmin show`: numbers, curves, settings and differences of runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from flatmin.report.figures.interactive import embed
from flatmin.report.html import Cell, Column, Markup, code, facts, heading, legend, notes, page, paragraph, table
from flatmin.report.runs.curves import charts
from flatmin.report.runs.figures import tones
from flatmin.report.runs.history import FAILED, History
from flatmin.report.runs.numbers import (
    RunProperty,
    alike,
    differences,
    machine,
    quantities_of,
    sentence,
    settings,
    troubles,
    unlisted,
)

_NONE = "–"


def render(runs: Sequence[History], *, command: Sequence[str] = ()) -> str:
    """The page as HTML text.

    Args:
        runs: at least one run, with distinct names; see `flatmin.report.runs.history.read_all`.
        command: the command that made the page.

    Raises:
        ValueError: there is no run.
        ModuleNotFoundError: there are curves and plotly is not installed (extra "report").
    """
    if not runs:
        raise ValueError("there is no run to show.")
    several = len(runs) > 1
    lead = f"{sentence(runs)} {alike(runs)[0]}".strip()
    body = [paragraph(lead, "lead"), (_several if several else _one)(runs), notes(troubles(runs))]
    if several:
        body += _unlike(runs)
    shown = charts(runs)
    if several and shown:
        drawn = {one.group for chart in shown for one in chart.series}
        body.append(legend({name: (name, tone) for name, tone in tones(runs).items() if name in drawn}))
    body += [heading(chart.title, chart.caption) + embed(chart) for chart in shown]
    if not shown:
        body.append(paragraph("No epoch is finished yet, so there are no curves."))
    title = runs[0].name if not several else f"{len(runs)} runs"
    return page(title, body, _foot(runs, command))


def _one(runs: Sequence[History]) -> Markup:
    columns = [Column("quantity", text=True), Column("value", text=True), Column("what it is", prose=True)]
    rows = [[Cell(q.name), Cell(q.text(runs[0]) or _NONE), Cell(q.hint)] for q in quantities_of(runs)]
    return table(columns, rows)


def _several(runs: Sequence[History]) -> Markup:
    quantities, tone = alike(runs)[1], tones(runs)
    columns = [
        Column("run", "the colour is that of the curves", text=True),
        *(Column(q.name, q.hint, text=q.value is None) for q in quantities),
    ]
    rows = [
        [
            Cell(run.name, tone=tone[run.name], flag=FAILED if run.state == FAILED else ""),
            *(_cell(quantity, run) for quantity in quantities),
        ]
        for run in runs
    ]
    return table(columns, rows)


def _cell(quantity: RunProperty, run: History) -> Cell:
    sort = None if quantity.value is None else quantity.value(run)
    return Cell(quantity.text(run) or _NONE, sort=sort)


def _unlike(runs: Sequence[History]) -> list[Markup]:
    every, tone = differences(runs), tones(runs)
    if not every:
        return [heading("Differences", "The settings are the same in all runs.")]
    differing = unlisted(every)
    if not differing:
        return []
    columns = [Column("setting", text=True), *(Column(run.name, text=True) for run in runs)]
    if len(runs) > 4:  # more columns than a page is wide
        columns = [Column("run", text=True), *(Column(key, text=True) for key in differing)]
        rows = [
            [Cell(run.name, tone=tone[run.name]), *(Cell(values[i]) for values in differing.values())]
            for i, run in enumerate(runs)
        ]
    else:
        rows = [[Cell(key), *(Cell(value) for value in values)] for key, values in differing.items()]
    caption = "Other settings that differ between the runs. Versions and machine are in brackets."
    return [heading("Differences", caption), table(columns, rows)]


def _foot(runs: Sequence[History], command: Sequence[str]) -> list[Markup]:
    """Common settings, and how the page was made."""
    several, unlike = len(runs) > 1, differences(runs) if len(runs) > 1 else {}
    shared = {key: value for key, value in settings(runs[0]).items() if key not in unlike}
    about = {key: value for key, value in machine(runs[0]).items() if f"({key})" not in unlike}
    return [
        heading("Common settings" if several else "Settings"),
        facts(shared),
        heading("How this was made"),
        code(shlex.join(command)),
        facts({(run.name if several else "folder"): str(run.path) for run in runs} | about),
    ]
