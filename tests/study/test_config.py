import pytest

from flatmin.methods import METHODS
from flatmin.study.arms import arms, candidates
from flatmin.study.config import DEFAULT_METHODS, CompareConfig, load


def rho(config):
    return {arm.label: arm.config.rho for arm in arms(config)}


def test_the_default():
    config = load()
    assert config.methods == DEFAULT_METHODS == ("sgd", "sam", "vasso") and config.seeds == 5
    assert config.noise_share == 0.4
    assert [arm.label for arm in arms(config)][-3:] == ["sgd + weight decay", "sgd, early stop", "sgd, 2x epochs"]
    by_label = {arm.label: arm.config for arm in arms(config)}
    assert by_label["sgd, early stop"].epochs == 15
    assert by_label["sgd, 2x epochs"].epochs == 60
    assert by_label["sgd + weight decay"].weight_decay == config.strong_weight_decay
    assert by_label["sgd"].rho is None
    assert len(candidates(config)) == 6


def test_options_come_before_words_before_the_preset():
    config = load("digits", ["epochs=5", "seeds=4"], seeds=2, noise=None)
    assert (config.epochs, config.seeds) == (5, 2)


def test_radii():
    config = load("digits", ["methods=sgd,sam,asam,vasso+asam,usam,fsam+bisam-log", "rho.sam=0.3"])
    found = rho(config)
    assert found["sam"] == 0.3
    # A composition without an entry of its own takes that of its geometry; USAM has none and takes its default.
    assert found["vasso+asam"] == config.rho["asam"]
    assert found["fsam+bisam-log"] == 0.3
    assert found["usam"] not in config.rho.values()
    assert set(rho(load("digits", ["methods=sam,vasso", "rho=0.07", "baselines=false"])).values()) == {0.07}


def test_a_factor_is_no_radius():
    """sgdhess never leaves w: what was chosen for lengths in the same geometry says nothing about it."""
    assert rho(load("digits", ["methods=sam,sgdhess"]))["sgdhess"] == 0.05
    assert rho(load("digits", ["methods=sam,sgdhess", "rho.sgdhess=0.5"]))["sgdhess"] == 0.5
    assert rho(load("digits", ["methods=sam,sgdhess", "rho=0.07"]))["sgdhess"] == 0.07


def test_all_is_every_name_of_the_table():
    config = load("digits", ["methods=all,vasso+asam", "baselines=false"])
    assert config.methods == (*METHODS, "vasso+asam") and config.skip_unfit
    assert load("digits", methods=("all",)).methods == tuple(METHODS)
    assert not load("digits").skip_unfit
    assert {arm.label for arm in arms(load("digits", ["methods=all", "micro_batches=8"]))} >= set(METHODS)
    assert {arm.config.micro_batches for arm in arms(load("digits", ["methods=sam", "micro_batches=8"]))} == {8}


def test_ones_own_model_or_data_do_not_inherit_the_presets_radii():
    found = rho(load("digits", ["methods=sam,asam"], data="some.module:function"))
    assert (found["sam"], found["asam"]) == (0.05, 0.5)
    assert load("digits", data="some.module:function").noise_share == 0
    assert load("digits", ["rho.sam=.1"], model="some.module:function").rho == {"sam": 0.1}


def test_parameters_go_to_the_methods_that_have_them():
    config = load("digits", ["methods=sam,vasso,vasso+asam", "theta=0.5"])
    found = {arm.label: arm.config.params for arm in arms(config)}
    assert found["sam"] == {}
    assert found["vasso"] == found["vasso+asam"] == {"direction.theta": 0.5}
    qualified = load("digits", ["methods=vasso,fsam", "direction.theta=0.5"])
    assert arms(qualified)[0].recipe.direction.theta == 0.5


def test_an_axis_without_tune_makes_rows():
    config = load("digits", ["methods=sgd,sam,vasso", "rho=.1,.2", "theta=.8,.9", "baselines=false"])
    assert [c.label for c in candidates(config)] == [
        "sgd",
        "sam rho=0.1",
        "sam rho=0.2",
        "vasso rho=0.1 theta=0.8",
        "vasso rho=0.1 theta=0.9",
        "vasso rho=0.2 theta=0.8",
        "vasso rho=0.2 theta=0.9",
    ]


def test_axes_of_one_method_and_of_the_run():
    config = load("digits", ["methods=sam,asam", "rho=.1,.2", "rho.asam=1,2,4", "lr=.05,.1", "tune=true"])
    found = [(c.label, dict(c.values)) for c in candidates(config)]
    assert sum(label == "sam" for label, _ in found) == 4
    assert sum(label == "asam" for label, _ in found) == 6
    assert ("asam", {"rho": 4.0, "lr": 0.05}) in found
    # The baselines take the general axis and one over what they regularise by.
    assert ("sgd + weight decay", {"lr": 0.05, "weight_decay": 0.02}) in found


def test_tune_without_axes():
    found: dict[str, list[dict[str, float]]] = {}
    for candidate in candidates(load("digits", ["methods=sgd,sam,asam"], tune=True)):
        found.setdefault(candidate.label, []).append(dict(candidate.values))
    config = load()
    assert found["sgd"] == [{}]
    assert [point["rho"] for point in found["sam"]] == [f * config.rho["sam"] for f in (0.5, 1, 2)]
    assert [point["weight_decay"] for point in found["sgd + weight decay"]][2] == config.strong_weight_decay
    assert [point["epochs"] for point in found["sgd, early stop"]] == [10, 15, 20]
    assert found["sgd, 2x epochs"] == [{}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epoch=3"], "unknown option 'epoch'; did you mean 'epochs'"),
        (["thta=.8"], "unknown option 'thta'; did you mean 'theta'"),
        (["theta=.8", "methods=sam"], "unknown option 'theta'"),
        (["methods=sam,vaso"], "unknown method 'vaso'; did you mean 'vasso'"),
        (["methods=asam+usam"], "'asam' and 'usam' both set the geometry"),
        (["methods=sam,sam"], "the method 'sam' is listed twice"),
        (["rho.vaso=.1"], "rho.vaso: no such method here; did you mean 'rho.vasso'"),
        (["rho=big"], "rho=big is not a number"),
        (["rho=-1"], "rho must be at least 0, got -1.0"),
        (["rho=nan"], "rho must be at least 0, got nan"),
        (["rho=.1,.1"], "rho=.1,.1 names a value twice"),
        (["rho="], "rho= has no value"),
        (["seeds=0"], "seeds must be at least 1"),
        (["theta=2"], "theta must be in"),
        (["methods=sgd", "rho=.1,.2"], "none of the methods has 'rho' to choose"),
        (["methods=", "baselines=false"], "nothing to compare"),
        (["noise=1.5"], "noise must be at least 0 and at most 1"),
        (["early_share=0"], "early_share must be above 0"),
    ],
)
def test_mistakes_are_one_sentence(words, message):
    with pytest.raises(ValueError, match=message):
        candidates(load("digits", words))


def test_a_radius_for_sgd_only_changes_nothing():
    assert rho(load("digits", ["methods=sgd", "rho=.1", "baselines=false"])) == {"sgd": None}


def test_presets_are_valid():
    assert isinstance(load("smoke"), CompareConfig)
    assert candidates(load("smoke"))
