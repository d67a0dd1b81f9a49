"""Runs in a terminal: their numbers, small curves of text, and what differs in their settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flatmin.report.runs.history import FAILED, History
from flatmin.report.runs.numbers import differences, quantities_of, sentence, troubles
from flatmin.train.result import Epoch

BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", ".:-=+*#@"
_SMALL, _LARGE = 10, 48  # columns of a curve
_CURVES: dict[str, tuple[Callable[[Epoch], float | None], str]] = {
    "train loss": (lambda line: line.train_loss, ".3f"),
    "perturbed loss": (lambda line: line.perturbed_loss, ".3f"),
    "val %": (lambda line: line.val_acc, ".1f"),
}


def print_runs(runs: Sequence[History], console: Console) -> None:
    """Print the numbers, curves, differences and troubles at the console's width."""
    console.print(render(runs, console), highlight=False)


def render(runs: Sequence[History], console: Console) -> RenderableType:
    """What is printed."""
    parts: list[RenderableType] = [Text(sentence(runs), style="bold"), Text()]
    parts += _numbers(runs, console)
    parts += [_curves(runs, console), Text()]
    if len(runs) > 1:
        parts += _differences(runs, console)
    parts += [Text(words, style="yellow" if "failed" in words else "") for words in troubles(runs)]
    while isinstance(parts[-1], Text) and not parts[-1].plain:
        parts.pop()
    return Group(*parts)


def _numbers(runs: Sequence[History], console: Console) -> list[RenderableType]:
    quantities = quantities_of(runs)
    rows = {q.name: [q.text(run) or "-" for run in runs] for q in quantities}
    return _columns(runs, "", rows, console)


def _differences(runs: Sequence[History], console: Console) -> list[RenderableType]:
    rows = differences(runs)
    if not rows:
        return [Text("The settings are the same."), Text()]
    return _columns(runs, "what differs", rows, console)


def _columns(
    runs: Sequence[History], title: str, rows: Mapping[str, Sequence[str]], console: Console
) -> list[RenderableType]:
    """A column a run, in as many blocks as the width asks for."""
    parts: list[RenderableType] = []
    start = 0
    while start < len(runs):
        count = len(runs) - start
        while count > 1 and _width(_block(runs, title, rows, start, count), console) > console.width:
            count -= 1
        parts += [_block(runs, title, rows, start, count), Text()]
        start += count
    return parts


def _block(runs: Sequence[History], title: str, rows: Mapping[str, Sequence[str]], start: int, count: int) -> Table:
    table = _table()
    table.add_column(title, no_wrap=True)
    # A single run says its name in the line above.
    table.show_header = len(runs) > 1
    for run in runs[start : start + count]:
        table.add_column(Text(run.name, style="yellow" if run.state == FAILED else ""), overflow="fold")
    for name, values in rows.items():
        table.add_row(Text(name), *(Text(value) for value in values[start : start + count]))
    return table


def _width(table: Table, console: Console) -> int:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _curves(runs: Sequence[History], console: Console) -> RenderableType:
    """Lines of text over the epochs, all of a quantity on one scale."""
    if not any(run.lines for run in runs):
        return Text("No epoch is finished yet.")
    names = max(len(run.name) for run in runs) if len(runs) > 1 else 0
    width = max(_SMALL, min(_LARGE, console.width - names - 36))
    longest = max(len(run.lines) for run in runs)
    table = _table()
    table.add_column("over the epochs", no_wrap=True)
    if names:
        table.add_column("run", no_wrap=True)
    table.add_column("first", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("last", justify="right", no_wrap=True)
    for title, (read, form) in _CURVES.items():
        curves = [[value for line in run.lines if (value := read(line)) is not None] for run in runs]
        scale = [value for curve in curves for value in curve]
        first = True
        for run, curve in zip(runs, curves, strict=True):
            if not curve:
                continue
            line = sparkline(
                curve, low=min(scale), high=max(scale), width=width, longest=longest, encoding=console.encoding
            )
            cells: list[str | Text] = [Text(run.name)] if names else []
            cells += [format(curve[0], form), Text(line), format(curve[-1], form)]
            table.add_row(title if first else "", *cells)
            first = False
    return table


def sparkline(
    values: Sequence[float], *, low: float, high: float, width: int, longest: int, encoding: str = "utf-8"
) -> str:
    """Values as a line of bars, from the lowest for `low` to the highest for `high`.

    Args:
        values: one an epoch.
        low: lower end of the scale.
        high: its upper end.
        width: columns of `longest` values, if there are more of them; each bar is the mean of its epochs.
        longest: number of values of the longest of the lines that stand above each other.
        encoding: of the terminal; without the block characters, signs of ASCII.

    Example:
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


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
