"""Reports side by side: numbers that can be checked by hand, and pages and pictures on which none is lost."""

import csv
import dataclasses
import html
import io
import itertools
import json
import math
import re
import sys
from importlib.util import find_spec

import pytest
import torch

from flatmin.measure.problem import Conventions, Problem
from flatmin.measure.report import Quantity, Report, ReportSection, ReportSettings, report
from flatmin.report import html as page
from flatmin.report.figures.static import require
from flatmin.report.measurements import picture as draw_report
from flatmin.report.measurements.figures import figures, save_figures
from flatmin.report.measurements.page import render
from flatmin.study.measured import (
    NetReport,
    as_csv,
    as_json,
    compare_reports,
    conclusions,
    groups_of,
    sentence,
    stat_text,
    unlike,
    with_error,
)
from tests.measure.nets import batches, make
from tests.pages import HOSTILE, Outline

with_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib is not installed (extra 'plot')"
)
WHERE = Conventions(loss="cross_entropy", split="train", examples=50, terms=50.0, batch=50, size=7, dtype="float32")
SMALL = ReportSettings(points=5, plane=3, steps=5, runs=1, ascent_steps=3, draws=2, probes=20, rhos=(0.05, 0.1), m=5)
ENVIRONMENT = {"versions": {"torch": "2.13.0", "absent": None}, "threads": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def small_plotly(monkeypatch):
    """plotly.js is 5 MB; its text does not matter here."""
    monkeypatch.setattr(page, "_plotly_js", lambda: "/* plotly.js */")


def quantity(name="lambda_1", value=1.0, flat="low", conventions=WHERE, **rest):
    return Quantity(name=name, text=f"what {name} is", value=value, flat=flat, conventions=conventions, **rest)


def made(group, seed, *quantities, where=WHERE, missing=None):
    """A net with these numbers."""
    part = ReportSection(name="hessian", title="Curvature", quantities=quantities, missing=missing or {})
    found = Report(sections=(part,), settings=ReportSettings(), conventions=where)
    return NetReport(name=f"{group}-s{seed}", group=group, seed=seed, report=found)


def nets(values, **rest):
    """{group: {seed: value}} of one quantity."""
    return [made(g, seed, quantity(value=v, **rest)) for g, seeds in values.items() for seed, v in seeds.items()]


def measured(name, group, seed):
    """A real net, not trained."""
    model, x, y, _ = make("mlp")
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64)
    problem = Problem(model, torch.nn.functional.cross_entropy, batches(x, y, 7), split="train")
    return NetReport(name=name, group=group, seed=seed, report=report(problem, "all", settings=SMALL))


@pytest.fixture(scope="module")
def real():
    return [measured(f"{group}-s{seed}", group, seed) for group in ("sam", "sgd") for seed in (0, 1)]


class TestCompare:
    def test_numbers_by_hand(self):
        (row,) = compare_reports(nets({"sgd": {0: 1.0, 1: 2.0, 2: 3.0}, "sam": {1: 1.5, 2: 2.0, 5: 9.0}}))
        assert (row.groups["sgd"].mean, row.groups["sgd"].n) == (2.0, 3)
        assert row.groups["sgd"].half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of 2 degrees of freedom
        assert row.groups["sam"].mean == pytest.approx(12.5 / 3)
        difference = row.difference["sam"]
        assert difference.values == (-0.5, -1.0), "over the seeds that both have"
        assert difference.mean == -0.75 and difference.half == pytest.approx(12.706205 * 0.25, rel=1e-6)
        assert set(row.difference) == {"sam"} and row.quantity.name == "lambda_1"

    @pytest.mark.parametrize(
        ("flat", "sam", "verdict"),
        [
            ("low", (1.0, 2.1), "flatter"),
            ("low", (5.0, 6.1), "sharper"),
            ("high", (1.0, 2.1), "sharper"),
            ("high", (5.0, 6.1), "flatter"),
            ("low", (2.0, 5.0), "not significant"),
            ("high", (3.0, 4.0), "not significant"),
            ("low", (1.0,), "not tested"),
            ("low", (math.nan, 2.0), "not significant"),
            ("", (1.0, 2.1), ""),
        ],
    )
    def test_verdicts(self, flat, sam, verdict):
        """The base has 3 and 4; two differences of nearly one size are told from zero, two of unlike size are not."""
        (row,) = compare_reports(nets({"sgd": {0: 3.0, 1: 4.0}, "sam": dict(enumerate(sam))}, flat=flat))
        assert row.verdict("sam") == verdict
        assert row.verdict("sgd") == "" and row.verdict("unknown") == ""

    def test_the_base_comes_first(self):
        found = nets({"sam": {0: 1.0}, "asam": {0: 2.0}, "sgd": {0: 4.0}})
        assert list(groups_of(found)) == ["sgd", "sam", "asam"]
        (row,) = compare_reports(found)
        assert {g: stat.mean for g, stat in row.difference.items()} == {"sam": -3.0, "asam": -2.0}
        assert list(groups_of(nets({"b": {0: 1.0}, "a": {0: 2.0}}))) == ["b", "a"], "or else the first"

    def test_groups_without_a_seed_in_common_have_no_difference(self):
        (row,) = compare_reports(nets({"sgd": {0: 1.0}, "sam": {1: 2.0}}))
        assert row.difference == {} and row.verdict("sam") == "" and row.groups["sam"].mean == 2.0

    def test_what_some_nets_lack_is_compared_over_the_others(self):
        both, one = quantity(), quantity("trace", 2.0)
        rows = compare_reports(
            [made("sgd", 0, both, one), made("sam", 0, quantity("frobenius"), both), made("sam", 1, one)]
        )
        found = {row.quantity.name: row for row in rows}
        assert list(found) == ["lambda_1", "trace", "frobenius"]
        assert {name: row.notes for name, row in found.items()} == {
            "lambda_1": ("from 2 of 3 networks",),
            "trace": ("from 2 of 3 networks",),
            "frobenius": ("from 1 of 3 networks",),
        }
        assert found["lambda_1"].difference["sam"].values == (0.0,) and found["lambda_1"].groups["sam"].n == 1
        assert set(found["frobenius"].groups) == {"sam"} and found["frobenius"].difference == {}
        assert found["trace"].difference == {}, "no seed in common"

    def test_the_error_is_that_of_the_worst_net(self):
        a, b = quantity(error=0.1), quantity(error=0.3)
        assert compare_reports([made("sgd", 0, a), made("sgd", 1, b)])[0].error == 0.3

    def test_shares_end_at_one_and_are_counted_in_examples(self):
        values = {"sgd": {0: 0.0, 1: 0.25}, "sam": {0: 0.25, 1: 0.5}}
        (row,) = compare_reports(nets(values, name="error_rate"))
        # Equal differences: their spread is taken to be one of the examples.
        assert row.difference["sam"].half == pytest.approx(12.706205 / WHERE.examples / math.sqrt(2), rel=1e-6)
        assert stat_text(row.groups["sgd"]) == "0.125 (0 to 1)" and stat_text(row.groups["sam"]) == "0.375 (0 to 1)"
        (row,) = compare_reports(nets(values))
        assert row.verdict("sam") == "not significant" and stat_text(row.difference["sam"]) == "0.25"

    def test_refusals(self):
        with pytest.raises(ValueError, match="there is no network to compare"):
            compare_reports([])
        with pytest.raises(ValueError, match="'sam' has two networks with seed 3"):
            compare_reports([made("sam", seed, quantity()) for seed in (1, 3, 3)])

    def test_conventions_that_differ_are_told(self):
        alike = [made("sgd", 0, quantity()), made("sam", 0, quantity())]
        assert unlike(alike) == []
        other = dataclasses.replace(WHERE, split="test", examples=30)
        found = unlike([*alike, made("asam", 0, quantity(), where=other)])
        assert found == ["split: train, test", "examples: 50, 30"]

    def test_wrong_labels_that_a_seed_draws_are_no_other_convention(self):
        shares = [dataclasses.replace(WHERE, split=f"train, {n}% of the labels wrong") for n in (20, 21)]
        found = [made("sgd", seed, quantity(), where=where) for seed, where in enumerate(shares)]
        assert unlike(found) == []
        assert "50 examples (train, with the labels that each was trained on), eval mode" in sentence(found)
        assert "50 examples (train, 20% of the labels wrong), eval mode" in sentence(found[:1])

    def test_conclusions(self):
        values = {"sgd": (3.0, 4.0), "sam": (1.0, 2.1), "asam": (2.0, 5.0), "usam": (1.0,)}
        found = [
            made(group, seed, quantity(value=v), quantity("sigma", v, flat="high"), quantity("loss", v, flat=""))
            for group, both in values.items()
            for seed, v in enumerate(both)
        ]
        assert conclusions(found) == [
            "sam is flatter by 1 and sharper by 1 of 2 measures than sgd. Flatter: lambda_1. Sharper: sigma.",
            "asam and sgd do not differ significantly by any of 2 measures.",
            "usam and sgd have one seed in common; a test of their difference needs at least two.",
        ]

    def test_a_line_for_each_net_and_quantity(self):
        where = dataclasses.replace(WHERE, seed=7)
        found = [
            made("sgd", 0, quantity(error=0.5, error_is="residual"), quantity("trace", 2.0, error=math.nan)),
            made("a, b", 3, quantity(value=math.inf, note='not "converged"', conventions=where)),
        ]
        rows = list(csv.DictReader(io.StringIO(as_csv(found))))
        keys = ("net", "group", "seed", "section", "quantity", "value", "error", "error_is", "flat")
        assert [tuple(row[key] for key in keys) for row in rows] == [
            ("sgd-s0", "sgd", "0", "hessian", "lambda_1", "1.0", "0.5", "residual", "low"),
            ("sgd-s0", "sgd", "0", "hessian", "trace", "2.0", "", "rounding", "low"),
            ("a, b-s3", "a, b", "3", "hessian", "lambda_1", "", "0.0", "rounding", "low"),
        ]
        assert [row["note"] for row in rows] == ["", "", 'not "converged"'] and rows[0]["what"] == "what lambda_1 is"
        assert [(row["loss"], row["examples"], row["drawn_by"]) for row in rows[1:]] == [
            ("cross_entropy", "50", ""), ("cross_entropy", "50", "7"),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (23.8123, 0.2194, "23.81 ± 0.22"),
        (23.8123, 0.0, "23.812"),
        (23.8123, math.nan, "23.812"),
        (0.012345, 0.00123, "0.0123 ± 0.0012"),
        (1.28e-4, 1.1e-5, "(1.28 ± 0.11)e-4"),
        (123456.0, 789.0, "(1.2346 ± 0.0079)e5"),
        (99999.0, 12345.0, "99999 ± 12345"),
        (-5.5, 0.1, "-5.50 ± 0.10"),
        (3.5642, 4e-7, "3.5642 ± 4e-07"),
        (0.0, 0.5, "0.00 ± 0.50"),
        (0.0, 0.0, "0"),
        (2.0, 30.0, "2 ± 30"),
        (2e-9, 3e-6, "(0.0 ± 3.0)e-6"),
        (math.nan, 1.0, "nan"),
        (math.inf, 1.0, "inf"),
        (1.0, math.inf, "1"),
    ],
)  # fmt: skip
def test_told(value, error, text):
    assert with_error(value, error) == text


class TestPage:
    def test_one_net(self, real):
        net = real[0]
        outline = Outline(render([net], command=["flatmin", "measure", "a b"], environment=ENVIRONMENT))
        words = [word.strip() for word in outline.text]
        assert f"Measures: {net.name}" in words and sentence([net]) in words
        for q in net.report.quantities.values():
            assert {q.name, with_error(q.value, q.error), q.text} <= set(words)
        for part in net.report.sections:
            assert not part.quantities or part.title in words
            assert all(f"{what} is missing: {why}" in words for what, why in part.missing.items())
        assert "flatmin measure 'a b'" in words and "torch 2.13.0" in words
        assert {"ascent steps", "rhos", "split"} <= set(words)
        # Both ends, the density, the sharpness, two lines and a plane.
        assert len(outline.specs) == 6

    def test_notes_and_reasons_are_shown(self):
        net = made("sgd", 0, quantity(note="not converged"), missing={"adaptive": "all are zero."})
        outline = Outline(render([net], environment={}))
        assert "not converged" in outline.text and "adaptive is missing: all are zero." in outline.text

    def test_several_nets(self, real):
        outline = Outline(render(real, environment=ENVIRONMENT))
        words = "\n".join(outline.text)
        assert "Measures: sgd and sam" in outline.text and "Networks: sgd (2), sam (2)." in words
        assert {"sam - sgd", "measurement error"} <= set(outline.text)
        rows = compare_reports(real)
        assert {row.verdict("sam") for row in rows} >= {"not significant"}
        for row in rows:
            stats = (row.groups["sgd"], row.groups["sam"], row.difference["sam"])
            assert row.quantity.name in words and all(stat_text(s) in outline.text for s in stats)
            assert row.verdict("sam") in {*outline.text, ""}
        assert "sam and sgd do not differ significantly by any of" in words or "measures than sgd" in words
        assert "different settings" not in words
        assert len(outline.specs) == 8, "a plane for each group"
        names = {t.get("name") for spec in outline.specs for t in spec["data"]}
        assert {"sgd", "sam"} <= {str(name).partition(",")[0] for name in names}
        for spec in outline.specs[:4]:
            colors = {t["legendgroup"]: t["marker"]["color"] for t in spec["data"]}
            assert colors == {"sgd": "var:tone-0", "sam": "var:tone-1"}, "as in the report of a study"

    def test_the_ends_of_several_spectra_do_not_hide_each_other(self, real):
        series = dict(figures(real))["Ends of the spectrum"].series
        places = sorted(x for one in series if one.filled for x in one.x)
        assert min(b - a for a, b in itertools.pairwise(places)) > 0.1
        assert {(one.group, one.filled) for one in series} == set(itertools.product(("sgd", "sam"), (True, False)))

    @pytest.mark.parametrize(
        ("sam", "word"), [((1.0, 2.1), "flatter"), ((5.0, 6.1), "sharper"), ((2.0, 5.0), "not significant")]
    )
    def test_verdicts(self, sam, word):
        text = render(nets({"sgd": {0: 3.0, 1: 4.0}, "sam": dict(enumerate(sam))}), environment={})
        assert word in "\n".join(Outline(text).text)

    def test_nets_that_were_not_measured_alike(self):
        other = made("sam", 0, quantity(), where=dataclasses.replace(WHERE, split="test"))
        text = render([made("sgd", 0, quantity()), other], environment={})
        assert "The networks were measured with different settings: split: train, test." in Outline(text).text

    def test_many_groups_and_groups_without_a_difference(self):
        found = [made(f"m{i}", i, quantity()) for i in range(5)]
        assert "Measures: 5 groups" in Outline(render(found, environment={})).text

    @pytest.mark.parametrize("count", [1, 3])
    def test_nothing_is_fetched(self, real, count):
        text = render(real[:count], environment=ENVIRONMENT)
        outline = Outline(text)
        assert not [value for name, value in outline.attributes if name in ("src", "href", "srcset")]
        assert any(name == "content" and value.startswith("default-src 'none'") for name, value in outline.attributes)
        assert "nan" not in outline.text and not re.search(r"NaN|Infinity", "".join(map(json.dumps, outline.specs)))

    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_names_stay_text(self, name):
        hostile = quantity(name, note=name)
        for found in ([made(name, 0, hostile)], [made("sgd", 0, hostile), made(name, 0, hostile)]):
            text = render(found, command=[name], environment={name: name})
            assert "img" not in Outline(text).tags and name in Outline(text).text
            assert name == html.escape(name) or f"<th>{name}" not in text

    def test_no_net(self):
        with pytest.raises(ValueError, match="no net"):
            render([], environment={})

    def test_figures_show_the_first_seed(self, real):
        text = render(list(reversed(real)), environment={})
        (ends,) = (t for t in Outline(text).specs[0]["data"] if t.get("name") == "sgd, largest")
        assert "the network of the first seed of each group" in text
        assert ends["y"] == real[2].report.result("eigenvalues").top.tolist()


def words_of(figure):
    return [text.get_text() for axes in figure.axes for text in [*axes.texts, axes._left_title]]


def titles_of(figure):
    return [title for axes in figure.axes[1:] if (title := axes.get_title("left").partition("  (")[0])]


@with_matplotlib
class TestPicture:
    def test_every_number_and_every_panel(self, real):
        settings = dataclasses.replace(SMALL, m=0)
        model, x, y, loss = make("mlp")
        found = report(Problem(model, loss, (x, y), split="train"), "report", settings=settings)
        net = NetReport(name="the net", group="sgd", seed=0, report=found)
        figure = draw_report.picture(net)
        words = words_of(figure)
        assert "the net" in words and "mean CrossEntropyLoss, 17 examples" in words and "train" in words
        for q in found.quantities.values():
            assert q.name in words and with_error(q.value, q.error) + " *" * bool(q.note) in words
        assert len(found.quantities) <= 26
        assert titles_of(figure) == [
            "Ends of the spectrum", "Spectral density", "Sharpness over the radius",
            "Loss along the first eigenvector", "Loss along a random direction", "Loss on a random plane",
        ]  # fmt: skip
        figure.canvas.draw()

    def test_what_was_not_measured_has_no_panel(self):
        net = made("sgd", 0, quantity(note="not converged"), quantity("b $x$ c", 2.0, error=0.1))
        figure = draw_report.picture(net)
        assert titles_of(figure) == []
        words = words_of(figure)
        assert {"1 *", "2.00 ± 0.10", "* not converged"} <= set(words)
        figure.canvas.draw()

    def test_a_picture_that_cannot_be_drawn_says_why(self, real, monkeypatch):
        def broken(*_, **__):
            raise ZeroDivisionError("no scale")

        monkeypatch.setattr("flatmin.report.measurements.figures.density", broken)
        missing = []
        figure = draw_report.picture(real[0], on_missing=missing.append)
        assert len(missing) == 1 and missing[0].startswith(
            "Spectral density could not be drawn: ZeroDivisionError: no scale"
        )
        assert {"Ends of the spectrum", "Sharpness over the radius"} <= set(titles_of(figure))
        assert missing[0] in words_of(figure)
        figure.canvas.draw()

    def test_more_numbers_than_fit_are_counted(self):
        figure = draw_report.picture(made("sgd", 0, *(quantity(f"q{i}", float(i)) for i in range(40))))
        words = words_of(figure)
        assert "q25" in words and "q26" not in words and any("14 more in the table" in word for word in words)

    @pytest.mark.parametrize("ending", ["png", "svg"])
    def test_it_is_written(self, real, ending, tmp_path):
        path = draw_report.save(real[0], tmp_path / "new" / f"card.{ending}", dpi=40)
        start = path.read_bytes()[:100]
        assert start.startswith(b"\x89PNG") if ending == "png" else b"<?xml" in start
        assert path.stat().st_size > 10_000

    def test_another_ending(self, tmp_path):
        with pytest.raises(ValueError, match=r"must end in \.svg, \.pdf, \.png, got 'a\.jpg'"):
            draw_report.save(made("sgd", 0, quantity()), tmp_path / "a.jpg")
        assert not list(tmp_path.iterdir())

    def test_every_figure_is_a_file_too(self, real, tmp_path):
        written = save_figures(real, tmp_path, (".svg",))
        assert [path.name for path in written] == [
            "ends-of-the-spectrum.svg", "spectral-density.svg", "worst-case-over-the-radius.svg",
            "average-case-over-the-radius.svg", "loss-along-the-first-eigenvector.svg",
            "loss-along-a-random-direction.svg", "loss-on-a-random-plane-sgd.svg", "loss-on-a-random-plane-sam.svg",
        ]  # fmt: skip


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for use in (require, lambda: draw_report.save(made("sgd", 0, quantity()), tmp_path / "a.png")):
        with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[plot\]'"):
            use()


def test_without_plotly_the_extra_is_named(real, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[report\]'"):
        render(real, environment={})


def test_everything_as_json(real):
    found = json.loads(json.dumps(as_json(real, ENVIRONMENT), allow_nan=False))
    assert found["environment"] == ENVIRONMENT
    assert [(n["name"], n["group"], n["seed"]) for n in found["nets"]] == [(n.name, n.group, n.seed) for n in real]
    for net, told_of in zip(real, found["nets"], strict=True):
        assert told_of["conventions"]["examples"] == 17
        assert (
            told_of["sections"]["hessian"]["quantities"]["lambda_1"]["value"] == net.report.quantities["lambda_1"].value
        )


def test_the_sentence_of_a_net():
    assert sentence([made("sgd", 0)]) == (
        "Mean cross_entropy over 50 examples (train), eval mode, weight decay 0, 7 weights, float32."
    )
