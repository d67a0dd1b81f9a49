"""A study's table as Markdown, CSV and LaTeX, read back."""

import csv
import dataclasses
import io
import math
import re

import pytest

from flatmin.stats import PERCENT, POINTS, summarise
from flatmin.study.conclusions import verdicts
from flatmin.study.spec import METRICS, Arm, Published, StudySpec
from flatmin.study.tables import CUT, body, comma_separated, header, latex, markdown, remarks, troubles, widths
from flatmin.study.tabulate import StudyRow, StudyTable, Value

SPEC = StudySpec(
    name="made",
    title="Made up",
    source="",
    train="smoke",
    settings={},
    axes=(),
    arms=(Arm(label="SGD", settings={}), Arm(label="a|b & 50 %", settings={})),
    seeds=(0, 1),
    baseline="SGD",
    notes=("A note.",),
)
PAPER = Published(label="a|b & 50 %", where={}, metric="test_acc", value=97.1, spread=0.25, source="a paper")


def make_row(arm, tests, *, values=None, diff=None, p=None, published=(), flags=()):
    stat = summarise(tests)
    std = 0.7071067811865476 if len(tests) == 2 else math.nan
    columns = {metric: Value(stat=summarise([]), std=math.nan) for metric in METRICS}
    columns["test_acc"] = Value(stat=stat, std=std, diff=diff, p=p, published=published)
    columns["train_ce"] = Value(stat=summarise([0.5 for _ in tests]), std=0.0)
    return StudyRow(arm=arm, values=values or {}, n=len(tests), gradients=2.0, columns=columns, flags=flags)


@pytest.fixture
def table():
    rows = [
        make_row("SGD", [90.0, 91.0]),
        make_row(
            "a|b & 50 %", [92.0, 93.0], values={"rho": "0.1"}, diff=summarise([2.0, 3.0]), p=0.125, published=(PAPER,)
        ),
        make_row("a|b & 50 %", [95.0], values={"rho": "0.2"}, diff=summarise([5.0]), flags=("no result: 1 of 2",)),
        make_row("lost", [], flags=("no result: 2 of 2",)),
    ]
    return StudyTable(
        spec=SPEC, rows=rows, metrics=("test_acc", "train_ce"), errors={"lost, seed 0": "why"}, environment={}
    )


def test_header_and_body(table):
    assert header(table) == [
        "arm",
        "rho",
        "n",
        "test % ±95 %",
        "vs SGD (paired)",
        "p",
        "published test %",
        "train loss ±95 %",
        "grads/step",
    ]
    assert body(table) == [
        ["SGD", "-", "2", "90.50 ±6.35", "-", "-", "-", "0.500", "2"],
        ["a|b & 50 %", "0.1", "2", "92.50 ±6.35", "+2.50 ±6.35", "0.12", "97.10 ±0.25", "0.500", "2"],
        ["a|b & 50 %", "0.2", "1", "95.00", "+5.00", "-", "-", "0.500", "2"],
        ["lost", "-", "0", "-", "-", "-", "-", "-", "2"],
    ]
    assert widths([["a", "bbb"], ["cc", "d"]]) == [2, 3]


@pytest.mark.parametrize(
    ("seconds", "unit", "shown"),
    [
        ([0.2, 0.4], "seconds", "0.3 ±1.3"),
        ([100.0, 110.0], "seconds", "105 ±64"),
        ([600.0, 660.0], "minutes", "10.5 ±6.4"),
        ([17560.0, 17650.0], "hours", "4.89 ±0.16"),
    ],
)
def test_long_times_are_in_minutes_or_hours(seconds, unit, shown):
    row = make_row("SGD", [90.0, 91.0])
    row = dataclasses.replace(row, columns={**row.columns, "seconds": Value(stat=summarise(seconds), std=math.nan)})
    timed = StudyTable(spec=SPEC, rows=[row], metrics=("seconds",), errors={}, environment={})
    place = header(timed).index(f"{unit} ±95 %")
    assert body(timed)[0][place] == shown
    (line,) = csv.DictReader(io.StringIO(comma_separated(timed)))
    assert float(line["seconds_mean"]) == pytest.approx(sum(seconds) / 2), "files keep seconds"


def test_no_published_column_where_none_is_shown(table):
    bare = dataclasses.replace(table, rows=[row for row in table.rows if row.arm == "SGD"])
    assert "published test %" not in header(bare) and len(body(bare)[0]) == len(header(bare))


def test_what_stands_below(table):
    assert troubles(table) == [
        "a|b & 50 % rho=0.2: no result: 1 of 2.",
        "lost: no result: 2 of 2.",
        "lost, seed 0: why",
    ]
    found = remarks(table)
    assert found[:2] == ["A note.", "Published: a paper."]
    assert any("at the same point of the axes" in text and "Holm" not in text for text in found)
    changed = dataclasses.replace(table, spec=dataclasses.replace(SPEC, changed=("epochs=2", "rho=0.1,0.2")))
    assert (
        "Settings changed by the command: epochs=2 rho=0.1,0.2; published numbers belong to the settings of their "
        "source." in remarks(changed)
    )
    assert not any("Published" in text for text in remarks(dataclasses.replace(table, rows=table.rows[:1])))


def test_two_tests_have_a_raw_and_a_corrected_p_and_the_size_of_the_family(table):
    other = make_row("other", [92.0, 93.0], diff=summarise([2.0, 3.0]), p=0.01)
    two = dataclasses.replace(table, rows=[*table.rows, other])
    assert header(two)[5:7] == ["p", "p (Holm, 2 tests)"] and body(two)[1][5:7] == ["0.12", "-"]
    assert any("corrected for the 2 tests" in text for text in remarks(two))


def test_intervals_stay_where_numbers_can_be(table):
    wide = Value(
        stat=summarise([55.0, 99.0], ends=PERCENT), std=31.1, diff=summarise([-10.0, 60.0], ends=POINTS), p=math.nan
    )
    row = dataclasses.replace(table.rows[1], columns={**table.rows[1].columns, "test_acc": wide})
    found = dataclasses.replace(table, rows=[table.rows[0], row])
    assert body(found)[1][3:6] == ["77.00 (0 to 100)", "+25.00 (-100 to +100)", "-"]
    assert CUT in remarks(found) and CUT not in remarks(table)
    one = list(csv.DictReader(io.StringIO(comma_separated(found))))[1]
    assert one["test_acc_half"] == one["test_acc_diff_half"] == ""
    assert [float(one[f"test_acc_{end}"]) for end in ("low", "high", "diff_low", "diff_high")] == [0, 100, -100, 100]


def test_markdown_read_back(table):
    lines = markdown(table).splitlines()
    assert lines[:2] == ["# Made up", ""]
    grid = [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if line.startswith("|")
    ]
    assert grid[0] == header(table) and set(grid[1]) == {"---"} and grid[2:] == body(table)
    below = [line[2:] for line in lines if line.startswith("- ")]
    assert below == [*troubles(table), *verdicts(table), *remarks(table)]


def test_csv_read_back(table):
    rows = list(csv.DictReader(io.StringIO(comma_separated(table))))
    assert [row["arm"] for row in rows] == [row.arm for row in table.rows]
    second = rows[1]
    assert float(second["test_acc_mean"]) == 92.5 and float(second["test_acc_std"]) == pytest.approx(0.5**0.5)
    stat = table.rows[1].columns["test_acc"].stat
    assert float(second["test_acc_half"]) == stat.half
    assert (float(second["test_acc_low"]), float(second["test_acc_high"])) == (stat.low, stat.high)
    assert (second["rho"], second["n"], second["gradients"]) == ("0.1", "2", "2.0")
    assert [float(second[f"test_acc_{kind}"]) for kind in ("diff", "p", "published")] == [2.5, 0.125, 97.1]
    assert rows[2]["test_acc_half"] == rows[2]["test_acc_p"] == rows[3]["test_acc_mean"] == rows[0]["rho"] == ""
    assert "nan" not in comma_separated(table)


def test_latex_read_back(table):
    text = latex(table)
    assert text.startswith(r"\begin{tabular}{llrrrrrrr}") and text.endswith("\\end{tabular}\n")
    lines = [line.removesuffix(r" \\") for line in text.splitlines() if line.endswith(r" \\")]
    plain = [
        [cell.replace(r"$\pm$", "±").replace("\\", "") for cell in re.split(r"(?<!\\) & ", line)] for line in lines
    ]
    assert plain == [header(table), *body(table)]
    hostile = dataclasses.replace(table.rows[0], arm=r"a_b#$^~\{}<")
    line = latex(dataclasses.replace(table, rows=[hostile])).splitlines()[4]
    assert line.startswith(r"a\_b\#\$\^{}\textasciitilde{}\textbackslash{}\{\}$<$ & ")
