"""Studies from presets and words: what is read, what is refused, and the grid points that they expand to."""

import collections
import re

import pytest

from flatmin.study.costs import Sizes
from flatmin.study.expand import grid_points
from flatmin.study.reading import read_study
from flatmin.train.settings import preset_names, read_preset

# Those of `flatmin compare` are small as they are.
NAMES = [name for name in preset_names("study") if "demo" in read_preset(name, "study")]
TINY = """
title = "T"
train = "smoke"
seeds = [0]
[[arms]]
label = "SGD"
method = "sgd"
[[arms]]
label = "SAM"
method = "sam"
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "s.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_the_studies_of_the_package():
    assert NAMES == [
        "bisam-cifar10",
        "bisam-cifar100",
        "bisam-combinations",
        "bisam-imagenet",
        "bisam-misclassified",
        "bisam-noise",
        "cifar-small-methods",
        "cifar-small-noise",
        "cifar-small-precision",
        "cifar-small-sharpness",
        "cifar-small-steps",
        "cifar100-methods",
        "empirical",
        "empirical-code",
        "empirical-ratio",
        "empirical-sgdhess",
        "empirical-sharpness",
        "empirical-sharpness-code",
        "finetune-flowers",
        "finetune-pets",
        "fundamental-cifar10",
        "fundamental-cifar10-momentum",
        "fundamental-cifar100",
        "fundamental-cifar100-momentum",
        "fundamental-tiny",
        "fundamental-tiny-momentum",
        "imagenet-vit",
        "one-gradient",
        "vasso-cifar10",
        "vasso-cifar100",
        "vasso-imagenet",
        "vasso-noise",
        "vasso-sharpness",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_study_and_its_demo_unfold(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for demo in (False, True):
        spec = read_study(name, demo=demo)
        rows, sizes = grid_points(spec), Sizes()
        labels = [row.label for row in rows]
        assert len(set(labels)) == len(labels)
        configs = [config for row in rows for config in row.configs.values()]
        assert len(set(map(repr, configs))) == len(configs), "two rows of the same runs"
        assert all(sizes.cost(config) > 0 for config in configs[:: len(spec.seeds)])
        assert spec.title and spec.source and spec.notes and len(spec.seeds) in (3, 5)
        if demo:
            assert {config.data for config in configs} == {"digits"}
            assert {config.model for config in configs} <= {"conv", "mlp", "vit"}
            assert not spec.published
            samples = sum(sizes.cost(config) * config.batch_size for config in configs)
            assert samples < 4e6 and all(config.epochs <= 60 for config in configs), "minutes on two cores"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_every_published_number_has_one_row_and_a_source(name):
    spec = read_study(name)
    rows = grid_points(spec)
    for one in spec.published:
        assert sum(row.arm == one.label and row.at(one.where) for row in rows) == 1, one
        assert len(one.source) > 10 and (50 < one.value < 100 or one.metric != "test_acc")


def published(name):
    return {(one.label, *one.where.values()): one.value for one in read_study(name).published}


def test_the_two_readings_of_the_empirical_table_differ_by_two_names():
    prose, code = published("empirical"), published("empirical-code")
    assert prose["SAM", "resnet18", "0.1"] == code["SAM", "resnet18", "0.1"] == 79.24
    assert prose["SAMDIRECTION", "resnet34", "0.4"] == code["SAMMAGNITUDE", "resnet34", "0.4"] == 76.38
    assert prose["SAMMAGNITUDE", "resnet34", "0.4"] == code["SAMDIRECTION", "resnet34", "0.4"] == 72.74
    swap = {"SAM": "SAM", "SAMDIRECTION": "SAMMAGNITUDE", "SAMMAGNITUDE": "SAMDIRECTION"}
    assert {(swap[label], *rest): value for (label, *rest), value in prose.items()} == code
    # "??" in the original
    for where in (("SAM", "resnet34", "0.1"), ("SAM", "resnet50", "0.4"), ("SAMMAGNITUDE", "resnet50", "0.1")):
        assert where not in prose
    assert len(prose) == 28


def test_of_vasso_only_what_was_read_off_the_chart_is_printed():
    """The tables themselves are known from memory alone; of them nothing may be quoted."""
    ten, hundred = published("vasso-cifar10"), published("vasso-cifar100")
    assert ten["VaSSO", "wrn28-10"] == 97.52 and ten["SGD", "resnet18"] == 96.25
    assert hundred == {
        ("SAM", "resnet18"): 80.95,
        ("VaSSO", "resnet18"): 81.29,
        ("SGD", "wrn28-10"): 81.7,
        ("SGD", "pyramidnet110"): 83.45,
    }
    assert ("ASAM", "pyramidnet110") not in ten and not any(where[1] == "vgg11-bn" for where in ten)
    for name in ("vasso-cifar10", "vasso-cifar100"):
        assert all("read off" in one.source and one.spread == 0.07 for one in read_study(name).published)


UNREAD = ("bisam", "fundamental", "finetune", "imagenet", "vasso-imagenet", "vasso-n", "vasso-s")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(UNREAD) and name != "bisam-imagenet"])
def test_where_nothing_could_be_read_nothing_is_printed_and_that_is_said(name):
    spec = read_study(name)
    assert not spec.published and any("not available" in note for note in spec.notes)


def test_the_convergence_papers_49_configurations():
    found = collections.Counter()
    for name in ("fundamental-cifar10", "fundamental-cifar100", "fundamental-tiny"):
        rows = grid_points(read_study(name))
        found[name] = len(rows)
        for row in rows:
            config = row.config
            assert (config.momentum, config.batch_size, config.weight_decay, config.rho) == (0, 128, 1e-3, 0.05)
            assert config.model_params == ({} if config.model == "wrn28-10" else {"max_pool": True})
            assert config.statistics == (None if "tiny" in name else "cifar10")
            assert config.as_coded == config.schedule.startswith("diminish")
            assert config.epochs == 200 and config.seed == 42
    assert found == {"fundamental-cifar10": 18, "fundamental-cifar100": 18, "fundamental-tiny": 13}
    assert [row.config.model for row in rows if row.config.schedule == "constant" and row.config.lr == 0.1] == [
        "resnet18"
    ]


def test_bisam_has_its_loss_and_its_scales():
    configs = {row.arm: row.config for row in grid_points(read_study("bisam-cifar100"))}
    assert configs["BiSAM (tanh)"].params["objective.mu"] == 10
    assert {config.rho for config in configs.values()} == {0.1}
    assert {(config.label_smoothing, config.smoothing) for config in configs.values()} == {(0.1, "others")}
    names = [row.config.method for row in grid_points(read_study("bisam-combinations"))]
    assert names == [
        f"{ascent}{objective}"
        for ascent in ("asam", "esam", "micro-sam")
        for objective in ("", "+bisam-tanh", "+bisam-log")
    ]


class TestOverrides:
    def test_one_value_sets_all_runs_and_makes_no_column(self):
        rows = grid_points(read_study("empirical", ["epochs=20", "model=resnet18"]))
        assert len(rows) == 9
        assert {row.config.epochs for row in rows} == {20} and {row.config.model for row in rows} == {"resnet18"}
        assert all(set(row.values) == {"rho"} for row in rows)

    def test_several_values_make_an_axis_in_place_of_the_studys(self):
        rows = grid_points(read_study("empirical", ["rho=.05,.1", "model=resnet18", "lr=0.1,0.05"]))
        assert [tuple(row.values.values()) for row in rows if row.arm == "SAM"] == [
            ("0.05", "0.1"),
            ("0.05", "0.05"),
            ("0.1", "0.1"),
            ("0.1", "0.05"),
        ]

    def test_seeds(self):
        spec = read_study("empirical", ["seed=0..4"])
        assert spec.seeds == (0, 1, 2, 3, 4) and spec.changed == ()
        assert [config.seed for config in grid_points(spec)[0].configs.values()] == [0, 1, 2, 3, 4]

    def test_a_radius_is_for_the_arms_that_have_one(self):
        for words in (["rho=0.1"], ["rho=0.1,0.2"]):
            rows = grid_points(read_study("empirical-sgdhess", words))
            assert rows[0].config.rho is None and rows[0].values == {}
            assert {row.config.rho for row in rows[1:]} <= {0.1, 0.2}

    def test_a_parameter_is_for_the_arms_that_have_it(self):
        rows = grid_points(read_study("vasso-cifar10", ["theta=.2,.4", "model=resnet18"]))
        assert [row.label for row in rows] == ["SGD", "SAM", "ASAM", "Fisher SAM", "VaSSO theta=0.2", "VaSSO theta=0.4"]

    def test_an_arms_own_setting_gives_way_to_words_but_not_to_the_studys_axes(self, write):
        name = write(TINY + "lr = 0.5\n[axes]\nlr = [0.1, 0.2]\n")
        assert [row.label for row in grid_points(read_study(name))] == ["SGD lr=0.1", "SGD lr=0.2", "SAM"]
        assert {row.config.lr for row in grid_points(read_study(name, ["lr=0.3"]))} == {0.3}

    def test_a_list_is_one_value_where_the_field_is_a_list(self):
        spec = read_study("empirical", ["schedule=multistep", "milestones=60,120"])
        assert grid_points(spec)[0].config.milestones == (60, 120)
        rows = grid_points(
            read_study("empirical", ["schedule=multistep", "milestones=60,120/80", "rho=.1", "model=resnet18"])
        )
        assert [row.config.milestones for row in rows[:2]] == [(60, 120), (80,)]

    def test_the_method_may_change_where_arms_differ_by_something_else(self):
        rows = grid_points(read_study("fundamental-cifar10", ["method=vasso", "model=resnet18"]))
        assert {row.config.method for row in rows} == {"vasso"} and len(rows) == 6

    def test_what_was_changed_is_kept(self):
        assert read_study("empirical", ["epochs=20", "seed=1", "epochs=30"]).changed == ("epochs=30",)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["epohcs=3"], "unknown setting 'epohcs'; did you mean 'epochs'?"),
            (["theta=.9"], "no arm has a setting 'theta'"),
            (["epochs=many"], "arm SAM: epochs=many is not a whole number"),
            (["epochs=0"], "epochs must be at least 1, got 0"),
            (["method=sam,vasso"], "method takes one value, got method=sam,vasso"),
            (["method=sam"], "the arms 'SAM' and 'SAMDIRECTION' are identical with method=sam"),
            (["log_every=3"], "log_every is an option of logging and storage"),
            (["model=resnt18"], "unknown model=resnt18; did you mean 'resnet18'?"),
            (["data=cifar1"], "unknown data=cifar1; did you mean 'cifar10'?"),
            (["model=wrn28-10", "model.max_pool=true"], "model=wrn28-10 has no option 'max_pool'"),
            (["seed=a"], "seed=a is not a whole number from 0"),
            (["seed="], "seed= has no value"),
            (["epochs"], "'epochs' is not a setting"),
        ],
    )
    def test_words_that_are_refused(self, words, message):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            grid_points(read_study("empirical", words))
        assert "\n" not in str(error.value)


class TestForm:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.replace('title = "T"', ""), "has no title"),
            (lambda t: t.replace('title = "T"', "title = 3"), "title is not text"),
            (lambda t: t.replace("[0]", "0"), "seeds is not a list"),
            (lambda t: t.replace("[0]", "[]"), "seed= has no value"),
            (lambda t: t.replace("[0]", "[1, 1]"), "seed has the value 1 twice"),
            (lambda t: t.replace("[0]", "[0.5]"), "seed=0.5 is not a whole number"),
            (lambda t: t.replace('"smoke"', '"smok"'), "unknown preset 'smok'; did you mean 'smoke'?"),
            (lambda t: "arm = 1\n" + t, "unknown entry 'arm'; did you mean 'arms'?"),
            (lambda t: t + 'label = "SGD"\n', "is not valid TOML"),
            (lambda t: t.replace('label = "SAM"', 'label = "SGD"'), "the arm 'SGD' exists twice"),
            (lambda t: t.replace('label = "SAM"\n', ""), "an arm has no label"),
            (lambda t: t.replace('method = "sam"', 'method = "sgd"'), "the arms 'SGD' and 'SAM' are identical."),
            (lambda t: 'baseline = "sgd"\n' + t, "the baseline 'sgd' is not an arm"),
            (lambda t: "notes = 'x'\n" + t, "notes is not a list"),
            (lambda t: t + "[axes]\nrho = 0.1\n", "the axis rho is not a list"),
            (lambda t: t + "[axes]\nseed = [1]\n", "write the seeds in the list seeds"),
            (lambda t: t + "[axes]\nrho = [0.1, 0.10]\n", "rho has the value 0.1 twice"),
            (lambda t: t + "[axes]\nlog_every = [1]\n", "log_every is an option of logging"),
            (lambda t: t + "[settings]\nmodel_params = {a = 1}\n", "model_params is a table; write its entries as"),
            (lambda t: t + "[settings]\nepohcs = 1\n", "arm SGD: unknown setting 'epohcs'; did you mean 'epochs'?"),
            (lambda t: t + "axes = 3\n", "axes of 'SAM' is not a table"),
            (lambda t: "arms = 3\n" + t.partition("[[arms]]")[0], "arms is not a list"),
            (lambda t: "arms = [1]\n" + t.partition("[[arms]]")[0], "an entry of arms is not a table"),
            (lambda t: t + "[[given]]\nmodel = 'mlp'\n", "an entry of given needs a key with its values"),
            (lambda t: t + "[[published]]\nlabel = 'SAM'\n", "a published number has no metric"),
        ],
    )
    def test_tables_that_are_refused(self, write, change, message):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            grid_points(read_study(write(change(TINY))))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ("label = 'SAN'", "the label 'SAN', which is not an arm"),
            ("metric = 'acc'", "the unknown metric 'acc' (columns: test_acc, "),
            ("value = '96'", "the value '96' of a published number is not a number"),
            ("rho = 0.3", "a published number is for rho=0.3, which no run has"),
            ("rhho = 0.1", "a published number is for rhho=0.1, which no run has"),
        ],
    )
    def test_published_numbers_that_could_stand_nowhere(self, write, entry, message):
        table = {"label": "'SAM'", "metric": "'test_acc'", "value": "96.0", "source": "'a paper'"}
        key, _, value = entry.partition(" = ")
        lines = "\n".join(f"{k} = {v}" for k, v in (table | {key: value}).items())
        text = f"{TINY}[axes]\nrho = [0.1, 0.2]\n[[published]]\n{lines}\n"
        with pytest.raises(ValueError, match=re.escape(message)):
            read_study(write(text))

    def test_no_demo(self, write):
        with pytest.raises(ValueError, match="has no scaled-down version"):
            read_study(write(TINY), demo=True)

    def test_unknown_study(self):
        with pytest.raises(ValueError, match="unknown preset 'empirica'; did you mean 'empirical'"):
            read_study("empirica")

    def test_settings_keep_every_digit(self, write):
        spec = read_study(write(TINY + "[settings]\nlr = 0.123456789\nweight_decay = 1e-12\n"))
        assert grid_points(spec)[0].config.lr == 0.123456789 and grid_points(spec)[0].config.weight_decay == 1e-12

    def test_a_cell_tells_its_settings(self, write):
        text = TINY.replace('"sam"', '"vasso"') + "theta = 0.80\n[settings]\nmodel = 'resnet20'\n"
        sgd, vasso = grid_points(read_study(write(text)))
        assert vasso.setting("theta") == vasso.setting("direction.theta") == "0.8" and sgd.setting("theta") is None
        assert sgd.setting("rho") is None and vasso.setting("rho") == "0.15"
        assert sgd.setting("model") == "resnet20" and sgd.setting("model.max_pool") is None
        assert sgd.setting("milestones") == "" and sgd.setting("as_coded") == "false"
