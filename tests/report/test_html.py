"""The parts of pages: what they are made of, that nothing from outside is markup, and how they are written."""

import json
import re

import pytest

from flatmin.report import html as page
from flatmin.report.html import Cell, Column, Figure, Markup
from flatmin.report.studies.page import render
from tests.pages import HOSTILE, Outline
from tests.study.made import made_table

STUDY = """
title = "{title}"
train = "smoke"
seeds = [0, 1]
notes = ["{note}"]
[[arms]]
label = "sgd"
method = "sgd"
[[arms]]
label = "{label}"
method = "sam"
"""


@pytest.fixture
def small_plotly(monkeypatch):
    """plotly.js is 5 MB; its text does not matter to most tests."""
    monkeypatch.setattr(page, "_plotly_js", lambda: "/* plotly.js */")


@pytest.fixture
def study_page(tmp_path, small_plotly):
    def make(title="A title", note="A note.", label="sam", command=("flatmin", "study", "x")):
        text = STUDY.format(**{k: json.dumps(v)[1:-1] for k, v in (("title", title), ("note", note), ("label", label))})
        return render(made_table(text, tmp_path, lambda point, seed: 90.0 + seed), command=command)

    return make


def test_a_page_is_whole_and_self_contained(study_page):
    text = study_page()
    outline = Outline(text)
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    for absent in ("link", "iframe", "img", "object"):
        assert absent not in outline.tags
    assert not [value for name, value in outline.attributes if name in ("src", "href", "srcset")]
    assert any(name == "content" and value.startswith("default-src 'none'") for name, value in outline.attributes)
    assert "nan" not in "".join(outline.text) and "NaN" not in json.dumps(outline.specs)


def test_hostile_names_stay_text(study_page):
    for hostile in HOSTILE:
        outline = Outline(study_page(hostile, hostile, hostile, ("flatmin", hostile)))
        assert "img" not in outline.tags
        assert not [name for name, _ in outline.attributes if name.startswith("on")]
        kinds = [kind for kind, _ in outline.scripts]
        assert kinds.count("code") == 3, "style, plotly.js and the page's own script, no other"
        assert "".join(outline.text).count(hostile) >= 3


def test_colours_come_from_the_style_sheet_and_traces_can_be_hidden_by_their_arm(study_page):
    text = study_page()
    names = set(re.findall(r'"var:([a-z0-9-]+)"', text))
    assert names and all(text.count(f"--{name}:") == 2 for name in names), "each colour in light and in dark"
    outline = Outline(text)
    arms = {value for name, value in outline.attributes if name == "value"}
    groups = {trace["legendgroup"] for spec in outline.specs for trace in spec["data"] if "legendgroup" in trace}
    assert groups <= arms >= {"sgd", "sam"}


def test_a_page_is_written_by_rename(tmp_path):
    path = page.write("text", tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8") == "text" and [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_plotly_is_embedded_once_and_only_where_there_is_a_figure(monkeypatch):
    figure = page.figure(Figure([], {"xaxis": {"title": {"text": "t"}}}), "a figure")
    assert page.page("t", [figure, figure]).count("plotly.js v") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "<h2>" in page.page("t", [page.heading("h")])
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'flatmin\[report\]'"):
        page.page("t", [figure])


def test_tables(tmp_path):
    with pytest.raises(ValueError, match="1 cells, but the table has 2 columns"):
        page.table([Column("a"), Column("b")], [[Cell("x")]])
    text = page.table([Column("a"), Column("b")], [[Cell("x"), Cell("9", sort=9.0)], [Cell("y"), Cell("–")]]).text
    assert 'data-sort="9.0"' in text and 'data-sort=""' in text
    assert (Markup("a", 1) + Markup("b", 2)) == Markup("ab", 3)
