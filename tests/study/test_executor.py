import os
from pathlib import Path

import pytest
import torch

from flatmin.study import executor
from flatmin.study.events import EpochDone, RunBroke, RunDone
from flatmin.study.executor import Interrupted, execute
from flatmin.study.store import Run, Store
from flatmin.train.config import RunConfig
from tests import user_side


def run(label="sgd", model="tests.user_side:net", **changes):
    config = RunConfig(
        method="sgd", epochs=2, batch_size=50, data="tests.user_side:data", model=model, selection="last", test_every=1,
        **changes,
    )  # fmt: skip
    return Run(label=label, config=config, code="c")


def without_time(lines):
    return [{**vars(line), "seconds": 0, "images_per_second": 0} for line in lines]


def test_results_come_as_they_are_made(tmp_path):
    store, events = Store(tmp_path), []
    runs = [run(seed=seed) for seed in range(3)]
    outcomes = execute(runs, store, workers=0, on_event=events.append)
    assert [type(event) for event in events] == [EpochDone, EpochDone, RunDone] * 3
    assert set(outcomes) == {one.name for one in runs}
    assert all(store.find(one, pytest.fail) is not None for one in runs)
    assert events[0].epochs == 2


def test_processes_give_the_same_numbers(tmp_path):
    here, there = Store(tmp_path / "a"), Store(tmp_path / "b")
    runs = [run(seed=seed) for seed in range(3)]
    threads = torch.get_num_threads()
    one = execute(runs, here, workers=0, on_event=lambda event: None)
    assert torch.get_num_threads() == threads
    events = []
    two = execute(runs, there, workers=2, on_event=events.append)
    for name in one:
        a, b = one[name], two[name]
        assert {**vars(a.result), "seconds": 0} == {**vars(b.result), "seconds": 0}
        assert without_time(a.lines) == without_time(b.lines)
    assert sum(isinstance(event, EpochDone) for event in events) == 6
    assert sum(isinstance(event, RunDone) for event in events) == 3


def test_an_error_is_told_and_the_others_go_on(tmp_path):
    runs = [run("broken", model="tests.user_side:nett"), run()]
    events = []
    outcomes = execute(runs, Store(tmp_path), workers=0, on_event=events.append)
    assert "did you mean 'net'" in outcomes[runs[0].name].error
    assert outcomes[runs[1].name].result is not None
    assert [type(e) for e in events if not isinstance(e, EpochDone)] == [RunBroke, RunDone]


def test_a_worker_that_dies_breaks_its_run_only(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATMIN_TEST_PARENT", str(os.getpid()))
    runs = [run("deadly", model="tests.user_side:deadly"), run(seed=0), run(seed=1)]
    outcomes = execute(runs, Store(tmp_path), workers=1, on_event=lambda event: None)
    assert "ended with exit code 9" in outcomes[runs[0].name].error
    assert all(outcomes[one.name].result is not None for one in runs[1:])


def test_workers_that_cannot_start_are_not_tried_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "_serve", user_side.stillborn)
    with pytest.raises(RuntimeError, match='needs `if __name__ == "__main__":`'):
        execute([run()], Store(tmp_path), workers=1, on_event=lambda event: None)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupt_keeps_what_is_finished_and_says_how_to_go_on(tmp_path, workers):
    def on_event(event):
        if isinstance(event, RunDone):
            raise KeyboardInterrupt

    runs = [run(seed=seed) for seed in range(3)]
    store = Store(tmp_path)
    with pytest.raises(Interrupted, match="1 of 3 runs are finished and kept; the same command goes on from there"):
        execute(runs, store, workers=workers, on_event=on_event)
    assert len(list(Path(tmp_path).glob("runs/*/result.json"))) == 1
    assert store.find(runs[0], pytest.fail) is not None


def test_nothing_to_do(tmp_path):
    assert execute([], Store(tmp_path), workers=2, on_event=pytest.fail) == {}
