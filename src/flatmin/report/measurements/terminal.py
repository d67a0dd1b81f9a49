"""Measured networks in a terminal: the numbers of one network, or groups side by side with their differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flatmin.report.terminal import fits, print_table, print_text
from flatmin.study.measured import (
    Comparison,
    NetReport,
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

if TYPE_CHECKING:
    from rich.console import Console


def print_nets(nets: Sequence[NetReport], console: Console) -> None:
    """Print the measurements at the console's width."""
    console.print()
    print_text(sentence(nets), console)
    for remark in remarks(nets):
        print_text(remark, console)
    console.print()
    (_print_one if len(nets) == 1 else _print_several)(nets, console)


def _print_one(nets: Sequence[NetReport], console: Console) -> None:
    for section in nets[0].report.sections:
        if section.quantities:
            console.print(section.title, style="bold", markup=False)
            rows = [
                [q.name, with_error(q.value, q.error), q.text + (f" ({q.note})" if q.note else "")]
                for q in section.quantities
            ]
            print_table(rows, console, header=False)
            console.print()
        for measure_name, why in section.missing.items():
            print_text(f"{measure_name} is missing: {why}", console)


def _print_several(nets: Sequence[NetReport], console: Console) -> None:
    groups, rows = list(groups_of(nets)), compare_reports(nets)
    base, others = groups[0], groups[1:]
    whole = _table(rows, groups, others, base)
    if len(others) < 2 or fits(whole, console):
        print_table(whole, console)
    else:  # one table for each group, with the base
        for number, group in enumerate(others):
            if number:
                console.print()
            print_table(_table(rows, [base, group], [group], base), console)
    counts = ", ".join(f"{name} {len(members)}" for name, members in groups_of(nets).items())
    console.print()
    print_text(
        f"Networks: {counts}. Values are means ± 95 % t intervals over the seeds; differences are paired by seed and "
        "not significant if their interval contains 0.",
        console,
        style="dim",
    )
    for text in conclusions(nets):
        print_text(text, console)
    for text in left_out(nets):
        print_text(text, console)
    if noted := "; ".join(f"{row.quantity.name} {', '.join(row.notes)}" for row in rows if row.notes):
        print_text(f"* for some network: {noted}", console)
    for text in unlike(nets):
        print_text(f"The networks were measured with different settings: {text}.", console)


def _table(rows: Sequence[Comparison], groups: Sequence[str], others: Sequence[str], base: str) -> list[list[str]]:
    """A row for each quantity: means of the groups, then each difference from the base with its verdict."""
    header = ["quantity", *groups]
    for name in others:
        header += [f"{name} - {base}", f"{name} is"]
    table = [header]
    for row in rows:
        cells = [row.quantity.name + " *" * bool(row.notes)]
        cells += ["-" if (stat := row.groups.get(name)) is None else stat_text(stat) for name in groups]
        for name in others:
            difference = row.difference.get(name)
            cells += ["-" if difference is None else stat_text(difference), row.verdict(name)]
        table.append(cells)
    return table
