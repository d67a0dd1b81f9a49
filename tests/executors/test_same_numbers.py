"""One tiny study through every executor: the same numbers, the same events, and an end to all that was started."""

import dataclasses
import importlib.util
import os
import signal
import time

import pytest

from flatmin.measure.report import ReportSettings
from flatmin.study import pool
from flatmin.study.events import EpochDone, ReportDone, RunBroke, RunDone, Warned
from flatmin.study.executors import StudyInterrupted, execute, executor_settings
from flatmin.study.measuring import View
from flatmin.study.store import Store
from tests.executors.killing import alive, below, command, plain, runs
from tests.train.kills import ROOT

# submitit leaves files and processes to the garbage collector, and Ray warns of its own future.
pytestmark = pytest.mark.filterwarnings("ignore")

ENGINES = {
    "local": {"workers": 2},
    "debug": {"workers": 2, "executor": "slurm", "settings": {"cluster": "debug"}},
    "slurm": {"workers": 2, "executor": "slurm", "settings": {"cluster": "local"}},
    "ray": {"workers": 2, "executor": "ray"},
}
PACKAGES = {"slurm": "submitit", "debug": "submitit", "ray": "ray"}


def needs(package):
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; make test-executors has it")


SLURM = pytest.param("slurm", marks=pytest.mark.slow)  # an interpreter a job


@pytest.fixture(params=["local", "debug", SLURM, "ray"])
def engine(request, monkeypatch):
    needs(PACKAGES.get(request.param))
    monkeypatch.chdir(ROOT)
    return ENGINES[request.param]


def measured():
    """Three runs whose networks are measured by the worker that has trained them."""
    view = View(what="hessian", examples=40, settings=ReportSettings(top=1))
    return [dataclasses.replace(run, view=view) for run in runs(3, epochs=3)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    wanted = measured()
    return execute(wanted, Store(tmp_path_factory.mktemp("here")), workers=0, on_event=lambda event: None)


def lambda_1(outcome):
    return outcome.report["sections"]["hessian"]["quantities"]["lambda_1"]["value"]


def test_the_same_numbers_as_in_this_process(tmp_path, engine, expected, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
    wanted, events = measured(), []
    found = execute(wanted, Store("out"), on_event=events.append, **engine)
    assert {name: plain(one) for name, one in found.items()} == {name: plain(one) for name, one in expected.items()}
    assert {name: lambda_1(one) for name, one in found.items()} == {
        name: lambda_1(one) for name, one in expected.items()
    }
    assert sum(isinstance(event, ReportDone) for event in events) == 3
    assert sum(isinstance(event, RunDone) for event in events) == 3
    told = [(event.run, event.line.epoch) for event in events if isinstance(event, EpochDone)]
    assert sorted(told) == sorted((run.name, epoch) for run in wanted for epoch in (1, 2, 3))
    assert (tmp_path / "out" / "slurm").exists() == (engine.get("executor") == "slurm")


@pytest.mark.parametrize("engine", ["local", SLURM, "ray"], indirect=True)
def test_ctrl_c_calls_off_what_is_under_way(tmp_path, engine, monkeypatch):
    monkeypatch.setenv("FLATMIN_TEST_PACE", "0.02")
    monkeypatch.setattr(pool, "START", "fork")

    def stop(event):
        if isinstance(event, EpochDone):
            raise KeyboardInterrupt

    before = set(below(os.getpid()))
    store = Store(tmp_path, checkpoint_seconds=0)
    with pytest.raises(StudyInterrupted, match="0 of 2 runs are finished and kept; the same command continues from"):
        execute(runs(2, epochs=300), store, on_event=stop, **engine)
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in set(below(os.getpid())) - before):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("engine", ["debug", "ray"], indirect=True)
def test_a_run_that_raises_is_broken_at_once(tmp_path, engine):
    events = []
    wanted = runs(1, model="nett")
    outcomes = execute(wanted, Store(tmp_path), on_event=events.append, **engine)
    assert "did you mean 'net'" in outcomes[wanted[0].name].error
    assert [type(event) for event in events] == [RunBroke]


@pytest.mark.parametrize("name", [SLURM, "ray"])
def test_a_job_that_is_lost_is_taken_up_again_twice(tmp_path, monkeypatch, name):
    needs(PACKAGES[name])
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FLATMIN_TEST_PARENT", str(os.getpid()))
    wanted, events = runs(1, model="deadly"), []
    outcomes = execute(wanted, Store(tmp_path), on_event=events.append, **ENGINES[name])
    assert outcomes[wanted[0].name].error.startswith("its worker was lost 3 times during this run; the last one ")
    assert [type(event) for event in events] == [Warned, Warned, RunBroke]


def test_a_job_at_its_time_limit_is_queued_again_and_goes_on(tmp_path, monkeypatch):
    needs("submitit")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FLATMIN_TEST_PACE", "0.02")
    told = []

    def preempt(event):
        told.append(event)
        if isinstance(event, EpochDone) and event.line.epoch == 3:
            for pid in below(os.getpid()):
                if b"submitit.core._submit" in command(pid):
                    os.kill(pid, signal.SIGUSR2)

    wanted = runs(1, epochs=20)
    store = Store(tmp_path, checkpoint_seconds=0)
    outcome = execute(wanted, store, on_event=preempt, **ENGINES["slurm"])[wanted[0].name]
    (log,) = (tmp_path / "slurm").glob("*.err")
    assert "this job is preempted" in log.read_text()
    assert not [event for event in told if isinstance(event, Warned)]
    assert outcome.lines[0] == told[0].line, "the time of an epoch that was not repeated"
    assert [line.epoch for line in outcome.lines] == list(range(1, 21))


@pytest.mark.parametrize("name", ["slurm", "ray"])
def test_wrong_words_are_refused_in_a_sentence(tmp_path, name):
    needs(PACKAGES[name])
    with pytest.raises(ValueError, match=f"the executor {name} has no setting 'partitoin'"):
        executor_settings(name, ["partitoin=gpu"])
    with pytest.raises(ValueError, match=f"the executor {name} needs at least one worker, got workers=0"):
        execute(runs(1), Store(tmp_path), workers=0, on_event=pytest.fail, executor=name)
