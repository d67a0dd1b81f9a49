"""The outcomes as text for a terminal and for a page."""

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
    """An adapter with its outcomes."""

    title: str
    version: str
    outcomes: dict[str, BehaviourOutcome]

    @property
    def heading(self) -> str:
        """Title and version."""
        return f"{self.title} {self.version}".strip()

    def count(self, status: str) -> int:
        """How many behaviours have a status."""
        return sum(o.status == status for o in self.outcomes.values())

    @property
    def failures(self) -> list[BehaviourOutcome]:
        """In the order of the table."""
        return [o for o in self.outcomes.values() if o.status == FAIL]


def _rows(columns: Sequence[AdapterColumn]) -> list[tuple[str, str]]:
    """(theme, name) of the behaviours that were run."""
    return [(b.theme, b.name) for b in ALL if any(b.name in c.outcomes for c in columns)]


def text(columns: Sequence[AdapterColumn]) -> str:
    """For a terminal."""
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
    """Markdown between markers, for the page that `--into` names."""
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
    lines += ["", "### What is demanded, and why", ""]
    lines += [f"- **{b.name}**: {b.demand} *{b.why}*" for b in ALL if (b.theme, b.name) in rows]
    lines += ["", "### The failing figures", ""]
    for c in columns:
        if c.failures:
            lines += [f"<details><summary>{c.heading}: {len(c.failures)}</summary>", ""]
            lines += [f"- {o.behaviour}: {_code(_short(o.figure))}" for o in c.failures]
            lines += ["", "</details>", ""]
    return "\n".join(lines).rstrip()


def insert(path: Path, what: str) -> None:
    """Replace what is between the markers of a page.

    Raises:
        ValueError: a page without markers.
    """
    old = path.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise ValueError(f"{path} has no {BEGIN} ... {END} to write between.")
    head, rest = old.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    path.write_text(f"{head}{BEGIN}\n\n{what}\n\n{END}{tail}", encoding="utf-8")


def _short(figure: str) -> str:
    # Addresses of objects and paths of machines differ from run to run and say nothing.
    figure = re.sub(r"(/[\w.-]+){2,}/", ".../", figure)
    figure = re.sub(r" at 0x[0-9a-f]+", "", figure)
    return figure if len(figure) <= LONG else figure[: LONG - 1].rstrip() + "…"


def _code(figure: str) -> str:
    return "`" + figure.replace("`", "'") + "`"
