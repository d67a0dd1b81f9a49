"""Tables for terminals of any width: columns side by side, in blocks below each other, or one row at a time.

>>> from rich.console import Console
>>> print_table([["arm", "test %"], ["sgd", "93.1"], ["sam", "95.1 ±0.4"]], Console(width=40))
arm     test %
──────────────
sgd       93.1
sam  95.1 ±0.4
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING
from unicodedata import combining, east_asian_width

from flatmin.streams import fitted

if TYPE_CHECKING:
    from rich.console import Console

_GAPS = (2, 1)  # numbers of blanks between columns, in order of preference
_PROSE = 24  # wider text may wrap, to at least this width
_MOST_BLOCKS = 4
_INDENT = "  "

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Column:
    """A column.

    Args:
        header, cells: the texts, with characters that the terminal can show.
        least, natural: the smallest width, and the width without wrapping.
        number: whether the cells are numbers.
        wide: width of the widest cell.
        simple: whether every cell is a single line of ASCII characters.
    """

    header: str
    cells: Sequence[str]
    least: int
    natural: int
    number: bool
    wide: int
    simple: bool


def print_table(rows: Rows, console: Console, *, header: bool = True, styles: Sequence[str] = ()) -> None:
    """Print a table that fits the console's width, see `lay_out`.

    Args:
        rows: the header, then the cells of each row.
        console: the console to print to.
        header: whether the first row is a header.
        styles: a style of rich for each row after the header. Default: none.
    """
    lines = lay_out(rows, width=console.width, encoding=console.encoding, header=header, styles=styles)
    if not console.is_terminal and not console.quiet:  # rich is slow for thousands of lines
        print("\n".join(line for line, _ in lines), file=console.file)
        return
    for style, group in groupby(lines, key=lambda line: line[1]):
        console.out("\n".join(line for line, _ in group), style=style or None, highlight=False)


def print_text(text: str, console: Console, *, style: str = "", hanging: str = "") -> None:
    """Print a paragraph, wrapped at the console's width, without the trailing blanks of rich.

    Args:
        text: the text, without line breaks.
        console: the console to print to.
        style: a style of rich.
        hanging: prefix of the first line; the other lines are indented by its length.
    """
    lines = _wrapped(fitted(text, console.encoding), max(1, console.width - len(hanging)))
    starts = [hanging, *[" " * len(hanging)] * (len(lines) - 1)]
    console.out(
        "\n".join(start + line for start, line in zip(starts, lines, strict=True)), style=style or None, highlight=False
    )


def lay_out(
    rows: Rows, *, width: int, encoding: str = "utf-8", header: bool = True, styles: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """The lines of a table, each with its style. Numbers are right-aligned, long texts wrap, and no number is cut.

    If the columns do not fit side by side, they are split into blocks that repeat the first column. If that takes more
    than four blocks, or one column is too wide, each row becomes a list of names and values.

    Args:
        rows: the header, then the cells of each row.
        width: width of the terminal in characters.
        encoding: encoding of the terminal; characters that it lacks are replaced.
        header: whether the first row is a header.
        styles: a style for each row after the header. Default: none.
    """
    table = rows if header else [[""] * len(rows[0]), *rows]
    every = [_column(cells, encoding) for cells in zip(*table, strict=True)]
    styles = [*styles, *[""] * (len(table) - 1 - len(styles))]
    rule = fitted("─", encoding)
    lines: list[tuple[str, str]] = []
    blocks = _blocks(every, width, len(styles))
    if blocks is None:
        return list(_records(every, styles, width))
    for number, (columns, widths, gap) in enumerate(blocks):
        lines += [("", "")] if number else []
        if header:
            lines += [(line, "bold") for line in _heads(columns, widths, gap)]
            lines.append((rule * (sum(widths) + gap * (len(widths) - 1)), ""))
        lines += _body(columns, widths, gap, styles)
    return lines


def fits(rows: Rows, console: Console) -> bool:
    """Whether the columns fit side by side."""
    columns = [_column(cells, console.encoding) for cells in zip(*rows, strict=True)]
    return _side_by_side(columns, console.width) is not None


def is_number(cell: str) -> bool:
    """Whether a cell begins with a number, or is empty.

    Examples:
        >>> is_number("95.1 ±0.4"), is_number("(1.2 ± 0.1)e-4"), is_number("-"), is_number("sam")
        (True, True, True, False)
    """
    word = cell.lstrip("(").partition(" ")[0].rstrip("%").replace(",", "")
    try:
        return not math.isnan(float(word))
    except ValueError:
        return cell in ("-", "")


def _length(text: str) -> int:
    """The width of a text in the terminal."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(char) else 1 + (east_asian_width(char) in "WF") for char in text)


def _column(cells: Sequence[str], encoding: str) -> _Column:
    plain = "".join(cells).isascii()
    header, *body = cells if plain else [fitted(cell, encoding) for cell in cells]
    different = set(body)
    lines = [line for cell in different for line in cell.split("\n")]
    wide = max(map(len if plain else _length, lines), default=0)
    number = not different <= {"-", ""} and all(map(is_number, different))
    least = wide
    if wide > _PROSE and not number:
        words = max((_length(word) for cell in different for word in cell.split()), default=0)
        least = min(wide, max(_PROSE, words))
    least = max([least, *map(_length, header.split())])
    simple = plain and len(lines) == len(different)
    return _Column(header, body, least, max(wide, _length(header)), number, wide, simple)


def _side_by_side(columns: Sequence[_Column], width: int) -> tuple[list[int], int] | None:
    """Widths of the columns and the gap between them, if they fit."""
    for gap in _GAPS:
        widths = [column.least for column in columns]
        spare = width - sum(widths) - gap * (len(columns) - 1)
        if spare < 0:
            continue
        while spare:  # give it to the column that wraps most
            i = max(range(len(columns)), key=lambda i: columns[i].natural / max(1, widths[i]))
            if columns[i].natural <= widths[i]:
                break
            widths[i] += 1
            spare -= 1
        return widths, gap
    return None


def _blocks(columns: Sequence[_Column], width: int, rows: int) -> list[tuple[Sequence[_Column], list[int], int]] | None:
    """Blocks of columns that fit beside the first column; None if there would be too many, or one does not fit."""
    if (whole := _side_by_side(columns, width)) is not None:
        return [(columns, *whole)]
    if rows < 2:
        return None
    made = _filled(columns, width, len(columns))
    if not made or len(made) > _MOST_BLOCKS:
        return None
    even = _filled(columns, width, math.ceil((len(columns) - 1) / len(made)))  # avoids a block with a single column
    return even if even is not None and len(even) == len(made) else made


def _filled(columns: Sequence[_Column], width: int, most: int) -> list[tuple[Sequence[_Column], list[int], int]] | None:
    """Blocks of as many columns as fit beside the first one, and no more than `most`; None if one does not fit."""
    first, *rest = columns
    made: list[tuple[Sequence[_Column], list[int], int]] = []
    while rest:
        for count in range(min(most, len(rest)), 0, -1):
            block = [first, *rest[:count]]
            if (found := _side_by_side(block, width)) is not None:
                made.append((block, *found))
                rest = rest[count:]
                break
        else:
            return None
    return made


def _heads(columns: Sequence[_Column], widths: Sequence[int], gap: int) -> Iterator[str]:
    """The lines of the headers, aligned at the bottom."""
    heads = [_wrapped(column.header, width) for column, width in zip(columns, widths, strict=True)]
    tall = max(map(len, heads))
    for i in range(tall):
        cells = [head[i - tall + len(head)] if i >= tall - len(head) else "" for head in heads]
        yield _line(cells, columns, widths, gap)


def _body(
    columns: Sequence[_Column], widths: Sequence[int], gap: int, styles: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """The lines of the rows, each with its style."""
    if all(column.simple and column.wide <= width for column, width in zip(columns, widths, strict=True)):
        # The same result, faster, for lists of thousands of rows.
        padded = [
            [cell.rjust(width) if column.number else cell.ljust(width) for cell in column.cells]
            for column, width in zip(columns, widths, strict=True)
        ]
        for cells, style in zip(zip(*padded, strict=True), styles, strict=True):
            yield (" " * gap).join(cells).rstrip(), style
        return
    for i, style in enumerate(styles):
        parts = [_wrapped(column.cells[i], width) for column, width in zip(columns, widths, strict=True)]
        for k in range(max(map(len, parts))):
            yield _line([part[k] if k < len(part) else "" for part in parts], columns, widths, gap), style


def _line(cells: Iterable[str], columns: Sequence[_Column], widths: Sequence[int], gap: int) -> str:
    padded = []
    for cell, column, width in zip(cells, columns, widths, strict=True):
        wide = width if cell.isascii() else width - _length(cell) + len(cell)
        padded.append(cell.rjust(wide) if column.number else cell.ljust(wide))
    return (" " * gap).join(padded).rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, broken between words where possible."""
    if "\n" not in text and _length(text) <= width:
        return [text]
    lines: list[str] = []
    for whole in text.split("\n"):
        if _length(whole) <= width:
            lines.append(whole)
            continue
        line = ""
        for word in whole.split():
            while word:
                joined = f"{line} {word}" if line else word
                if _length(joined) <= width:
                    line, word = joined, ""
                elif line:
                    lines.append(line)
                    line = ""
                else:  # a word that is wider than the column
                    count = next(n for n in range(len(word), 0, -1) if n == 1 or _length(word[:n]) <= width)
                    lines.append(word[:count])
                    word = word[count:]
        lines += [line] if line else []
    return lines or [""]


def _records(columns: Sequence[_Column], styles: Sequence[str], width: int) -> Iterator[tuple[str, str]]:
    """One row at a time: its first cell, then a line for each other column."""
    first, *rest = columns
    names = max((_length(column.header) for column in rest), default=0)
    beside = len(_INDENT) + names + 2 <= 0.6 * width
    for i, style in enumerate(styles):
        if i:
            yield "", ""
        for line in _wrapped(first.cells[i], width):
            yield line, style or "bold"
        for column in rest:
            start = f"{_INDENT}{column.header + ' ' * (names - _length(column.header))}  " if beside else _INDENT * 2
            if not beside:
                for line in _wrapped(column.header, width - len(_INDENT)):
                    yield f"{_INDENT}{line}", style
            for k, line in enumerate(_wrapped(column.cells[i], max(1, width - _length(start)))):
                yield (start if k == 0 else " " * _length(start)) + line, style
