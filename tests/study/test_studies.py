"""What a study concludes, from made-up results: baselines, differences, corrected p values, published numbers."""

import math

import pytest

from flatmin.stats import holm, paired, paired_p
from flatmin.study.executors import RunOutcome
from flatmin.study.plan import plan
from flatmin.study.reading import read_study
from flatmin.study.tabulate import tabulate
from tests.study.made import made_result

STUDY = """
title = "Made up"
train = "smoke"
seeds = [0, 1, 2]
baseline = "SAM"
[axes]
rho = [0.1, 0.2]
[[arms]]
label = "SGD"
method = "sgd"
[[arms]]
label = "SAM"
method = "sam"
[[arms]]
label = "VaSSO"
method = "vasso"
[[arms]]
label = "ASAM"
method = "asam"
axes = { rho = [2] }
[[published]]
label = "SAM"
rho = 0.2
metric = "test_acc"
value = 97.0
spread = 0.1
source = "a paper"
[[published]]
label = "VaSSO"
rho = 0.1
metric = "test_acc"
value = 98.5
source = "a chart"
"""


def result(config, test, **changes):
    return made_result(config, test, **{"gradient_evaluations": 2.0, **changes})


@pytest.fixture
def make(tmp_path):
    def make(test_of, words=(), text=STUDY):
        """The table of a study whose run has the accuracy, result or error that `test_of(row, seed)` gives."""
        path = tmp_path / "made.toml"
        path.write_text(text, encoding="utf-8")
        todo = plan(read_study(str(path), words), tmp_path, make=False)
        outcomes = {}
        for (i, seed), run in todo.runs.items():
            found = test_of(todo.grid_points[i].label, seed)
            if isinstance(found, str):
                outcomes[run.name] = RunOutcome(error=found)
            elif found is not None:
                changes = {} if isinstance(found, float) else found
                test = found if isinstance(found, float) else 50.0
                outcomes[run.name] = RunOutcome(result=result(run.config, test, **changes))
        return tabulate(todo, outcomes)

    return make


NUMBERS = {
    "SGD": (90.0, 91.0, 92.5),
    "SAM rho=0.1": (93.0, 94.0, 94.5),
    "SAM rho=0.2": (95.0, 95.5, 96.5),
    "VaSSO rho=0.1": (93.5, 94.1, 95.2),
    "VaSSO rho=0.2": (95.2, 95.4, 96.4),
    "ASAM": (94.0, 94.0, 95.0),
}


def known(label, seed):
    return NUMBERS[label][seed]


def named(table):
    return {" ".join([row.arm, *(f"{k}={v}" for k, v in row.values.items())]): row for row in table.rows}


def test_rows_their_means_and_spread(make):
    rows = named(make(known))
    assert list(rows) == list(NUMBERS)
    value = rows["SAM rho=0.1"].columns["test_acc"]
    assert value.stat.mean == pytest.approx(93.8333333) and value.std == pytest.approx(0.7637626)
    assert value.stat.half == pytest.approx(4.302652729911275 * 0.7637626 / math.sqrt(3))
    assert rows["SGD"].columns["val_acc"].stat.values == (91.0, 92.0, 93.5)
    assert rows["SGD"].n == 3 and rows["SGD"].gradients == 2 and rows["SGD"].flags == ()


def test_differences_are_to_the_baseline_at_the_same_point(make):
    rows = named(make(known))
    for rho in ("0.1", "0.2"):
        diff = rows[f"VaSSO rho={rho}"].columns["test_acc"].diff
        ours, base = NUMBERS[f"VaSSO rho={rho}"], NUMBERS[f"SAM rho={rho}"]
        assert diff.values == pytest.approx([a - b for a, b in zip(ours, base, strict=True)])
        assert rows[f"SAM rho={rho}"].columns["test_acc"].diff is None
    # sgd has no radius, and ASAM another one: there is no same point to be compared at.
    for label in ("SGD", "ASAM"):
        assert rows[label].columns["test_acc"].diff is None and rows[label].columns["test_acc"].p is None


def test_a_baseline_without_the_axis_is_every_points(make):
    rows = named(make(known, text=STUDY.replace('baseline = "SAM"', 'baseline = "SGD"')))
    for label, numbers in NUMBERS.items():
        diff = rows[label].columns["test_acc"].diff
        if label == "SGD":
            assert diff is None
        else:
            assert diff.values == pytest.approx([a - b for a, b in zip(numbers, NUMBERS["SGD"], strict=True)])


def test_p_values_are_corrected_over_the_column(make):
    rows = named(make(known, text=STUDY.replace('baseline = "SAM"', 'baseline = "SGD"')))
    labels = [label for label in NUMBERS if label != "SGD"]
    base = dict(enumerate(NUMBERS["SGD"]))
    raw = [paired_p(paired(dict(enumerate(NUMBERS[label])), base)) for label in labels]
    values = [rows[label].columns["test_acc"] for label in labels]
    assert [value.p for value in values] == pytest.approx(raw)
    assert [value.corrected for value in values] == pytest.approx(holm(raw))
    assert max(raw) < max(holm(raw))


def test_only_shared_seeds_are_paired_and_one_has_no_p(make):
    rows = named(make(lambda label, seed: "broke" if label == "VaSSO rho=0.1" and seed else known(label, seed)))
    value = rows["VaSSO rho=0.1"].columns["test_acc"]
    assert value.diff.values == pytest.approx((0.5,)) and value.p is None and math.isnan(value.std)
    assert rows["VaSSO rho=0.2"].columns["test_acc"].p == pytest.approx(
        paired_p(rows["VaSSO rho=0.2"].columns["test_acc"].diff)
    ), "one test needs no correction"


class TestPublished:
    def test_stand_beside_their_own_runs(self, make):
        rows = named(make(known))
        found = {label: [one.value for one in row.columns["test_acc"].published] for label, row in rows.items()}
        assert {label: values for label, values in found.items() if values} == {
            "SAM rho=0.2": [97.0],
            "VaSSO rho=0.1": [98.5],
        }
        assert all(not row.columns["val_acc"].published for row in rows.values())

    @pytest.mark.parametrize(("rho", "values"), [("0.2", [97.0]), ("0.20", [97.0]), ("0.3", [])])
    def test_also_where_the_axis_is_no_column(self, make, rho, values):
        table = make(lambda label, seed: 90.0, [f"rho={rho}"])
        sam = named(table)["SAM"].columns["test_acc"]
        assert [one.value for one in sam.published] == values

    def test_also_where_the_radius_is_the_presets(self, make):
        text = STUDY.replace("[axes]\nrho = [0.1, 0.2]\n", "").replace("rho = 0.2", "rho = 0.15")
        rows = named(make(lambda label, seed: 90.0, text=text))
        assert [one.value for one in rows["SAM"].columns["test_acc"].published] == [97.0]
        assert rows["VaSSO"].columns["test_acc"].published == ()


def test_runs_without_a_result_are_counted_and_said(make):
    def found(label, seed):
        if label == "SGD":
            return "out of memory" if seed == 1 else {"failure": "the loss was not finite", "chosen": None}
        if label == "ASAM":
            return {"trained": False} if seed else None
        return known(label, seed)

    table = make(found)
    rows = named(table)
    assert rows["SGD"].flags == ("no result: 3 of 3",) and rows["SGD"].n == 0
    assert rows["SGD"].gradients == 1, "of the recipe, where no run says"
    assert rows["ASAM"].flags == ("no result: 1 of 3", "did not train: 2 of 3")
    assert table.errors == {
        "SGD, seed 0": "the loss was not finite",
        "SGD, seed 1": "out of memory",
        "SGD, seed 2": "the loss was not finite",
    }
    assert rows["VaSSO rho=0.1"].columns["test_acc"].diff.n == 3


def test_columns_are_those_that_some_row_has(make):
    assert make(known).metrics == ("test_acc", "val_acc", "train_ce", "seconds")
    curved = {"lambda_max": {"value": 3.0}, "last": {"memorised": 7.0, "test_acc": None}}
    table = make(lambda label, seed: curved if label == "SGD" else known(label, seed))
    assert table.metrics == ("test_acc", "val_acc", "memorised", "train_ce", "lambda_max", "seconds")
    assert named(table)["SGD"].columns["lambda_max"].stat.mean == 3
    assert named(table)["SGD"].columns["memorised"].stat.mean == 7


class TestPlan:
    def test_makes_no_folder_unless_it_is_to_run(self, tmp_path):
        spec = read_study("empirical", demo=True)
        plan(spec, tmp_path / "a", make=False)
        assert not list(tmp_path.iterdir())
        plan(spec, tmp_path / "a")
        assert (tmp_path / "a" / "runs").is_dir()

    def test_one_configuration_is_one_run_whatever_the_arms_call_it(self, tmp_path):
        path = tmp_path / "s.toml"
        arms = ('label = "A"\nmethod = "sam"\nrho = 0.1', 'label = "B"\nmethod = "sam"\naxes = { rho = [0.1, 0.2] }')
        path.write_text('title = "T"\ntrain = "smoke"\n' + "".join(f"[[arms]]\n{arm}\n" for arm in arms))
        todo = plan(read_study(str(path)), tmp_path / "out", make=False)
        assert len(todo.grid_points) == 3 and len(todo.runs) == 9 and len(todo.missing) == 6
        assert todo.runs[0, 1].name == todo.runs[1, 1].name and todo.runs[0, 1].name.startswith("sam-s1-")

    def test_both_readings_of_a_study_share_all_runs(self, tmp_path):
        names = [
            {run.name for run in plan(read_study(name, ["model=resnet18"]), tmp_path, make=False).missing}
            for name in ("empirical", "empirical-code")
        ]
        assert names[0] == names[1] and len(names[0]) == 27
