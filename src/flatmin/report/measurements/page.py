"""The page of `flatmin measure`: every number with its error, the figures, and how they were made."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flatmin.report.figures.interactive import embed
from flatmin.report.html import (
    Cell,
    Column,
    Markup,
    code,
    facts,
    flat,
    folded,
    heading,
    notes,
    page,
    paragraph,
    table,
    verdicts,
)
from flatmin.report.measurements.figures import figures
from flatmin.study.measured import (
    Comparison,
    NetReport,
    Unmeasured,
    compare_reports,
    conclusions,
    groups_of,
    left_out,
    remarks,
    sentence,
    stat_text,
    unlike,
    with_error,
)

_NUMBERS = (
    Column("quantity", text=True),
    Column("value", "the value with its measurement error"),
    Column("description", prose=True),
)
_QUANTITIES = (
    Column("quantity", text=True),
    Column("measurement error", "the largest measurement error of a single network"),
    Column("description", prose=True),
)


def render(
    nets: Sequence[NetReport],
    *,
    command: Sequence[str] = (),
    environment: Mapping[str, object],
    failed: Sequence[Unmeasured] = (),
    on_missing: Callable[[str], None] = lambda text: None,
) -> str:
    """The page as HTML text. A figure that cannot be drawn is replaced with the reason.

    Args:
        nets: at least one network.
        command: the command that made the page.
        environment: versions and machine.
        failed: networks that could not be measured.
        on_missing: called with a sentence for each figure that could not be drawn.

    Raises:
        ValueError: there is no network.
        ModuleNotFoundError: plotly is not installed (extra "report").
    """
    if not nets:
        raise ValueError("there is no network to show.")
    groups = groups_of(nets)
    body = _one(nets[0]) if len(nets) == 1 else _several(nets)
    body.append(notes([*remarks(nets), *(f"{one.name} could not be measured: {one.why}" for one in failed)]))
    for title, shown in figures(nets):
        if isinstance(shown, str):
            on_missing(shown)
            body.append(heading(title) + notes([shown]))
        else:
            body.append(heading(title, shown.caption) + embed(shown))
    title = nets[0].name if len(nets) == 1 else _listed(list(groups)) if len(groups) < 4 else f"{len(groups)} groups"
    settings = {k: v for k, v in dataclasses.asdict(nets[0].report.settings).items()}
    foot = [
        heading("How this was made"),
        code(shlex.join(command)),
        facts(_conventions(nets[0]) | {key.replace("_", " "): value for key, value in settings.items()}),
        facts(flat(environment)),
    ]
    return page(f"Measures: {title}", body, foot)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _one(net: NetReport) -> list[Markup]:
    body = [paragraph(sentence([net]), "lead")]
    for section in net.report.sections:
        if section.quantities:
            rows = [
                [
                    Cell(q.name),
                    Cell(with_error(q.value, q.error), sort=q.value),
                    Cell(q.text, minor=f"(±: {q.error_is})" if q.error else "", flag=q.note),
                ]
                for q in section.quantities
            ]
            body += [heading(section.title), table(_NUMBERS, rows)]
        body.append(notes(f"{what} is missing: {why}" for what, why in section.missing.items()))
    return body


def _several(nets: Sequence[NetReport]) -> list[Markup]:
    groups = groups_of(nets)
    base, others = next(iter(groups)), list(groups)[1:]
    counts = ", ".join(f"{name} ({len(members)})" for name, members in groups.items())
    columns = [
        Column("quantity", text=True),
        *(Column(name, "mean over the seeds with the 95 % t interval") for name in groups),
        *(
            Column(
                f"{name} - {base}",
                "difference paired by seed, with its 95 % t interval, which decides whether it is significant",
            )
            for name in others
        ),
    ]
    rows = compare_reports(nets)
    about = [[Cell(row.quantity.name), _error(row), Cell(row.quantity.text, flag="; ".join(row.notes))] for row in rows]
    differ = unlike(nets)
    return [
        paragraph(f"{sentence(nets)} Networks: {counts}.", "lead"),
        verdicts(conclusions(nets)),
        table(columns, [_row(row, list(groups), others) for row in rows]),
        notes(
            [
                *(f"The networks were measured with different settings: {difference}." for difference in differ),
                *left_out(nets),
            ]
        ),
        folded("Descriptions and measurement errors of the quantities", table(_QUANTITIES, about)),
    ]


def _row(row: Comparison, groups: Sequence[str], others: Sequence[str]) -> list[Cell]:
    def stat(value: Any, verdict: str = "") -> Cell:
        return Cell("–") if value is None else Cell(stat_text(value), sort=value.mean, minor=verdict)

    return [
        Cell(row.quantity.name + " *" * bool(row.notes)),
        *(stat(row.groups.get(name)) for name in groups),
        *(stat(row.difference.get(name), row.verdict(name)) for name in others),
    ]


def _error(row: Comparison) -> Cell:
    text = "unknown" if math.isnan(row.error) else f"{row.error:.1g}" if row.error else "rounding"
    return Cell(text, sort=row.error)


def _conventions(net: NetReport) -> dict[str, object]:
    return {key.replace("_", " "): value for key, value in dataclasses.asdict(net.report.conventions).items()}
