"""`flatmin study` from end to end, on three clouds of points and a tiny net."""

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

from flatmin.cli.main import app, main
from flatmin.study import costs, trial
from flatmin.study.executors import RunOutcome
from flatmin.study.executors import local as executor
from flatmin.train.settings import preset_names

runner = CliRunner()

STUDY = """
title = "Three clouds"
train = "smoke"
seeds = [0, 1]
baseline = "SGD"
notes = ["To see that it works."]

[settings]
data = "tests.user_side:data"
model = "tests.user_side:net"
epochs = 1
batch_size = 50
device = "cpu"

[[arms]]
label = "SGD"
method = "sgd"

[[arms]]
label = "SAM"
method = "sam"
[arms.axes]
rho = [0.1, 0.2]

[[published]]
label = "SAM"
rho = 0.2
metric = "test_acc"
value = 97.25
source = "a paper"

[demo]
title = "Fewer clouds"
seeds = [0]
"""


def invoke(*words):
    return runner.invoke(app, ["study", *map(str, words)], env={"COLUMNS": "200"})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "clouds.toml"
    path.write_text(STUDY, encoding="utf-8")
    return path


@pytest.fixture
def study(file, tmp_path):
    """The tiny study with more words, in one folder."""

    def study(*words):
        return invoke(file, *words, "--out", tmp_path / "out", "--workers", 0)

    return study


def table(tmp_path, name="clouds"):
    with open(tmp_path / "out" / "studies" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return {(row["arm"], row.get("rho", "")): row for row in csv.DictReader(file)}


def test_from_a_file_to_a_table_and_on(study, file, tmp_path):
    first = study()
    assert first.exit_code == 0, first.output
    lines = first.output.splitlines()
    assert lines[0].startswith("Training: 6 runs, about ")
    assert sum(line.startswith("[") for line in lines) == 6
    assert "Three clouds" in lines and "- To see that it works." in lines and "- Published: a paper." in lines
    head = next(line for line in lines if line.startswith("arm "))
    assert "vs SGD (paired)" in head and "p (Holm, 2 tests)" in head and "published test %" in head
    begin = lines.index(head) + 2
    rows = [line.split() for line in lines[begin : begin + 3]]
    assert [row[:2] for row in rows] == [["SGD", "-"], ["SAM", "0.1"], ["SAM", "0.2"]]
    assert "97.25" in rows[2] and "97.25" not in rows[1]
    folder = tmp_path / "out" / "studies"
    assert lines[-2:] == [
        f"Tables: {folder / 'clouds.md'}, .csv, .seeds.csv, .tex",
        f"Report: {folder / 'clouds.html'}",
    ]
    assert [path.name for path in sorted(folder.glob("*.csv"))] == ["clouds.csv", "clouds.seeds.csv"]
    with open(folder / "clouds.seeds.csv", encoding="utf-8", newline="") as seeds:
        found = [row for row in csv.DictReader(seeds) if row["metric"] == "test_acc"]
    assert [(row["arm"], row["rho"], row["seed"]) for row in found[:3]] == [
        ("SGD", "", "0"),
        ("SGD", "", "1"),
        ("SAM", "0.1", "0"),
    ]
    mean = sum(float(row["value"]) for row in found[:2]) / 2
    assert mean == pytest.approx(float(table(tmp_path)["SGD", ""]["test_acc_mean"]))
    assert (folder / "clouds.md").read_text(encoding="utf-8").startswith("# Three clouds\n")
    assert (folder / "clouds.tex").read_text(encoding="utf-8").startswith(r"\begin{tabular}{llrr")
    before = table(tmp_path)
    assert before["SAM", "0.1"]["n"] == "2" and before["SAM", "0.2"]["test_acc_published"] == "97.25"
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*/result.json")}
    assert len(finished) == 6

    again = study()
    assert "6 runs, all finished before" in again.output and table(tmp_path) == before

    more = study("seed=0..2", "rho=0.2,0.3")
    assert "9 runs" in more.output and "5 finished before" not in first.output
    after = table(tmp_path)
    assert [row["n"] for row in after.values()] == ["3", "3", "3"] and ("SAM", "0.3") in after
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "nothing is trained twice"
    assert len(list(tmp_path.glob("out/runs/*/result.json"))) == 6 + 5

    other = tmp_path / "other.toml"
    other.write_text(STUDY.replace('label = "SAM"', 'label = "Foret"').replace("Three", "Other"), encoding="utf-8")
    shared = invoke(other, "--out", tmp_path / "out", "--workers", 0)
    assert "6 runs, all finished before" in shared.output, "another name for the arm, the same runs"
    assert table(tmp_path, "other")["Foret", "0.1"]["test_acc_mean"] == before["SAM", "0.1"]["test_acc_mean"]

    twin = study("--demo")
    assert "3 runs, all finished before" in twin.output and (folder / "clouds-demo.md").is_file()


def test_an_arm_that_fails_is_listed_and_the_others_stand(study, file, tmp_path):
    file.write_text(STUDY.replace("[[arms]]", '[[arms]]\nlabel = "Wild"\nmethod = "sgd"\nlr = 1e30\n[[arms]]', 1))
    result = study()
    assert result.exit_code == 0, result.output
    assert "- Wild: no result: 2 of 2." in result.output
    errors = [line for line in result.output.splitlines() if line.startswith("- Wild, seed ")]
    assert len(errors) == 2 and all("not finite" in line for line in errors)
    rows = table(tmp_path)
    assert rows["Wild", ""]["n"] == "0" and rows["SAM", "0.1"]["n"] == "2"
    assert "Wild, seed 0: " in (tmp_path / "out" / "studies" / "clouds.md").read_text(encoding="utf-8")


def test_a_run_that_broke_is_done_again_alone(study, monkeypatch, tmp_path):
    run_task = executor.run_task

    def broken(task, store, on_line):
        return RunOutcome(error="a bad day") if task.run.config.rho == 0.2 else run_task(task, store, on_line)

    monkeypatch.setattr(executor, "run_task", broken)
    result = study("seed=0")
    assert "SAM rho=0.2, seed 0: a bad day" in result.output and "SAM rho=0.2: no result: 1 of 1." in result.output
    monkeypatch.setattr(executor, "run_task", run_task)
    again = study("seed=0")
    assert sum(line.startswith("[") for line in again.output.splitlines()) == 1
    assert "a bad day" not in again.output and table(tmp_path)["SAM", "0.2"]["n"] == "1"


def test_ctrl_c_says_how_to_go_on(study, monkeypatch, tmp_path):
    run_task = executor.run_task

    def stopped(task, store, on_line):
        if task.run.config.method == "sgd":  # the shortest, and so the last
            raise KeyboardInterrupt
        return run_task(task, store, on_line)

    monkeypatch.setattr(executor, "run_task", stopped)
    result = study("seed=0")
    assert result.exit_code == 130
    assert "2 of 3 runs are finished and kept; the same command continues from there." in result.stderr
    assert not (tmp_path / "out" / "studies").exists()
    monkeypatch.setattr(executor, "run_task", run_task)
    assert sum(line.startswith("[") for line in study("seed=0").output.splitlines()) == 1


def test_a_dry_run_touches_nothing_and_says_what_there_is(study, tmp_path):
    result = study("--dry-run", "seed=0")
    assert result.exit_code == 0 and [path.name for path in tmp_path.iterdir()] == ["clouds.toml"]
    lines = result.output.splitlines()
    assert len(lines[0].split()) == 6 and sum(line.endswith("to do") for line in lines) == 3
    # 50 samples in batches of 50: one update of one gradient for sgd and of two for sam.
    total = next(line for line in lines if line.startswith("3 runs"))
    assert total.startswith("3 runs, 3 to do: 5 gradient evaluations of one batch each, about ")
    assert total.endswith(" of training in 1 process here, estimated from one gradient of each network.")
    study("seed=0", "rho=0.1")
    result = study("--dry-run", "seed=0")
    assert "3 runs, 1 to do: 2 gradient evaluations of one batch each, about " in result.output


def test_a_dry_run_of_a_study_of_the_package_needs_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(costs._SAMPLES, "cpu", 2)  # of which a gradient is timed: here without waiting for a fair time
    monkeypatch.setattr(costs, "_ENOUGH", 0.01)
    monkeypatch.setattr(trial, "_MOST", 0.0)
    result = invoke("fundamental-tiny", "--dry-run")
    assert result.exit_code == 0 and "39 runs, 39 to do: 10,982,400 gradient evaluations" in result.output
    assert not list(tmp_path.iterdir())


TWO = """
title = "Two folders"
train = "smoke"
seeds = [0]
[settings]
data = "images"
model = "mlp"
epochs = 1
batch_size = 4
image_size = 8
val_share = 0.2
[[arms]]
label = "SGD"
method = "sgd"
"""


@pytest.fixture
def folders(tmp_path):
    """Two folders of images of the same names, sizes and labels, and other colours."""
    Image = pytest.importorskip("PIL.Image", reason="Pillow makes the images that are read here")
    for k, root in enumerate("AB"):
        for part, count in (("train", 5), ("test", 3)):
            for j, name in enumerate(("ant", "bee")):
                (tmp_path / root / part / name).mkdir(parents=True)
                for i in range(count):
                    pixel = (40 * i, 90 * j + 50 * k, 20 + i)
                    Image.new("RGB", (8, 8), pixel).save(tmp_path / root / part / name / f"{i}.bmp")
    (tmp_path / "two.toml").write_text(TWO, encoding="utf-8")
    return tmp_path


class TestData:
    """Runs on other data are other runs, wherever the data lie."""

    def study(self, here, *words, out="out"):
        result = invoke(here / "two.toml", *words, "--out", here / out, "--no-report", "--workers", 0)
        assert result.exit_code == 0, result.output
        return result.output

    def losses(self, here, out="out"):
        with open(here / out / "studies" / "two.csv", encoding="utf-8", newline="") as file:
            return [row["train_ce_mean"] for row in csv.DictReader(file)]

    def test_two_folders_in_one_study(self, folders):
        self.study(folders, f"data_dir={folders / 'A'},{folders / 'B'}")
        both = self.losses(folders)
        for name, loss in zip("AB", both, strict=True):
            self.study(folders, f"data_dir={folders / name}", out=name.lower())
            assert self.losses(folders, name.lower()) == [loss]
        assert both[0] != both[1]

    def test_what_is_moved_stays_and_what_is_replaced_is_trained_anew(self, folders):
        def planned(name):
            return self.study(folders, f"data_dir={folders / name}", "--dry-run")

        self.study(folders, f"data_dir={folders / 'A'}")
        (folders / "A").rename(folders / "C")
        assert "1 run, 0 to do" in planned("C")
        (folders / "B").rename(folders / "A")
        assert "1 run, 1 to do" in planned("A"), "other images of the same names and sizes"
        (folders / "C" / "train" / "ant" / "notes.txt").write_text("")
        said = planned("C")
        assert "0 to do" in said and ".webp, .ppm: 1 of .txt." in said

    def test_where_the_data_are_not(self, folders):
        """What is finished is summed up all the same, as on a laptop, and it is said what is not known."""
        words = ("data=pets", f"data_dir={folders / 'A'}")
        self.study(folders, *words)
        (folders / "A").rename(folders / "gone")
        said = self.study(folders, *words, "--table", "again")
        assert len(list((folders / "out" / "runs").iterdir())) == 1 and (folders / "out/studies/again.csv").exists()
        assert "data=pets cannot be read here (there is no folder " in said
        both = self.study(folders, "data=pets", f"data_dir={folders / 'A'},{folders / 'B'}", "--dry-run")
        assert "2 runs, 1 to do" in both


def test_a_file_that_a_function_reads_is_part_of_the_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reads_csv.py").write_text(
        "import numpy as np, torch\n"
        "def net():\n"
        "    return torch.nn.Linear(2, 2)\n"
        "def load():\n"
        "    rows = np.loadtxt('rows.csv', delimiter=',')\n"
        "    return [(rows[:, :2], rows[:, 2].astype(int))] * 3\n"
        "def draws():\n"
        "    return [(np.random.rand(8, 2), np.arange(8) % 2)] * 3\n"
    )
    rows = "".join(f"{k},{k * k},{k % 2}\n" for k in range(8))
    (tmp_path / "rows.csv").write_text(rows)
    text = TWO.replace('"images"', '"reads_csv:load"').replace("image_size = 8\nval_share = 0.2\n", "")
    text = text.replace('"mlp"', '"reads_csv:net"')
    (tmp_path / "mine.toml").write_text(text)
    words = ("mine.toml", "--no-report", "--workers", 0)
    assert invoke(*words).exit_code == 0
    assert "1 run, 0 to do" in invoke(*words, "--dry-run").output
    (tmp_path / "rows.csv").write_text(rows.replace("7,49", "7,48"))
    assert "1 run, 1 to do" in invoke(*words, "--dry-run").output
    (tmp_path / "rows.csv").write_text(rows)
    assert "1 run, 0 to do" in invoke(*words, "--dry-run").output
    said = invoke(*words, "data=reads_csv:draws").output
    assert "the data have changed since the run was planned: data=reads_csv:draws returned other samples" in said
    assert "it draws random numbers without a fixed seed" in said


def test_the_list_has_every_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("list")
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines[2:]] == preset_names("study")
    assert next(line for line in lines if line.startswith("empirical ")).split()[1:3] == ["108", "45"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["empirica"], "flatmin: unknown preset 'empirica'; did you mean 'empirical'?"),
        (["nowhere.toml"], "flatmin: preset file 'nowhere.toml' does not exist."),
        (["empirical", "epohcs=3"], "flatmin: unknown setting 'epohcs'; did you mean 'epochs'?"),
    ],
)
def test_mistakes_are_one_sentence(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["study", *words])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith(message) and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_honest_baselines_and_a_radius_chosen_on_validation(study, tmp_path):
    result = study("seed=0", "--baselines", "--choose", "rho")
    assert result.exit_code == 0, result.output
    rows = table(tmp_path)
    assert [arm for arm, _ in rows] == ["SGD", "SAM", "SGD, more weight decay", "SGD, averaged", "SGD, 2x epochs"]
    sam = next(row for (arm, _), row in rows.items() if arm == "SAM")
    assert sam["chosen"] == f"rho={sam['rho']}" in ("rho=0.1", "rho=0.2") and sam["equal_diff"]
    assert (
        "'equal grads' is the difference from plain training" in result.output
        and "is chosen by mean validation" in result.output
    )


def test_runs_that_diverged_are_done_again_when_asked(study, file, tmp_path):
    file.write_text(STUDY.replace("[[arms]]", '[[arms]]\nlabel = "Wild"\nmethod = "sgd"\nlr = 1e30\n[[arms]]', 1))
    study("seed=0", "rho=0.1")
    assert "3 runs, all finished before" in study("seed=0", "rho=0.1").output
    assert (
        sum(line.endswith("to do") for line in study("seed=0", "rho=0.1", "--retry", "--dry-run").output.splitlines())
        == 1
    )
    assert "3 runs, all finished before" in study("seed=0", "rho=0.1").output, "a dry run takes nothing away"
    assert "3 runs, 2 finished before" in study("seed=0", "rho=0.1", "--retry").output


def test_the_page_can_be_left_out(study, tmp_path):
    assert study("seed=0", "rho=0.1", "--no-report").exit_code == 0
    assert not (tmp_path / "out" / "studies" / "clouds.html").exists()
    assert study("seed=0", "rho=0.1").exit_code == 0
    page = (tmp_path / "out" / "studies" / "clouds.html").read_text(encoding="utf-8")
    assert "<title>Three clouds</title>" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--executor", "cloud"), "unknown executor 'cloud'"),
        (("--on", "address=here"), "the executor local has no setting 'address'"),
        (("--on", "address"), "'address' is not a setting"),
        (
            ("--executor", "slurm", "--on", "gpus_per_node=1"),
            "GPUs are requested, but the runs use the CPU: set device=",
        ),
        (("--table", "up/there"), "--table 'up/there' is not a valid name for a file or folder: it is a path"),
        (("--choose", "rhoo"), "rhoo cannot be chosen, because it is not an axis"),
    ],
)
def test_bad_options_are_one_sentence_before_any_work(file, tmp_path, words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["study", str(file), "--out", str(tmp_path / "out"), *words])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_table_under_its_own_name_leaves_the_other(study, tmp_path):
    study("seed=0", "rho=0.1")
    before = (tmp_path / "out" / "studies" / "clouds.md").read_text(encoding="utf-8")
    study("seed=0", "rho=0.2", "--table", "larger")
    assert (tmp_path / "out" / "studies" / "clouds.md").read_text(encoding="utf-8") == before
    names = {path.stem for path in (tmp_path / "out" / "studies").iterdir()}
    assert names == {"clouds", "clouds.seeds", "larger", "larger.seeds"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_runs_on_a_gpu_elsewhere_are_planned_here_and_refused_here(file, tmp_path, capsys):
    words = ["study", str(file), "device=cuda", "--out", str(tmp_path / "out")]
    dry = invoke(*words[1:], "--dry-run")
    assert dry.exit_code == 0 and "6 runs, 6 to do" in dry.output
    assert "the time cannot be estimated: device=cuda cannot be used here" in dry.output
    with pytest.raises(SystemExit):
        main(words)
    err = capsys.readouterr().err
    assert "device=cuda cannot be used here" in err and err.count("\n") == 1
    assert not list((tmp_path / "out").glob("runs/*"))


def test_runs_say_the_method_that_they_are(study, tmp_path):
    study("seed=0", "rho=0.1")
    labels = {json.loads(path.read_text())["label"] for path in tmp_path.glob("out/runs/*/config.json")}
    assert labels == {"sgd", "sam"}
