"""Runs in a terminal: numbers, small curves of text, and differences between settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from flatmin.report.runs.history import History
from flatmin.report.runs.numbers import alike, differences, sentence, troubles, unlisted
from flatmin.report.terminal import print_table, print_text
from flatmin.train.result import Epoch

if TYPE_CHECKING:
    from rich.console import Console

BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", ".:-=+*#@"
_SMALL, _LARGE = 10, 48  # width of a curve in characters
_CURVES: dict[str, tuple[Callable[[Epoch], float | None], str]] = {
    "train loss": (lambda line: line.train_loss, ".3f"),
    "perturbed loss": (lambda line: line.perturbed_loss, ".3f"),
    "val %": (lambda line: line.val_acc, ".1f"),
}


def print_runs(runs: Sequence[History], console: Console) -> None:
    """Print the numbers, curves, differences and notes at the console's width."""
    shared, quantities = alike(runs)
    print_text(sentence(runs), console, style="bold")
    if shared:
        print_text(shared, console)
    console.print()
    numbers = {quantity.name: [quantity.text(run) or "-" for run in runs] for quantity in quantities}
    _print_columns(runs, "", numbers, console)
    console.print()
    _print_curves(runs, console)
    if len(runs) > 1:
        every = differences(runs)
        if differing := unlisted(every):
            console.print()
            _print_columns(runs, "differences", differing, console)
        elif not every:
            console.print()
            print_text("The settings are the same in all runs.", console)
    if told := troubles(runs):
        console.print()
        for words in told:
            print_text(words, console, style="yellow" if "failed" in words else "")


def _print_columns(runs: Sequence[History], title: str, rows: Mapping[str, Sequence[str]], console: Console) -> None:
    """Print a table with one column for each run; a single run needs no header."""
    header = [[title, *(run.name for run in runs)]] if len(runs) > 1 else []
    print_table([*header, *([name, *values] for name, values in rows.items())], console, header=bool(header))


def _print_curves(runs: Sequence[History], console: Console) -> None:
    """Print curves over the epochs as text, with one scale for each quantity."""
    if not any(run.lines for run in runs):
        print_text("No epoch is finished yet.", console)
        return
    names = max(len(run.name) for run in runs) if len(runs) > 1 else 0
    width = max(_SMALL, min(_LARGE, console.width - names - 36))
    longest = max(len(run.lines) for run in runs)
    rows = [["over the epochs", *["run"] * bool(names), "first", "", "last"]]
    for title, (read, form) in _CURVES.items():
        curves = [[value for line in run.lines if (value := read(line)) is not None] for run in runs]
        scale = [value for curve in curves for value in curve]
        for run, curve in zip(runs, curves, strict=True):
            if not curve:
                continue
            line = sparkline(
                curve, low=min(scale), high=max(scale), width=width, longest=longest, encoding=console.encoding
            )
            named = title if title not in [row[0] for row in rows] else ""
            rows.append([named, *[run.name] * bool(names), format(curve[0], form), line, format(curve[-1], form)])
    print_table(rows, console)


def sparkline(
    values: Sequence[float], *, low: float, high: float, width: int, longest: int, encoding: str = "utf-8"
) -> str:
    """Values as a line of bars, with the lowest bar for `low` and the highest for `high`.

    Args:
        values: one value for each epoch.
        low: lower end of the scale.
        high: upper end of the scale.
        width: largest number of bars. If there are more values, each bar is the mean of several epochs.
        longest: number of values of the longest line, so that lines above each other have the same scale.
        encoding: encoding of the terminal; ASCII characters are used if it is not UTF.

    Examples:
        >>> sparkline([0.0, 1.0, 2.0, 3.0], low=0, high=3, width=10, longest=4)
        '▁▃▆█'
    """
    signs = BLOCKS if encoding.lower().startswith("utf") else PLAIN
    size = max(1.0, longest / width)
    bars = []
    for i in range(math.ceil(len(values) / size)):
        part = values[int(i * size) : max(int(i * size) + 1, int((i + 1) * size))]
        share = (sum(part) / len(part) - low) / (high - low) if high > low else 0.0
        bars.append(signs[min(len(signs) - 1, max(0, round(share * (len(signs) - 1))))])
    return "".join(bars)
