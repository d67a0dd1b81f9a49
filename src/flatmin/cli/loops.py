"""Which training loops support which method: a table for the terminal and for the documentation."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from flatmin.methods import Method
from flatmin.optim.support import Loop, refusal

YES, NO = "yes", "-"


def reasons(table: Mapping[str, Method]) -> dict[tuple[str, Loop], str | None]:
    """For every method and loop, the reason why the loop does not support the method; None if it does."""
    return {(name, loop): refusal(method.recipe(), loop) for name, method in table.items() for loop in Loop}


def as_text(table: Mapping[str, Method], width: int) -> str:
    """The table and the reasons, which the table refers to by letters, for a terminal."""
    return _render(table, markdown=False, width=width)


def as_markdown(table: Mapping[str, Method]) -> str:
    """The same for a documentation page."""
    return _render(table, markdown=True)


def _render(table: Mapping[str, Method], *, markdown: bool, width: int = 0) -> str:
    reasons_of = reasons(table)
    letters: dict[str, str] = {}
    for reason in reasons_of.values():
        if reason is not None:
            letters.setdefault(reason, chr(ord("a") + len(letters)))
    heads = ["method", *(f"`{loop.value}`" if markdown and "DDP" not in loop.value else loop.value for loop in Loop)]
    rows = [[name, *(_cell(reasons_of[name, loop], letters) for loop in Loop)] for name in table]
    if markdown:
        lines = [_line(heads), _line(["---", *[":-:"] * len(Loop)]), *map(_line, rows)]
        notes = [f"- **{letter}** {reason}" for reason, letter in letters.items()]
    else:
        wide = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip() for row in (heads, *rows)]
        notes = [
            textwrap.fill(f"{letter}: {reason}", width, subsequent_indent="   ", break_on_hyphens=False)
            for reason, letter in letters.items()
        ]
    return "\n".join([*lines, "", *notes])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(reason: str | None, letters: Mapping[str, str]) -> str:
    return YES if reason is None else f"{NO} {letters[reason]}"
