"""The page of `flatmin measure`: every number with its error, the pictures, and how it was made."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from flatmin.report.figures import interactive as draw
from flatmin.report.html import (
    Cell,
    Column,
    Figure,
    Markup,
    code,
    facts,
    figure,
    flat,
    folded,
    heading,
    notes,
    page,
    paragraph,
    table,
    verdicts,
)
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
from flatmin.words import reason

_NUMBERS = (
    Column("quantity", text=True),
    Column("value", "with its error of measurement"),
    Column("what it is", prose=True),
)
_QUANTITIES = (
    Column("quantity", text=True),
    Column("error of one net", "the largest error of measurement of a single net"),
    Column("what it is", prose=True),
)


def render(
    nets: Sequence[NetReport],
    *,
    command: Sequence[str] = (),
    environment: Mapping[str, object],
    failed: Sequence[Unmeasured] = (),
    on_missing: Callable[[str], None] = lambda text: None,
) -> str:
    """The page as text. A figure that cannot be drawn is named with the reason.

    Args:
        nets: at least one.
        command: the arguments of the command line.
        environment: versions and machine.
        failed: nets that could not be measured.
        on_missing: called with a sentence for each figure that could not be drawn.

    Raises:
        ValueError: no net.
        ModuleNotFoundError: plotly is not installed (extra "report").
    """
    if not nets:
        raise ValueError("there is no net to show.")
    groups = groups_of(nets)
    body = _one(nets[0]) if len(nets) == 1 else _several(nets)
    body.append(notes([*remarks(nets), *(f"{one.name} could not be measured: {one.why}" for one in failed)]))
    shown = {
        (name if len(nets) > 1 else ""): min(members, key=lambda net: net.seed) for name, members in groups.items()
    }
    for title, caption, make in _figures(shown, len(nets) > 1):
        try:
            drawn = figure(make(), title)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            text = f"{title} could not be drawn: {reason(error)}"
            on_missing(text)
            drawn = notes([text])
        body.append(heading(title, caption) + drawn)
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
        *(Column(name, "mean with the 95 % t interval over the seeds") for name in groups),
        *(
            Column(f"{name} - {base}", "paired over the seeds that both have; verdict by its interval")
            for name in others
        ),
    ]
    rows = compare_reports(nets)
    about = [[Cell(row.quantity.name), _error(row), Cell(row.quantity.text, flag="; ".join(row.notes))] for row in rows]
    differ = unlike(nets)
    return [
        paragraph(f"{sentence(nets)} Nets: {counts}.", "lead"),
        verdicts(conclusions(nets)),
        table(columns, [_row(row, list(groups), others) for row in rows]),
        notes(
            [
                *(f"The networks were measured with different settings: {difference}." for difference in differ),
                *left_out(nets),
            ]
        ),
        folded("What the quantities are, and how exactly they are known", table(_QUANTITIES, about)),
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


def _figures(shown: Mapping[str, NetReport], several: bool) -> list[tuple[str, str, Callable[[], Figure]]]:
    whose = " One net of each group: that of the first seed." if several else ""
    made: list[tuple[str, str, Callable[[], Figure]]] = []

    def add(name: str, title: str, caption: str, make: Callable[[Any], Figure]) -> None:
        results = {label: net.report.result(name) for label, net in shown.items()}
        results = {label: result for label, result in results.items() if result is not None}
        if results:
            made.append((title, caption + whose, partial(make, results if several else next(iter(results.values())))))

    add("eigenvalues", "Ends of the spectrum", "Bars are residuals.", draw.eigenvalues)
    add(
        "density",
        "Spectral density",
        "Raw nodes, smoothed for the picture only.",
        lambda results: draw.density(results if several else {"density": results}),
    )
    for name, title in (("worst", "Worst case over the radius"), ("average", "Average case over the radius")):

        def curves(results: Any, title: str = title) -> Figure:
            named = results if several else {title: results}
            return draw.curve(
                {k: (c.rhos, c.values, None if math.isnan(c.errors[0]) else c.errors) for k, c in named.items()},
                xlabel="rho",
                ylabel="rise of the loss",
                log_x=True,
                log_y=all(v > 0 for c in named.values() for v in c.values),
            )

        add(name, title, "Largest rise found, a lower bound." if name == "worst" else "Bars: standard error.", curves)
    add("along_v1", "Loss along the first eigenvector", "", draw.profile)
    add("along_random", "Loss along a random direction", "Filter-normalised.", draw.profile)
    for label, net in shown.items():
        plane = net.report.result("plane")
        if plane is not None:
            title = "Loss on a random plane" + (f": {label}" if several else "")
            made.append((title, "Filter-normalised directions." + whose, partial(draw.contour, plane)))
    return made
