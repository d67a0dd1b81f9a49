"""A Ray cluster that is there already, by its address or by a connection of the program's own."""

import os
import signal
import subprocess
import sys

import pytest

from flatmin.study.events import EpochDone, RunDone
from flatmin.study.executors import execute, executor_settings, make_executor
from flatmin.study.store import Store
from tests.executors.killing import below, command, plain, runs
from tests.train.kills import PATIENCE, ROOT

ray = pytest.importorskip("ray", reason="needs Ray: run make test-executors")
pytestmark = pytest.mark.filterwarnings("ignore")

DRIVER = """
import sys
from flatmin.study.executors import execute
from flatmin.study.store import Store
from tests.executors.killing import runs

if __name__ == "__main__":
    settings = {"address": sys.argv[2]}
    found = execute(runs(2, epochs=2), Store(sys.argv[1]), workers=2, on_event=print, executor="ray", settings=settings)
    assert all(outcome.result is not None for outcome in found.values()), found
"""


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of this machine, and its address."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def test_by_its_address_and_by_an_open_connection(tmp_path, cluster):
    """In one test, because a cluster takes seconds to start."""
    wanted, events = runs(2, epochs=2), []
    found = execute(wanted, Store(tmp_path / "open"), workers=1, on_event=events.append, executor="ray")
    assert ray.is_initialized(), "a connection that was there is left"
    assert sum(isinstance(event, EpochDone) for event in events) == 4
    assert sum(isinstance(event, RunDone) for event in events) == 2
    subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "address"), cluster],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=PATIENCE,
    )
    store = Store(tmp_path / "address")
    for run in wanted:
        result, lines = store.find(run, pytest.fail)
        assert plain(found[run.name]) == plain(type(found[run.name])(result=result, lines=tuple(lines)))


def test_a_cluster_without_nodes_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FLATMIN_TEST_PACE", "0.02")
    killed = []

    def lose(event):
        if not killed and isinstance(event, EpochDone):
            killed.extend(pid for pid in below(os.getpid()) if command(pid).split(b"\0")[0].endswith(b"/raylet"))
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(ValueError, match="the Ray cluster has lost all its nodes"):
        execute(runs(1, epochs=1000), Store(tmp_path), workers=1, on_event=lose, executor="ray")
    assert len(killed) == 1 and not ray.is_initialized()


def test_settings():
    made = make_executor("ray", executor_settings("ray", ["address=auto", "cpus=0.5", "gpus=none"]))
    assert (made.address, made.cpus, made.gpus) == ("auto", 0.5, None)
    with pytest.raises(ValueError, match="cpus must be above 0, got 0"):
        make_executor("ray", {"cpus": 0})


def test_usage_statistics_are_off(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    seen = {}
    monkeypatch.setattr(
        ray, "init", lambda **settings: seen.update(settings, env=os.environ["RAY_USAGE_STATS_ENABLED"])
    )
    make_executor("ray")._connect(3)
    assert seen["env"] == "0" and seen["num_cpus"] == 3 and seen["address"] == "local"
