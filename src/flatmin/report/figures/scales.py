"""Numbers and texts of figures: round ticks, the choice of logarithmic axes, and labels in several lines."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from flatmin.report.figures.chart import Axis

WIDE = 50.0  # values that span more than this factor get a logarithmic axis
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_EPOCHS = 10  # up to this number, each epoch has a tick
_BREAK = re.compile(r"(?<= )|(?<=[/+,])(?=[^ /+,])|(?<=\w-)(?=[^\W\d])")
_CHARACTER = 0.018  # width of a character of a tick, as a share of the width of a narrow figure


def number(value: float) -> str:
    """A number for a tick.

    Examples:
        >>> number(0.05), number(1e-7), number(3e6), number(-120.0)
        ('0.05', '10⁻⁷', '3·10⁶', '-120')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.5g}"
    digits, exponent = f"{value:.2e}".split("e")
    power = f"10{str(int(exponent)).translate(_RAISED)}"
    digits = f"{float(digits):g}"
    return power if digits == "1" else f"{digits}·{power}"


def count(points: int, what: str) -> str:
    """A number of points with a description, such as "2 points not finite"; empty for 0."""
    return f"{points} point{'s' * (points != 1)} {what}" if points else ""


def is_wide(values: Iterable[float], factor: float = WIDE) -> bool:
    """Whether values are positive and span more than a factor, which calls for a logarithmic axis."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > factor * min(finite)


def ends(axis: Axis, values: Iterable[float]) -> tuple[float, float]:
    """The lower and the upper end of an axis: those of its range, else those of the values that it can show."""
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)]
    low, high = min(finite, default=1.0), max(finite, default=1.0)
    first, last = axis.range
    first, last = low if first is None else first, high if last is None else last
    return min(first, last), max(first, last)


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between two ends; on a logarithmic scale powers of ten if there are three or more."""
    if not log or high < 3 * low:
        width = high - low
        step = 10.0 ** math.floor(math.log10(width / 4))
        step *= max(m for m in (1, 2, 5) if m * step <= (1 + 1e-9) * width / 4)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [float(f"{k * step:.12g}") for k in range(first, last + 1)]
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    places: list[float] = []
    for multiples in ([1], [1, 3], [1, 2, 5]):
        places = [m * 10.0**k for k in range(first, last + 1) for m in multiples]
        places = [t for t in places if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
        if len(places) >= 3:
            break
    return places[:: math.ceil(len(places) / 8)]


def epochs(last: float) -> dict[float, str] | None:
    """A tick for each epoch; None if there are many, to let the renderer choose."""
    return {float(e): str(e) for e in range(1, int(last) + 1)} if last <= _EPOCHS else None


def readable(given: Mapping[float, str], low: float, high: float, log: bool) -> dict[float, str]:
    """Ticks of a horizontal axis, without texts that would overlap in a narrow figure."""
    scale = math.log10 if log else float
    width = abs(scale(high) - scale(low)) or 1.0
    shown: dict[float, str] = {}
    end = -math.inf
    for place in sorted(given):
        text = given[place]
        middle, half = scale(place) / width, _CHARACTER * (len(text) + 1) / 2
        fits = middle - half >= end
        shown[place] = text if fits else ""
        end = middle + half if fits else end
    return shown


def aside(value: float, share: float, low: float, high: float, log: bool) -> float:
    """A value, moved by a share of the length of the axis."""
    return value * (high / low) ** share if log else value + share * (high - low)


def shifts(count: int, step: float, room: float) -> list[float]:
    """Offsets, as shares of an axis, that keep marks at the same place apart.

    Args:
        count: number of marks.
        step: distance between neighbours.
        room: the largest width of all of them together; many marks are closer to each other.

    Examples:
        >>> shifts(3, 0.02, 0.1)
        [-0.02, 0.0, 0.02]
    """
    return [(i - (count - 1) / 2) * min(step, room / count) for i in range(count)]


def broken(label: str, width: int, lines: int = 0) -> str:
    r"""A label in lines of about equal length, broken at spaces, after "/", "+" and ",", and at hyphens.

    Args:
        label: one line.
        width: the largest number of characters in a line; a longer word has a line of its own.
        lines: the largest number of lines, the last of which ends with "…" if the label is cut; 0 for any number.

    Examples:
        >>> broken("samdirection+bisam-log+asam", 16)
        'samdirection+\nbisam-log+asam'
    """
    glued = label.replace(" = ", "\u00a0=\u00a0")
    pieces = _BREAK.split(glued)
    count = max(math.ceil(len(glued) / width), 1)
    best = _filled(pieces, width)
    for shorter in range(math.ceil(len(glued) / count), width):
        found = _filled(pieces, shorter)
        if len(found) <= len(best):
            best = found
            break
    if lines and len(best) > lines:
        best = [*best[: lines - 1], textwrap.shorten(" ".join(best[lines - 1 :]), width, placeholder="…")]
    if lines:  # a very long word
        best = [line if len(line) <= 2 * width else line[: 2 * width - 1] + "…" for line in best]
    return "\n".join(best)


def tick(text: str) -> str:
    """The text of a tick, broken into short lines."""
    return "\n".join(broken(line, 20, 3) for line in text.split("\n"))


def _filled(pieces: Sequence[str], width: int) -> list[str]:
    rows = [""]
    for piece in pieces:
        if rows[-1] and len(rows[-1]) + len(piece.rstrip()) > width:
            rows.append("")
        rows[-1] += piece
    return [row.strip() for row in rows if row.strip()] or [""]
