import io
import json
import os
import re
import signal
import threading
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flatmin.cli.main import app, main
from flatmin.cli.progress import Progress
from flatmin.cli.study import MAX_WORKERS, default_workers
from flatmin.study import events
from flatmin.train.result import Epoch, Result

runner = CliRunner()
OWN = ("--data", "tests.user_side:data", "batch_size=9")


def invoke(*words, **options):
    return runner.invoke(app, ["compare", *map(str, words)], env={"COLUMNS": "100"}, **options)


def quick(out):
    """Words of a comparison that takes a second."""
    return (
        "--preset",
        "smoke",
        "--seeds",
        1,
        "--workers",
        0,
        "--out",
        out,
        "epochs=1",
        "methods=sgd,sam",
        "timing=false",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    return out, invoke(*quick(out), catch_exceptions=False)


def test_says_what_it_will_do_then_the_table_then_where_the_report_is(finished):
    out, result = finished
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith("Training: 2 runs, about ")
    assert sum(line.startswith("[") for line in lines) == 2, "without a terminal, one line a run"
    assert any(line.startswith("sam ") for line in lines)
    assert lines[-1] == f"Report: {out / 'report.html'}"
    assert "<table" in (out / "report.html").read_text(encoding="utf-8")


def test_a_second_call_reuses_every_run(finished):
    out, _ = finished
    results = sorted(out.glob("runs/*/result.json"))
    before = [path.stat().st_mtime_ns for path in results]
    again = invoke(*quick(out), "--no-report", catch_exceptions=False)
    assert "2 runs, all finished before" in again.output and "Report:" not in again.output
    assert [path.stat().st_mtime_ns for path in results] == before


def test_options_reach_the_runs(tmp_path):
    words = ("--preset", "smoke", "--out", tmp_path, "--workers", 0, "-m", "sam", "-m", "vasso+asam", "--noise", 0.2)
    result = invoke(*words, "--seeds", 1, "epochs=1", "theta=0.7", "rho.sam=0.3", "timing=false", "--no-report")
    assert result.exit_code == 0, result.output
    configs = {c["method"]: c for c in (json.loads(p.read_text()) for p in tmp_path.glob("runs/*/config.json"))}
    assert set(configs) == {"sam", "vasso+asam"}
    assert configs["sam"]["rho"] == 0.3 and configs["sam"]["noise"] == 0.2
    assert configs["vasso+asam"]["params"] == {"direction.theta": 0.7}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "smok"], r"did you mean 'smoke'"),
        (["epoch=3"], r"unknown setting 'epoch'; did you mean 'epochs'"),
        (["-m", "samm"], r"unknown method 'samm'; did you mean 'sam'"),
        (["epochs=many"], r"epochs=many is not a whole number"),
        (["--data", "no_such_package:f"], r"no module 'no_such_package'"),
        (["--out", "/dev/null/x"], r"cannot be written"),
        (
            ["--data", "tests.user_side:data", "batch_size=9", "--dry-run"],
            r"'conv' needs images .* shape \(6,\): name .* --model",
        ),
        (
            ["--data", "tests.user_side:data", "--model", "tests.user_side:ent", "--dry-run", "batch_size=9"],
            r"did you mean 'net'\?$",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_runs(words, message, tmp_path):
    result = invoke("--out", tmp_path, *words)
    assert isinstance(result.exception, ValueError)
    assert not list(tmp_path.glob("runs/*")) and not result.output
    assert re.search(message, str(result.exception))


def test_missing_plotly_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = invoke("--out", tmp_path)
    assert isinstance(result.exception, ModuleNotFoundError) and "'.[report]'" in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_says_how_to_go_on(tmp_path, capsys):
    """The signal comes in the first run; one from outside to a whole process group is in study/test_comparison.py."""
    words = ["compare", "--preset", "smoke", "epochs=100000", "--workers", "0", "--no-report", "--out", str(tmp_path)]
    ended = threading.Event()

    def interrupt():
        deadline = time.monotonic() + 60
        while not (ended.is_set() or list(tmp_path.glob("runs/*/metrics.jsonl"))) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    # A test runner in the background may have been started with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(SystemExit) as stopped:
            main(words)
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    err = capsys.readouterr().err
    assert "0 of 6 runs are finished and kept; the same command continues from there." in err and "Traceback" not in err


def test_workers_follow_the_machine():
    assert 1 <= default_workers() <= MAX_WORKERS


EPOCH = Epoch(
    epoch=1, lr=0.1, rho=0.05, train_loss=1.0, val_acc=90.0, val_loss=0.3, test_acc=89.0, memorised=None, seconds=0.1
)


def result(**changes):
    values = dict(method="sam", rho=0.1, gradient_evaluations=2.0, seed=0, epochs=1, noise=0.0, trained=True)
    values |= dict(last={"test_acc": 89.0, "val_acc": 88.0}, best=None, train_ce=0.1, lambda_max=None, seconds=1.0)
    return Result(**(values | changes))


STORY = (
    events.Planned(
        stage="tune", runs=3, reused=1, epochs=2, seconds=10.0, labels={"sam-s0-abc": "sam rho=0.2, seed 0"}
    ),
    events.EpochDone(run="sam-s0-abc", epochs=1, line=EPOCH),
    events.RunDone(run="sam-s0-abc", result=result()),
    events.RunBroke(run="own-[b]-s0-abc", error="ValueError: [red]no[/red]"),
    events.RunDone(run="own-s1-abc", result=result(failure="the loss was not finite", last=None)),
    events.Tuned(label="sam", chosen={"rho": 0.2}),
    events.Timing(methods=2),
    events.Warned(text="something"),
)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_tells_every_event(terminal):
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
    with Progress(console) as progress:
        for event in STORY:
            progress(event)
    text = console.file.getvalue()
    for said in (
        "Choosing settings on validation: 3 runs, 1 finished before, about 10 seconds.",
        "own-[b]-s0: no result, ValueError: [red]no[/red]",
        "own-s1: stopped, the loss was not finite",
        "sam: chosen on validation: rho=0.2.",
        "time per step of 2 methods",
        "Note: something",
    ):
        assert said in text
    assert ("[1/2] sam rho=0.2, seed 0: validation 88.0 %, 1.0 s" in text) is not terminal
