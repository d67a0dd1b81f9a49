"""The style that figures share: colours of the style sheet, symbols, dashes, and the colours of arms."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flatmin.methods import BASE
from flatmin.report.html import NUM_TONES
from flatmin.stats import Stat

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
DASHES_IN_WORDS = ("solid", "dashed", "dotted", "dash-dotted", "long dashes", "long dashes with dots")


@dataclass(frozen=True, kw_only=True)
class Style:
    """How an arm, a run or a group is drawn: a colour of the style sheet, a symbol, and a dash."""

    tone: str
    symbol: str = SYMBOLS[0]
    dash: str = DASHES[0]


def styles(names: Sequence[str], base: str = BASE) -> dict[str, Style]:
    """A style for each name: grey for the base, the other colours in turn for the others.

    Symbols and dashes are assigned in turn too.

    Args:
        names: names of the arms, in the order in which they are shown.
        base: the name of the arm that the others are compared with.
    """
    others = [name for name in names if name != base]
    tones = {name: tone(i) for i, name in enumerate(others)} | {base: "tone-0"}
    return {
        name: Style(tone=tones[name], symbol=SYMBOLS[i % len(SYMBOLS)], dash=DASHES[i % len(DASHES)])
        for i, name in enumerate(names)
    }


def tone(i: int) -> str:
    """The i-th colour of the style sheet, without grey."""
    return f"tone-{1 + i % (NUM_TONES - 1)}"


@cache
def light_colours() -> dict[str, str]:
    """The colours of the style sheet's light theme by name."""
    sheet = next(Path(__file__).parent.rglob("page.css")).read_text(encoding="utf-8")
    return dict(re.findall(r"--([a-z0-9-]+):\s*(#[0-9a-f]{6})", sheet.partition("}")[0]))


def number(stat: Stat, digits: int = 1) -> str:
    """The mean with its interval, see `Stat.text`; "–" without a value."""
    return "–" if not stat.n or math.isnan(stat.mean) else stat.text(f".{digits}f", gap=" ")


def interval(stats: Sequence[Stat]) -> tuple[list[float], list[float]]:
    """The lower and the upper ends of the intervals of means; NaN where they are unknown."""
    return [math.nan if math.isnan(s.half) else s.low for s in stats], [
        math.nan if math.isnan(s.half) else s.high for s in stats
    ]
