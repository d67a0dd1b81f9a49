import dataclasses
import io
import re

import pytest
from rich.console import Console

from flatmin.report.comparison.terminal import print_summary
from flatmin.stats import PERCENT, summarise


def shown(summary, width):
    console = Console(file=io.StringIO(), width=width)
    print_summary(summary, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [30, 60, 80, 100, 200])
def test_no_number_is_cut_at_any_width(summary, width):
    text = shown(summary, width)
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    for expected in ("94.5 ±1.2", "+17.5 ±1.2", "2.01 (1.95-2.10)", "(1e-03)", "0.2", "3 seeds"):
        assert expected in text


def test_a_wide_terminal_gets_one_table_and_a_narrow_one_two(summary):
    assert len(re.findall(r"^arm ", shown(summary, 200), re.MULTILINE)) == 1
    assert len(re.findall(r"^arm ", shown(summary, 80), re.MULTILINE)) == 2


def test_intervals_stay_where_numbers_can_be(summary):
    wide = dataclasses.replace(summary.rows[1], memorised=summarise([8.0, 64.0], ends=PERCENT))
    text = shown(dataclasses.replace(summary, rows=[summary.rows[0], wide]), 80)
    assert "36.0 (0 to 100)" in text and "36.0 ±" not in text and "there are too few seeds" in " ".join(text.split())
    assert "too few seeds" not in shown(summary, 80)


def test_notes_hang(summary):
    note = "word " * 40
    lines = shown(dataclasses.replace(summary, notes=[note]), 80).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("- word"))
    assert lines[first + 1].startswith("  word")


def test_a_single_seed_has_no_interval(build):
    text = shown(build("sam", seeds=1), 100)
    assert "no interval from a single seed" in text and "±" not in text and "nan" not in text


def test_different_numbers_of_seeds_get_a_column(summary):
    rows = [summary.rows[0], dataclasses.replace(summary.rows[1], n=2)]
    text = shown(dataclasses.replace(summary, rows=rows), 120)
    assert "n seeds" in text and re.search(r"\bn\b", text.splitlines()[3])


def test_flags_and_missing_values(summary, nothing):
    broken = dataclasses.replace(
        summary.rows[1],
        flags=["did not train"],
        n=0,
        last=nothing,
        best=nothing,
        memorised=nothing,
        train_ce=nothing,
        lambda_max=nothing,
        lambda_residual=float("nan"),
        time_ratio=None,
        diff=None,
    )
    text = shown(dataclasses.replace(summary, rows=[summary.rows[0], broken]), 100)
    assert "[did not train]" in text and "nan" not in text


def test_names_are_not_markup(build):
    assert "[red]x[/red]" in shown(build("[red]x[/red]"), 120)


def test_a_failed_seed_is_visible_as_its_own_count(summary):
    row = dataclasses.replace(summary.rows[1], n=1, last=summarise([90.0]))
    assert "90.0" in shown(dataclasses.replace(summary, rows=[summary.rows[0], row]), 120)


def test_an_ascii_terminal_gets_words_for_what_it_lacks(summary):
    """Also from `print_summary` in a script, whose output nobody has prepared."""
    rows = [summary.rows[0], dataclasses.replace(summary.rows[1], label="größer ρ", flags=["λ not converged"])]
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_summary(dataclasses.replace(summary, title="ρ", notes=["λ_max"], rows=rows), Console(file=out, width=100))
    out.flush()
    text = out.buffer.getvalue().decode()
    assert "grosser rho [lambda not converged]" in text and "94.5 +-1.2" in text and "- lambda_max" in text
