"""Which pairs of methods compose: a matrix and the reasons why others do not, as text and as Markdown."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from flatmin.methods import ContradictionError, Method, compose

SYMBOLS = {
    "objective": "o",
    "direction": "d",
    "geometry": "g",
    "mask": "m",
    "radius": "r",
    "schedule": "t",
    "inner_loop": "i",
    "samples": "s",
    "combine": "c",
}
GOES, SAME, CONTRADICTS = "+", ".", "x"
BLOCK = 5  # columns between two gaps
PAGE_WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """Whether two methods compose: the symbol in the matrix; if not, the error message and its cause."""

    symbol: str
    reason: str | None = None
    clash: ContradictionError | None = None


def compatibilities(table: Mapping[str, Method]) -> dict[tuple[str, str], Compatibility]:
    """The result of `compose` for every pair of methods, in the order of the table."""
    return {(a, b): _verdict(a, b, table) for a, b in itertools.combinations(table, 2)}


def _verdict(a: str, b: str, table: Mapping[str, Method]) -> Compatibility:
    try:
        compose(f"{a}+{b}", table)
    except ContradictionError as clash:
        return Compatibility(symbol=CONTRADICTS, reason=str(clash), clash=clash)
    except ValueError as error:
        kinds = [part.kind for part in table[a].parts]
        both = next(part.kind for part in table[b].parts if part.kind in kinds)
        return Compatibility(symbol=SYMBOLS[both], reason=str(error))
    return Compatibility(symbol=GOES)


def as_text(table: Mapping[str, Method], width: int) -> str:
    """The matrix, its legend and the reasons, for a terminal."""
    return _render(table, width, fences=())


def as_markdown(table: Mapping[str, Method]) -> str:
    """The same for a documentation page."""
    return _render(table, PAGE_WIDTH, fences=("```text", "```"))


def _render(table: Mapping[str, Method], width: int, fences: tuple[str, ...]) -> str:
    pairs = compatibilities(table)
    lines = [*fences[:1], *_square(table, pairs), *fences[1:], "", *textwrap.wrap(_legend(), width), ""]
    for line in _refusals(table, pairs):
        lines += textwrap.wrap(line, width, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def _square(table: Mapping[str, Method], pairs: Mapping[tuple[str, str], Compatibility]) -> list[str]:
    names = list(table)
    wide = max(map(len, names)) + 3
    numbers = [f"{i:>2}" for i in range(1, len(names) + 1)]
    lines = [f"{'':{wide}} {_spaced([number[digit] for number in numbers])}".rstrip() for digit in (0, 1)]
    for i, a in enumerate(names):
        row = [SAME if a == b else pairs[(a, b) if i < j else (b, a)].symbol for j, b in enumerate(names)]
        lines.append(f"{numbers[i]} {a:<{wide - 3}} {_spaced(row)}")
    return lines


def _spaced(cells: list[str]) -> str:
    blocks = ["".join(cells[i : i + BLOCK]) for i in range(0, len(cells), BLOCK)]
    return " ".join(blocks)


def _legend() -> str:
    letters = ", ".join(f"{symbol} {kind}" for kind, symbol in SYMBOLS.items())
    return (
        f"{GOES}: the two compose. {CONTRADICTS}: they do not compose, because their parts contradict each other. A "
        f"letter: they do not compose, because both set this part ({letters}). Columns have the numbers of the rows. "
        "The full error message: flatmin methods NAME+NAME."
    )


def _refusals(table: Mapping[str, Method], pairs: Mapping[tuple[str, str], Compatibility]) -> list[str]:
    """One line for each part that several methods set, then one for each method and reason of a contradiction."""
    lines = []
    for kind in SYMBOLS:
        setters = [name for name, method in table.items() if any(part.kind == kind for part in method.parts)]
        if len(setters) > 1:
            lines.append(f"Methods that set the {kind}, of which only one can be used: {', '.join(setters)}.")
    grouped: dict[tuple[str, str], list[str]] = {}
    for (a, b), verdict in pairs.items():
        clash = verdict.clash
        if clash is None:
            continue
        owner, other = (a, b) if clash.other in table[a].parts else (b, a)
        why = f"{clash.need.value}, which {owner} does not have: {clash.reason}"
        grouped.setdefault((owner, why), []).append(other)
    order = {name: i for i, name in enumerate(table)}
    for (owner, why), others in sorted(grouped.items(), key=lambda item: order[item[0][0]]):
        lines.append(f"{owner} with {', '.join(others)}: {'these need' if len(others) > 1 else 'it needs'} {why}.")
    return lines
