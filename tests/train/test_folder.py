"""The folder of one run: what is written when, and what is read back of it."""

import dataclasses
import json

import pytest
import torch

from flatmin.data.dataset import as_data
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.inputs import Inputs
from flatmin.train.result import Epoch, Result
from tests import user_side

CONFIG = RunConfig(method="sam", rho=0.1, epochs=2)
LINE = Epoch(
    epoch=1, lr=0.1, rho=0.1, train_loss=1.0, val_acc=50.0, val_loss=1.0, test_acc=None, memorised=None, seconds=0.1
)
RESULT = Result(
    method="sam",
    rho=0.1,
    gradient_evaluations=2.0,
    seed=0,
    epochs=2,
    noise=0.0,
    trained=True,
    last={"epoch": 2, "test_acc": 90.0, "val_acc": 91.0, "memorised": None, "train_loss": 0.1},
    best={"epoch": 1, "test_acc": 89.0, "val_acc": 92.0},
    train_ce=0.1,
    lambda_max=None,
    seconds=0.5,
)


@pytest.fixture
def finished(tmp_path):
    """A finished run."""
    folder = RunFolder(tmp_path / "run")
    folder.begin(CONFIG, {"threads": 1}, Inputs.of(as_data(user_side.data(), "clouds")), label="sam")
    for epoch in (1, 2):
        folder.add_line(dataclasses.replace(LINE, epoch=epoch))
    folder.keep({"weight": torch.ones(2)})
    folder.finish(RESULT, label="sam")
    return folder


def test_what_was_written_is_read_back(finished):
    assert finished.begun and finished.finished
    assert finished.config() == (CONFIG, {"label": "sam"})
    assert finished.lines(expected=2) == [LINE, dataclasses.replace(LINE, epoch=2)]
    assert finished.result() == RESULT
    assert torch.load(finished.weights, weights_only=True)["weight"].tolist() == [1, 1]
    assert json.loads((finished.path / "env.json").read_text()) == {"threads": 1}


def test_nothing_is_there_before_it_begins(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert not folder.begun and not folder.finished
    assert not folder.path.exists()


def test_beginning_again_removes_the_old_result_first(finished):
    finished.add_step({"step": 1})
    finished.add_measures({"step": 1})
    finished.record_nonfinite({"step": 1})
    finished.begin(CONFIG, {})
    assert not finished.finished and not finished.weights.exists()
    assert finished.lines() == finished.steps() == finished.measures() == []
    assert sorted(p.name for p in finished.path.iterdir()) == ["config.json", "env.json", "metrics.jsonl"]


def test_a_result_that_is_not_there_and_one_of_another_run(finished):
    with pytest.raises(ValueError, match="belongs to another run or version"):
        finished.result(lambda found: found["label"] == "sgd")
    with pytest.raises(ValueError, match="no entry 'key'"):
        finished.result(lambda found: found["key"] == "x")
    (finished.path / "result.json").unlink()
    with pytest.raises(FileNotFoundError):
        finished.result()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has 0 epochs, expected 2"),
        ('{"epoch": 1', "Expecting ',' delimiter"),
        ('{"epoch": 1}\n', "metrics.jsonl: .*missing"),
    ],
)
def test_lines_that_are_no_epochs(finished, text, words):
    (finished.path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        finished.lines(expected=2)


def test_rewinding_takes_back_what_came_after_a_checkpoint(finished):
    for step in (5, 10, 15):
        finished.add_step({"step": step, "loss": 0.5})
    finished.add_measures({"step": 15})
    with (finished.path / "steps.jsonl").open("a") as file:
        file.write('{"step": 2')
    finished.rewind([LINE], 10)
    assert finished.lines() == [LINE]
    assert [one["step"] for one in finished.steps()] == [5, 10] and finished.measures() == []
    finished.add_step({"step": 15, "loss": 0.5})
    assert [one["step"] for one in finished.steps()] == [5, 10, 15], "the line that was cut short is gone"


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"method": "sa', "truncated or damaged"), ("{}", "method"), ('{"method": "sam", "epochs": 0}', "epochs")],
)
def test_a_configuration_that_cannot_be_read(finished, content, words):
    (finished.path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="cannot be read: ") as error:
        finished.config()
    assert words in str(error.value)
