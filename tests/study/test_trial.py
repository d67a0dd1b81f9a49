"""What is refused before the first run of a study: data that are missing, and code that fails at its first update."""

import sys
from dataclasses import replace

import pytest
import torch

from flatmin.methods import METHODS
from flatmin.study import trial
from flatmin.study.code import Contents, code_of
from flatmin.study.dimensions import read_dimension
from flatmin.study.plan import plan
from flatmin.study.reading import read_study
from flatmin.study.search import search
from flatmin.study.studies import study
from flatmin.study.trial import check_runs, try_out
from flatmin.train.config import RunConfig

CONFIG = RunConfig(method="sam", rho=0.1, epochs=2, batch_size=25, model="conv")
OWN = """
from dataclasses import dataclass
import torch
from flatmin.methods import Direction, Method

@dataclass(frozen=True, kw_only=True)
class Breaks(Direction):
    def __call__(self, g, state, c):
        return [1 / 0 * x for x in g], {}

METHODS = {"breaks": Method(name="breaks", title="Late", parts=(Breaks(),), formula="g / 0", paper="mine")}

class Net(torch.nn.Linear):
    def forward(self, x):
        return self.wieght @ x

def net():
    return Net(6, 3)

def data():
    return open("nowhere.csv").read()
"""
STUDY = """
title = "Two"
train = "smoke"
seeds = [0, 1]
[settings]
device = "cpu"
epochs = 1
[[arms]]
label = "SGD"
method = "sgd"
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of a user's own, in which everything fails when it is first called."""
    (tmp_path / "own_failing.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_failing"
    sys.modules.pop("own_failing", None)


def line(text):
    return OWN.splitlines().index(text) + 1


def settings(tmp_path, *words, text=STUDY):
    (tmp_path / "two.toml").write_text(text)
    return read_study(str(tmp_path / "two.toml"), words)


def test_every_method_takes_its_first_update(monkeypatch):
    """What can run is not refused, and what is too slow is named.

    Of the methods, sam-on needs normalisation layers, imbsam a loop that knows the tail, and bsam a bare base.
    """
    configs = [replace(CONFIG, method=name, rho=None) for name in METHODS if name not in ("sam-on", "imbsam", "bsam")]
    configs.append(replace(CONFIG, method="bsam", rho=None, momentum=0.0, weight_decay=0.0))
    scheduled = dict(schedule="multistep", schedule_unit="step", warmup=0.2, milestones=(1,), optimizer="sgd")
    configs += [replace(CONFIG, **scheduled), replace(CONFIG, precision="bf16", accumulate=5, ema=0.9, compile=True)]
    before = torch.get_rng_state()
    assert try_out(configs) == [] and torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(trial, "_MOST", 0.0)
    (note,) = try_out(configs)  # two differ in their schedule alone, and three are named
    assert "about a second or more here): " in note and f" and {len(configs) - 1 - 3} more." in note


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            dict(method="breaks", plugins=("own_failing",)),
            ("ZeroDivisionError: ", "        return [1 / 0 * x for x in g], {}"),
        ),
        (dict(model="own_failing:net", data="tests.user_side:data"), ("wieght", "        return self.wieght @ x")),
        (dict(data="own_failing:data"), ("nowhere.csv", None)),
        (dict(batch_size=10_000), ("batch_size=10000 is larger than the", None)),
    ],
)
def test_what_would_fail_in_every_run_is_refused_in_a_sentence(own, changes, why):
    with pytest.raises(ValueError, match="no run was started") as refused:
        check_runs([replace(CONFIG, **changes)], Contents())
    text = str(refused.value)
    assert why[0] in text and "\n" not in text
    assert why[1] is None or f"(own_failing.py, line {line(why[1])})" in text


def test_a_study_and_a_search_without_their_data_start_nothing(own, tmp_path):
    spec = settings(tmp_path, "data=cifar10", f"data_dir={tmp_path}")
    words = rf"data=cifar10 cannot be read in data_dir={tmp_path}, .*Set data_dir=FOLDER, or add --download\.$"
    todo = plan(spec, tmp_path / "out")
    with pytest.raises(ValueError, match=words):
        study(todo, workers=0, on_event=pytest.fail)
    with pytest.raises(ValueError, match=words):
        search(spec, [read_dimension("lr=0.1..1")], budget=5, out=tmp_path / "out", workers=0, on_event=pytest.fail)
    assert not list((tmp_path / "out" / "runs").iterdir())
    elsewhere = [replace(CONFIG, data="own_failing:data"), replace(CONFIG, data="images", data_dir=str(tmp_path))]
    assert check_runs([run.config for run in todo.missing] + elsewhere, todo.contents, here=False) == []


def test_a_plugin_counts_for_the_methods_that_it_brings(own, tmp_path):
    configs = [replace(CONFIG, method=name, rho=None, plugins=(own,)) for name in ("sgd", "breaks", "breaks+asam")]
    configs += [replace(CONFIG, model=f"{own}:net", data="tests.user_side:data")]
    before = [code_of(config) for config in configs]
    (tmp_path / "own_failing.py").write_text(OWN + "# changed\n")
    assert [code_of(config) == was for config, was in zip(configs, before, strict=True)] == [True, False, False, False]
