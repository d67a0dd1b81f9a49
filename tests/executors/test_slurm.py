"""Slurm's own commands, played by shell scripts: what is asked of them, a job that is lost, and one called off."""

import os
import time

import pytest

from flatmin.study.events import EpochDone, RunDone, Warned
from flatmin.study.executors import StudyInterrupted, execute, executor_settings, make_executor
from flatmin.study.store import Store
from tests.executors.killing import alive, runs
from tests.train.kills import ROOT

submitit = pytest.importorskip("submitit", reason="needs submitit: run make test-executors")

COMMANDS = {
    "sbatch": """
        n=$(( $(ls "$FAKE_SLURM" | wc -l) + 1 )); job="$FAKE_SLURM/$n"; mkdir "$job"; cp "$1" "$job/script"
        (SLURM_JOB_ID=$n setsid sh "$job/script"; echo $? > "$job/code") > /dev/null 2>&1 &
        echo "Submitted batch job $n"
    """,
    "srun": """
        job="$FAKE_SLURM/$SLURM_JOB_ID"
        while :; do case "$1" in --unbuffered) shift;; --output|--error) shift 2;; *) break;; esac; done
        "$@" > /dev/null 2> "$job/errors" & echo $! > "$job/pid"; wait $!
    """,
    "sacct": """
        echo "JobID|State|NodeList"
        for job in "$FAKE_SLURM"/*; do
            state=RUNNING; [ -f "$job/code" ] && state=FAILED
            echo "${job##*/}|$state|node"
        done
    """,
    "scancel": """
        kill -9 "$(cat "$FAKE_SLURM/$1/pid")"
    """,
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of the jobs."""
    for name, text in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(0o755)
    (tmp_path / "jobs").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "jobs"))
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0)
    monkeypatch.setattr("flatmin.study.executors.slurm._PAUSE", {"slurm": 0.1})
    monkeypatch.chdir(ROOT)
    return tmp_path / "jobs"


def test_a_lost_job_is_submitted_again_and_ctrl_c_cancels(tmp_path, slurm, monkeypatch):
    for name, value in {"DIARY": str(tmp_path / "diary"), "ENDS": "4", "PACE": "0.02"}.items():
        monkeypatch.setenv(f"FLATMIN_TEST_{name}", value)
    wanted, events = [runs(1, epochs=3, model="diary")[0], runs(1, epochs=1000)[0]], []

    def listen(event):
        events.append(event)
        # The other one must have been seen to be at work before it can be called off in it.
        if isinstance(event, EpochDone) and any(isinstance(one, RunDone) for one in events):
            raise KeyboardInterrupt

    words = ["partition=gpu", "timeout_min=30", "mem_gb=2", "gpus_per_node=1", "extra.nice=100", "setup=set -u"]
    settings = executor_settings("slurm", words)
    store = Store(tmp_path / "out", checkpoint_seconds=0)
    with pytest.raises(StudyInterrupted, match="1 of 2 runs are finished"):
        execute(wanted, store, workers=2, on_event=listen, executor="slurm", settings=settings)
    assert [path.name for path in sorted(slurm.iterdir())] == ["1", "2", "3"], "the first run had two jobs"
    script = (slurm / "1" / "script").read_text()
    for line in ("partition=gpu", "time=30", "mem=2GB", "gpus-per-node=1", "nice=100", f"job-name={wanted[0].name}"):
        assert f"#SBATCH --{line}\n" in script
    assert "\nset -u\n" in script
    (warned,) = (event for event in events if isinstance(event, Warned))
    assert f"{wanted[0].name} is resumed" in warned.text and "(job 1) ended as failed" in warned.text
    # Two updates an epoch: the fourth, of the second epoch, was the one that ended the first job.
    lives = (tmp_path / "diary").read_text().split()
    assert [lives.count(pid) for pid in dict.fromkeys(lives)] == [4, 4]
    deadline = time.monotonic() + 10
    while alive(int((slurm / "2" / "pid").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_where_there_is_no_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match='executor slurm: Could not detect "srun"'):
        execute(runs(1), Store(tmp_path), workers=1, on_event=pytest.fail, executor="slurm")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"cluster": "slrum"}, "cluster=slrum is not known; did you mean 'slurm'"),
        ({"timeout_min": 0}, "timeout_min must be at least 1, got 0"),
        ({"mem_gb": "much"}, "mem_gb = 'much' is a str, expected a number"),
        ({"nodes": 2}, "executor slurm: unknown option 'nodes'"),
    ],
)
def test_settings_are_refused_in_a_sentence(settings, text):
    with pytest.raises(ValueError, match=text):
        make_executor("slurm", settings)
