import dataclasses
import json
import os
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from flatmin.study import pool
from flatmin.study.events import EpochDone, RunBroke, RunDone, Warned
from flatmin.study.executors import StudyInterrupted, execute, executor_settings, make_executor
from flatmin.study.executors.loop import Busy, Reporter, Task, ctrl_c_later, run_all
from flatmin.study.executors.worker import run_task
from flatmin.study.store import Run, Store, finished_and_missing
from flatmin.train import checkpoint
from flatmin.train import run as training
from flatmin.train.config import RunConfig
from flatmin.train.lock import hold
from tests import user_side


def run(label="sgd", model="tests.user_side:net", epochs=2, **changes):
    config = RunConfig(
        method="sgd", epochs=epochs, batch_size=50, data="tests.user_side:data", model=model, selection="last",
        test_every=1, **changes,
    )  # fmt: skip
    return Run(label=label, config=config, code="c")


def without_time(lines):
    return [{**vars(line), "seconds": 0, "images_per_second": 0} for line in lines]


def test_results_come_as_they_are_made(tmp_path):
    store, events = Store(tmp_path), []
    runs, threads = [run(seed=seed) for seed in range(3)], torch.get_num_threads()
    outcomes = execute(runs, store, workers=0, on_event=events.append)
    assert torch.get_num_threads() == threads
    assert [type(event) for event in events] == [EpochDone, EpochDone, RunDone] * 3
    assert set(outcomes) == {one.name for one in runs}
    assert all(store.find(one, pytest.fail) is not None for one in runs)
    assert events[0].epochs == 2


def test_an_error_is_told_and_the_others_go_on(tmp_path):
    runs = [run("broken", model="tests.user_side:nett"), run()]
    events = []
    outcomes = execute(runs, Store(tmp_path), workers=0, on_event=events.append)
    assert "did you mean 'net'" in outcomes[runs[0].name].error
    assert outcomes[runs[1].name].result is not None
    assert [type(e) for e in events if not isinstance(e, EpochDone)] == [RunBroke, RunDone]


def test_a_run_whose_workers_die_is_given_up_after_three_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATMIN_TEST_PARENT", str(os.getpid()))
    monkeypatch.setattr(pool, "START", "fork")
    runs = [run("deadly", model="tests.user_side:deadly"), run(seed=0), run(seed=1)]
    events = []
    outcomes = execute(runs, Store(tmp_path), workers=1, on_event=events.append)
    error = outcomes[runs[0].name].error
    assert error.startswith("its worker was lost 3 times during this run; the last one ended with exit code 9")
    assert all(outcomes[one.name].result is not None for one in runs[1:])
    assert [type(event) for event in events[:3]] == [Warned, Warned, RunBroke]
    assert events[0].text.startswith(f"{runs[0].name} is resumed from its last checkpoint, because its worker")


def test_a_run_whose_worker_dies_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """An epoch is an update here; each loss costs the one that was under way."""
    monkeypatch.setattr(pool, "START", "fork")
    for name, value in (("DIARY", str(tmp_path / "diary")), ("ENDS", "3 6")):
        monkeypatch.setenv(f"FLATMIN_TEST_{name}", value)
    one, events = run(model="tests.user_side:diary", epochs=6), []
    outcomes = execute([one], Store(tmp_path, checkpoint_seconds=0), workers=1, on_event=events.append)
    outcome = outcomes[one.name]
    lives = (tmp_path / "diary").read_text().split()
    assert [lives.count(pid) for pid in dict.fromkeys(lives)] == [3, 3, 2]
    assert [line.epoch for line in outcome.lines] == [event.line.epoch for event in events if type(event) is EpochDone]
    assert [line.epoch for line in outcome.lines] == [1, 2, 3, 4, 5, 6]
    monkeypatch.setenv("FLATMIN_TEST_ENDS", "")
    alone = execute([one], Store(tmp_path / "alone"), workers=0, on_event=lambda event: None)[one.name]
    assert without_time(alone.lines) == without_time(outcome.lines)


class TestRunTask:
    """One run in a folder that may hold something."""

    @pytest.mark.parametrize("change", [None, "key", "damage"])
    def test_it_goes_on_with_this_very_run_only(self, tmp_path, change):
        one, store = run(epochs=3), Store(tmp_path / "a", checkpoint_seconds=0)
        expected = run_task(Task.of(one), Store(tmp_path / "b"), lambda line: None)
        first = []

        def stop(line):
            first.append(line)
            if len(first) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_task(Task.of(one), store, stop)
        assert len(list(store.folder(one).glob("checkpoints/*.pt"))) == 1
        where = store.folder(one) / "config.json"
        if change is not None:
            found = json.loads(where.read_text())
            where.write_text("{" if change == "damage" else json.dumps({**found, "key": "another"}))
        lines = []
        outcome = run_task(Task.of(one), store, lines.append)
        assert without_time(outcome.lines) == without_time(expected.lines) and tuple(lines) == outcome.lines
        assert (outcome.lines[0] == first[0]) == (change is None), "the time of an epoch that was not repeated"
        assert not (store.folder(one) / "checkpoints").exists()

    def test_a_run_that_failed_leaves_no_checkpoint_and_is_not_done_again(self, tmp_path):
        one, store = run(lr=1e30), Store(tmp_path, checkpoint_seconds=0)
        outcome = run_task(Task.of(one), store, lambda line: None)
        assert outcome.result.failure and not list(store.folder(one).glob("checkpoints/*"))
        mark = (store.folder(one) / "result.json").stat().st_mtime_ns
        assert run_task(Task.of(one), store, lambda line: None) == outcome
        assert (store.folder(one) / "result.json").stat().st_mtime_ns == mark

    def test_checkpoints_come_by_the_clock(self, tmp_path, monkeypatch):
        saved = []
        monkeypatch.setattr(checkpoint, "save", lambda folder, step, state, keep: saved.append(step))
        run_task(Task.of(run(epochs=4)), Store(tmp_path / "a"), lambda line: None)
        assert saved == []
        run_task(Task.of(run(epochs=4)), Store(tmp_path / "b", checkpoint_seconds=0), lambda line: None)
        assert saved == [1, 2, 3]
        clock = iter(range(1000))
        monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
        saved.clear()
        run_task(Task.of(run(epochs=8)), Store(tmp_path / "c", checkpoint_seconds=3), lambda line: None)
        assert saved == [3, 6]

    def test_a_run_that_another_process_has_is_left_to_it(self, tmp_path):
        one, store = run(), Store(tmp_path)
        with hold(store.folder(one)):
            assert run_task(Task.of(one), store, pytest.fail) == Busy()

    def test_code_that_is_not_that_of_the_study_is_refused(self, tmp_path):
        one, store = run(), Store(tmp_path)
        outcome = run_task(dataclasses.replace(Task.of(one), code="another"), store, pytest.fail)
        assert outcome.result is None and "flatmin, torch or your own modules have changed or differ" in outcome.error
        assert not store.folder(one).exists()

    def test_what_a_listener_raises_is_no_error_of_the_run(self, tmp_path):
        def broken(event):
            raise ZeroDivisionError("the display")

        one, store = run(), Store(tmp_path)
        with pytest.raises(ZeroDivisionError, match="the display"):
            execute([one], store, workers=0, on_event=broken)
        assert not store.folder(one).joinpath("result.json").exists()
        assert execute([one], store, workers=0, on_event=lambda event: None)[one.name].error is None


def test_checkpoints_that_a_finished_run_has_left_are_removed(tmp_path):
    """Its worker and its driver were killed between the result and the end of the work."""
    one, store, left = run(epochs=3), Store(tmp_path, checkpoint_seconds=0), tmp_path / "left"

    def copy(line):
        if line.epoch == 3:
            left.write_bytes(next(store.folder(one).glob("checkpoints/*.pt")).read_bytes())
            (tmp_path / "name").write_text(next(store.folder(one).glob("checkpoints/*.pt")).name)

    outcome = run_task(Task.of(one), store, copy)
    where = store.folder(one) / "checkpoints" / (tmp_path / "name").read_text()
    where.parent.mkdir()
    left.rename(where)
    finished_and_missing([one], Store(tmp_path, make=False), pytest.fail)
    assert where.exists()
    assert finished_and_missing([one], store, pytest.fail)[0] == {one.name: outcome}
    assert not where.parent.exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_call_does_what_the_first_has_not_begun(tmp_path, monkeypatch, workers):
    """The first run is held elsewhere: all others are done before it is waited for."""
    monkeypatch.setattr(pool, "START", "fork")
    store, runs, ended = Store(tmp_path), [run(seed=seed) for seed in range(3)], []
    with ExitStack() as elsewhere:
        elsewhere.enter_context(hold(store.folder(runs[0])))

        def listen(event):
            if isinstance(event, RunDone):
                ended.append(event.run)
                if len(ended) == 2:
                    elsewhere.close()

        outcomes = execute(runs, store, workers=workers, on_event=listen)
    assert ended == [runs[1].name, runs[2].name, runs[0].name]
    assert all(outcome.result is not None for outcome in outcomes.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_refused_before_the_first_run(tmp_path):
    runs = [run(), run(seed=1, device="cuda")]
    with pytest.raises(ValueError, match="device=cuda cannot be used here"):
        execute(runs, Store(tmp_path), workers=1, on_event=pytest.fail)


def test_a_worker_that_is_lost_while_it_measures_loses_no_run(tmp_path):
    one, store, events, outcomes = run(), Store(tmp_path), [], {}
    run_task(Task.of(one), store, lambda line: None)
    reporter = Reporter(store, events.append, outcomes)
    assert reporter.lost(one, "vanished") and reporter.lost(one, "vanished") and not reporter.lost(one, "vanished")
    outcome = outcomes[one.name]
    assert outcome.error is None and outcome.result == store.find(one, pytest.fail)[0]
    assert outcome.refusal == "its worker was lost 3 times during this run; the last one vanished"
    assert events[-1].text == f"{one.name} could not be measured: {outcome.refusal}"


def test_ctrl_c_waits_for_what_is_being_handed_over():
    steps = []
    with pytest.raises(KeyboardInterrupt), ctrl_c_later():
        signal.raise_signal(signal.SIGINT)
        steps.append("handed over")
    assert steps == ["handed over"]
    with pytest.raises(KeyboardInterrupt), ctrl_c_later():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        steps.append("a second one does not wait")
    assert steps == ["handed over"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt) as stopped, ctrl_c_later():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("the command that hands over was stopped too")
    assert isinstance(stopped.value.__cause__, ValueError)
    with pytest.raises(ValueError, match="of its own"), ctrl_c_later():
        raise ValueError("of its own")


class Elsewhere:
    """A scheduler whose jobs find the first run held for a while, and nothing to do but what `outcome` says."""

    def __init__(self, held, outcome):
        self.held, self.outcome, self.submitted = held, outcome, []

    def submit(self, task, store):
        self.submitted.append(task.run.name)
        return task.run

    def poll(self, job):
        return Busy() if job.name == self.held and len(self.submitted) < 4 else self.outcome

    def wait(self, jobs):
        assert jobs

    def cancel(self, job):
        raise AssertionError("nothing is lost")


def test_no_job_is_handed_over_to_wait_for_another(tmp_path):
    store, runs, outcomes, told = Store(tmp_path), [run(seed=seed) for seed in range(3)], {}, []
    outcome = run_task(Task.of(run(seed=9)), store, lambda line: None)
    scheduler = Elsewhere(runs[0].name, outcome)
    with ExitStack() as elsewhere:
        elsewhere.enter_context(hold(store.folder(runs[0])))

        def listen(event):
            if isinstance(event, RunDone):
                told.append(event.run)
                if len(told) == 2:
                    threading.Timer(0.7, elsewhere.close).start()

        run_all(scheduler, runs, store, workers=1, reporter=Reporter(store, listen, outcomes))
    assert scheduler.submitted == [run.name for run in (*runs, runs[0])]
    assert set(outcomes) == {run.name for run in runs}


def test_a_worker_may_have_processes_that_read_its_data(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "START", "fork")
    one = dataclasses.replace(run(), config=dataclasses.replace(run().config, data="tests.user_side:reading"))
    outcomes = execute([one], Store(tmp_path), workers=1, on_event=lambda event: None)
    assert outcomes[one.name].error is None and outcomes[one.name].result is not None


def test_workers_that_cannot_start_are_not_tried_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "START", "fork")
    monkeypatch.setattr(pool, "_serve", user_side.stillborn)
    with pytest.raises(RuntimeError, match='under `if __name__ == "__main__":`'):
        execute([run()], Store(tmp_path), workers=1, on_event=lambda event: None)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupt_keeps_what_is_finished_and_says_how_to_go_on(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(pool, "START", "fork")

    def on_event(event):
        if isinstance(event, RunDone):
            raise KeyboardInterrupt

    runs = [run(seed=seed) for seed in range(3)]
    store = Store(tmp_path)
    with pytest.raises(StudyInterrupted, match="1 of 3 runs are finished and kept; the same command continues from"):
        execute(runs, store, workers=workers, on_event=on_event)
    assert len(list(Path(tmp_path).glob("runs/*/result.json"))) >= 1
    assert store.find(runs[0], pytest.fail) is not None


def test_executors_are_chosen_by_name_and_refuse_what_they_do_not_know(tmp_path, monkeypatch):
    for name, settings, text in (
        ("locl", {}, "unknown executor 'locl'; did you mean 'local'"),
        ("local", {"address": "auto"}, "executor local: unknown option 'address'"),
    ):
        with pytest.raises(ValueError, match=text):
            execute([run()], Store(tmp_path), workers=1, on_event=pytest.fail, executor=name, settings=settings)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("ray", "ray"), ("slurm", "submitit")):
        with pytest.raises(ModuleNotFoundError, match=rf"needs {package}: pip install '\.\[{name}\]'"):
            make_executor(name)
    with pytest.raises(ValueError, match="the executor local has no setting 'a'"):
        executor_settings("local", ["a=1"])


def test_nothing_to_do(tmp_path):
    assert execute([], Store(tmp_path), workers=2, on_event=pytest.fail) == {}
