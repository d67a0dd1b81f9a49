import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flatmin.study.compare import compare, plan
from flatmin.study.config import CompareConfig
from flatmin.study.events import EpochDone, Planned, RunDone, Timing, Tuned, Warned

CONFIG = CompareConfig(
    title="Clouds",
    methods=("sgd", "sam"),
    baselines=False,
    seeds=2,
    epochs=2,
    batch_size=16,
    noise=0.3,
    data="tests.user_side:data",
    model="tests.user_side:net",
    timing=False,
)


def go(config, out, **changes):
    events = []
    return compare(config, out=out, workers=0, on_event=events.append, **changes), events


def kinds(events):
    return [type(event) for event in events if not isinstance(event, EpochDone)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, *go(replace(CONFIG, timing=True), out, command=("flatmin", "compare", "a b"))


def test_the_summary(finished):
    _, summary, events = finished
    assert kinds(events) == [Planned, RunDone, RunDone, RunDone, RunDone, Timing]
    assert summary.title == "Clouds, 30% of the training labels wrong"
    assert summary.command == "flatmin compare 'a b'"
    assert summary.errors == {}
    sgd, sam = summary.rows
    assert (sgd.label, sgd.rho, sgd.gradient_evaluations, sgd.diff, sgd.flags) == ("sgd", None, 1.0, None, [])
    assert (sam.label, sam.rho, sam.gradient_evaluations, sam.n) == ("sam", 0.05, 2.0, 2)
    assert sam.diff.values == tuple(a - b for a, b in zip(sam.last.values, sgd.last.values, strict=True))
    assert sam.lambda_residual <= 1e-2
    assert sam.time_ratio.q25 <= sam.time_ratio.median <= sam.time_ratio.q75
    assert all(len(seeds) == 2 and len(seeds[0]) == 2 for seeds in summary.curves["sam"].values())
    assert summary.environment["threads"] == 1
    assert summary.notes


def test_what_the_model_cannot_run_is_left_out_with_its_sentence(tmp_path):
    config = replace(CONFIG, methods=("sgd", "sam-on", "micro-sam"), seeds=1, skip_unfit=True)
    config = replace(config, axes={"rho.sam-on": (0.1, 0.2)})
    summary, events = go(config, tmp_path)
    assert [row.label for row in summary.rows] == ["sgd", "micro-sam"]
    (warning,) = [event.text for event in events if isinstance(event, Warned)]
    assert warning.startswith("'sam-on' is left out: Layers: no layer matches ") and "Linear" in warning
    assert warning in summary.notes
    assert kinds(go(config, tmp_path)[1]) == [Warned, Planned]
    with pytest.raises(ValueError, match="no layer matches"):
        go(replace(config, skip_unfit=False, axes={}), tmp_path)
    with pytest.raises(ValueError, match="no method is left to compare; the first refusal: Layers"):
        go(replace(config, methods=("sam-on",)), tmp_path)


def test_the_announcement(finished):
    _, _, events = finished
    planned = events[0]
    assert (planned.runs, planned.reused, planned.epochs) == (4, 0, 8)
    assert planned.sentence.startswith("4 runs, about ")


def test_a_second_call_reuses_everything(finished):
    out, summary, _ = finished
    again, events = go(replace(CONFIG, timing=True), out)
    assert kinds(events) == [Planned]
    assert events[0].sentence == "4 runs, all finished before"
    assert again.rows == summary.rows
    assert again.curves == summary.curves


def test_more_seeds_run_only_what_is_new(finished):
    out, summary, _ = finished
    more, events = go(replace(CONFIG, seeds=3), out)
    assert kinds(events) == [Planned, RunDone, RunDone]
    assert "4 finished before" in events[0].sentence
    assert more.rows[0].last.values[:2] == summary.rows[0].last.values


def test_a_truncated_result_is_done_again_and_named(finished, tmp_path):
    out, summary, _ = finished
    path = sorted(out.glob("runs/sam-s0-*/result.json"))[0]
    path.write_text(path.read_text()[:50])
    again, events = go(CONFIG, out)
    assert kinds(events) == [Warned, Planned, RunDone]
    assert str(path) in events[0].text
    assert again.rows[1].last == summary.rows[1].last


def test_changed_code_does_not_reuse(tmp_path, monkeypatch):
    source = (Path(__file__).parents[1] / "user_side.py").read_text()
    module = tmp_path / "flatmin_test_changing.py"
    module.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    config = replace(CONFIG, methods=("sgd",), seeds=1, model="flatmin_test_changing:net")
    out = tmp_path / "out"
    assert kinds(go(config, out)[1]) == [Planned, RunDone]
    assert kinds(go(config, out)[1]) == [Planned]
    module.write_text(source + "# changed\n")
    assert kinds(go(config, out)[1]) == [Planned, RunDone]
    module.write_text(source)
    assert kinds(go(config, out)[1]) == [Planned]


def test_changed_package_code_does_not_reuse(tmp_path, monkeypatch):
    config = replace(CONFIG, methods=("sgd",), seeds=1)
    go(config, tmp_path)
    monkeypatch.setattr("flatmin.study.compare.package_digest", lambda: "other")
    assert kinds(go(config, tmp_path)[1]) == [Planned, RunDone]


def test_changed_data_does_not_reuse(tmp_path, monkeypatch):
    from tests import user_side

    config = replace(CONFIG, methods=("sgd",), seeds=1)
    go(config, tmp_path)
    train, val, test = user_side.data()
    monkeypatch.setattr(user_side, "data", lambda: ((train[0] * 1.01, train[1]), val, test))
    assert kinds(go(config, tmp_path)[1]) == [Planned, RunDone]


def test_a_folder_that_cannot_be_written_is_told_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the folder '.*' cannot be written"):
        compare(CONFIG, out=tmp_path / "file", on_event=pytest.fail)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("sgd", "sma")}, "unknown method 'sma'; did you mean 'sam'"),
        ({"data": "tests.user_side:dat"}, "did you mean 'data'"),
        ({"model": "conv"}, "does not take inputs of shape"),
        ({"plugins": ("flatmin_no_such",)}, "plugin: there is no module 'flatmin_no_such'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"device": "gpu"}, "device=gpu cannot be used here"),
    ],
)
def test_mistakes_are_told_before_any_run(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        compare(replace(CONFIG, **changes), out=tmp_path, workers=0, on_event=pytest.fail)


def test_tuning_chooses_on_validation_and_keeps_the_curve(tmp_path):
    config = replace(CONFIG, axes={"rho": (0.05, 0.1, 50.0)}, tune=True, epochs=3)
    summary, events = go(config, tmp_path)
    assert next(e for e in events if isinstance(e, Planned)).stage == "tune"
    (tuned,) = (event for event in events if isinstance(event, Tuned))
    assert [row.label for row in summary.rows] == ["sgd", "sam"]
    curve = summary.tuning["sam"]
    assert [rho for rho, _ in curve] == [0.05, 0.1, 50.0]
    assert summary.rows[1].rho == tuned.chosen["rho"]
    best = max(stat.mean for _, stat in curve)
    assert dict(curve)[summary.rows[1].rho].mean == best
    assert [choice.chosen for choice in summary.choices["sam"]].count(True) == 1
    assert any("never on test" in note for note in summary.notes)
    # What was chosen reuses the runs of the choice: nothing is trained twice.
    assert sum(isinstance(event, RunDone) for event in events) == 2 + 3 * 2


def test_a_value_with_a_failed_run_is_not_chosen(tmp_path):
    config = replace(CONFIG, methods=("sgd",), axes={"lr": (1e30, 0.1)}, tune=True)
    summary, _ = go(config, tmp_path)
    assert [choice.chosen for choice in summary.choices["sgd"]] == [False, True]
    assert summary.tuning == {}
    assert summary.rows[0].n == 2
    assert len(summary.errors) == 2


def test_a_method_that_fails_is_flagged_and_the_others_stand(tmp_path):
    config = replace(CONFIG, axes={"lr": (0.1, 1e30)})
    summary, _ = go(config, tmp_path)
    by_label = {row.label: row for row in summary.rows}
    assert by_label["sam lr=1e+30"].flags == ["failed"]
    assert by_label["sam lr=1e+30"].n == 0
    assert math.isnan(by_label["sam lr=1e+30"].last.mean)
    assert by_label["sam lr=0.1"].flags == []
    assert all("not finite" in text for text in summary.errors.values())
    assert any("a run without a result" in note for note in summary.notes)


def test_nothing_but_failures(tmp_path):
    with pytest.raises(ValueError, match="no run had a result; the first one: the training loss was not finite"):
        compare(replace(CONFIG, lr=1e30), out=tmp_path, workers=0)


def test_a_net_that_only_guesses_is_flagged(tmp_path):
    summary, _ = go(replace(CONFIG, lr=0.0), tmp_path)
    assert summary.rows[0].flags == ["did not train"]
    assert any("log K" in note for note in summary.notes)


PLUGIN = """
from dataclasses import dataclass
from flatmin.methods import Direction
from flatmin.methods import Method

@dataclass(frozen=True, kw_only=True)
class Signs(Direction):
    power: float = 1.0

    def __call__(self, g, state, c):
        return [x.sign() * x.abs() ** self.power for x in g], {}

METHODS = {"signs": Method(name="signs", title="Signs", parts=(Signs(),), formula="sign(g) |g|^power", paper="mine")}
"""


def test_a_plugin_runs_is_swept_and_its_source_is_in_the_key(tmp_path, monkeypatch):
    (tmp_path / "flatmin_test_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    config = replace(
        CONFIG, methods=("sgd", "signs+asam"), plugins=("flatmin_test_plugin",), axes={"power": (0.5, 1.0)}
    )
    summary, _ = go(config, tmp_path / "out")
    assert [row.label for row in summary.rows] == ["sgd", "signs+asam power=0.5", "signs+asam power=1"]
    assert summary.rows[1].rho == 0.5
    (tmp_path / "flatmin_test_plugin.py").write_text(PLUGIN + "# changed\n")
    assert len(plan(config, out=tmp_path / "out").missing) == len(summary.rows) * 2


def test_a_plugin_reaches_the_workers(tmp_path, monkeypatch):
    (tmp_path / "flatmin_test_plugin2.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    config = replace(CONFIG, methods=("signs",), seeds=1, plugins=("flatmin_test_plugin2",))
    summary = compare(config, out=tmp_path / "out", workers=1)
    assert summary.errors == {}
    assert summary.rows[0].n == 1


SCRIPT = """
import sys
from pathlib import Path

if __name__ == "__main__":
    from flatmin.study.compare import compare
    from flatmin.study.config import CompareConfig
    from flatmin.study.events import EpochDone, RunDone

    config = CompareConfig(methods=("sgd", "sam"), baselines=False, seeds=40, epochs=4, batch_size=16,
                           data="tests.user_side:data", model="tests.user_side:slow", timing=False, measure=False)
    def tell(event):
        if isinstance(event, (EpochDone, RunDone)):
            print(type(event).__name__, flush=True)
    try:
        compare(config, out=Path(sys.argv[1]), workers=2, on_event=tell)
    except KeyboardInterrupt as interrupt:
        sys.exit(str(interrupt))
"""


def _alive(group):
    """Processes of a group that are not just waiting to be reaped."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX")
def test_ctrl_c_in_a_terminal(tmp_path):
    """SIGINT to the whole process group, as a terminal sends it: quick, nothing lost, no tracebacks, no orphans."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
    )
    for line in process.stdout:
        if line.startswith("RunDone"):
            break
    os.killpg(process.pid, signal.SIGINT)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert process.returncode == 1
    assert re.fullmatch(
        r"Interrupted: \d+ of 80 runs are finished and kept; the same command continues from there.", errors.strip()
    )
    kept = list((tmp_path / "out").glob("runs/*/result.json"))
    assert int(errors.split()[1]) <= len(kept) <= int(errors.split()[1]) + 2
    assert all(json.loads(path.read_text())["version"] == 1 for path in kept)
    if Path("/proc").is_dir():
        deadline = time.monotonic() + 5
        while _alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert _alive(process.pid) == []
