"""Two kinds of parts and some classes had other names before: settings, run folders and checkpoints still have them."""

import copy
import json

import pytest
import torch

import flatmin
from flatmin.cli.train import default_name
from flatmin.methods import FORMER_KINDS, KINDS, NStep, Part, compose, current_word, former_word
from flatmin.study.comparison import comparison
from flatmin.study.expand import grid_points
from flatmin.study.reading import read_study
from flatmin.train.config import RunConfig, differences, identity
from flatmin.train.folder import RunFolder
from flatmin.train.preset import load_run

STUDY = """
title = "Former words"
train = "smoke"
seeds = [0]

[[arms]]
label = "every k"
method = "every-k"

[axes]
"when.k" = [2, 3]
"""


def test_parameters_are_taken_under_both_words():
    for former, present in FORMER_KINDS.items():
        assert present in KINDS and current_word(former) == current_word(present) == present
        assert former_word(current_word(f"{former}.k")) == f"{former}.k" and former_word("mask.k") == "mask.k"
    assert compose("looksam", **{"when.k": 3}) == compose("looksam", **{"schedule.k": 3}) == compose("looksam", k=3)
    assert compose("n-step", points={"n": 2}) == compose("n-step", points=NStep(n=2)) == compose("n-step", n=2)
    assert compose("every-k+n-step", when={"k": 2}, **{"points.n": 4}).qualified("when.k") == ["schedule.k"]
    with pytest.raises(ValueError, match="when must be a part or a dict of its parameters, got 3"):
        compose("every-k", when=3)
    with pytest.raises(TypeError, match="must not be named 'when'"):
        type("Bad", (Part,), {"__annotations__": {"when": float}, "when": 0.1})


def test_settings_of_runs_comparisons_and_studies_are_taken_under_both_words(tmp_path):
    words = ["method=every-k", "when.k=3"]
    run = load_run("smoke", words)[0]
    assert run.params == {"schedule.k": 3} and run == load_run("smoke", ["method=every-k", "schedule.k=3"])[0]
    (row,) = grid_points(comparison("smoke", ["when.k=3"], methods=("every-k",)))
    assert row.config.params == {"schedule.k": 3}
    (tmp_path / "mine.toml").write_text(STUDY)
    rows = grid_points(read_study(str(tmp_path / "mine.toml")))
    assert [row.config.params for row in rows] == [{"schedule.k": 2}, {"schedule.k": 3}]
    assert rows[0].setting("when.k") == rows[0].setting("schedule.k") == "2"


def test_a_run_of_an_earlier_version_is_found_and_its_own(tmp_path):
    config = RunConfig(method="every-k", params={"schedule.k": 3})
    stored = json.loads(json.dumps(identity(config))) | {"params": {"when.k": 3}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert RunFolder(tmp_path).config()[0] == config
    assert differences(stored, config) == {}
    assert list(differences(stored | {"params": {"when.k": 4}}, config)) == ["params"]
    # The name that flatmin 0.1.0 has given the folder.
    assert default_name("digits", config, None) == "every-k-digits-s0-d47270f3d4"


FORMER = {
    "looksam": ("when=EveryK, combine=Look", "looksam(when.k=3, when.phase=0, combine.alpha=0.7)"),
    "n-step": ("points=NStep", "n-step(points.n=3, points.step='split')"),
    "ae-sam": ("when=Trigger", "ae-sam(when.delta=0.9, when.start=1.0, when.end=-1.0, when.total=0)"),
    "esam": ("mask=RandomTensors, samples=Sharpest", "esam(mask.beta=0.6, samples.gamma=0.5)"),
    "rho-ramp": ("radius=Ramp", "rho-ramp(radius.start=0.0, radius.end=1.0, radius.total=1000)"),
}


def optimizer(name, **options):
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    criterion = flatmin.Criterion(torch.nn.CrossEntropyLoss())
    opt = flatmin.wrap(
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), name, model=net, criterion=criterion, **options
    )
    x, y = torch.randn(5, 6, 4), torch.randint(3, (5, 6))

    def step(k):
        def closure():
            opt.zero_grad()
            loss = criterion(net(x[k]), y[k])
            loss.backward()
            return loss

        opt.step(closure)

    return net, opt, step


@pytest.mark.parametrize("name", FORMER)
def test_a_checkpoint_with_the_former_words_goes_on_bit_for_bit(name, recwarn):
    options = {"k": 3} if name == "looksam" else {}
    net, opt, step = optimizer(name, **options)
    for k in range(3):
        step(k)
    saved = copy.deepcopy({"net": net.state_dict(), "opt": opt.state_dict()})
    parts, recipe = FORMER[name]
    group = saved["opt"]["param_groups"][0]
    group = {f"flatmin.{former_word(k[8:])}" if k.startswith("flatmin.") else k: v for k, v in group.items()}
    saved["opt"]["param_groups"][0] = {**group, "flatmin.recipe": recipe, "flatmin.parts": parts}
    again, other, go_on = optimizer(name, **options)
    again.load_state_dict(saved["net"])
    other.load_state_dict(saved["opt"])
    for k in (3, 4):
        step(k)
        go_on(k)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert not [w for w in recwarn if "made with" in str(w.message)]
    wrong = {**saved["opt"]["param_groups"][0], "flatmin.parts": parts.replace("=", "=Other")}
    with pytest.raises(ValueError, match="the checkpoint is of recipe"):
        other.load_state_dict({**saved["opt"], "param_groups": [wrong]})


def test_functional_state_with_the_former_words_goes_on():
    def loss(params):
        return (params["w"] ** 2).sum()

    params, state = {"w": torch.tensor([1.0, 2.0])}, None
    for _ in range(2):
        _, _, state = flatmin.value_and_grad(loss, params, recipe="ae-sam", state=state)
    before = {former_word(key): value for key, value in state.items()}
    assert "when.mean" in before and "schedule.mean" in state
    new, old = (flatmin.value_and_grad(loss, params, recipe="ae-sam", state=s)[2] for s in (state, before))
    assert new.keys() == old.keys() and new["schedule.variance"] == old["schedule.variance"]
