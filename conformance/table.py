"""Prints the outcomes for a terminal and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.behaviours import ALL, TITLES
from conformance.verdict import ABSENT, FAIL, PASS, BehaviourOutcome

BEGIN, END = "<!-- conformance -->", "<!-- /conformance -->"
LONG = 110


@dataclass(frozen=True)
class AdapterColumn:
    """The column of an adapter: its outcomes by behaviour."""

    title: str
    version: str
    outcomes: dict[str, BehaviourOutcome]

    @property
    def heading(self) -> str:
        """The title with the version."""
        return f"{self.title} {self.version}".strip()

    def count(self, status: str) -> int:
        """The number of behaviours with this status."""
        return sum(o.status == status for o in self.outcomes.values())

    @property
    def failures(self) -> list[BehaviourOutcome]:
        """The failures, in the order of the table."""
        return [o for o in self.outcomes.values() if o.status == FAIL]


def _rows(columns: Sequence[AdapterColumn]) -> list[tuple[str, str]]:
    """The (theme, name) of all behaviours that were tested."""
    return [(b.theme, b.name) for b in ALL if any(b.name in c.outcomes for c in columns)]


def text(columns: Sequence[AdapterColumn]) -> str:
    """The table for a terminal."""
    rows = _rows(columns)
    marks = {PASS: "pass", FAIL: "FAIL", ABSENT: "-"}
    wide = max(len(name) for _, name in rows)
    heads = [c.title[:12] for c in columns]
    lines = ["".join([" " * (wide + 2), *(f"{h:>13}" for h in heads)])]
    theme = ""
    for of, name in rows:
        if of != theme:
            theme = of
            lines += ["", TITLES[of]]
        cells = [marks[c.outcomes[name].status] if name in c.outcomes else "" for c in columns]
        lines.append("".join([f"  {name:<{wide}}", *(f"{cell:>13}" for cell in cells)]))
    sums = [f"{c.count(PASS)}/{c.count(PASS) + c.count(FAIL)}" for c in columns]
    lines += ["", "".join([f"  {'passed of those offered':<{wide}}", *(f"{s:>13}" for s in sums)])]
    for c in columns:
        if c.failures:
            lines += ["", f"{c.heading} fails:"]
            lines += [f"  {o.behaviour}: {_short(o.figure)}" for o in c.failures]
    return "\n".join(lines)


def page(columns: Sequence[AdapterColumn], environment: str) -> str:
    """The table in Markdown, for the page given by `--into`."""
    rows = _rows(columns)
    marks = {PASS: "pass", FAIL: "**fail**", ABSENT: "–"}
    lines = [environment, "", "| | " + " | ".join(c.title for c in columns) + " |", "|---|" + "---|" * len(columns)]
    lines.append("| version | " + " | ".join(c.version for c in columns) + " |")
    sums = [f"{c.count(PASS)} of {c.count(PASS) + c.count(FAIL)}" for c in columns]
    lines.append("| passed of those offered | " + " | ".join(sums) + " |")
    theme = ""
    for of, name in rows:
        if of != theme:
            theme = of
            lines.append(f"| **{TITLES[of].rstrip('.')}** |" + " |" * len(columns))
        cells = [marks[c.outcomes[name].status] if name in c.outcomes else "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "### The behaviours, and why they matter", ""]
    lines += [f"- **{b.name}**: {b.demand} *{b.why}*" for b in ALL if (b.theme, b.name) in rows]
    lines += ["", "### Figures of the failures", ""]
    for c in columns:
        if c.failures:
            lines += [f"<details><summary>{c.heading}: {len(c.failures)}</summary>", ""]
            lines += [f"- {o.behaviour}: {_code(_short(o.figure))}" for o in c.failures]
            lines += ["", "</details>", ""]
    return "\n".join(lines).rstrip()


def insert(path: Path, what: str) -> None:
    """Replace the text between the markers of a page.

    Raises:
        ValueError: the page has no markers.
    """
    old = path.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise ValueError(f"{path} has no markers {BEGIN} ... {END}; add them where the table should be.")
    head, rest = old.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    path.write_text(f"{head}{BEGIN}\n\n{what}\n\n{END}{tail}", encoding="utf-8")


def _short(figure: str) -> str:
    # Memory addresses and paths differ from run to run.
    figure = re.sub(r"(/[\w.-]+){2,}/", ".../", figure)
    figure = re.sub(r" at 0x[0-9a-f]+", "", figure)
    return figure if len(figure) <= LONG else figure[: LONG - 1].rstrip() + "…"


def _code(figure: str) -> str:
    return "`" + figure.replace("`", "'") + "`"
