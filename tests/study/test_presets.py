"""The studies of the package against their sources: settings and published numbers written down by hand."""

import collections

import pytest

from flatmin.data.named import DATASETS
from flatmin.study.costs import Sizes
from flatmin.study.expand import grid_points
from flatmin.study.reading import read_study
from flatmin.train.settings import preset_names, read_preset

SHARPNESS = "empirical_sam: mean of positives"
FUNDAMENTAL = ("fundamental-cifar10", "fundamental-cifar100", "fundamental-tiny")
IMAGENET = ("bisam-imagenet", "vasso-imagenet", "imagenet-vit")
TRANSFER = ("finetune-flowers", "finetune-pets")
STUDIES = [name for name in preset_names("study") if "demo" in read_preset(name, "study") and "cifar100-m" not in name]
RECORDED = ("empirical-ratio", "bisam-misclassified", "vasso-sharpness", "one-gradient")


def published(name, metric):
    return {(one.label, *one.where.values()): one.value for one in read_study(name).published if one.metric == metric}


def configs(name, *, demo=False):
    return {row.label: row.config for row in grid_points(read_study(name, demo=demo))}


@pytest.mark.parametrize("name", STUDIES)
def test_a_demo_has_the_columns_and_the_arms_of_its_study(name):
    whole, demo = read_study(name), read_study(name, demo=True)
    assert demo.columns == whole.columns and demo.choose == whole.choose and demo.baseline == whole.baseline
    assert {arm.label for arm in demo.arms} == {arm.label for arm in whole.arms}
    assert (demo.measure is None) == (whole.measure is None)
    if whole.measure is not None:
        assert demo.measure.what == whole.measure.what
    assert demo.record.diagnostics == whole.record.diagnostics


class TestSharpness:
    """Sharpness of ResNet-18 in the README of the empirical study: a row for each method, a column for each radius."""

    PROSE = (
        ("SAM", (71.04, 56.53, 52.23), (79.24, 79.54, 79.44)),
        ("SAMDIRECTION", (259.27, 3737.54, 1254.17), (77.89, 78.52, 78.22)),
        ("SAMMAGNITUDE", (93.54, 114.01, 373.49), (78.73, 79.23, 77.94)),
    )

    @pytest.mark.parametrize(("column", "metric"), [(1, SHARPNESS), (2, "test_acc")])
    def test_by_the_prose(self, column, metric):
        table = {
            (row[0], rho): value
            for row in self.PROSE
            for rho, value in zip(("0.1", "0.2", "0.4"), row[column], strict=True)
        }
        assert published("empirical-sharpness", metric) == table

    @pytest.mark.parametrize("metric", [SHARPNESS, "test_acc"])
    def test_by_the_code_the_two_names_are_swapped(self, metric):
        swap = {"SAM": "SAM", "SAMDIRECTION": "SAMMAGNITUDE", "SAMMAGNITUDE": "SAMDIRECTION"}
        prose = published("empirical-sharpness", metric)
        code = published("empirical-sharpness-code", metric)
        assert {(swap[label], rho): value for (label, rho), value in prose.items()} == code

    def test_the_accuracies_are_those_of_the_other_study(self):
        whole = published("empirical", "test_acc")
        for (label, rho), value in published("empirical-sharpness", "test_acc").items():
            assert whole[label, "resnet18", rho] == value

    def test_sgdhess(self):
        assert published("empirical-sgdhess", SHARPNESS) == {
            ("SGD",): 207.06,
            ("SGDHESS", "0.05"): 192.45,
            ("SGDHESS", "1"): 151.62,
            ("SGDHESS", "2"): 138.62,
        }

    @pytest.mark.parametrize("name", ["empirical-sharpness", "empirical-sharpness-code", "empirical-sgdhess"])
    def test_forty_batches_of_the_training_batch(self, name):
        spec = read_study(name)
        view = spec.measure
        assert (view.what, view.split, view.mode, view.batch) == ("published", "train", "eval", 256)
        assert view.examples == 40 * view.batch
        assert {config.batch_size for config in configs(name).values()} == {256}
        small = read_study(name, demo=True).measure
        assert small.examples == 40 * small.batch <= 900
        assert any("is our reading of its code" in note for note in spec.notes)


def test_the_published_numbers_of_imagenet_are_those_of_the_rebuttal():
    spec = read_study("bisam-imagenet")
    for metric, numbers in {
        "test_acc": {"SAM": (66.62, 0.43), "BiSAM (tanh)": (66.64, 0.80), "BiSAM (-log)": (66.71, 0.21)},
        "test_top5": {"SAM": (87.68, 0.25), "BiSAM (tanh)": (87.68, 0.46), "BiSAM (-log)": (87.75, 0.19)},
    }.items():
        assert {one.label: (one.value, one.spread) for one in spec.published if one.metric == metric} == numbers
    for config in configs("bisam-imagenet").values():
        assert (config.model, config.epochs, config.batch_size) == ("resnet50", 90, 512)
        assert 3 * config.train_size - 1_281_167 in range(3)
    rows = grid_points(read_study("bisam-imagenet", ["train_size=none"]))
    assert not any(row.at(one.where) for row in rows for one in spec.published), "all of ImageNet is another table"


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "bisam-imagenet"])
def test_nothing_is_quoted_that_could_not_be_read(name):
    """Numbers are published for the README of the empirical study, a radar chart, and one rebuttal alone."""
    spec = read_study(name)
    known = name.startswith("empirical") or name in ("vasso-cifar10", "vasso-cifar100")
    assert bool(spec.published) == (known and name != "empirical-ratio")


def test_the_ratio_has_its_classes_and_no_number_without_a_row():
    spec = read_study("empirical-ratio")
    assert not spec.published and any("above 50 % in the beginning and 85 % later" in note for note in spec.notes)
    assert {"ratio_larger@first", "ratio_larger@last"} < set(spec.columns)
    assert len([column for column in spec.columns if column.startswith("ratio_") and "larger" not in column]) == 4
    config = configs("empirical-ratio")["SAM rho=0.2"]
    assert spec.record.log_every * config.epochs == Sizes().updates(config), "the last update of each epoch"


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_diagnostics_are_there_to_be_averaged(name):
    """Each demo has ten lines or more, so that first and last are of different ones."""
    for demo in (False, True):
        spec = read_study(name, demo=demo)
        assert spec.record.diagnostics
        for config in configs(name, demo=demo).values():
            assert Sizes().updates(config) >= 20 * spec.record.log_every


def test_fundamental_with_momentum_has_the_same_49_configurations():
    found = collections.Counter()
    for name in FUNDAMENTAL:
        plain, heavy = configs(name), configs(f"{name}-momentum")
        assert plain.keys() == heavy.keys()
        found[name] = len(heavy)
        for label, config in heavy.items():
            other = plain[label]
            assert (config.momentum, other.momentum, config.model_params) == (0.9, 0, {})
            same = ("lr", "schedule", "as_coded", "model", "weight_decay", "batch_size", "rho", "statistics", "epochs")
            assert all(getattr(config, key) == getattr(other, key) for key in same)
        assert read_study(f"{name}-momentum").baseline == read_study(name).baseline
    assert sum(found.values()) == 49


class TestDataOfTheUser:
    @pytest.mark.parametrize("name", [*IMAGENET, *TRANSFER])
    def test_costs_are_known_without_data_and_the_folders_are_told(self, name, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        spec = read_study(name)
        assert all(Sizes().cost(config) > 0 for config in configs(name).values())
        assert any("data_dir=FOLDER" in note for note in spec.notes)
        assert any("not available" in note for note in spec.notes)

    @pytest.mark.parametrize("name", IMAGENET)
    def test_imagenet(self, name):
        for config in configs(name).values():
            assert (config.data, config.val_share, config.epochs) == ("imagenet", 0.01, 90)

    def test_the_vit_is_vit_s_32_with_adamw(self):
        found = configs("imagenet-vit")
        assert {config.optimizer for config in found.values()} == {"adamw"}
        assert {config.model for config in found.values()} == {"vit"}
        assert found["SAM"].model_params == {"patch": 32, "depth": 12, "width": 384, "heads": 6}
        assert found["AdamW"].method == "sgd" and found["VaSSO"].params == {"direction.theta": 0.9}
        assert {config.optimizer for config in configs("imagenet-vit", demo=True).values()} == {"adamw"}

    @pytest.mark.parametrize(("name", "classes", "images"), [("flowers", 102, 2040), ("pets", 37, 3680)])
    def test_fine_tuning(self, name, classes, images):
        for config in configs(f"finetune-{name}").values():
            assert config.model == "timm:vit_base_patch16_224" and config.model_params == {"pretrained": True}
            assert (config.label_smoothing, config.smoothing, config.statistics) == (0.1, "others", "half")
            assert abs(Sizes().updates(config) - 500) < 5
            known = DATASETS[config.data]
            assert (known.classes, known.train, known.shape) == (classes, images, (3, 224, 224))


class TestOneGradient:
    def test_arms_and_their_cost(self):
        rows = grid_points(read_study("one-gradient", demo=True))
        cost = {row.arm: Sizes().cost(row.config) for row in rows}
        assert cost["SGD, twice as long"] == cost["SAM"] == 2 * cost["SGD"]
        assert cost["stale-gradient SAM"] == cost["Momentum-SAM"] == cost["SGD"]
        for arm in ("SAM every 5th step", "LookSAM", "AE-SAM"):
            assert cost["SGD"] < cost[arm] <= 1.5 * cost["SGD"]

    def test_every_radius_is_chosen(self):
        for demo in (False, True):
            spec = read_study("one-gradient", demo=demo)
            assert spec.choose == ("rho",)
            count = collections.Counter(row.arm for row in grid_points(spec))
            plain = ("SGD", "SGD, twice as long")
            assert all(count[arm] == (1 if arm in plain else 2 if demo else 3) for arm in count)


def test_sharpness_is_measured_at_the_radius_that_was_trained_with():
    for demo in (False, True):
        spec = read_study("vasso-sharpness", demo=demo)
        record, end = spec.record, spec.measure
        assert (record.measure_m, record.measure_rho) == (end.settings.m, end.settings.rho)
        assert record.measure_examples == end.examples and record.measures in end.what.split(",")
        epochs = {config.epochs for config in configs("vasso-sharpness", demo=demo).values()}
        assert all(count % record.measure_every == 0 and count >= 6 * record.measure_every for count in epochs)
        assert {config.rho for config in configs("vasso-sharpness", demo=demo).values()} == {spec.measure.settings.rho}
        assert spec.measure.examples == 8 * spec.measure.settings.m
