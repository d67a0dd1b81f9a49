"""Search at equal cost: budgets, replays, what is searched, and the study that follows."""

import dataclasses
import json
import tomllib

import pytest

from flatmin.study import pool
from flatmin.study.dimensions import Dimension, read_dimension, read_overrides
from flatmin.study.events import Planned, RunDone, Warned
from flatmin.study.expand import grid_points
from flatmin.study.reading import read_study
from flatmin.study.search import BATCH, SearchResult, search
from flatmin.study.writing import FRESH, best_study

pytest.importorskip("optuna", reason="the extra search is not installed")

STUDY = """
title = "Three clouds"
train = "smoke"
seeds = [0]
baseline = "SGD"
[settings]
data = "tests.user_side:data"
model = "tests.user_side:net"
epochs = 2
batch_size = 50
device = "cpu"
[[arms]]
label = "SGD"
method = "sgd"
[[arms]]
label = "SAM"
method = "sam"
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "clouds.toml"
    path.write_text(STUDY, encoding="utf-8")
    return read_study(str(path))


def run(spec, tmp_path, *words, budget=20, events=None, workers=0):
    dimensions = [read_dimension(word) for word in words]
    tell = None if events is None else events.append
    return search(spec, dimensions, budget=budget, out=tmp_path / "out", workers=workers, on_event=tell)


class TestWords:
    def test_forms(self):
        assert read_dimension("lr=0.01..1") == Dimension(key="lr", low=0.01, high=1.0)
        assert read_dimension("lr=1e-3..0.1").log and not read_dimension("momentum=0.5..0.95").log
        assert not read_dimension("weight_decay=0..1e-3").log
        assert read_dimension("batch_size=16..64").whole
        assert read_dimension("batch_size=32,64").values == ("32", "64")

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("lr=0.1", "there is nothing to search"),
            ("lr=1..0.1", "write the smaller end first"),
            ("lr=a..b", "is not an interval of numbers"),
            ("lr=0.1..inf", "write the smaller end first"),
            ("epochs=1.5..3", "epochs must have whole numbers as ends"),
            ("lr", "is not a setting"),
        ],
    )
    def test_others_are_refused(self, word, message):
        with pytest.raises(ValueError, match=message):
            read_dimension(word)


def test_every_arm_spends_the_same_budget_so_sam_has_half_the_trials(spec, tmp_path):
    events = []
    sgd, sam = run(spec, tmp_path, "lr=0.01..1", "rho=0.01..0.5", budget=20, events=events)
    assert (len(sgd.trials), len(sam.trials)) == (10, 5) and sgd.spent == sam.spent == 20
    assert {tuple(trial.settings) for trial in sgd.trials} == {("lr",)}
    assert {tuple(trial.settings) for trial in sam.trials} == {("lr", "rho")}
    for trial in (*sgd.trials, *sam.trials):
        assert 0.01 <= float(trial.settings["lr"]) <= 1
        assert all(len(value.replace(".", "").lstrip("0")) <= 3 for value in trial.settings.values())
    assert [event.text for event in events if isinstance(event, Warned)] == ["SGD has no rho to search."]
    assert next(event for event in events if isinstance(event, Planned)).runs == 15
    assert sgd.best.score == max(trial.score for trial in sgd.trials) > 40


def test_a_call_again_replays_and_a_larger_budget_goes_on(spec, tmp_path):
    first = run(spec, tmp_path, "lr=0.01..1", budget=12)
    events = []
    again = run(spec, tmp_path, "lr=0.01..1", budget=12, events=events)
    assert [found.trials for found in again] == [found.trials for found in first]
    assert not any(isinstance(event, RunDone) for event in events)
    more = run(spec, tmp_path, "lr=0.01..1", budget=24, events=events)
    whole = BATCH * (len(first[0].trials) // BATCH)  # the last, cut batch is asked for again
    assert more[0].trials[:whole] == first[0].trials[:whole] and len(more[0].trials) == 12
    done = {event.run for event in events if isinstance(event, RunDone)}
    assert 0 < len(done) < sum(len(found.trials) for found in more)


def test_processes_find_the_same(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "START", "fork")
    spec = dataclasses.replace(spec, arms=spec.arms[:1])  # each arm starts processes of its own
    here = run(spec, tmp_path / "a", "lr=0.01..1", budget=8)
    there = run(spec, tmp_path / "b", "lr=0.01..1", budget=8, workers=2)
    assert len(here[0].trials) == 4
    assert [found.trials for found in here] == [found.trials for found in there]


def test_several_seeds_a_trial_cost_as_many(spec, tmp_path):
    sgd, _ = run(dataclasses.replace(spec, seeds=(0, 1)), tmp_path, "lr=0.1,0.2", budget=9)
    assert len(sgd.trials) == 2 and sgd.spent == 8
    assert {trial.settings["lr"] for trial in sgd.trials} <= {"0.1", "0.2"}


def test_a_trial_that_diverges_counts_as_nothing_right(spec, tmp_path):
    sgd, _ = run(spec, tmp_path, "lr=1e20..2e20", budget=4)
    assert [trial.score for trial in sgd.trials] == [0.0, 0.0]


def test_an_arm_of_several_rows_is_refused_unless_one_is_named(tmp_path):
    path = tmp_path / "clouds.toml"
    path.write_text(STUDY + "[axes]\nweight_decay = [0, 0.01]\nlr = [0.1, 0.2]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"SGD has 2 rows to search; give one value .* e.g. weight_decay=0"):
        run(read_study(str(path)), tmp_path, "lr=0.01..1", budget=8)
    spec = read_study(str(path), ["weight_decay=0.01", "epochs=1"])
    found = run(spec, tmp_path, "lr=0.01..1", budget=4)
    assert [one.grid_point.label for one in found] == ["SGD", "SAM"]
    path.write_text(best_study(spec, [read_dimension("lr=0.01..1")], found, 4), encoding="utf-8")
    for point in grid_points(read_study(str(path))):
        assert (point.config.weight_decay, point.config.epochs) == (0.01, 1), "what was searched is what is run"


def test_what_is_given_with_other_values_does_not_win_over_the_search(tmp_path):
    path = tmp_path / "clouds.toml"
    given = '[[given]]\nmethod = ["sgd"]\nset = { lr = 0.05, momentum = 0.5 }\n'
    path.write_text(STUDY + given, encoding="utf-8")
    spec = read_study(str(path))
    sgd, _ = run(spec, tmp_path, "lr=0.2..0.5", budget=4)
    runs = list((tmp_path / "out" / "runs").glob("sgd-*"))
    settings = [json.loads((one / "config.json").read_text()) for one in runs]
    assert {str(one["lr"]) for one in settings} == {trial.settings["lr"] for trial in sgd.trials}
    assert {one["momentum"] for one in settings} == {0.5}


def test_the_test_part_is_not_searched_on(spec, tmp_path):
    spec = dataclasses.replace(spec, settings={**spec.settings, "train_on_val": "true", "selection": "last"})
    with pytest.raises(ValueError, match="train_on_val=true validates on the test part"):
        run(spec, tmp_path, "lr=0.2..0.5", budget=4)


def test_which_words_are_searched():
    words = ["lr=.1..1", "seed=0..2", "data_dir=../data", "milestones=3,5", "batch_size=16,32", "epochs=3"]
    found, rest = read_overrides(words)
    assert [one.key for one in found] == ["lr", "batch_size"]
    assert rest == ["seed=0..2", "data_dir=../data", "milestones=3,5", "epochs=3"]


@pytest.mark.parametrize(
    ("words", "budget", "message"),
    [
        ((), 9, "there is nothing to search"),
        (("lr=0.1..1", "lr=0.2..0.3"), 9, "lr is searched twice"),
        (("log_every=1..5",), 9, "log_every cannot be searched"),
        (("lrr=0.1..1",), 9, "no arm has 'lrr' to search; did you mean 'lr'"),
        (("lr=0.1..1",), 3, "a trial of SAM costs 4 epochs of plain training, more than the budget of 3"),
    ],
)
def test_what_cannot_be_searched(spec, tmp_path, words, budget, message):
    with pytest.raises(ValueError, match=message):
        run(spec, tmp_path, *words, budget=budget)
    assert not list(tmp_path.glob("out/runs/*"))


def test_what_was_found_is_a_study_over_other_seeds(spec, tmp_path):
    dimensions = [read_dimension("lr=0.01..1"), read_dimension("rho=0.01..0.5")]
    found = search(spec, dimensions, budget=8, out=tmp_path / "out", workers=0)
    path = tmp_path / "found.toml"
    path.write_text(best_study(spec, dimensions, found, 8), encoding="utf-8")
    then = read_study(str(path))
    assert then.seeds == tuple(range(1, 1 + FRESH)) and then.baseline == "SGD"
    rows = {point.arm: point.config for point in grid_points(then)}
    for one in found:
        config, settings = rows[one.grid_point.label], one.best.settings
        assert config.lr == float(settings["lr"]) and config.rho == (
            float(settings["rho"]) if "rho" in settings else None
        )
        assert config.epochs == 2 and config.model == "tests.user_side:net"


def test_text_is_quoted(spec, tmp_path):
    title = 'A "title" \\ of ρ and 🙂'
    spec = dataclasses.replace(spec, title=title, arms=(dataclasses.replace(spec.arms[0], label='"'),), baseline='"')
    found = [SearchResult(grid_point=point) for point in grid_points(spec)]
    table = tomllib.loads(best_study(spec, [read_dimension("lr=0.1..1")], found, 1))
    assert table["title"] == f"{title}, searched" and table["arms"][0]["label"] == '"'
