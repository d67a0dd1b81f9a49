"""The comparison: which study its settings make, and what that study does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flatmin.methods import METHODS
from flatmin.study.comparison import comparison, without_unfit
from flatmin.study.events import EpochDone, Planned, RunDone, Timing, Tuned
from flatmin.study.expand import grid_points, tuned
from flatmin.study.plan import plan
from flatmin.study.reading import read_study
from flatmin.study.studies import study

OWN = ["data=tests.user_side:data", "model=tests.user_side:net", "batch_size=16", "epochs=2", "timing=false"]
SMALL = ["methods=sgd,sam", "baselines=false", "seeds=2"]


def rows(preset="digits", overrides=(), **options):
    return {row.label: row for row in grid_points(comparison(preset, overrides, **options))}


def radii(*words, **options):
    return {label: row.config.rho for label, row in rows("digits", ["baselines=false", *words], **options).items()}


def go(out, *words, **options):
    """The table of a comparison on a task of a second, and the events without the epochs."""
    events = []
    spec = without_unfit(comparison("digits", [*OWN, "noise=0.3", *words], **options))
    table = study(plan(spec, out), workers=0, on_event=events.append)
    return table, [event for event in events if not isinstance(event, EpochDone)]


class TestTheStudyItMakes:
    def test_the_default(self):
        spec = comparison()
        found = rows()
        assert list(found) == ["sgd", "sam", "vasso", "sgd + weight decay", "sgd, early stop", "sgd, 2x epochs"]
        assert len(spec.seeds) >= 5 and spec.timing and spec.baseline == "sgd"
        assert spec.title == "Handwritten digits, 40 % of the training labels wrong"
        assert {row.config.noise for row in found.values()} == {0.4}
        assert [row.config.epochs for row in found.values()] == [30, 30, 30, 30, 15, 60]
        assert (found["sgd"].config.rho, found["sgd + weight decay"].config.weight_decay) == (None, 0.02)

    def test_baselines_follow_the_settings_but_for_their_own(self):
        found = rows(overrides=["epochs=10", "weight_decay=1e-3", "early_share=0.3"])
        assert [found[label].config.epochs for label in ("sam", "sgd, early stop", "sgd, 2x epochs")] == [10, 3, 20]
        assert (found["sam"].config.weight_decay, found["sgd + weight decay"].config.weight_decay) == (1e-3, 0.02)
        assert rows(overrides=["strong_weight_decay=.05"])["sgd + weight decay"].config.weight_decay == 0.05
        assert [row.config.epochs for row in rows(overrides=["epochs=10,20"]).values()] == [
            *(10, 20) * 4, *(5, 10), *(20, 40),
        ]  # fmt: skip

    def test_options_come_before_words_before_the_preset(self):
        spec = comparison("digits", ["epochs=5", "seeds=4"], seeds=2, noise=None)
        assert spec.seeds == (0, 1) and grid_points(spec)[0].config.epochs == 5

    def test_radii(self):
        found = radii("methods=sgd,sam,asam,vasso+asam,usam,fsam+bisam-log", "rho.sam=0.3")
        # A composition without an entry of its own takes that of its geometry; USAM has none and takes its default.
        assert (found["sgd"], found["sam"], found["vasso+asam"], found["fsam+bisam-log"]) == (None, 0.3, 2.0, 0.15)
        assert found["usam"] not in (0.15, 2.0, 0.3)
        assert set(radii("methods=sam,vasso", "rho=0.07").values()) == {0.07}
        # sgdhess never leaves w: what was chosen for lengths in the same geometry says nothing about its factor.
        assert radii("methods=sam,sgdhess")["sgdhess"] == 0.05
        assert radii("methods=sam,sgdhess", "rho.sgdhess=0.5", "rho=.1")["sgdhess"] == 0.5

    def test_ones_own_network_or_data_inherit_neither_radii_nor_noise(self):
        own = ["data=tests.user_side:data", "model=tests.user_side:net", "methods=sam,asam"]
        assert radii(*own) == {"sam": 0.05, "asam": 0.5}
        spec = comparison("digits", own)
        assert {row.config.noise for row in grid_points(spec)} == {0.0}
        assert spec.title == "tests.user_side:net on tests.user_side:data"
        assert radii(*own, "rho.sam=.1")["sam"] == 0.1
        found = [row.config.noise for row in rows(overrides=["noise=0,.4", "methods=sam", "baselines=false"]).values()]
        assert found == [0.0, 0.4]

    def test_another_base_optimizer(self):
        spec = comparison("digits", ["optimizer=adamw", "methods=base,sam"])
        found = grid_points(spec)
        assert spec.baseline == "adamw" and [row.arm for row in found] == [
            "adamw", "sam", "adamw + weight decay", "adamw, early stop", "adamw, 2x epochs",
        ]  # fmt: skip
        assert {(row.config.optimizer, row.config.lr) for row in found} == {("adamw", 0.001)}
        assert found[0].config.method == "sgd" and "lr is torch's default 0.001" in spec.notes[0]
        assert {row.config.lr for row in rows(overrides=["optimizer=adam", "lr=0.01"]).values()} == {0.01}
        axis = comparison("digits", ["optimizer=adam,sgd", "methods=base,sam", "baselines=false"])
        assert axis.baseline == "base" and {(row.config.optimizer, row.config.lr) for row in grid_points(axis)} == {
            ("adam", 0.001), ("sgd", 0.1),
        }  # fmt: skip

    def test_the_weight_decay_of_the_baseline_is_of_the_scale_of_the_optimizer(self):
        def decays(*words):
            spec = comparison("digits", [*words, "methods=base"])
            found = [row.config.weight_decay for row in grid_points(spec) if "weight decay" in row.arm]
            return found, "".join(spec.notes)

        found, notes = decays("optimizer=adamw", "lr=0.01", "tune=true")
        assert found == [0.25, 0.5, 1, 2]
        assert "'adamw + weight decay' has weight_decay=1 in place of 0.02" in notes
        assert decays("optimizer=adamw")[0] == [1] and decays("optimizer=adam")[0] == [0.02]
        assert decays("optimizer=sgd,adamw")[0] == [0.02, 1]
        found, notes = decays("optimizer=adamw", "strong_weight_decay=5")
        assert found == [5] and "in place of" not in notes

    def test_the_table_lists_what_the_command_changed(self):
        found = comparison("digits", ["strong_weight_decay=5", "epochs=9"], tune=True, methods=("sgd", "sam")).changed
        assert found == ("strong_weight_decay=5.0", "tune=true", "methods=sgd,sam", "epochs=9")

    def test_all_is_every_name_of_the_table(self):
        spec = comparison("digits", ["methods=all,vasso+asam", "baselines=false", "micro_batches=8"])
        assert [arm.label for arm in spec.arms] == [*METHODS, "vasso+asam"] and spec.skip_unfit
        assert {row.config.micro_batches for row in grid_points(spec)} == {8}

    def test_parameters_go_to_the_methods_that_have_them(self):
        found = rows(overrides=["methods=sam,vasso,vasso+asam", "theta=0.5", "baselines=false"])
        assert [row.config.params for row in found.values()] == [{}, *[{"direction.theta": 0.5}] * 2]

    def test_an_axis_without_tune_makes_rows(self):
        assert list(rows(overrides=["methods=sgd,sam,vasso", "rho=.1,.2", "theta=.8,.9", "baselines=false"])) == [
            "sgd", "sam rho=0.1", "sam rho=0.2", "vasso rho=0.1 theta=0.8", "vasso rho=0.1 theta=0.9",
            "vasso rho=0.2 theta=0.8", "vasso rho=0.2 theta=0.9",
        ]  # fmt: skip

    def test_tune(self):
        found = {}
        for row in grid_points(comparison("digits", ["methods=sgd,sam,asam"], tune=True)):
            assert set(row.values) == row.choose
            found.setdefault(row.arm, []).append(list(row.values.values()))
        assert found["sgd"] == found["sgd, 2x epochs"] == [[]]
        assert found["sam"] == [["0.075"], ["0.15"], ["0.3"]] and found["asam"] == [["1"], ["2"], ["4"]]
        assert found["sgd + weight decay"] == [["0.005"], ["0.01"], ["0.02"], ["0.04"]]
        assert found["sgd, early stop"] == [["10"], ["15"], ["20"]]
        # Of what the command fixes nothing is chosen, and an axis of the command is the one of the baselines too.
        fixed = {row.label: row.config.rho for row in grid_points(comparison("digits", ["rho=.1"], tune=True))}
        assert (fixed["sam"], fixed["vasso"]) == (0.1, 0.1)
        short = [row.config.epochs for row in grid_points(comparison("digits", ["epochs=2,4"], tune=True))]
        assert short == [*(2, 4) * 3, *(2,) * 4, *(4,) * 4, *(1, 2), *(4, 8)]
        alone = [
            row.label for row in grid_points(comparison("digits", ["rho.sam=.1,.2", "baselines=false"], tune=True))
        ]
        assert alone == ["sgd", "sam rho=0.1", "sam rho=0.2", *(f"vasso rho={rho}" for rho in ("0.075", "0.15", "0.3"))]
        # What sets the task is never chosen.
        task = tuned(read_study("bisam-noise", demo=True))
        assert {key for row in grid_points(task) for key in row.choose} == {"rho"}
        own = comparison("digits", ["methods=sam,asam", "rho=.1,.2", "rho.asam=1,2,4", "lr=.05,.1", "tune=true"])
        counts = [row.arm for row in grid_points(own)]
        assert (counts.count("sam"), counts.count("asam"), counts.count("sgd + weight decay")) == (4, 6, 8)

    def test_a_file_of_the_form_before_is_read(self, tmp_path):
        text = 'title = "Mine"\nmethods = ["sgd", "asam"]\nbaselines = false\nseeds = 3\nepochs = 4\nmodel = "mlp"\n'
        (tmp_path / "mine.toml").write_text(text + "timing = false\n[rho]\nasam = 1.5\n[params]\neta = 0.1\n")
        spec = comparison(str(tmp_path / "mine.toml"), ["epochs=5"])
        assert spec.seeds == (0, 1, 2) and not spec.timing and spec.title.startswith("Mine, 40 %")
        sgd, asam = grid_points(spec)
        assert (sgd.config.epochs, asam.config.rho, asam.config.model) == (5, 1.5, "mlp")
        assert asam.config.params == {"geometry.eta": 0.1}

        (tmp_path / "own.toml").write_text('methods = ["sam", "asam"]\ntune = true\n[rho]\nsam = 0.33\nasam = 1.7\n')
        mine = comparison(
            str(tmp_path / "own.toml"), tune=False, model="tests.user_side:net", data="tests.user_side:data"
        )
        assert [row.config.rho for row in grid_points(mine)][:2] == [0.33, 1.7], "radii of one's own file stay"

    def test_a_multiple_is_of_what_the_arm_would_have_without_it(self, tmp_path):
        text = 'title = "M"\ntrain = "smoke"\nseeds = [0]\n[settings]\nepochs = 4\nweight_decay = "2x"\n'
        text += '[[arms]]\nlabel = "SAM"\nmethod = "sam"\nrho = 0.3\n'
        text += '[[arms]]\nlabel = "long"\nmethod = "sam"\nepochs = "3x"\n'
        text += '[[given]]\nepochs = ["3x"]\nset = { weight_decay = "2x" }\n'
        (tmp_path / "m.toml").write_text(text)

        def found(*words):
            rows = grid_points(read_study(str(tmp_path / "m.toml"), words))
            return [(row.config.epochs, row.config.rho, row.config.weight_decay) for row in rows]

        assert found() == [(4, 0.3, 1e-3), (12, 0.15, 2e-3)]
        assert found("rho=0.5x") == [(4, 0.15, 1e-3), (12, 0.075, 2e-3)] and found("rho.SAM=2x")[0][1] == 0.6
        assert [row[0] for row in found("epochs=2x")] == [8, 24] and [row[0] for row in found("epochs=5")] == [5, 5]
        assert [row[1] for row in found("rho=1x,2x")] == [0.3, 0.6, 0.15, 0.3]
        epochs = {label: row.config.epochs for label, row in rows(overrides=["epochs=2x"]).items()}
        assert (epochs["sam"], epochs["sgd, early stop"], epochs["sgd, 2x epochs"]) == (60, 30, 120)
        for word, message in (("ema=2x", "ema is not set,"), ("epochs=0x", "epochs=0x: epochs is 4,")):
            with pytest.raises(ValueError, match=message):
                found(word)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["methods=sgd,base"], "the method 'sgd' is listed twice"),
            (["methods=sam,SAM"], "the method 'sam' is listed twice"),
            (["seeds=3", "seed=7,8"], "both set the seeds"),
            (["baselines=false", "early_share=.3"], "early_share=0.3 has no effect"),
            (["epoch=3"], "unknown setting 'epoch'; did you mean 'epochs'"),
            (["thta=.8"], "unknown setting 'thta'; did you mean 'theta'"),
            (["theta=.8", "methods=sam"], "no arm has a setting 'theta'"),
            (["methods=sam,vaso"], "unknown method 'vaso'; did you mean 'vasso'"),
            (["methods=asam+usam"], "'asam' and 'usam' both set the geometry"),
            (["methods=sam,sam"], "the method 'sam' is listed twice"),
            (["rho.vaso=.1"], "rho.vaso: this study has no such arm or method; did you mean 'vasso'"),
            (["rho=big"], "rho=big is not a number"),
            (["rho=-1"], "rho must be at least 0, got -1.0"),
            (["rho=nan"], "rho must be at least 0, got nan"),
            (["rho=.1,.1"], "rho has the value 0.1 twice"),
            (["rho="], "rho= has no value"),
            (["seeds=0"], "seeds must be at least 1"),
            (["seeds=many"], "seeds=many is not a whole number"),
            (["theta=2"], "theta must be in"),
            (["methods=sgd", "rho=.1,.2"], "no arm has a setting 'rho'"),
            (["methods=", "baselines=false"], "nothing to compare"),
            (["noise=1.5"], "noise must be at least 0 and at most 1"),
            (["early_share=0"], "early_share must be above 0"),
            (["batch_size=0"], "batch_size must be at least 1"),
            (["plugins=flatmin_no_such"], "plugin: there is no module 'flatmin_no_such'"),
            (["rho=2x,x"], "rho=x is not a number"),
        ],
    )
    def test_mistakes_are_one_sentence(self, words, message):
        with pytest.raises(ValueError, match=message):
            grid_points(comparison("digits", words))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    return out, *go(out, *SMALL, timing=True)


class TestWhatItDoes:
    def test_the_table(self, finished):
        _, table, events = finished
        assert [type(event) for event in events] == [Planned, *[RunDone] * 4, Timing]
        assert (events[0].runs, events[0].reused, events[0].epochs) == (4, 0, 8)
        title = "tests.user_side:net on tests.user_side:data, 30 % of the training labels wrong"
        assert table.spec.title == title and table.errors == {}
        sgd, sam = table.rows
        assert (sgd.label, sgd.gradients, sgd.columns["test_acc"].diff) == ("sgd", 1.0, None)
        assert (sam.label, sam.gradients, sam.n, sam.config.rho) == ("sam", 2.0, 2, 0.05)
        mine, theirs = (row.columns["test_acc"].stat.values for row in (sam, sgd))
        assert sam.columns["test_acc"].diff.values == tuple(a - b for a, b in zip(mine, theirs, strict=True))
        assert all(row.columns["lambda_max"].stat.n == row.columns["test_best"].stat.n == 2 for row in table.rows)
        assert sam.time.q25 <= sam.time.median <= sam.time.q75

    def test_a_second_call_reuses_everything_and_more_seeds_run_only_what_is_new(self, finished):
        out, table, _ = finished
        again, events = go(out, *SMALL, timing=True)
        assert [event.sentence for event in events] == ["4 runs, all finished before"]
        assert [(row.columns, row.time) for row in again.rows] == [(row.columns, row.time) for row in table.rows]
        more, events = go(out, *SMALL, seeds=3)
        assert [type(event) for event in events] == [Planned, RunDone, RunDone]
        first = [one.rows[0].columns["test_acc"].stat.values[:2] for one in (more, table)]
        assert first[0] == first[1]

    def test_what_the_network_cannot_run_is_left_out_with_its_sentence(self):
        """The network and the data are those that the command names, not those of the preset."""
        words = ("seeds=1", "baselines=false")
        spec = comparison("digits", [*OWN, *words, "methods=all"])
        kept = without_unfit(spec)
        assert "sam-on" not in [arm.label for arm in kept.arms] and "micro-sam" in [arm.label for arm in kept.arms]
        (note,) = [note for note in kept.notes if "sam-on" in note]
        assert note.startswith("'sam-on' is left out: Layers: no layer matches ") and note.endswith(
            "layers are Linear."
        )
        (note,) = [note for note in kept.notes if "imbsam" in note]
        assert note.startswith("'imbsam' is left out: imbsam takes one closure each for the head and the tail of the ")

    def test_tuning_chooses_on_validation(self, tmp_path):
        table, events = go(tmp_path, *SMALL, "rho=0.05,0.1,50", "epochs=3", tune=True)
        assert events[0].stage == "tune"
        assert {"sgd, seed 0", "sam rho=50, seed 1"} <= {*events[0].labels.values()}
        (tuned,) = (event for event in events if isinstance(event, Tuned))
        (label,) = table.tried
        scores = {row.chosen["rho"]: row.columns["val_acc"].stat.mean for row in table.tried[label]}
        assert scores[tuned.chosen["rho"]] == max(scores.values())
        assert [row.arm for row in table.rows] == ["sgd", "sam"] and table.rows[1].chosen == tuned.chosen
        # What was chosen reuses the runs of the choice: nothing is trained twice.
        assert sum(isinstance(event, RunDone) for event in events) == 2 + 3 * 2

    def test_failures(self, tmp_path):
        table, _ = go(tmp_path, *SMALL, "methods=sgd", "lr=1e30,0.1", tune=True)
        assert table.rows[0].chosen == {"lr": "0.1"} and len(table.errors) == 2
        table, _ = go(tmp_path, *SMALL, "lr=0.1,1e30")
        by_label = {row.label: row for row in table.rows}
        assert by_label["sam lr=1e+30"].flags == ("no result: 2 of 2",) and by_label["sam lr=0.1"].flags == ()
        assert all("not finite" in text for text in table.errors.values())
        with pytest.raises(ValueError, match="all runs failed; the first error: the training loss was not finite"):
            go(tmp_path, *SMALL, "lr=1e30")
        assert go(tmp_path, *SMALL, "lr=0")[0].rows[0].flags == ("did not train: 2 of 2",)


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


def test_a_plugin_reaches_the_workers_is_swept_and_its_source_is_in_the_key(tmp_path, monkeypatch):
    (tmp_path / "flatmin_test_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    words = [*OWN, "methods=sgd,signs+asam", "baselines=false", "seeds=1", "power=.5,1", "plugins=flatmin_test_plugin"]
    todo = plan(comparison("digits", words), tmp_path / "out")
    table = study(todo, workers=1)
    assert [row.label for row in table.rows] == ["sgd", "signs+asam power=0.5", "signs+asam power=1"]
    assert table.errors == {} and [row.n for row in table.rows] == [1, 1, 1] and table.rows[1].config.rho == 0.5
    (tmp_path / "flatmin_test_plugin.py").write_text(PLUGIN + "# changed\n")
    missing = plan(comparison("digits", words), tmp_path / "out").missing
    assert {run.config.method for run in missing} >= {"signs+asam"}


SCRIPT = """
import sys
from pathlib import Path

if __name__ == "__main__":
    from flatmin.study import pool
    from flatmin.study.comparison import comparison
    from flatmin.study.events import EpochDone, RunDone
    from flatmin.study.plan import plan
    from flatmin.study.studies import study

    pool.START = sys.argv[2]
    spec = comparison("digits", ["methods=sgd,sam", "baselines=false", "seeds=40", "epochs=4", "batch_size=16",
                                 "data=tests.user_side:data", "model=tests.user_side:slow", "timing=false",
                                 "measure=false"])
    def tell(event):
        if isinstance(event, (EpochDone, RunDone)):
            print(type(event).__name__, flush=True)
    try:
        study(plan(spec, Path(sys.argv[1])), workers=2, on_event=tell)
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
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_ctrl_c_in_a_terminal(tmp_path, start):
    """SIGINT to the whole process group, as a terminal sends it: quick, nothing lost, no tracebacks, no orphans."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "out"), start],
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
