"""Tables in a terminal: they fit, they lose nothing, and numbers stay whole."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from flatmin.report.terminal import lay_out, print_table, print_text

STUDY = [
    ["arm", "rho", "n", "grads/step", "test % ±95 %", "vs SGD (paired)", "p (Holm)", "train loss ±95 %", "lambda_max"],
    ["SGD", "-", "2", "1", "80.7 ±11.2", "-", "-", "1.700 ±0.178", "2.5 ±5.5"],
    ["SAM, long", "0.15", "2", "2", "79.4 (57.8 to 100)", "-1.7 ±23.1", "0.52", "(1.28 ± 0.11)e-4", "2.0 ±1.6"],
]


def lines(rows, width, **options):
    return [line for line, _ in lay_out(rows, width=width, **options)]


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 100, 140])
def test_it_fits_and_no_number_is_cut(width):
    text = "\n".join(lines(STUDY, width))
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for cell in (cell for row in STUDY[1:] for cell in row if cell != "-"):
        assert cell in text if width >= 30 else " ".join(cell.split()) in " ".join(text.split()), cell


def test_side_by_side_then_blocks_then_a_row_at_a_time():
    assert len([line for line in lines(STUDY, 140) if line.startswith("arm")]) == 1
    blocks = [line.split()[0] for line in lines(STUDY, 80) if line]
    assert blocks.count("SGD") == blocks.count("SAM,") == 2, "each block repeats the first column"
    long = [STUDY[0], *([f"{row[0]}-{'x' * 30}", *row[1:]] for row in STUDY[1:])]
    rows = lines(long, 44)
    assert rows[0] == f"SGD-{'x' * 30}" and "  vs SGD (paired)   -1.7 ±23.1" in rows


def test_numbers_stand_to_the_right_and_texts_wrap():
    rows = [["name", "size", "what it is"], ["a", "1,024", "word " * 20], ["b", "7", "short"]]
    found = lines(rows, 40)
    assert found[0] == "name   size  what it is" and re.match(r"─+$", found[1])
    assert found[2].startswith("a     1,024  word word") and found[3].startswith(" " * 13 + "word")
    assert found[-1] == "b         7  short"
    assert lines([["a", "b"], ["1", "2"]], 40, header=False) == ["a  b", "1  2"]


def test_styles_and_encodings():
    rows = [["ρ", "x"], ["größer ± ✓", "1"], ["日本", "2"]]
    assert lay_out(rows, width=40, styles=["red"])[2] == ("größer ± ✓  1", "red")
    wide = lines(rows, 40)
    assert len({cell_len(line) for line in wide[2:]}) == 1, "signs of two columns count as two"
    assert "\n".join(lines(rows, 40, encoding="ascii")).isascii()
    console = Console(file=io.StringIO(), width=20)
    print_table(rows, console)
    print_text("one [red]two[/red] three four", console, hanging="- ")
    assert console.file.getvalue().splitlines()[-2:] == ["- one [red]two[/red]", "  three four"]


words = st.text(st.sampled_from("ab 1.日é\n"), max_size=40)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(words, min_size=n, max_size=n), min_size=2, max_size=4)),
       st.integers(10, 90))  # fmt: skip
def test_nothing_is_lost_at_any_width(rows, width):
    """Each letter of each cell, and of the headers if there is more than the first column."""
    found = lines(rows, width)
    assert all(cell_len(line) <= width for line in found)
    text = "".join(found)
    for letter in "ab日é":
        assert text.count(letter) >= sum(cell.count(letter) for row in rows[1:] for cell in row)
