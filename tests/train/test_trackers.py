"""Trackers without their packages: what numbers are called, what is refused, and what a failure means."""

import dataclasses
import importlib.util
import math
import sys

import pytest

from flatmin.train.events import Measured, Warned
from flatmin.train.trackers import TRACKERS, Safely, Sink, _installed, make_tracker, scalars, settings
from tests.trackers.story import DIAGNOSTICS, MEASURES, began, ended, ended_epoch, stepped, whole


def test_a_step():
    assert scalars(stepped(4)) == {
        "step/loss": 0.25,
        "step/lr": 0.025,
        "step/rho": 0.1,
        "step/images_per_second": 150.0,
        "step/last_loss": DIAGNOSTICS["loss"],
        "step/loss_perturbed": DIAGNOSTICS["loss_perturbed"],
        "step/cosine": -0.25,
        "step/ratio_larger": 1.0,
    }
    assert scalars(stepped(4, rho=None, seconds=0.0, diagnostics={})) == {"step/loss": 0.25, "step/lr": 0.025}


def test_an_epoch():
    assert scalars(ended_epoch(2)) == {
        "epoch": 2.0,
        "train/lr": 0.1,
        "train/rho": 0.1,
        "train/loss": 1 / 3,
        "train/perturbed_loss": 0.5,
        "train/acc": 61.5,
        "val/acc": 72.0,
        "val/loss": 0.9,
        "train/seconds": 0.6,
        "train/images_per_second": 150.0,
        "train/skipped": 1.0,
    }
    event = ended_epoch(1)
    full = dataclasses.replace(
        event.line, val_top5=90.0, test_acc=60.0, test_top5=88.0, memorised=5.0, peak_memory=2**40, rho=None
    )
    more = scalars(dataclasses.replace(event, line=full))
    assert more["val/top5"] == 90.0 and more["test/acc"] == 60.0 and more["test/top5"] == 88.0
    assert more["train/memorised"] == 5.0 and more["train/peak_memory"] == 2.0**40 and "train/rho" not in more


def test_a_measurement():
    found = scalars(Measured(epoch=1, step=10, values=MEASURES))
    assert found == {f"measure/{name}": value for name, value in MEASURES.items()}


def test_the_end():
    found = scalars(ended())
    assert found["summary/chosen/test_acc"] == 200 / 3 and found["summary/best/val_acc"] == 72.0
    assert found["summary/lambda_max/value"] == 41.5 and found["summary/lambda_max/converged"] == 1.0
    assert found["summary/trained"] == 1.0 and found["summary/train_ce"] == 0.31
    assert "summary/chosen/test_top5" not in found and "summary/chosen/selection" not in found
    assert scalars(ended("a failure")) == {
        "summary/trained": 0.0,
        "summary/seconds": 1.2,
        "summary/gradient_evaluations": 2.0,
    }


def test_the_others_have_no_numbers():
    assert scalars(began()) == scalars(Warned(text="by the way")) == {}


def test_numbers_are_floats_also_those_that_are_not_finite():
    for event in whole():
        assert all(type(value) is float for value in scalars(event).values())
    assert math.isnan(scalars(stepped(1, loss=math.nan))["step/loss"])


def test_settings_are_one_table_of_plain_values():
    found = settings(began())
    assert all(type(value) in (bool, int, float, str) for value in found.values())
    assert found["method"] == "vasso+asam" and found["params.direction.theta"] == 0.8
    assert found["betas"] == "0.9,0.95" and found["milestones"] == "1,2" and found["plugins"] == ""
    assert found["ema"] == "none" and found["nesterov"] is True
    assert found["environment.versions.torch"] == "2.13.0" and found["environment.versions.scikit-learn"] == "none"
    assert found["run.parameters"] == 1000 and found["run.steps"] == 10


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_said_with_the_extra(name, monkeypatch, tmp_path):
    for module in (name, "sqlalchemy"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"the tracker {name} needs {name}.*: pip install '\.\[{name}\]'"):
        make_tracker(name, folder=tmp_path / "run", run="run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "some_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("some_tracker") is not None
    assert not _installed("some_tracker")


@pytest.mark.parametrize(("name", "hint"), [("wandv", "; did you mean 'wandb'?"), ("csv", "")])
def test_an_unknown_name(name, hint, tmp_path):
    with pytest.raises(ValueError) as error:
        make_tracker(name, folder=tmp_path, run="run")
    assert str(error.value) == f"unknown tracker '{name}'{hint} (trackers: tensorboard, wandb, mlflow, trackio)"


class Recorder(Sink):
    """Writes down what it is asked for; raises at the call of the name."""

    name = "recorder"

    def __init__(self, folder, fails="", error=None, **others):
        super().__init__(**{"folder": folder, "run": "run", "project": "p", "resume": False, **others})
        self.calls, self.fails, self.error = [], fails, error or OSError("the disk\nis full.")

    def _note(self, what, *more):
        self.calls.append((what, *more))
        if what == self.fails:
            raise self.error

    def begin(self, event):
        self._note("begin")

    def log(self, values, step):
        self._note("log", step)

    def end(self, values, step, failure):
        self._note("end", step, failure)

    def finish(self, status):
        self._note("finish", status)


def told(sink, events=None):
    said = []
    safe = Safely(sink, said.append)
    for event in whole() if events is None else events:
        safe(event)
    safe.close()
    return said


def test_who_is_called_when(tmp_path):
    sink = Recorder(tmp_path)
    assert told(sink) == []
    logs = [("log", step) for step in (5, 10, 10, 10, 15, 20, 20)]
    assert sink.calls == [("begin",), *logs, ("end", 20, None), ("finish", "finished")]


@pytest.mark.parametrize(
    ("events", "status"),
    [([began(), ended("why")], "failed"), ([began(), stepped(5)], "stopped"), ([began()], "stopped")],
)
def test_status(events, status, tmp_path):
    sink = Recorder(tmp_path)
    told(sink, events)
    assert sink.calls[-1] == ("finish", status)


def test_closed_before_it_began_and_twice(tmp_path):
    sink = Recorder(tmp_path)
    sink.close()
    assert sink.calls == []
    told(sink)
    sink.close()
    assert sum(call[0] == "finish" for call in sink.calls) == 1


@pytest.mark.parametrize("fails", ["begin", "log", "end"])
def test_a_failing_tracker_is_told_of_once_and_hears_nothing_more(fails, tmp_path):
    sink = Recorder(tmp_path, fails)
    assert told(sink) == [
        "the tracker recorder failed (OSError: the disk is full) and is disabled for this run; training continues, "
        "and metrics.jsonl and steps.jsonl are complete."
    ]
    assert [call[0] for call in sink.calls].count(fails) == 1
    assert sink.calls[-1] == ("finish", "broken")


def test_a_failure_at_the_end_is_told_of(tmp_path):
    (text,) = told(Recorder(tmp_path, "finish", RuntimeError()))
    assert text.startswith("the tracker recorder failed (RuntimeError) and")


def test_a_tracker_that_fails_twice_is_told_of_once(tmp_path):
    class Worse(Recorder):
        def finish(self, status):
            raise RuntimeError("again")

    assert len(told(Worse(tmp_path, "log"))) == 1


def test_ctrl_c_goes_through(tmp_path):
    safe = Safely(Recorder(tmp_path, "log", KeyboardInterrupt()), print)
    safe(began())
    with pytest.raises(KeyboardInterrupt):
        safe(stepped(5))


def test_a_tracker_of_ones_own_needs_two_methods():
    class Own:
        def __call__(self, event):
            raise ValueError("no")

        def close(self):
            pass

    (text,) = told(Own())
    assert text.startswith("the tracker Own failed (ValueError: no)")


def test_identities_are_kept_side_by_side(tmp_path):
    one, other = Recorder(tmp_path), Recorder(tmp_path)
    other.name = "other"
    one.keep_identity("a")
    other.keep_identity("b")
    assert Recorder(tmp_path).identity is None
    assert Recorder(tmp_path, resume=True).identity == "a"
