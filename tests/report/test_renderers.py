"""Figures: what is described is what is drawn, in pages and in files; labels stay labels."""

import dataclasses
import json
import math
import re
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from flatmin.report import figures as plots
from flatmin.report.figures import Axis, Chart, Radar, Series, interactive, scales, static
from flatmin.report.figures.chart import at as chart_at
from flatmin.report.figures.files import endings
from flatmin.report.style import DASHES, SYMBOLS, light_colours, styles
from tests.browser import CHROMIUM, browser
from tests.report.measured import measured

with_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib is not installed (extra 'plot')"
)
with_plotly = pytest.mark.skipif(find_spec("plotly") is None, reason="plotly is not installed (extra 'report')")
HOSTILE = "_<b>$x$</b> & <img src=x onerror=alert(1)> $y"
NAN = math.nan

KINDS = Chart(
    title="Every kind",
    x=Axis(label="rho", log=True, ticks={0.1: "0.1", 0.2: "0.2", 0.4: "0.4"}),
    y=Axis(label="accuracy, %", range=(40.0, 100.0)),
    series=[
        Series(label="line", x=[0.1, 0.2, 0.4], y=[50.0, NAN, 60.0], dash="dash", tone="tone-0", width=3.0),
        Series(label="band", x=[0.1, 0.4], y=[70.0, 80.0], y_interval=([65.0, 75.0], [75.0, 85.0]), band=True),
        Series(
            label="marks", x=[0.1, 0.4], y=[90.0, 95.0], kind="marks", symbol="diamond", filled=False, tone="bad",
            y_interval=([85.0, NAN], [100.0, NAN]), hover=["one", "two\nlines"],
        ),
        Series(label="both", x=[0.1, 0.2], y=[55.0, 45.0], kind="both", symbol="x", dash="dot", opacity=0.5),
        Series(x=[0.1, 0.4], y=[88.0, 92.0], kind="steps", tone="soft", points=["0"]),
        Series(label="one", x=[0.2], y=[77.0], symbol="star", group="g"),
    ],
    levels={50.0: "chance"},
    note="a note",
    legend=True,
)  # fmt: skip
SEEDS = Chart(
    title="Accuracy per seed",
    x=Axis(label="test accuracy, %"),
    y=Axis(ticks={0.0: "sgd", 1.0: "sam"}, range=(1.5, -0.5), grid=False),
    series=[
        Series(x=[76.0, 77.0], y=[-0.1, -0.1], kind="marks", group="sgd", opacity=0.7, edge="paper"),
        Series(x=[76.5], y=[-0.1], kind="marks", group="sgd", size=12.0, x_interval=([75.0], [78.0])),
        Series(x=[94.0], y=[1.1], kind="marks", group="sam", size=12.0, filled=False, x_interval=([90.0], [100.0])),
    ],
)  # fmt: skip
RADAR = Radar(
    title="Radar",
    spokes=["mlp", "conv", "resnet20"],
    series=[Series(label="sam", x=[0, 1, 2, 0], y=[1.0, 0.15, 0.5, 1.0], kind="both")],
    ring=0.15,
)


@pytest.fixture(scope="module")
def made():
    return measured()


CALLS = {
    "line": lambda d: plots.profile(d["line"]),
    "accuracy": lambda d: plots.profile(d["line"], value="accuracy"),
    "lines": lambda d: plots.profile({"sgd": d["line"], "sam": d["eigen"]}),
    "path": lambda d: plots.profile(d["linear"]),
    "paths": lambda d: plots.profile({"straight": d["straight"], "bent": d["bezier"]}, log=True),
    "density": lambda d: plots.density({"a": d["density"], "b": d["density"]}, width=0.1),
    "eigenvalues": lambda d: plots.eigenvalues({"sgd": d["spectrum"], "sam": d["spectrum"]}),
    "curve": lambda d: plots.curve(
        {"sam": ([0.1, 0.2], [1.0, 3.0], [0.1, 0.2]), "sgd": ([0.1, 0.2], [2.0, 2.0])},
        xlabel="rho", ylabel="rise of the loss", log_x=True,
    ),
    "kinds": lambda d: dataclasses.replace(KINDS, levels={}),
    "seeds": lambda d: SEEDS,
}  # fmt: skip
FIELDS = {
    "contour": lambda d: plots.contour(d["plane"]),
    "error": lambda d: plots.contour(d["plane"], value="error", levels=8),
    "walk": lambda d: plots.contour(d["walk"]),
    "surface": lambda d: plots.surface(d["plane"], log=True),
    "surface, linear": lambda d: plots.surface(d["walk"], log=False),
    "radar": lambda d: RADAR,
}


def words(text):
    return re.sub("(?<=-) ", "", re.sub("<br>|\n|\u00a0", " ", text))


def lines_of(axes):
    """The lines and marks, without the caps of error bars."""
    return [line for line in axes.lines if line.get_marker() not in ("_", "|", 2, 3, 0, 1)]


def traces_of(chart):
    return [trace for trace in interactive.figure(chart).data if "fill" not in trace]


@with_matplotlib
@pytest.mark.parametrize("call", CALLS)
def test_both_renderers_draw_what_is_described(call, made):
    from matplotlib.colors import to_hex

    chart = CALLS[call](made)
    figure = static.figure(chart)
    axes, layout = figure.axes[0], interactive.figure(chart).layout
    for way, axis in (("x", chart.x), ("y", chart.y)):
        page = layout[f"{way}axis"]
        assert words(getattr(axes, f"get_{way}label")()) == axis.label
        assert words(page["title"]["text"]) == axis.label
        assert (getattr(axes, f"get_{way}scale")() == "log") == (page.get("type") == "log") == axis.log
        if None not in axis.range:
            assert getattr(axes, f"get_{way}lim")() == pytest.approx(axis.range)
            assert page["range"] == pytest.approx([math.log10(end) if axis.log else end for end in axis.range])
    lines, traces = lines_of(axes), traces_of(chart)
    assert len(lines) == len(traces) == len(chart.series)
    for one, line, trace in zip(chart.series, lines, traces, strict=True):
        np.testing.assert_array_equal(np.array([line.get_xdata(), line.get_ydata()], float), np.array([one.x, one.y]))
        np.testing.assert_array_equal(np.array([trace["x"], trace["y"]], float), np.array([one.x, one.y]))
        assert trace["marker"]["color"] == f"var:{one.tone}" and to_hex(line.get_color()) == light_colours()[one.tone]
        assert ("markers" in trace["mode"]) == (line.get_marker() != "none") == one.marked
        assert ("lines" in trace["mode"]) == (line.get_linestyle() != "None") == one.lined
        assert trace["marker"]["symbol"].endswith("-open") == (not one.filled)
        assert (to_hex(line.get_markerfacecolor()) == "#ffffff") == (not one.filled)
    labels = [one.label for one in chart.series if one.label]
    shown = [words(text.get_text()) for legend in figure.legends for text in legend.get_texts()]
    assert shown == labels
    if chart.legend:
        assert [trace["name"] for trace in traces if trace["showlegend"]] == labels and layout["showlegend"]


@with_matplotlib
def test_intervals_and_what_lies_beside_the_data():
    figure = static.figure(KINDS)
    axes, (page,) = figure.axes[0], [t for t in traces_of(KINDS) if t["name"] == "marks"]
    assert page["error_y"]["array"] == [10.0, 0.0] and page["error_y"]["arrayminus"] == [5.0, 0.0]
    segments = [s.tolist() for c in axes.collections if hasattr(c, "get_segments") for s in c.get_segments()]
    assert segments == [[[0.1, 85.0], [0.1, 100.0]], [[0.4, 95.0], [0.4, 95.0]]]
    (shade,) = [t for t in interactive.figure(KINDS).data if "fill" in t]
    assert shade["x"] == [0.1, 0.4, 0.4, 0.1] and shade["y"] == [75.0, 85.0, 75.0, 65.0]
    (band,) = [c for c in axes.collections if not hasattr(c, "get_segments")]
    assert {tuple(v) for v in band.get_paths()[0].vertices.tolist()} >= {(0.1, 65.0), (0.4, 85.0)}
    (across,) = [t for t in traces_of(SEEDS) if t["x"] == [76.5]]
    assert across["error_x"]["array"] == [1.5] and across["error_x"]["arrayminus"] == [1.5]
    layout = interactive.figure(KINDS).layout
    assert [(s["y0"], s["y1"]) for s in layout["shapes"]] == [(50.0, 50.0)] and layout["title"]["text"] == "a note"
    assert layout["annotations"][0]["text"] == "chance" == axes.texts[0].get_text()
    assert axes.get_title("left") == "a note" and not axes.get_title() and not figure.get_suptitle()


def test_a_band_has_gaps_and_points_are_passed_on():
    chart = dataclasses.replace(KINDS, series=[Series(
        x=[1, 2, 3], y=[1.0] * 3, y_interval=([0.0, NAN, 0.0], [2.0, NAN, 2.0]), band=True, points=["1"], group="g",
    )])  # fmt: skip
    shade, line = interactive.figure(chart).data
    assert shade["x"] == [1, 1, None, 3, 3] and shade["points"] == line["points"] == ["1"]
    assert shade["legendgroup"] == line["legendgroup"] == "g"
    assert [len(chart_at(KINDS, point).series) for point in "01"] == [6, 5]


@with_matplotlib
def test_symbols_and_dashes_differ_in_both():
    for kind, field, known in (("marks", "symbol", SYMBOLS), ("line", "dash", DASHES)):
        series = [Series(x=[0, 1], y=[i, i], kind=kind, **{field: name}) for i, name in enumerate(known)]
        lines = lines_of(static.figure(dataclasses.replace(KINDS, series=series, levels={})).axes[0])
        drawn = {line.get_marker() if kind == "marks" else str(line._dash_pattern) for line in lines}
        assert len(drawn) == len(known)


def test_one_rule_for_colours():
    made = styles(["sam", "sgd", *map(str, range(20))])
    assert made["sgd"].tone == "tone-0" and made["sam"].tone == "tone-1" and made["0"].tone == "tone-2"
    assert "tone-0" not in {style.tone for name, style in made.items() if name != "sgd"}
    assert styles(["a", "b"], base="b")["b"].tone == "tone-0"
    assert {f"tone-{i}" for i in range(10)} | {"ink", "soft", "paper", "bad"} <= set(light_colours())


def test_lengths_that_differ_are_refused():
    for bad in ({"y": [1.0]}, {"y_interval": ([1.0], [1.0, 2.0])}, {"hover": ["one"]}):
        with pytest.raises(ValueError, match="'a' must have the same length, got"):
            Series(**({"label": "a", "x": [1.0, 2.0], "y": [1.0, 2.0]} | bad))


def hostile():
    axis = Axis(label=HOSTILE, ticks={0.0: HOSTILE, 1.0: "1"})
    series = [
        Series(label=HOSTILE, x=[0.0, 1.0], y=[1.0, 2.0], hover=[HOSTILE, "x"], lost=[0.5]),
        Series(label="b", x=[1], y=[1]),
    ]
    chart = Chart(title=HOSTILE, x=axis, y=axis, series=series, levels={1.0: HOSTILE}, note=HOSTILE, legend=True)
    return [
        chart,
        dataclasses.replace(
            RADAR, spokes=[HOSTILE] * 3, note=HOSTILE, series=[dataclasses.replace(series[0], lost=[])]
        ),
    ]


def test_hostile_labels_stay_text_in_pages():
    for shown in hostile():
        figure = interactive.figure(shown)
        text = json.dumps([figure.data, figure.layout], ensure_ascii=False)
        assert "&lt;b&gt;" in text and not {"<b>", "<img", "$"} & {w for w in ("<b>", "<img", "$") if w in text}


@with_matplotlib
def test_hostile_labels_stay_text_in_files(tmp_path):
    for shown in hostile():
        figure = static.figure(shown)
        figure.canvas.draw()
        found = [
            text for text in figure.findobj(lambda one: hasattr(one, "_preprocess_math")) if "img" in text.get_text()
        ]
        read = {words(text._preprocess_math(text.get_text())[0]) for text in found}
        assert len(found) >= 3 and not any(text._preprocess_math(text.get_text())[1] for text in found)
        assert read == {HOSTILE}, "the legend's too, although it begins with _"
        written = plots.save(shown, tmp_path / "a.svg").read_text(encoding="utf-8")
        assert "<img" not in written and "<script" not in written


@with_matplotlib
class TestFiles:
    def test_the_same_figure_gives_the_same_file_whatever_the_settings(self, made, tmp_path):
        import matplotlib

        for call, ending in (("kinds", "png"), ("kinds", "pdf"), ("contour", "svg")):
            chart = {**CALLS, **FIELDS}[call](made)
            first = plots.save(chart, tmp_path / f"a.{ending}").read_bytes()
            with matplotlib.rc_context({"font.size": 20.0, "axes.grid": True, "text.color": "red"}):
                before = dict(matplotlib.rcParams)
                assert plots.save(chart, tmp_path / f"b.{ending}").read_bytes() == first
                assert dict(matplotlib.rcParams) == before

    def test_text_stays_text_and_fits_a_column(self, tmp_path):
        svg = plots.save(KINDS, tmp_path / "new" / "a.svg").read_text(encoding="utf-8")
        assert ">accuracy, %</text>" in svg and f'width="{3.3 * 72:g}pt"' in svg
        assert 'width="460.8pt"' in plots.save(KINDS, tmp_path / "a.svg", width=6.4).read_text(encoding="utf-8")
        sizes = {float(size) for size in re.findall(r"font-size: ([0-9.]+)px", svg)}
        assert sizes and min(sizes) >= 7
        assert b"/FontFile2" in plots.save(KINDS, tmp_path / "a.pdf").read_bytes()

    def test_one_file_a_figure(self, tmp_path):
        shown = [dataclasses.replace(KINDS, title=title) for title in ("|r| > 1", "r > 1", "A / b", "a-b", "日本")]
        names = [path.name for path in plots.save_all(shown, tmp_path / "new", ".svg")]
        assert names == ["bar-r-bar-gt-1.svg", "r-gt-1.svg", "a-b.svg", "a-b-2.svg", "figure.svg"]

    def test_endings(self, made, tmp_path):
        assert endings("svg, PDF,.png,svg") == (".svg", ".pdf", ".png")
        for bad in ("", ",", "jpg", "svg,html"):
            with pytest.raises(ValueError, match="the formats of figures must be one or more of svg, pdf, png"):
                endings(bad)
        with pytest.raises(ValueError, match=r"must end in \.svg, \.pdf, \.png, got 'a\.jpg'"):
            plots.save(KINDS, tmp_path / "a.jpg")

    def test_without_matplotlib_the_extra_is_named(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        for call in (
            lambda: endings("svg"),
            lambda: plots.save(KINDS, tmp_path / "a.svg"),
            lambda: plots.as_matplotlib(KINDS),
        ):
            with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[plot\]'"):
                call()

    @pytest.mark.parametrize("call", FIELDS)
    def test_fields_have_words_and_can_be_drawn(self, call, made):
        shown = FIELDS[call](made)
        figure = plots.as_matplotlib(shown)
        figure.canvas.draw()
        if shown is not RADAR:
            axes = figure.axes[0]
            found = [axes.get_xlabel(), axes.get_ylabel()]
            found.append(axes.get_zlabel() if shown.view else figure.axes[1].get_ylabel())
            assert list(map(words, found)) == [shown.x.label, shown.y.label, shown.z_axis.label]


def titled(calls, made):
    return [dataclasses.replace(call(made), title=f"figure <{name}>") for name, call in calls.items()]


@with_plotly
def test_all_of_them_on_one_page(made, tmp_path):
    shown = titled({**CALLS, **FIELDS}, made)
    path = plots.save_page(shown, tmp_path / "new" / "page.html", title="A & B")
    text = path.read_text()
    assert "<title>A &amp; B</title>" in text and "figure &lt;contour&gt;" in text
    specs = [json.loads(s) for s in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    assert len(specs) == len(shown)
    assert {t["type"] for spec in specs for t in spec["data"]} == {"scatter", "contour", "surface", "scatterpolar"}
    import plotly.graph_objects as go

    def colored(value):  # the page's own colours become real ones in the browser
        if isinstance(value, dict):
            return {k: colored(v) for k, v in value.items() if k != "points"}
        if isinstance(value, list):
            return [colored(v) for v in value]
        return "#000000" if isinstance(value, str) and value.startswith("var:") else value

    for spec in specs:
        go.Figure(data=colored(spec["data"]), layout=colored(spec["layout"]))  # plotly's own check of every key
    assert "<title>Every kind</title>" in plots.save(KINDS, tmp_path / "one.html").read_text()
    with pytest.raises(ValueError, match="no figure to write"):
        plots.save_page([], tmp_path / "a.html", title="t")


@with_plotly
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize(
    ("names", "widths"),
    [
        (["paths", "kinds", "seeds", "contour", "radar"], [390]),
        # A processor takes seconds to draw the surfaces.
        pytest.param([*CALLS, *FIELDS], [1280, 390], marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_a_browser_draws_them(made, tmp_path, names, widths):
    shown = titled({name: {**CALLS, **FIELDS}[name] for name in names}, made)
    path = plots.save_page(shown, tmp_path / "page.html", title="A & B")
    with browser(tmp_path / "profile") as tab:
        for width in widths:
            phone = width < 500
            tab.open(path, width=width, dark=phone, phone=phone)
            assert tab.run("document.querySelectorAll('.plot .main-svg').length") >= len(shown)
            assert tab.run("document.documentElement.scrollWidth") == width
            # A machine without a graphics card says so.
            assert not [problem for problem in tab.problems if "WebGL" not in problem and "Canvas2D" not in problem]


class TestScales:
    @pytest.mark.parametrize(
        ("low", "high", "log", "want"),
        [
            (0.001, 20.0, True, [0.001, 0.01, 0.1, 1.0, 10.0]),
            (1.0, 7.0, True, [1.0, 2.0, 5.0]),
            (1.1, 1.3, True, [1.1, 1.15, 1.2, 1.25, 1.3]),
            (30.2, 100.0, False, [40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0]),
            (-0.13, 0.12, False, [-0.1, -0.05, 0.0, 0.05, 0.1]),
        ],
    )
    def test_ticks(self, low, high, log, want):
        assert scales.ticks(low, high, log) == pytest.approx(want)

    def test_numbers_on_logarithmic_axes_are_whole(self):
        """Less than a decade has plain numbers; nothing has a digit beside a power of ten."""
        for values, want in (([0.21, 1.0], ["0.2", "0.5", "1"]), ([2e-3, 0.3], ["0.01", "0.1"])):
            chart = dataclasses.replace(KINDS, x=Axis(log=True), y=Axis(log=True), series=[Series(x=values, y=values)])
            for axis in ("xaxis", "yaxis"):
                layout = interactive.figure(chart).layout[axis]
                assert set(want) <= set(layout["ticktext"]), layout
                assert all(
                    scales.number(v) in (t, "") or not t
                    for v, t in zip(layout["tickvals"], layout["ticktext"], strict=True)
                )

    def test_ticks_that_would_collide_have_no_text(self):
        radii = [0.01, 0.1, 0.2, 0.3, 0.4, 0.5]
        shown = scales.readable({r: f"{r:g}" for r in radii}, 0.01, 0.5, log=True)
        assert list(shown) == radii and shown[0.4] == "0.4" and shown[0.5] == ""

    @pytest.mark.parametrize("label", ["", "short", "a-b " * 30, "x" * 200, "λ = 3 " * 20, "lambda_1/lambda_5 " * 5])
    def test_labels_are_broken_between_words(self, label):
        found = scales.broken(label, 40)
        assert re.sub(r"\s", "", found) == re.sub(r"\s", "", label)
        assert all(len(line) <= 40 for line in found.split("\n")) or "x" * 200 in found
        assert {"lambda_1/", "lambda_5"} <= set(re.split(r"\s|(?<=/)", found)) or "lambda" not in label

    def test_names_are_cut_where_they_must(self):
        assert scales.broken("SAMDIRECTION", 8) == "SAMDIRECTION"
        assert len(scales.broken("x" * 300, 16, 2)) == 32
