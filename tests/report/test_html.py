"""The pieces of a page: hostile text in every place that takes text, what each piece holds, and what may run."""

import base64
import hashlib
import inspect
import json
import re
import sys

import pytest

from flatmin.report import html as page
from flatmin.report.html import Cell, Column, Figure, Markup
from flatmin.report.studies.page import render
from tests.browser import CHROMIUM, browser
from tests.pages import Outline
from tests.study.made import made_table

HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "' onmouseover='alert(3)",
    "</title></style></script>", "]]><!--", "{{ 7 * 7 }}{% raw %}", "a & b &lt;", "line\u2028break",
)  # fmt: skip


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


PLOTLY = page._plotly_js


@pytest.fixture(autouse=True)
def small_plotly(monkeypatch):
    """plotly.js is 5 MB; its text does not matter to most tests."""
    monkeypatch.setattr(page, "_plotly_js", lambda: "/* plotly.js */")


@pytest.fixture
def study_page(tmp_path):
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


def pieces(text):
    """Every piece with the text in every place that takes one, by name."""
    column = Column(text, hint=text)
    words = Column(text, text=True)
    return {
        "heading": page.heading(text, text),
        "paragraph": page.paragraph(text, "lead"),
        "verdicts": page.verdicts([text, f"{text}. And more {text}"]),
        "notes": page.notes([text, f"Short. {'long ' * 40}{text}"], title=text),
        "code": page.code(text),
        "facts": page.facts({text: text}),
        "folded": page.folded(text, page.paragraph(text)),
        "table": page.table([words, column, words], [[Cell(text, flag=text), Cell(text, minor=text), Cell(text)]]),
        "legend": page.legend({text: (text, "tone-1")}, {text: text}, at=text),
        "figure": page.figure(Figure([{"name": text, text: text}], {"title": {"text": text}}), text),
        "panels": page.panels({text: Figure([{"name": text}]), "other": Figure([])}),
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text):
    """A page with it has the tags of a page with a harmless word, and hands it over letter by letter."""
    plain = "w" * len(text)
    hostile, harmless = (Outline(page.page(word, list(pieces(word).values()))) for word in (text, plain))
    assert hostile.tags == harmless.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in harmless.attributes]
    assert [kind for kind, _ in hostile.scripts] == [kind for kind, _ in harmless.scripts]
    assert "".join(hostile.text) == "".join(part.replace(plain, text) for part in harmless.text)
    values = {name: value for name, value in hostile.attributes if value and text in value}
    assert set(values) == {"value", "title", "aria-label", "data-label"}
    assert hostile.specs[0]["data"][0] == {"name": text, text: text}


def test_every_piece_is_among_them():
    made = {
        name
        for name, one in vars(page).items()
        if inspect.isfunction(one) and one.__module__ == page.__name__ and not name.startswith("_")
        and inspect.signature(one).return_annotation == "Markup"
    }  # fmt: skip
    assert made == set(pieces("x"))


@pytest.mark.parametrize("name", ["x); background: url(//evil", "x y", "", "X"])
def test_names_of_the_style_sheet_are_checked(name):
    with pytest.raises(ValueError, match="not a name of the style sheet"):
        page.legend({"sam": ("sam", name)})
    if name:
        with pytest.raises(ValueError, match="not a name of the style sheet"):
            page.table([Column("a"), Column("b")], [[Cell("x", tone=name), Cell("1")]])


def test_only_the_scripts_of_the_page_may_run(monkeypatch):
    monkeypatch.setattr(page, "_plotly_js", lambda: "let a = 'é';\r\n")
    text = page.page("t", [page.figure(Figure([]), "f")])
    outline = Outline(text)
    (policy,) = [value for name, value in outline.attributes if name == "content" and value.startswith("default-src")]
    ran = [data for kind, data in outline.scripts if kind == "code"][1:]  # the first is the style
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in ran]
    assert len(ran) == 2 and "\r" not in text
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["script-src"].split() == [f"'sha256-{one}'" for one in digests]


def test_notes_show_their_first_sentence():
    long = "Trained as in Foret et al. (2021), Fig. 3. " + "The rest is long. " * 10
    text = page.notes(["Short. And whole.", long]).text
    assert "<li>Short. And whole.</li>" in text and "<h3>" not in text
    assert "<summary>Trained as in Foret et al. (2021), Fig. 3.</summary> <span>The rest is long." in text
    assert "<h3>Notes</h3>" in page.notes(["a", "b", "c", "d"]).text and "<h3>" not in page.notes("abcd", "").text
    assert page.notes([]) == page.verdicts([]) == page.facts({}) == Markup("")
    assert "<strong>Flatter.</strong> <span>By all.</span>" in page.verdicts(["Flatter. By all."]).text


def test_tables():
    columns = [Column("a"), Column("b", "what b is"), Column("c", text=True), Column("d", prose=True)]
    rows = [
        [Cell("x"), Cell("9", sort=9.0), Cell("short"), Cell("s")],
        [Cell("y"), Cell("–"), Cell("w " * 20), Cell("s")],
    ]
    text = page.table(columns, rows).text
    assert 'data-sort="9.0"' in text and 'data-sort=""' in text and 'title="what b is"' in text
    assert text.count('<td class="text prose"') == 4, "long text and what is said to be prose wrap"
    assert 'class="table stack pairs"' in text, "a number beside its name, and prose below"
    wide = page.table([Column(str(i)) for i in range(5)], [[Cell("1")] * 5] * 31).text
    assert 'class="table tall"' in wide and "data-label" not in wide
    with pytest.raises(ValueError, match="1 cells, but the table has 2 columns"):
        page.table(columns[:2], [[Cell("x")]])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser(tmp_path):
    """No table runs out of a phone unannounced, few columns stand below each other, and everything opens for paper."""
    wide = page.table([Column("row"), *[Column(f"column {i}") for i in range(12)]], [[Cell("a")] * 13])
    few = page.table([Column("key", text=True), Column("value"), Column("what", prose=True)], [[Cell("a" * 40)] * 3])
    long = page.notes([f"Short. Then {'long ' * 40}"])
    text = page.page("w" * 90, [wide, few, long], [page.facts({"k" * 60: "v" * 200})])
    with browser(tmp_path) as tab:
        for width, phone in ((1300, False), (390, True)):
            tab.open(page.write(text, tmp_path / "page.html"), width=width, phone=phone)
            assert tab.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            look = "(() => { const b = document.querySelectorAll('.table')[%d]; return [%s]; })()"
            assert tab.run(look % (0, "b.matches('.more'), b.querySelector('.hint').hidden")) == [phone, not phone]
            display = "getComputedStyle(b.querySelector('tbody tr')).display === 'grid', b.matches('.more')"
            assert tab.run(look % (1, display)) == [phone, False]
        tab.run("document.querySelector('.scroll').scrollLeft = 9999")
        tab.settle()
        assert tab.run(look % (0, "b.matches('.more'), b.matches('.moved')")) == [False, True]
        place = "b.querySelector('tbody th').getBoundingClientRect().left - b.getBoundingClientRect().left < 3"
        assert tab.run(look % (0, place)) == [True], "the first column stays"
        for event, opened in (("beforeprint", True), ("afterprint", False)):
            tab.run(f"window.dispatchEvent(new Event('{event}'))")
            assert tab.run("document.querySelector('details').open") is opened
        assert tab.problems == []


def test_figures_are_not_folded_away():
    with pytest.raises(ValueError, match="figure cannot be folded"):
        page.folded("more", page.figure(Figure([]), "f"))


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else sys)
    with pytest.raises(ModuleNotFoundError, match=r"need jinja2, which .* pip install '\.\[report\]'"):
        page.require_figures()


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
    monkeypatch.setattr(page, "_plotly_js", PLOTLY)
    figure = page.figure(Figure([], {"xaxis": {"title": {"text": "t"}}}), "a figure")
    assert page.page("t", [figure, figure]).count("plotly.js v") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "<h2>" in page.page("t", [page.heading("h")])
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[report\]'"):
        page.page("t", [figure])
