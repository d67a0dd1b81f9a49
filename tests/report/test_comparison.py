import dataclasses
import json
import math
import re
import sys

import pytest

from flatmin.report import html as page
from flatmin.report.comparison import figures
from flatmin.report.comparison.page import render_report, write_report
from flatmin.report.html import Cell, Column, Figure, Markup
from tests.pages import Outline

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "a & b", "$x$", "</script>", "'quoted'"]


@pytest.fixture
def small_plotly(monkeypatch):
    """plotly.js is 5 MB; its text does not matter to most tests."""
    monkeypatch.setattr(page, "_plotly_js", lambda: "/* plotly.js */")


def test_the_page_is_whole_and_self_contained(summary, small_plotly):
    text = render_report(summary)
    outline = Outline(text)
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    for absent in ("link", "iframe", "img", "object"):
        assert absent not in outline.tags
    assert not [value for name, value in outline.attributes if name in ("src", "href", "srcset")]
    assert any(name == "content" and value.startswith("default-src 'none'") for name, value in outline.attributes)
    everything = "\n".join(outline.text)
    for expected in (
        "94.5 ± 1.2",
        "+17.5 ± 1.2",
        "2.01 ×",
        "flatmin compare --seeds 3",
        "torch 2.13.0",
        "Choice of rho",
    ):
        assert expected in everything
    assert "absent" not in everything and "nan" not in everything


def test_plotly_is_embedded_once(summary):
    text = render_report(summary)
    assert text.count("plotly.js v") == 1 and "cdn.plot.ly/plotly" not in text


def test_hostile_names_stay_text(build, small_plotly):
    summary = build(*HOSTILE, title=HOSTILE[0], command=HOSTILE[4], notes=[HOSTILE[1]], errors={HOSTILE[0]: HOSTILE[4]})
    outline = Outline(render_report(summary))
    assert "img" not in outline.tags
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    kinds = [kind for kind, _ in outline.scripts]
    assert kinds.count("code") == 3, "style, plotly.js and the page's own script, no other"
    shown = "".join(outline.text)
    for name in HOSTILE:
        assert name in shown
    labels = outline.specs[0]["layout"]["yaxis"]["ticktext"]
    assert "<script" not in "".join(labels) and "&lt;script&gt;" in "".join(labels).replace("<br>", "")
    assert "$" not in "".join(labels)


def test_unknown_numbers_become_null(build, small_plotly):
    summary = build("sam")
    rows = [summary.rows[0], dataclasses.replace(summary.rows[1], lambda_residual=math.nan, time_ratio=None)]
    curves = summary.curves | {"sam": {"memorised": [[1.0, math.nan]]}}
    outline = Outline(render_report(dataclasses.replace(summary, rows=rows, curves=curves)))
    assert outline.specs
    assert "NaN" not in json.dumps(outline.specs)


def test_every_trace_can_be_hidden_by_its_arm(summary, small_plotly):
    outline = Outline(render_report(summary))
    arms = {value for name, value in outline.attributes if name == "value"}
    assert arms == {"sgd", "sam", "asam"}
    assert {trace["legendgroup"] for spec in outline.specs for trace in spec["data"]} <= arms


def test_colours_come_from_the_style_sheet(summary, small_plotly):
    text = render_report(summary)
    names = set(re.findall(r'"var:([a-z0-9-]+)"', text))
    assert names and all(text.count(f"--{name}:") == 2 for name in names), "each colour in light and in dark"


def test_figures_without_values_are_left_out(build, nothing, small_plotly):
    summary = build("sam", curves={})
    rows = [dataclasses.replace(row, lambda_max=nothing) for row in summary.rows]
    specs = Outline(render_report(dataclasses.replace(summary, rows=rows))).specs
    assert len(specs) == 1, "accuracy per seed is all that is known"


def test_cost_counts_the_whole_run(build):
    summary = build("sam", "sgd, 2x epochs")
    rows = [*summary.rows[:2], dataclasses.replace(summary.rows[2], rho=None, gradient_evaluations=1.0)]
    curves = summary.curves | {"sgd, 2x epochs": {"test_acc": [[0.0] * 10]}}
    summary = dataclasses.replace(summary, rows=rows, curves=curves)
    fig = figures.cost(summary, figures.marks(rows))
    assert fig is not None
    assert [round(trace["x"][0]) for trace in fig.data] == [1, 2, 2]


def test_more_arms_than_colours(build, small_plotly):
    summary = build(*(f"arm {i}" for i in range(25)))
    mark = figures.marks(summary.rows)
    assert len({(m.tone, m.symbol) for m in mark.values()}) > 20
    assert "arm 24" in render_report(summary)


def test_written_by_rename(summary, small_plotly, tmp_path):
    path = write_report(summary, tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == render_report(summary)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_missing_plotly_names_the_extra(summary, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'flatmin\[report\]'"):
        render_report(summary)


def test_a_page_without_figures_needs_no_plotly(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Plotly" in page.page("t", [page.heading("h")]), "the page's script only"


def test_rows_must_fit_the_columns():
    with pytest.raises(ValueError, match="1 cells, but the table has 2 columns"):
        page.table([Column("a"), Column("b")], [[Cell("x")]])


def test_cells_sort_by_number_or_last():
    text = page.table([Column("a"), Column("b")], [[Cell("x"), Cell("9", sort=9.0)], [Cell("y"), Cell("–")]]).text
    assert 'data-sort="9.0"' in text and 'data-sort=""' in text


def test_layouts_are_merged_key_by_key():
    fig = Figure([], {"xaxis": {"title": {"text": "t"}}})
    spec = Outline(page.figure(fig, "a figure").text).specs[0]
    assert spec["layout"]["xaxis"]["title"] == {"text": "t"}
    assert spec["layout"]["xaxis"]["gridcolor"] == "var:grid"


def test_pieces_add_up():
    assert (Markup("a", 1) + Markup("b", 2)) == Markup("ab", 3)
