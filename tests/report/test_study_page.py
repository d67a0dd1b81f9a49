"""The page of a study, from made-up results: every figure's numbers, what is left out, and hostile names."""

import csv
import io
import itertools
import json
import math
from functools import partial

import pytest
import torch

from flatmin.methods.losses import bisam_log, bisam_tanh
from flatmin.report import html as page
from flatmin.report.studies import curves as study_curves
from flatmin.report.studies import figures as study_figures
from flatmin.report.studies import recorded as study_recorded
from flatmin.report.studies.files import save_figures
from flatmin.report.studies.page import render, sentence, sort_key
from flatmin.report.studies.phi import phi
from flatmin.report.studies.style import StudyStyle
from flatmin.stats import summarise
from flatmin.study import tables
from flatmin.study.executors import RunOutcome
from flatmin.study.plan import plan
from flatmin.study.reading import read_study
from flatmin.study.tabulate import tabulate
from flatmin.train.result import Epoch, Result
from tests.browser import CHROMIUM, browser
from tests.pages import Outline

STUDY = """
title = "Made up"
source = "a paper"
train = "smoke"
seeds = [0, 1, 2]
baseline = "SGD"
[axes]
rho = [0.1, 0.2]
model = ["mlp", "conv"]
[record]
log_every = 1
diagnostics = true
[measure]
what = "hessian,density,landscape,published"
[[arms]]
label = "SGD"
method = "sgd"
[[arms]]
label = "SAM"
method = "sam"
[[arms]]
label = "BiSAM (tanh)"
method = "bisam-tanh"
mu = 5
[[arms]]
label = "BiSAM (-log)"
method = "bisam-log"
"""
SMALL = """
title = "Small"
train = "smoke"
seeds = [0, 1, 2]
[record]
log_every = 1
diagnostics = true
[[arms]]
label = "SGD"
method = "sgd"
[[arms]]
label = "SAM"
method = "sam"
"""
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "$x$ a & b </script>", "'q' " + "w" * 300]
UPDATES = 2 * 15  # epochs times updates of the preset


@pytest.fixture
def small_plotly(monkeypatch):
    monkeypatch.setattr(page, "_plotly_js", lambda: "/* plotly.js */")


def score(label, seed):
    """An accuracy that every row and seed has for itself."""
    return 80.0 + sum(map(ord, label)) % 15 + 0.5 * seed


def a_result(config, gradients=2.0, **changes):
    test = changes.pop("test", 50.0)
    point = {"epoch": 1, "val_acc": test + 1, "test_acc": test, "memorised": None}
    values = dict(
        method=config.method, rho=config.rho, gradient_evaluations=gradients, seed=config.seed, epochs=config.epochs,
        noise=0.0, trained=True, last=point, best=point, chosen=point, train_ce=0.5, lambda_max=None, seconds=1.0,
    )  # fmt: skip
    return Result(**(values | changes))


def epochs(test, count=2):
    return tuple(
        Epoch(
            epoch=e, lr=0.1, rho=None, train_loss=2.0 / e + test / 100, val_acc=test - 10 / e, val_loss=1.0,
            test_acc=None, memorised=None, seconds=1.0,
        )
        for e in range(1, count + 1)
    )  # fmt: skip


def steps(seed, wrong=10):
    """Two lines an epoch, of 15 updates each."""
    ratios = {"ratio_larger": 0.5 + seed / 100, "ratio_above_1": 0.4, "ratio_0_to_1": 0.3}
    return [
        {"step": 10 * i, "epoch": 1 + i // 2, "misclassified": wrong + i + seed, "flipped": i, **ratios}
        for i in range(4)
    ]


def report(seed, size=100):
    axis = {"direction": {"label": "v"}, "points": [-1.0, 0.0, 1.0]}
    return {
        "conventions": {"size": size},
        "sections": {
            "hessian": {"quantities": {"lambda_1": {"value": 10.0 + seed}}, "results": {}},
            "density": {
                "quantities": {},
                "results": {
                    "density": {
                        "nodes": [-1.0, 0.0, 10.0 + seed],
                        "weights": [0.1, 0.8, 0.1],
                        "conventions": {"size": size},
                    }
                },
            },
            "landscape": {
                "quantities": {},
                "results": {
                    "along_v1": {"loss": [3.0 + seed, 1.0, None], "axes": [axis]},
                    "along_random": {"loss": [2.0, 1.0, 2.0], "axes": [axis]},
                    "plane": {"loss": [[1.0]], "axes": [axis, axis]},
                },
            },
            "published": {"quantities": {"sam_paper: lambda_1": {"value": 9.0 + seed}}, "results": {}},
        },
    }


def everything(label, seed):
    return {
        "result": {"test": score(label, seed), "lambda_max": {"value": 5.0 + seed}},
        "gradients": 1.0 if label.startswith("SGD") else 2.0,
        "lines": epochs(score(label, seed)),
        "steps": [] if label.startswith("SGD") else steps(seed),
        "report": report(seed),
    }


def table_of(folder, of=everything, words=(), text=STUDY):
    """The table of a study whose runs have what `of(row, seed)` gives: an error, nothing, or parts of a run."""
    path = folder / "made.toml"
    path.write_text(text, encoding="utf-8")
    todo = plan(read_study(str(path), words), folder / "out")
    outcomes = {}
    for (i, seed), run in todo.runs.items():
        found = of(todo.grid_points[i].label, seed)
        if isinstance(found, str):
            outcomes[run.name] = RunOutcome(error=found)
        elif found is not None:
            own = a_result(run.config, found.get("gradients", 2.0), **found["result"])
            outcomes[run.name] = RunOutcome(result=own, lines=found.get("lines", ()), report=found.get("report"))
            run_folder = todo.store.folder(run)
            run_folder.mkdir(parents=True, exist_ok=True)
            (run_folder / "env.json").write_text(json.dumps({"versions": {"torch": "2.0"}}), encoding="utf-8")
            for kind in ("steps", "measures"):
                if found.get(kind):
                    lines = "".join(json.dumps(step) + "\n" for step in found[kind])
                    (run_folder / f"{kind}.jsonl").write_text(lines, encoding="utf-8")
    return tabulate(todo, outcomes)


@pytest.fixture
def make(tmp_path):
    return partial(table_of, tmp_path)


def named(section):
    """The figures of a section by their titles."""
    assert section is not None
    return {figure.title: figure for figure in section.figures}


def only(section, name=None):
    """The series of a section's figure."""
    found = named(section)
    return found[name or next(iter(found))].series


def line_of(section, name, arm):
    (found,) = [one for one in only(section, name) if one.group == arm]
    return found


class TestTable:
    def test_has_the_cells_of_the_other_tables(self, make, small_plotly):
        table = make()
        outline = Outline(render(table))
        shown = " ".join("".join(outline.text).split())
        for name in tables.header(table):
            assert " ".join(name.split()) in shown
        for row in tables.body(table):
            for cell in row:
                assert cell == tables.ABSENT or all(part in shown for part in cell.replace("±", "").split())
        assert "4 arms, 14 rows, 42 of 42 runs with a result, seeds 0, 1, 2. Source: a paper." in shown

    def test_nothing_is_bold(self, make, small_plotly):
        outline = Outline(render(make()))
        assert not {"b", "strong", "em"} & set(outline.tags)
        assert not any(name == "style" and "bold" in value for name, value in outline.attributes)
        assert "<b>" not in json.dumps(outline.specs)

    def test_sorts_by_number(self, make, small_plotly):
        table = make()
        outline = Outline(render(table))
        sorts = [value for name, value in outline.attributes if name == "data-sort"]
        means = [f"{row.columns['test_acc'].stat.mean:.2f}" for row in table.rows]
        assert {repr(float(mean)) for mean in means} <= set(sorts)

    @pytest.mark.parametrize(
        ("cell", "key"),
        [("95.10 ±0.4", 95.1), ("-1.2 ±3", -1.2), ("1e-16", 1e-16), ("97, 98", 97), ("-", None), ("3x3", None),
         ("", None), ("resnet18", None), ("0.5", 0.5), ("nan", None)],
    )  # fmt: skip
    def test_keys(self, cell, key):
        assert sort_key(cell) == key

    def test_failures_and_remarks_are_said(self, make, small_plotly, monkeypatch):
        table = make(
            lambda label, seed: "out of <memory>" if label.startswith("SAM rho=0.1") else everything(label, seed)
        )
        shown = "".join(Outline(render(table)).text)
        assert "no result: 3 of 3" in shown and "out of <memory>" in shown
        assert all(remark in shown for remark in tables.remarks(table))
        # A figure that fails takes no other away.
        count = len(Outline(render(table)).specs)

        def broken(*_, **__):
            raise ZeroDivisionError("no scale")

        monkeypatch.setattr(study_figures, "over_cost", broken)
        outline = Outline(render(table))
        assert "accuracy over cost could not be drawn: ZeroDivisionError: no scale" in "".join(outline.text)
        assert 0 < len(outline.specs) == count - 1


class TestPoints:
    def test_arms_without_an_axis_belong_to_all_points_that_agree(self, make):
        table = make()
        style = StudyStyle(table)
        assert style.points == [{"rho": r, "model": m} for r in ("0.1", "0.2") for m in ("mlp", "conv")]
        at = {row.label: style.of(row)["points"] for row in table.rows}
        assert at["SGD model=mlp"] == ["0", "2"] and at["SAM rho=0.2 model=conv"] == ["3"]
        choices, first = style.choices()
        assert list(choices) == ["0", "1", "2", "3", ""] and first == "0", "too many rows for one figure"

    def test_few_rows_are_shown_together(self, make):
        style = StudyStyle(make(words=["model=mlp"]))
        assert style.choices()[1] == "" and len(style.choices()[0]) == 3
        assert StudyStyle(make(text=SMALL)).choices() == ({}, "")

    def test_the_baseline_is_grey_and_others_have_their_own(self, make):
        style = StudyStyle(make())
        assert style.tones["SGD"] == "tone-0" and len(set(style.tones.values())) == 4

    def test_chosen_values_are_no_point(self, make):
        style = StudyStyle(make(text=STUDY.replace("[axes]", 'choose = ["rho"]\n[axes]', 1)))
        assert style.points == [{"model": "mlp"}, {"model": "conv"}]

    def test_a_chosen_row_is_counted_once(self, make):
        table = make(text=STUDY.replace("[axes]", 'choose = ["rho"]\n[axes]', 1))
        assert "4 arms, 8 rows, 42 of 42 runs with a result" in sentence(table)
        lines = list(csv.DictReader(io.StringIO(tables.per_seed(table))))
        keys = [(line["arm"], line["model"], line["rho"], line["seed"], line["metric"]) for line in lines]
        assert len(set(keys)) == len(keys)
        chosen = {(line["arm"], line["model"]): line["rho"] for line in lines if line["chosen"] == "true"}
        assert chosen == {(row.arm, row.values["model"]): row.values.get("rho", "") for row in table.rows}


class TestRho:
    def test_a_line_for_each_arm_and_network(self, make):
        table = make()
        rows = {row.label: row for row in table.rows}
        section = study_figures.over_rho(table, StudyStyle(table))
        lines = [one for one in only(section) if one.kind == "both"]
        assert len(lines) == 6 and "test accuracy" in section.caption and len(section.figures) == 1
        line = next(one for one in lines if one.label == "SAM model=mlp")
        stats = [rows[f"SAM rho={rho} model=mlp"].columns["test_acc"].stat for rho in ("0.1", "0.2")]
        assert line.x == pytest.approx([0.1, 0.2], rel=0.04) and line.y == [stat.mean for stat in stats]
        assert ["rho 0.1:" in line.hover[0], "rho 0.2:" in line.hover[1]] == [True, True]
        assert line.y_interval == ([stat.low for stat in stats], [stat.high for stat in stats])
        assert line.points == ["0", "2"]

    def test_plain_training_is_level(self, make):
        table = make()
        level = [one for one in only(study_figures.over_rho(table, StudyStyle(table))) if one.kind == "line"]
        means = [row.columns["test_acc"].stat.mean for row in table.rows if row.arm == "SGD"]
        assert [one.y for one in level] == [[mean, mean] for mean in means] and all(one.band for one in level)

    def test_radii_of_different_geometries_are_apart(self, make):
        table = make(text=STUDY + '[[arms]]\nlabel = "ASAM"\nmethod = "asam"\n', words=["model=mlp"])
        section = study_figures.over_rho(table, StudyStyle(table))
        arms = {name: {one.group for one in chart.series} for name, chart in named(section).items()}
        assert arms == {
            "Accuracy over the radius, L2": {"SGD", "SAM", "BiSAM (tanh)", "BiSAM (-log)"},
            "Accuracy over the radius, Adaptive": {"SGD", "ASAM"},
        }
        assert "Radii in different geometries cannot be compared" in section.caption
        assert [chart.x.label for chart in section.figures] == ["rho (L2)", "rho (Adaptive)"]

    def test_a_chosen_radius_is_shown_by_what_it_was_chosen_by(self, make):
        table = make(text=STUDY.replace("[axes]", 'choose = ["rho"]\n[axes]', 1))
        section = study_figures.over_rho(table, StudyStyle(table))
        line = next(one for one in only(section) if one.group == "SAM")
        assert "validation accuracy" in section.caption and line.x == pytest.approx([0.1, 0.2], rel=0.04)
        assert line.y[0] == pytest.approx(summarise([score("SAM rho=0.1 model=mlp", s) + 1 for s in range(3)]).mean)

    def test_needs_two_radii(self, make):
        for table in (make(words=["rho=0.1"]), make(text=SMALL)):
            assert study_figures.over_rho(table, StudyStyle(table)) is None

    def test_bars_end_at_a_hundred_percent(self, make):
        table = make(lambda label, seed: {"result": {"test": 90.0 + 5 * seed}})
        line = next(one for one in only(study_figures.over_rho(table, StudyStyle(table))) if one.kind == "both")
        low = 95.0 - summarise([90.0, 95.0, 100.0]).half
        assert line.y_interval == (pytest.approx([low, low]), [100.0, 100.0])


class TestCost:
    def test_budgets_and_means(self, make):
        table = make()
        marks = [one for one in only(study_figures.over_cost(table, StudyStyle(table))) if one.kind == "marks"]
        for row, one in zip(table.rows, marks, strict=True):
            assert one.x[0] == pytest.approx(row.budget, rel=0.05)
            assert f"{row.budget:.0f} gradient evaluations" in one.hover[0]
            assert one.y == [row.columns["test_acc"].stat.mean]
        assert {round(row.budget / row.gradients) for row in table.rows} == {UPDATES}

    def test_the_front_of_each_point(self, make):
        table = make()
        style = StudyStyle(table)
        fronts = [one for one in only(study_figures.over_cost(table, style)) if one.kind == "steps"]
        assert [one.points for one in fronts] == [["0"], ["1"], ["2"], ["3"]]
        here = [row for row in table.rows if "0" in style.of(row)["points"]]
        best = study_figures.front([(row.budget, row.columns["test_acc"].stat.mean) for row in here])
        assert list(zip(fronts[0].x, fronts[0].y, strict=True)) == best

    @pytest.mark.parametrize(
        ("points", "kept"),
        [([(1, 1.0)], [(1, 1.0)]), ([(1, 2.0), (2, 1.0), (3, 2.0)], [(1, 2.0)]), ([], []),
         ([(2, 3.0), (1, 1.0), (1, 2.0), (2, 1.0), (4, 9.0)], [(1, 2.0), (2, 3.0), (4, 9.0)])],
    )  # fmt: skip
    def test_front(self, points, kept):
        assert study_figures.front(points) == kept

    def test_needs_two_costs(self, make):
        table = make(lambda label, seed: {"result": {}})
        assert study_figures.over_cost(table, StudyStyle(table)) is None

    def test_rows_of_equal_cost_stand_beside_each_other(self, make):
        table = make()
        found = only(study_figures.over_cost(table, StudyStyle(table)))
        places = [one.x[0] for one in found if one.kind == "marks" and "0" in one.points]
        assert places[0] == UPDATES, "alone at its cost"
        # By two hundredths of the axis, which are about a mark's width on a phone.
        assert len(places) == 4 and min(b - a for a, b in itertools.pairwise(places)) > 0.02 * 2 * UPDATES


class TestSharpness:
    def test_one_mark_a_run(self, make):
        table = make()
        section = study_figures.over_sharpness(table, StudyStyle(table))
        marks, at_loss = only(section, "Sharpness and accuracy"), only(section, "Sharpness and train loss")
        for row, trace, other in zip(table.rows, marks, at_loss, strict=True):
            assert trace.x == [score(row.label, seed) for seed in range(3)] and trace.y == other.y == [5.0, 6.0, 7.0]
            assert other.x == [0.5] * 3

    def test_from_the_report_where_the_runs_have_none(self, make):
        table = make(lambda label, seed: {"result": {}, "report": report(seed)})
        section = study_figures.over_sharpness(table, StudyStyle(table))
        assert only(section)[0].y == [10.0, 11.0, 12.0]
        assert "lambda_1" in section.figures[0].y.label and section.figures[0].y.log

    @pytest.mark.parametrize("value", [0.0, -3.0, math.nan, math.inf])
    def test_what_has_no_logarithm_is_left_out(self, make, value):
        def of(label, seed):
            return {"result": {"lambda_max": {"value": value if seed else 2.0}}}

        table = make(of)
        assert only(study_figures.over_sharpness(table, StudyStyle(table)))[0].y == [2.0]


class TestCurves:
    def test_mean_and_band(self, make):
        table = make(text=SMALL)
        section = study_curves.over_epochs(table, StudyStyle(table))
        assert list(named(section)) == ["Train loss", "Validation accuracy"]
        line = line_of(section, "Validation accuracy", "SAM")
        # The seeds differ by less than one of the 100 validation samples.
        stats = [summarise([score("SAM", seed) - 10 / e for seed in range(3)], step=1.0) for e in (1, 2)]
        assert line.x == [1, 2] and line.y == pytest.approx([stat.mean for stat in stats], rel=1e-5) and line.band
        for end, sign in zip(line.y_interval, (-1, 1), strict=True):
            assert end == pytest.approx([stat.mean + sign * stat.half for stat in stats], rel=1e-5)

    def test_one_seed_has_no_band(self, make):
        table = make(words=["seed=0"], text=SMALL)
        section = study_curves.over_epochs(table, StudyStyle(table))
        assert line_of(section, "Train loss", "SAM").y_interval is None

    def test_gaps_where_the_interval_is_not_known(self, make):
        def of(label, seed):
            return {"result": {}, "lines": epochs(50.0 + seed, 4 if seed == 0 else 2)}

        table = make(of, text=SMALL)
        line = line_of(study_curves.over_epochs(table, StudyStyle(table)), "Train loss", "SAM")
        assert line.x == [1, 2, 3, 4] and [math.isnan(low) for low in line.y_interval[0]] == [False, False, True, True]

    def test_not_finite_values_are_left_out(self, make):
        def of(label, seed):
            lines = epochs(50.0 + seed)
            bad = lines[1].__class__(**{**lines[1].__dict__, "train_loss": math.inf if seed else math.nan})
            return {"result": {}, "lines": (lines[0], bad)}

        table = make(of, text=SMALL)
        section = study_curves.over_epochs(table, StudyStyle(table))
        assert only(section, "Train loss")[0].x == [1] and only(section, "Validation accuracy")[0].x == [1, 2]

    def test_a_wide_loss_has_a_logarithmic_axis(self, make):
        def of(label, seed):
            lines = epochs(0.0)
            small = lines[1].__class__(**{**lines[1].__dict__, "train_loss": 1e-3 * (1 + seed)})
            return {"result": {}, "lines": (lines[0], small)}

        table = make(of, text=SMALL)
        chart = named(study_curves.over_epochs(table, StudyStyle(table)))["Train loss"]
        assert chart.y.log
        lows = [low for one in chart.series for low in one.y_interval[0] if not math.isnan(low)]
        assert lows and min(lows) > 0, "bands are cut where there is no logarithm"

    def test_misclassified_is_scaled_to_the_epoch(self, make):
        table = make(text=SMALL)
        section = study_curves.under_perturbation(table, StudyStyle(table))
        (wrong,), (flipped,) = only(section, "Misclassified at w + ε"), only(section, "Misclassified only at w + ε")
        assert wrong.group == "SAM", "plain training has no w + eps"
        # Two lines an epoch of 10 + i + seed samples, 15 updates, mean of the seeds 0, 1, 2.
        assert wrong.x == [1, 2] and wrong.y == pytest.approx([11.5 * 15, 13.5 * 15])
        assert flipped.y == pytest.approx([0.5 * 15, 2.5 * 15])

    def test_ratios(self, make):
        table = make(text=SMALL)
        section = study_curves.ratios(table, StudyStyle(table))
        assert list(named(section)) == ["|r| > 1", "r > 1", "0 < r ≤ 1"], "classes that no line has are left out"
        assert only(section, "|r| > 1")[0].y == pytest.approx([51.0, 51.0])
        assert only(section, "0 < r ≤ 1")[0].y == pytest.approx([30.0, 30.0])

    def test_slices(self, make):
        table = make()
        section = study_curves.slices(table, StudyStyle(table))
        line = only(section, "Along the first eigenvector")[0]
        assert (line.x, line.y) == ([-1.0, 0.0], [4.0, 1.0]), "no loss at 1 that is finite"
        assert only(section, "Along a random direction")[0].y == [2.0, 1.0, 2.0]

    def test_spectra_are_means_over_the_seeds(self, make):
        table = make()
        lines = only(study_curves.spectra(table, StudyStyle(table)))
        assert len(lines) == len(table.rows)
        x, y = lines[0].x, [0.0 if math.isnan(height) else height for height in lines[0].y]
        share = sum(b for a, b in zip(x, y, strict=True) if 9 < a < 13) * (x[1] - x[0])
        assert share == pytest.approx(0.1, rel=0.02), "a third of a tenth at each of 10, 11 and 12"
        peaks = [x[i] for i in range(1, len(x) - 1) if y[i] > max(y[i - 1], y[i + 1])]
        assert peaks == pytest.approx([-1, 0, 10, 11, 12], abs=0.05)

    def test_reports_without_these_sections(self, make):
        table = make(lambda label, seed: {"result": {}, "report": {"sections": {}}})
        style = StudyStyle(table)
        assert study_curves.spectra(table, style) is None and study_curves.slices(table, style) is None


class TestPhi:
    def test_what_the_arms_climb(self, make):
        section = phi(make())
        step, tanh, tanh_bound, log, log_bound = only(section)
        assert step.y == [0, 0, 1, 1]
        assert tanh.label == "tanh, α = 0.1, μ = 5: BiSAM (tanh)" and log.label == "-log, μ = 1: BiSAM (-log)"
        margins = torch.tensor(tanh.x, dtype=torch.float64)
        for trace, loss, mu in ((tanh, bisam_tanh, 5.0), (log, bisam_log, 1.0)):
            # With two classes Q = log(exp(mu phi) + 1) / mu, as phi(0) = 0.
            logits = torch.stack([torch.zeros_like(margins), margins], 1)
            values = [loss(row[None], torch.tensor([0]), mu) for row in logits]
            expected = torch.log(torch.expm1(mu * torch.stack(values))) / mu
            assert torch.allclose(torch.tensor(trace.y, dtype=torch.float64), expected)
        for trace in (tanh, tanh_bound, log, log_bound):
            assert all(y <= (x > -1e-9) + 1e-9 for x, y in zip(trace.x, trace.y, strict=True)), (
                "never above the 0-1 loss"
            )

    def test_arms_of_one_objective_share_a_curve(self, make):
        text = STUDY.replace('label = "SAM"\nmethod = "sam"', 'label = "BiSAM 2"\nmethod = "bisam-log+asam"')
        names = [one.label for one in only(phi(make(text=text)))]
        assert len(names) == 5 and any("BiSAM 2, BiSAM (-log)" in name for name in names)

    def test_only_with_bisam(self, make):
        assert phi(make(text=SMALL)) is None


class TestRadar:
    TEXT = STUDY.replace('model = ["mlp", "conv"]', 'model = ["mlp", "conv", "resnet20"]').replace(
        "rho = [0.1, 0.2]\n", ""
    )

    def test_each_axis_goes_from_its_smallest_to_its_largest_mean(self, make):
        table = make(text=self.TEXT)
        polygons = only(study_figures.radar(table, StudyStyle(table)))
        assert [p.group for p in polygons] == ["SGD", "SAM", "BiSAM (tanh)", "BiSAM (-log)"]
        assert polygons[0].x == [0, 1, 2, 0], "closed"
        for k, model in enumerate(("mlp", "conv", "resnet20")):
            means = [row.columns["test_acc"].stat.mean for row in table.rows if row.values["model"] == model]
            found = [p.y[k] for p in polygons]
            low, high = min(means), max(means)
            assert found == pytest.approx([0.15 + 0.85 * (mean - low) / (high - low) for mean in means])
            assert all(f"{m:.2f}" in p.hover[k] for m, p in zip(means, polygons, strict=True))

    def test_a_missing_vertex_leaves_the_polygon_open(self, make):
        table = make(lambda label, seed: None if label == "SAM model=conv" else everything(label, seed), text=self.TEXT)
        polygon = next(p for p in only(study_figures.radar(table, StudyStyle(table))) if p.group == "SAM")
        assert polygon.x == [0, 2]

    def test_equal_means(self, make):
        table = make(lambda label, seed: {"result": {"test": 90.0}}, text=self.TEXT)
        assert only(study_figures.radar(table, StudyStyle(table)))[0].y == [1, 1, 1, 1]

    def test_needs_three_axes_and_two_arms(self, make):
        table = make()
        assert study_figures.radar(table, StudyStyle(table)) is None
        table = make(lambda label, seed: everything(label, seed) if label.startswith("SAM") else None, text=self.TEXT)
        assert study_figures.radar(table, StudyStyle(table)) is None


class TestRecorded:
    """Whatever was written down is drawn, by the name that it was written down with."""

    TEXT = SMALL.replace(
        "diagnostics = true", 'diagnostics = true\nmeasure_every = 2\nmeasures = "sharpness"\nmeasure_m = 8'
    )

    def of(self, label, seed):
        found = everything(label, seed)
        own = {} if label == "SGD" else {"ascent_cosine": 0.5 + 0.1 * seed}
        common = {"lr": 0.1, "rho": 0.1, "seconds": 1.0, "images": 9, "flipped": 3}
        found["steps"] = [
            {"step": k, "epoch": k // 60, "loss": 1.0 / k, "new <b>": None if k % 2 else seed, **own, **common}
            for k in range(1, 151)
        ]
        found["measures"] = [
            {"epoch": e, "step": 60 * e, "m_sharpness": 10.0**-e * (1 + seed), "odd": "word" if e == 2 else 2.0}
            for e in (2, 4, 6)
        ]
        return found

    def test_diagnostics_over_the_updates(self, make):
        table = make(self.of, text=self.TEXT)
        section = study_recorded.over_updates(table, StudyStyle(table))
        assert list(named(section)) == ["loss", "new <b>", "ascent_cosine"], "those of other sections are left out"
        (line,) = only(section, "ascent_cosine")
        # 150 lines are blocks of three.
        assert line.group == "SAM" and line.x == list(range(3, 151, 3)) and line.y == pytest.approx([0.6] * 50)
        stat = summarise([0.5, 0.6, 0.7])
        assert line.band and line.hover[0].endswith(f"3: 0.6 ± {stat.half:.2g} (n = 3)")
        loss = line_of(section, "loss", "SGD")
        assert loss.y[:2] == pytest.approx([(1 + 1 / 2 + 1 / 3) / 3, (1 / 4 + 1 / 5 + 1 / 6) / 3], rel=1e-5)
        gaps = line_of(section, "new <b>", "SGD")
        assert gaps.x == line.x and gaps.y == [1.0] * 50, "a mean of what is there"
        assert named(section)["loss"].x.label == "update"

    def test_few_lines_are_points_of_their_own(self, make):
        def of(label, seed):
            return self.of(label, seed) | {"steps": self.of(label, seed)["steps"][: study_recorded.POINTS]}

        table = make(of, text=self.TEXT)
        line = line_of(study_recorded.over_updates(table, StudyStyle(table)), "loss", "SAM")
        assert line.x == list(range(1, 61)) and line.y == pytest.approx([1 / k for k in range(1, 61)], rel=1e-5)

    def test_measurements_over_the_epochs(self, make):
        table = make(self.of, text=self.TEXT)
        section = study_recorded.while_training(table, StudyStyle(table))
        assert list(named(section)) == ["m_sharpness", "odd"]
        line = line_of(section, "m_sharpness", "SAM")
        assert line.x == [2, 4, 6] and line.y == pytest.approx([2e-2, 2e-4, 2e-6]) and line.band
        assert named(section)["m_sharpness"].y.log
        assert line_of(section, "odd", "SGD").x == [4, 6], "a word is no point"
        told = (
            "on 1000 training samples. The names are those of flatmin measure. The l2 radius is 0.05. m_sharpness is "
            "the mean over groups of 8."
        )
        assert told in section.caption

    def test_only_what_the_study_asks_for(self, make):
        table = make(self.of, text=SMALL)
        assert study_recorded.while_training(table, StudyStyle(table)) is None
        table = make(self.of, text=SMALL.replace("log_every = 1\ndiagnostics = true", ""))
        assert study_recorded.over_updates(table, StudyStyle(table)) is None

    def test_on_the_page(self, make, small_plotly):
        outline = Outline(render(make(self.of, text=self.TEXT)))
        shown = "".join(outline.text)
        assert shown.index("Measured while training") < shown.index("Over the updates")
        assert "new <b>" in shown and "b" not in outline.tags


class TestFiles:
    def test_a_file_for_each_figure_and_point(self, make, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        drawn = []
        monkeypatch.setattr("flatmin.report.figures.files.save", lambda shown, path, **_: drawn.append(shown) or path)
        names = [path.name for path in save_figures(make(), tmp_path, [".svg", ".pdf"])]
        assert len(set(names)) == len(names) and sum(name.endswith(".pdf") for name in names) == len(names) / 2
        # Lines over rho are the same at every rho, so there is one figure for each network.
        assert [name for name in names if name.startswith("accuracy-over-the-radius")][:2] == [
            "accuracy-over-the-radius-model-mlp.svg", "accuracy-over-the-radius-model-conv.svg",
        ]  # fmt: skip
        costs = {f"accuracy-over-cost-rho-0-{rho}-model-{model}.svg" for rho in (1, 2) for model in ("mlp", "conv")}
        assert costs <= set(names) and "surrogate-of-the-0-1-loss-in-bisam.svg" in names
        cost = drawn[names.index("accuracy-over-cost-rho-0-1-model-mlp.svg")]
        assert [one.label for one in cost.series] == ["", "SGD", "SAM", "BiSAM (tanh)", "BiSAM (-log)"]

    def test_few_rows_share_a_file(self, make, tmp_path):
        pytest.importorskip("matplotlib")
        written = save_figures(make(text=SMALL), tmp_path / "new", [".svg"])
        assert {"train-loss.svg", "accuracy-over-cost.svg"} <= {path.name for path in written if path.is_file()}


class TestWhole:
    TITLES = (
        "Accuracy over the radius", "Accuracy and cost", "Training", "Sharpness",
        "Eigenvalue density", "Slices of the loss", "Misclassified under perturbation",
        "SAM's gradient relative to SGD's",
        "Surrogate of the 0-1 loss in BiSAM", "Sharpness as in other publications",
    )  # fmt: skip

    def test_has_every_section_once_and_a_foot(self, make, small_plotly):
        text = render(make(), command=["flatmin", "study", "a b.toml"])
        outline = Outline(text)
        shown = "".join(outline.text)
        assert all(shown.count(title) >= 1 for title in self.TITLES)
        assert "flatmin study 'a b.toml'" in shown and "torch" in shown and "flatmin train smoke" in shown
        assert "9.00" not in shown and "10.00" in shown, "the mean of the published sharpness"
        assert not [value for name, value in outline.attributes if name in ("src", "href", "srcset")]

    def test_every_trace_is_hidden_by_an_arm_or_by_none(self, make, small_plotly):
        outline = Outline(render(make()))
        values = {value for name, value in outline.attributes if name == "value"}
        groups = {trace.get("legendgroup") for spec in outline.specs for trace in spec["data"]} - {None}
        points = {p for spec in outline.specs for trace in spec["data"] for p in trace.get("points", [])}
        assert groups == {"SGD", "SAM", "BiSAM (tanh)", "BiSAM (-log)"} and groups | points <= values

    def test_what_is_not_known_has_no_figure(self, make, small_plotly):
        text = render(make(lambda label, seed: {"result": {}}, words=["rho=0.1"]))
        shown = "".join(Outline(text).text)
        assert [title for title in self.TITLES if title in shown] == ["Surrogate of the 0-1 loss in BiSAM"]

    @pytest.mark.parametrize("failure", ["it broke", None])
    def test_a_study_without_a_result(self, make, small_plotly, failure):
        shown = "".join(Outline(render(make(lambda label, seed: failure, text=SMALL))).text)
        assert "0 of 6 runs with a result" in shown and "There are no values for figures yet." in shown
        assert ("it broke" in shown) == (failure is not None) and "nan" not in shown

    def test_a_single_run(self, make, small_plotly):
        text = SMALL[: SMALL.rindex("[[arms]]")]
        outline = Outline(render(make(words=["seed=0"], text=text)))
        shown = "".join(outline.text)
        assert "1 arm, 1 row, 1 of 1 run with a result, seed 0." in shown and "select" not in outline.tags
        assert not [trace for spec in outline.specs for trace in spec["data"] if trace.get("fill")]

    def test_numbers_that_are_not_finite(self, make, small_plotly):
        def of(label, seed):
            found = everything(label, seed)
            point = {"epoch": 1, "val_acc": math.nan, "test_acc": math.inf if seed else math.nan, "memorised": None}
            found["result"] = {"chosen": point, "train_ce": math.inf, "lambda_max": {"value": math.nan}}
            found["steps"] = [{"step": 1, "epoch": 1, "misclassified": None, "ratio_larger": math.nan}]
            found["report"]["sections"]["density"]["results"]["density"]["nodes"] = [None, 1.0, 2.0]
            found["report"]["sections"]["published"]["quantities"]["sam_paper: lambda_1"]["value"] = None
            return found

        outline = Outline(render(make(of)))
        shown = "".join(outline.text)
        assert "Training" in shown and "Slices" in shown and "Eigenvalue density" not in shown
        assert "NaN" not in json.dumps(outline.specs) and "nan" not in shown

    def test_hostile_names_stay_text(self, make, small_plotly):
        text = STUDY.replace(
            'source = "a paper"', f"source = {json.dumps(HOSTILE[0])}\nnotes = [{json.dumps(HOSTILE[1])}]"
        )
        text = text.replace('"Made up"', json.dumps(HOSTILE[2]))
        for old, new in (
            ("SGD", HOSTILE[0]),
            ("SAM", HOSTILE[1]),
            ("BiSAM (tanh)", HOSTILE[2]),
            ("BiSAM (-log)", HOSTILE[3]),
        ):
            text = text.replace(f'label = "{old}"', f"label = {json.dumps(new)}")
        text = text.replace('baseline = "SGD"', f"baseline = {json.dumps(HOSTILE[0])}")
        table = make(lambda label, seed: HOSTILE[1] if seed == 2 else everything(label, seed), text=text)
        outline = Outline(render(table, command=["flatmin", *HOSTILE]))
        assert "img" not in outline.tags and not [name for name, _ in outline.attributes if name.startswith("on")]
        assert [kind for kind, _ in outline.scripts].count("code") == 3, "style, plotly.js and the page's own script"
        shown = "".join(outline.text)
        assert all(name in shown for name in HOSTILE)
        for spec in outline.specs:
            for trace in spec["data"]:
                labels = json.dumps([trace.get("hovertext"), trace.get("name")], ensure_ascii=False)
                assert "<script" not in labels and "<img" not in labels and "$" not in labels

    def test_forty_nine_rows(self, make, small_plotly):
        arms = "".join(f'[[arms]]\nlabel = "schedule {i}"\nmethod = "sam"\nlr = {0.1 / (i + 1)}\n' for i in range(7))
        widths = ", ".join(f"{0.01 * (i + 1):.2f}" for i in range(7))
        text = SMALL[: SMALL.index("[[arms]]")] + f"[axes]\nrho = [{widths}]\n{arms}"
        table = make(text=text)
        text = render(table)
        outline = Outline(text)
        assert len(table.rows) == 49 and outline.tags.count("option") == 8
        assert len(text) < 3e6

    def test_more_arms_than_colours(self, make):
        arms = "".join(f'[[arms]]\nlabel = "arm {i}"\nmethod = "sam"\nlr = {0.1 / (i + 1)}\n' for i in range(21))
        table = make(text=SMALL[: SMALL.index("[[arms]]")] + arms)
        style = StudyStyle(table)
        found = {style.at(row.arm, row.point) for row in table.rows}
        assert len(found) == 21, "no two arms are drawn alike"
        assert "Arms with the same colour" in style.explained() and not StudyStyle(make(text=SMALL)).explained()


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    pytest.importorskip("plotly")
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return page.write(render(table_of(folder), command=["flatmin", "study"]), folder / "page.html")


class TestChromium:
    @pytest.fixture
    def opened(self, tab, make, tmp_path):
        def opened(table=None, **how):
            path = page.write(render(table or make(), command=["flatmin", "study"]), tmp_path / "page.html")
            tab.problems.clear()
            tab.open(path, **how)
            return tab

        return opened

    @pytest.fixture
    def usual(self, tab, written):
        """The page of the study, opened where the last test has left it for another."""
        if tab.run("location.href") != written.as_uri():
            tab.problems.clear()
            tab.open(written)
        return tab

    def test_the_table_sorts(self, usual):
        tab = usual
        column = "[...document.querySelectorAll('table')[0].tBodies[0].rows].map((row) => row.cells[4].dataset.sort)"
        before = tab.run(column)
        tab.click("table thead th:nth-child(5) button")
        falling = [float(value) for value in tab.run(column)]
        assert falling == sorted(map(float, before), reverse=True) != list(map(float, before))
        tab.click("table thead th:nth-child(5) button")
        assert [float(value) for value in tab.run(column)] == falling[::-1]
        assert not tab.problems

    def test_tooltips_legend_and_points(self, usual):
        tab = usual
        plots = "[...document.querySelectorAll('.plot')]"
        assert tab.run(f"{plots}.every((plot) => plot.querySelector('.main-svg'))")
        hidden = f"{plots}.flatMap((p) => p.data).filter((t) => t.legendgroup === 'SAM').map((t) => t.visible)"
        assert any(tab.run(hidden)) and not all(tab.run(hidden)), "one point at first"
        tab.run("{const s = document.querySelector('select'); s.value = ''; s.dispatchEvent(new Event('change'))}")
        tab.settle()
        assert all(tab.run(hidden)), "all points"
        tab.click(".legend label:nth-of-type(3)")
        assert not any(tab.run(hidden)), "the arm's box"
        tab.click(".legend label:nth-of-type(3)")
        assert all(tab.run(hidden))
        mark = (
            "(() => { const e = document.querySelectorAll('.plot')[1].querySelectorAll('.scatterlayer .point');"
            " const m = e[e.length - 1]; m.scrollIntoView({block: 'center'});"
            " const r = m.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        tab.point(*tab.run(mark))
        tab.until("document.querySelector('.hovertext') !== null")
        assert "gradient evaluations" in tab.run("document.querySelector('.hovertext').textContent")
        assert not tab.problems

    def test_light_and_dark(self, usual):
        tab = usual
        row_style = (
            "[getComputedStyle(document.body).backgroundColor,"
            " document.querySelector('.plot').layout.paper_bgcolor, document.querySelector('.plot').data[1].line.color]"
        )
        light = tab.run(row_style)
        tab.dark(True)
        tab.settle()
        dark = tab.run(row_style)
        tab.dark(False)
        assert light[0] == "rgb(255, 255, 255)" and all(a != b for a, b in zip(light, dark, strict=True))
        assert not tab.problems

    @pytest.mark.parametrize("hostile", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_fits_a_phone(self, opened, make, hostile):
        text = STUDY.replace('"Made up"', json.dumps(HOSTILE[3]))
        for old, new in (("SAM", HOSTILE[1]), ("BiSAM (tanh)", HOSTILE[2]), ("BiSAM (-log)", HOSTILE[3])):
            text = text.replace(f'label = "{old}"', f"label = {json.dumps(new)}")
        tab = opened(make(text=text if hostile else STUDY), width=380, height=800, phone=True)
        assert tab.run("document.documentElement.scrollWidth") == 380
        assert tab.run("Math.max(...[...document.querySelectorAll('.plot')].map((p) => p.clientWidth))") <= 380
        assert not tab.problems

    def test_a_radar_and_many_rows(self, opened, make):
        arms = "".join(f'[[arms]]\nlabel = "arm {i}"\nmethod = "sam"\nlr = {0.1 / (i + 1)}\n' for i in range(20))
        head = TestRadar.TEXT[: TestRadar.TEXT.index("[[arms]]")].replace('baseline = "SGD"\n', "")
        tab = opened(make(text=head + arms))
        assert tab.run("document.querySelectorAll('.polarlayer .polar').length") == 1
        assert tab.run("document.documentElement.scrollWidth") == 1280
        assert not tab.problems
