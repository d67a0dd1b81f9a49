"""Honest baselines, settings chosen on validation, and plain training at equal cost."""

import dataclasses

import pytest

from flatmin.data.named import DATASETS
from flatmin.study import costs, tables
from flatmin.study.baselines import with_baselines
from flatmin.study.costs import Sizes
from flatmin.study.executors import RunOutcome
from flatmin.study.expand import grid_points
from flatmin.study.reading import read_study
from flatmin.study.tables import body, header, remarks
from flatmin.train.settings import preset_names
from flatmin.train.sources import load_clean
from tests.study.made import made_result, made_table

STUDY = """
title = "Made up"
train = "digits"
seeds = [0, 1, 2]
baseline = "SGD"
[settings]
epochs = 10
weight_decay = 0.001
[[arms]]
label = "SGD"
method = "sgd"
weight_decay = 0.0005
[[arms]]
label = "SAM"
method = "sam"
axes = { rho = [0.05, 0.1, 0.2] }
choose = ["rho"]
"""


def spec_of(tmp_path, text=STUDY):
    path = tmp_path / "s.toml"
    path.write_text(text, encoding="utf-8")
    return read_study(str(path))


def by_arm(spec):
    found = {}
    for point in grid_points(spec):
        found.setdefault(point.arm, []).append(point.config)
    return found


class TestBaselines:
    def test_are_plain_training_with_more_of_one_thing_each(self, tmp_path):
        arms = by_arm(with_baselines(spec_of(tmp_path)))
        assert list(arms) == [
            "SGD",
            "SAM",
            "SGD, more weight decay",
            "SGD, early stop",
            "SGD, averaged",
            "SGD, 2x epochs",
        ]
        plain = arms["SGD"][0]

        def differences(label):
            found = []
            for config in arms[label]:
                mine, base = vars(config), vars(plain)
                found.append({key: mine[key] for key in mine if mine[key] != base[key]})
            return found

        assert differences("SGD, more weight decay") == [{"weight_decay": value} for value in (0.001, 0.002, 0.004)]
        assert differences("SGD, early stop") == [{"epochs": value} for value in (3, 5, 7)]
        assert differences("SGD, averaged") == [{"ema": value} for value in (0.99, 0.999)]
        assert differences("SGD, 2x epochs") == [{"epochs": 20}]

    def test_all_but_the_budget_are_chosen_on_validation(self, tmp_path):
        for point in grid_points(with_baselines(spec_of(tmp_path))):
            if point.arm.startswith("SGD,") and "2x" not in point.arm:
                assert point.choose == set(point.values) and len(point.choose) == 1

    def test_bring_plain_training_where_there_is_none_and_its_networks(self, tmp_path):
        text = STUDY.replace('[[arms]]\nlabel = "SGD"\nmethod = "sgd"\nweight_decay = 0.0005\n', "")
        text = text.replace('baseline = "SGD"', "").replace("[settings]", '[axes]\nmodel = ["conv", "mlp"]\n[settings]')
        arms = by_arm(with_baselines(spec_of(tmp_path, text)))
        assert [config.model for config in arms["SGD"]] == ["conv", "mlp"]
        assert {config.weight_decay for config in arms["SGD"]} == {0.001}
        assert len(arms["SGD, early stop"]) == 6

    def test_no_second_row_for_a_length_that_is_there(self, tmp_path):
        text = STUDY + '[[arms]]\nlabel = "long"\nmethod = "sgd"\nepochs = 20\n'
        assert not any("x epochs" in label for label in by_arm(with_baselines(spec_of(tmp_path, text))))

    def test_what_is_given_with_a_network_does_not_shorten_them(self, tmp_path):
        text = STUDY + '[[given]]\nmodel = ["conv"]\nset = { epochs = 10 }\n'
        assert by_arm(with_baselines(spec_of(tmp_path, text)))["SGD, 2x epochs"][0].epochs == 20

    def test_one_length_for_each_cost(self, tmp_path):
        text = (
            STUDY + '[[arms]]\nlabel = "twice"\nmethod = "sam"\nrho = 0.3\n[[arms]]\nlabel = "k"\nmethod = "looksam"\n'
        )
        arms = by_arm(with_baselines(spec_of(tmp_path, text)))
        longer = {label: configs[0].epochs for label, configs in arms.items() if "x epochs" in label}
        assert longer == {"SGD, 1.2x epochs": 12, "SGD, 2x epochs": 20}
        text = STUDY + '[[arms]]\nlabel = "a"\nmethod = "ae-sam"\n'
        arms = by_arm(with_baselines(spec_of(tmp_path, text)))
        assert {label: configs[0].epochs for label, configs in arms.items() if "x epochs" in label}[
            "SGD, 2x epochs"
        ] == 20

    @pytest.mark.parametrize("name", preset_names("study"))
    def test_every_study_can_have_them(self, name):
        plain = read_study(name)
        found = with_baselines(plain)
        assert len(found.baselines) > len(plain.baselines) and grid_points(found)

    def test_a_name_that_is_taken(self, tmp_path):
        text = STUDY + '[[arms]]\nlabel = "SGD, averaged"\nmethod = "sgd"\nema = 0.9\n'
        with pytest.raises(ValueError, match="already has an arm 'SGD, averaged'; leave out --baselines"):
            with_baselines(spec_of(tmp_path, text))


class TestChoice:
    def test_is_by_validation_and_not_by_test(self, tmp_path):
        def result_of(point, seed):
            rho = point.values.get("rho", "")
            test = {"0.05": 90.0, "0.1": 80.0, "0.2": 70.0}.get(rho, 60.0) + seed
            val = {"0.05": 80.0, "0.1": 90.0, "0.2": 85.0}.get(rho, 60.0) + seed
            chosen = {"epoch": 1, "val_acc": val, "test_acc": test, "memorised": None}
            return RunOutcome(result=made_result(point.configs[seed], test, chosen=chosen))

        table = made_table(STUDY, tmp_path, result_of)
        sam = table.rows[1]
        assert [row.arm for row in table.rows] == ["SGD", "SAM"]
        assert sam.chosen == {"rho": "0.1"} and sam.columns["test_acc"].stat.mean == 81
        assert [row.values["rho"] for row in table.tried["SAM rho=0.1"]] == ["0.05", "0.1", "0.2"]
        assert header(table)[:2] == ["arm", "chosen"] and [row[1] for row in body(table)] == ["-", "rho=0.1"]
        assert sam.columns["test_acc"].diff.mean == pytest.approx(20), "the baseline has no radius"
        said = next(text for text in remarks(table) if "is chosen by" in text)
        assert "rho=0.05 81.00 ±2.48; rho=0.1 91.00 ±2.48; rho=0.2 86.00 ±2.48" in said

    def test_a_value_that_lacks_a_seed_is_not_chosen_unless_all_do(self, tmp_path):
        def result_of(point, seed, broken):
            if point.values.get("rho") in broken and seed == 1:
                return RunOutcome(error="lost")
            return 99.0 if point.values.get("rho") == "0.2" else 80.0

        table = made_table(STUDY, tmp_path, lambda point, seed: result_of(point, seed, ("0.2",)))
        assert table.rows[1].chosen == {"rho": "0.05"}
        table = made_table(STUDY, tmp_path, lambda point, seed: result_of(point, seed, ("0.05", "0.1", "0.2")))
        assert table.rows[1].chosen == {"rho": "0.05"} and table.rows[1].flags == ("no result: 1 of 3",)

    def test_each_point_of_the_other_axes_has_its_own(self, tmp_path):
        best = {"conv": "0.05", "mlp": "0.2"}
        text = STUDY.replace("[settings]", '[axes]\nmodel = ["conv", "mlp"]\n[settings]')
        table = made_table(
            text,
            tmp_path,
            lambda point, seed: 90.0 if point.values.get("rho") == best[point.values["model"]] else 80.0,
        )
        assert [row.chosen for row in table.rows if row.arm == "SAM"] == [{"rho": "0.05"}, {"rho": "0.2"}]
        assert header(table)[:3] == ["arm", "model", "chosen"]

    def test_not_where_the_validation_part_is_the_test_part(self, tmp_path):
        text = STUDY.replace("[settings]", "[settings]\ntrain_on_val = true\nselection = 'last'")
        with pytest.raises(ValueError, match="rho cannot be chosen on validation data with train_on_val=true"):
            grid_points(spec_of(tmp_path, text))

    def test_only_an_axis_can_be_chosen(self, tmp_path):
        spec = dataclasses.replace(spec_of(tmp_path), choose=("rhoo",))
        with pytest.raises(ValueError, match="rhoo cannot be chosen, because it is not an axis; did you mean 'rho'"):
            grid_points(spec)


class TestEqualCost:
    def table(self, tmp_path, score, text=STUDY):
        return made_table(text, tmp_path, lambda point, seed: score(point) + seed, changed=with_baselines)

    def test_stands_beside_twice_the_epochs(self, tmp_path):
        scores = {"SGD": 80.0, "SAM": 85.0, "SGD, 2x epochs": 83.0}
        table = self.table(tmp_path, lambda point: scores.get(point.arm, 70.0))
        rows = {row.arm: row for row in table.rows}
        steps = -(-len(load_clean(rows["SGD"].grid_point.config).train) // 64)
        assert rows["SGD"].budget == 10 * steps and rows["SAM"].budget == rows["SGD, 2x epochs"].budget == 20 * steps
        equal = rows["SAM"].equal
        assert equal.label == "SGD, 2x epochs" and equal.diff.mean == pytest.approx(2) and equal.diff.n == 3
        assert all(row.equal is None for row in table.rows if row.arm != "SAM")
        assert rows["SAM"].columns["test_acc"].diff.mean == pytest.approx(5), "at equal epochs"
        assert "vs plain, equal grads" in header(table)
        assert body(table)[1][header(table).index("vs plain, equal grads")].startswith("+2.00")

    def test_of_several_is_the_best_on_validation(self, tmp_path):
        longer = '[[arms]]\nlabel = "long"\nmethod = "sgd"\nepochs = 20\nweight_decay = 0.01\n'
        text = STUDY + longer + longer.replace("long", "longer").replace("0.01", "0.02")
        scores = {"SAM": 85.0, "longer": 83.0, "long": 84.0}
        table = self.table(tmp_path, lambda point: scores.get(point.arm, 70.0), text)
        assert {row.arm: row.equal.label for row in table.rows if row.equal} == {"SAM": "long"}

    def test_a_baseline_of_another_network_is_none(self, tmp_path):
        text = STUDY.replace("weight_decay = 0.0005", 'model = "mlp"')
        table = made_table(text, tmp_path, lambda point, seed: 80.0 + seed)
        assert all(row.columns["test_acc"].diff is None for row in table.rows)

    def test_is_of_the_same_network(self, tmp_path):
        text = STUDY.replace("[settings]", '[axes]\nmodel = ["conv", "mlp"]\n[settings]')
        table = self.table(tmp_path, lambda point: 80.0 if point.values["model"] == "conv" else 90.0, text)
        found = {row.values["model"]: row.equal for row in table.rows if row.arm == "SAM"}
        assert {model: equal.label for model, equal in found.items()} == {
            "conv": "SGD, 2x epochs model=conv",
            "mlp": "SGD, 2x epochs model=mlp",
        }
        assert all(equal.diff.mean == 0 for equal in found.values())


class TestSteps:
    def test_every_official_training_part_has_its_test_part(self):
        assert set(costs._TESTS) == {name for name, known in DATASETS.items() if known.train is not None}

    def test_equal_differences_count_as_one_sample_apart(self, tmp_path):
        """The digits have 100 validation and 797 test images; 3 of 797 more in every seed are no certainty."""

        def result_of(point, seed):
            return 100 * (700 + seed + 3 * (point.arm == "SAM")) / 797

        text = STUDY.replace("axes = { rho = [0.05, 0.1, 0.2] }", "rho = 0.1").replace('choose = ["rho"]\n', "")
        table = made_table(text, tmp_path, result_of)
        value = table.rows[1].columns["test_acc"]
        assert value.diff.half == pytest.approx(4.302653 * 100 / 797 / 3**0.5, rel=1e-6)
        # df = 2: P(|T| > t) = 1 - t / sqrt(2 + t^2), t = 3 sqrt(3).
        assert value.p == pytest.approx(1 - (27 / 29) ** 0.5, rel=1e-6)
        assert tables.difference(value.diff) == "+0.38 ±0.31"
        # Numbers on no grid that differ by the same in every seed have no interval.
        seconds = table.rows[1].columns["seconds"]
        assert seconds.p == 1.0 and tables.difference(seconds.diff) == "+0.00"
        assert table.rows[1].steps == {
            "val_acc": 1.0,
            "test_acc": 100 / 797,
            "test_top5": 100 / 797,
            "memorised": 100 / 360,
        }

    @pytest.mark.parametrize(
        ("settings", "val", "test", "wrong"),
        [
            ({"noise": 0.0}, 5000, 10_000, 0),
            ({"noise": 0.2, "val_share": 0.2}, 10_000, 10_000, 8000),
            ({"noise": 0.2, "noise_kind": "asymmetric"}, 5000, 10_000, 4500),
            ({"data": "imagenet", "train_on_val": True, "selection": "last", "noise": 0.1}, 50_000, 50_000, 128_117),
        ],
    )
    def test_official_sizes_need_no_data(self, tmp_path, settings, val, test, wrong):
        config = grid_points(spec_of(tmp_path))[0].configs[0]
        steps = Sizes().steps(dataclasses.replace(config, **{"data": "cifar10", **settings}))
        counts = {name: round(100 / step) for name, step in steps.items()}
        expected = {"val_acc": val, "test_acc": test, "test_top5": test, "memorised": wrong}
        assert counts == {name: count for name, count in expected.items() if count}
