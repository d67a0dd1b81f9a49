"""The table of a comparison for a terminal: one block if it fits, else two that fit in 80 columns, else more."""

from __future__ import annotations

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flatmin.report.studies.text import CUT
from flatmin.streams import fitted
from flatmin.study.summary import Row, Stat, Summary


@dataclass(frozen=True)
class _Column:
    header: str
    cell: Callable[[Row], str | Text]
    right: bool = True


def _stat(stat: Stat, digits: int = 1, sign: str = "") -> str:
    if not stat.n or math.isnan(stat.mean):
        return "-"
    return stat.text(f"{sign}.{digits}f")


def _label(row: Row) -> Text:
    text = Text(row.label)
    if row.flags:
        text.append(" [" + ", ".join(row.flags) + "]", style="bold red")
    return text


def _sharpness(row: Row) -> str:
    residual = "" if math.isnan(row.lambda_residual) else f" ({row.lambda_residual:.0e})"
    return _stat(row.lambda_max) + residual


def _time(row: Row) -> str:
    ratio = row.time_ratio
    return "-" if ratio is None else f"{ratio.median:.2f} ({ratio.q25:.2f}-{ratio.q75:.2f})"


_NAME = _Column("arm", _label, right=False)
_OUTCOME = (
    _Column("rho", lambda row: "-" if row.rho is None else f"{row.rho:g}"),
    _Column("grads\n/step", lambda row: f"{row.gradient_evaluations:g}"),
    _Column("test %\nlast", lambda row: _stat(row.last)),
    _Column("test %\nbest val", lambda row: _stat(row.best)),
    _Column("vs sgd\n(paired)", lambda row: "-" if row.diff is None else _stat(row.diff, sign="+")),
    _Column("memorised\n%", lambda row: _stat(row.memorised)),
)
_SEEDS = _Column("n", lambda row: str(row.n))
_COST = (
    _Column("train\nloss", lambda row: _stat(row.train_ce, 3)),
    _Column("lambda_max\n(residual)", _sharpness),
    _Column("time/step\n(quartiles)", _time),
)


def render(summary: Summary, console: Console) -> RenderableType:
    """The table, its key and its notes, for this console's width."""
    counts = sorted({row.n for row in summary.rows})
    seeds: tuple[_Column, ...] = () if len(counts) == 1 else (_SEEDS,)
    rows = [_fitted_row(row, console) for row in summary.rows]
    tables = [_block((_NAME, *_OUTCOME, *seeds, *_COST), rows, console)]
    if not _fits(tables[0], console):
        tables = [*_blocks((*_OUTCOME, *seeds), rows, console), *_blocks(_COST, rows, console)]
    number = f"{counts[0]} seed{'s' * (counts[0] != 1)}" if len(counts) == 1 else "n seeds"
    interval = "mean ± 95 % t-interval" if counts and counts[-1] > 1 else "no interval from a single seed"
    key = (
        f"{number}, {interval}; last epoch and best-validation epoch; memorised: wrong labels learnt by heart; "
        "train loss and lambda_max: un-augmented training set, evaluation mode; time relative to sgd."
    )
    if any(row.cut for row in summary.rows):
        key += f" {CUT}"
    parts: list[RenderableType] = [Text(fitted(summary.title, console.encoding), style="bold")]
    for table in tables:
        parts += [Text(), table]
    parts += [Text(), _wrapped(key, console, style="dim"), Text()]
    parts += [_wrapped(note, console, first="- ", rest="  ") for note in summary.notes]
    return Group(*parts)


def print_summary(summary: Summary, console: Console) -> None:
    """Print the table at the console's width."""
    console.print(render(summary, console), highlight=False)


def _fitted_row(row: Row, console: Console) -> Row:
    """The row with its words as the console can show them."""
    flags = [fitted(flag, console.encoding) for flag in row.flags]
    return dataclasses.replace(row, label=fitted(row.label, console.encoding), flags=flags)


def _fits(table: Table, console: Console) -> bool:
    unbounded = console.options.update(max_width=10_000)
    return Measurement.get(console, unbounded, table).maximum <= console.width


def _blocks(columns: Sequence[_Column], rows: Sequence[Row], console: Console) -> list[Table]:
    """Tables below each other that have as many of the columns as fit, and one at least; closer ones if that helps."""
    for count, gap in itertools.product(range(len(columns), 0, -1), (1, 0)):
        table = _block((_NAME, *columns[:count]), rows, console, gap)
        if _fits(table, console):
            break
    return [table, *(_blocks(columns[count:], rows, console) if columns[count:] else [])]


def _block(columns: Sequence[_Column], rows: Sequence[Row], console: Console, gap: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.header, justify="right" if column.right else "left", no_wrap=column.right, overflow="fold"
        )
    for row in rows:
        cells = (column.cell(row) for column in columns)
        fit = [fitted(cell, console.encoding) if isinstance(cell, str) else cell for cell in cells]
        table.add_row(*fit, style="yellow" if row.flags else "")
    return table


def _wrapped(text: str, console: Console, *, first: str = "", rest: str = "", style: str = "") -> Text:
    """A paragraph with a hanging indent, and without the trailing blanks that a table would leave in a file."""
    text = fitted(text, console.encoding)
    return Text(textwrap.fill(text, console.width, initial_indent=first, subsequent_indent=rest), style=style)
