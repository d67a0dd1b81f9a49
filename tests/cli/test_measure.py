"""`flatmin measure`: what it prints and writes for one net and for several, and how it refuses."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from flatmin.cli.main import app, main
from flatmin.measure.problem import Problem
from flatmin.measure.report import ReportSettings, report
from flatmin.report import html as page
from flatmin.study import pool
from flatmin.study.executors import execute
from flatmin.study.measured import with_error
from flatmin.study.measuring import View, batches, find, find_all, measure, measure_all, split_of
from flatmin.study.store import Run, Store
from flatmin.train.config import RunConfig
from flatmin.train.saved import open_run
from tests.user_side import data as clouds
from tests.user_side import net

runner = CliRunner()
QUICK = ("points=5", "plane=3", "steps=5", "runs=1", "ascent_steps=3", "draws=2", "probes=20", "rhos=0.05,0.1")
SETTINGS = ReportSettings(points=5, plane=3, steps=5, runs=1, ascent_steps=3, draws=2, probes=20, rhos=(0.05, 0.1))
USER = ("--model", "tests.user_side:net", "--data", "tests.user_side:data")


STUDY = """
title = "Made up"
train = "smoke"
seeds = [0, 1]
baseline = "SGD"
[settings]
epochs = 1
batch_size = 25
model = "tests.user_side:net"
data = "tests.user_side:data"
[tune]
rho = ["1x", "2x"]
[[arms]]
label = "SGD"
method = "sgd"
[[arms]]
label = "SAM"
method = "sam"
"""


class Named(nn.Module):
    """A net whose layers have names."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.first(x)))


def named():
    return Named()


class Late(Named):
    """Has a mistake that is met near its own weights only, when everything has been looked over."""

    home = None

    def forward(self, x):
        weight = self.head.weight.detach().double()
        self.home = weight.clone() if self.home is None else self.home
        return int("x") if 0 < float((weight - self.home).norm()) < 0.1 else super().forward(x)


def late():
    return Late()


class Answer(Named):
    """Returns an object, as the models of Hugging Face do."""

    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x))


def answer():
    return Answer()


class Deadly(Named):
    """Ends its process, as a lack of memory does, if its weights are all one."""

    def forward(self, x):
        if bool((self.head.weight == 1).all()):
            os._exit(9)
        return super().forward(x)


def deadly():
    return Deadly()


def damaged():
    """Data whose file is broken."""
    return json.loads('{"x": ')


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of two arms of two seeds, by label and seed."""
    store = Store(tmp_path_factory.mktemp("measure"))
    config = RunConfig(
        method="sgd", epochs=1, batch_size=50, noise=0.3, data="tests.user_side:data", model="tests.user_side:net"
    )
    arms = {"sam": dataclasses.replace(config, method="sam", rho=0.1), "sgd": config}
    runs = {
        (label, seed): Run(label=label, config=dataclasses.replace(one, seed=seed), code="c")
        for label, one in arms.items()
        for seed in (0, 1)
    }
    execute(list(runs.values()), store, workers=0, on_event=lambda event: None)
    return {key: store.folder(run) for key, run in runs.items()}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(file, folder of the runs): two arms, and a search over the radius of one."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "own.toml").write_text(STUDY, encoding="utf-8")
    words = ["study", str(folder / "own.toml"), "--tune", "--out", str(folder / "out"), "--no-report", "--workers", "0"]
    done = runner.invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and len(list((folder / "out" / "runs").iterdir())) == 6
    return folder / "own.toml", folder / "out"


@pytest.fixture
def weights(tmp_path):
    """A file of weights."""
    torch.manual_seed(0)
    torch.save({"state_dict": net().state_dict(), "epoch": 3}, tmp_path / "mine.pt")
    return tmp_path / "mine.pt"


@pytest.fixture(scope="module", autouse=True)
def small_plotly():
    """plotly.js is 5 MB; its text does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_plotly_js", lambda: "/* plotly.js */")
        yield


def invoke(out, *given, status=0):
    found = runner.invoke(
        app, ["measure", *map(str, given), "--out", str(out)], env={"COLUMNS": "100"}, catch_exceptions=False
    )
    assert found.exit_code == status, found.output
    return found.output


def files(out):
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())


def numbers(out):
    return [name for name in files(out) if name.endswith(".json")]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def one(folders, tmp_path_factory):
    """(folder, name, what was said, the numbers) of one net."""
    out, name = tmp_path_factory.mktemp("one"), folders["sam", 0].name
    said = invoke(out, folders["sam", 0], *QUICK)
    return out, name, said, read(out / f"{name}.json")


@pytest.fixture(scope="module")
def several(folders, tmp_path_factory):
    """(folder, what was said, the numbers) of four nets."""
    out = tmp_path_factory.mktemp("several")
    said = invoke(out, *folders.values(), *QUICK, "--workers", 0, "--what", "model,hessian,density")
    return out, said, read(out / "measures.json")


@pytest.fixture(scope="module")
def data(folders):
    """What the runs were trained on."""
    return open_run(folders["sgd", 0]).data()


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command that must be refused in one sentence before anything is written; the sentence."""

    def run(*given, out=tmp_path / "out"):
        with pytest.raises(SystemExit) as stop:
            main(["measure", *map(str, given), "--out", str(out)])
        said = capsys.readouterr()
        assert stop.value.code == 2, said.err
        assert said.err.startswith("flatmin: ") and said.err.count("\n") == 1, said.err
        assert said.out == "" and not out.exists()
        return said.err

    return run


class TestOneRun:
    def test_what_is_written(self, one):
        out, name, said, _ = one
        *written, first, second, third = sorted(files(out), key=lambda file: (file.startswith("landscapes"), file))
        assert written == [f"{name}.csv", f"{name}.html", f"{name}.json"]
        where = Path(first).parent
        assert where.parent == Path("landscapes") / name
        assert [first, second, third] == [str(where / f"{which}.pt") for which in ("along_random", "along_v1", "plane")]
        assert said.splitlines()[-3:] == [f"Written: {out / name}.{kind}" for kind in ("json", "csv", "html")]

    def test_the_numbers_are_those_of_the_report(self, one, folders):
        _, name, said, found = one
        run = open_run(folders["sam", 0])
        data = run.data()
        problem = Problem(run.model(), nn.functional.cross_entropy, (data.train.x, data.train.y))
        want = report(problem, "report", settings=SETTINGS)
        (net_of,) = found["nets"]
        assert (net_of["name"], net_of["group"], net_of["seed"]) == (name, "sam", 0)
        assert list(net_of["sections"]) == [s.name for s in want.sections]
        for section in want.sections:
            told_of = net_of["sections"][section.name]["quantities"]
            assert {n: q["value"] for n, q in told_of.items()} == {q.name: q.value for q in section.quantities}
        for q in want.quantities.values():
            assert re.search(
                rf"^{re.escape(q.name)} +{re.escape(with_error(q.value, q.error))} ", said, re.MULTILINE
            ), q.name

    def test_how_it_was_measured(self, one):
        _, _, said, found = one
        (net_of,) = found["nets"]
        assert net_of["conventions"]["split"] == "train, 30% of the labels wrong"
        assert (net_of["conventions"]["examples"], net_of["conventions"]["dtype"]) == (50, "float32")
        assert net_of["settings"]["rhos"] == [0.05, 0.1] and net_of["settings"]["top"] == 5
        assert net_of["sections"]["trace"]["quantities"]["trace"]["conventions"]["seed"] == 0
        assert set(found["environment"]) >= {"versions", "python", "device", "threads"}
        assert "Mean cross_entropy over 50 examples (train, 30% of the labels wrong), eval mode" in said

    def test_how_many_threads(self, one):
        assert one[3]["environment"]["threads"] == torch.get_num_threads()

    def test_the_page(self, one):
        out, name, _, _ = one
        text = (out / f"{name}.html").read_text(encoding="utf-8")
        assert f"<title>Measures: {name}</title>" in text and "lambda_1" in text and "flatmin" in text

    def test_landscapes_are_taken_from_where_they_are_kept(self, one, folders, tmp_path):
        """One value is changed there, so that it can be known again."""
        out, name, _, _ = one
        shutil.copytree(out / "landscapes" / name, tmp_path / "landscapes" / name)
        (kept,) = (tmp_path / "landscapes" / name).rglob("plane.pt")
        saved = torch.load(kept, weights_only=True)
        saved["loss"][0, 0] = 42.0
        torch.save(saved, kept)
        invoke(tmp_path, folders["sam", 0], *QUICK, "--what", "landscape", "--no-page")
        found = read(tmp_path / f"{name}.json")["nets"][0]["sections"]["landscape"]["results"]["plane"]
        assert found["loss"][0][0] == 42.0

    @pytest.mark.parametrize("change", [["points=7"], ["--split", "test"], ["--examples", 20]])
    def test_the_same_net_looked_at_otherwise(self, folders, tmp_path, change):
        words = (folders["sam", 0], *QUICK, "plane=0", "--what", "landscape", "--no-page")
        invoke(tmp_path, *words)
        invoke(tmp_path, *words, *change)


class TestOptions:
    def test_they_reach_the_numbers(self, folders, tmp_path):
        given = ("--what", "model,layers", "--split", "val", "--params", "2.*", "--dtype", "float64", "--no-page")
        said = invoke(tmp_path, folders["sgd", 1], *given, "--examples", 12, "--batch", 5, "tol=0.001", "seed=3")
        assert files(tmp_path) == [f"{folders['sgd', 1].name}.{kind}" for kind in ("csv", "json")], "numbers only"
        (one,) = read(tmp_path / f"{folders['sgd', 1].name}.json")["nets"]
        where = one["conventions"]
        assert (where["split"], where["params"], where["dtype"]) == ("val", "2.*", "float64")
        assert (where["examples"], where["batch"], where["size"]) == (12, 5, 51)
        assert (one["settings"]["tol"], one["settings"]["seed"]) == (0.001, 3)
        assert list(one["sections"]) == ["model", "layers"]
        assert "lambda_1[2.weight]" in said and "lambda_1[0.weight]" not in said

    def test_pictures(self, folders, tmp_path):
        pytest.importorskip("matplotlib")
        invoke(tmp_path, folders["sgd", 0], *QUICK, "--what", "model,hessian", "--png", "--no-page")
        picture = tmp_path / f"{folders['sgd', 0].name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_figures_for_papers(self, folders, tmp_path):
        pytest.importorskip("matplotlib")
        said = invoke(tmp_path, folders["sgd", 0], *QUICK, "--what", "hessian", "--figures", "svg,pdf", "--no-page")
        folder = tmp_path / f"{folders['sgd', 0].name}-figures"
        assert files(folder) == ["ends-of-the-spectrum.pdf", "ends-of-the-spectrum.svg"]
        assert f"Written: {folder / 'ends-of-the-spectrum.svg'}" in said

    def test_bfloat16_is_said(self, folders, tmp_path):
        said = invoke(tmp_path, folders["sgd", 0], "--what", "model", "--dtype", "bfloat16", "--no-page")
        assert "autocast torch.bfloat16" in said

    def test_the_page_is_opened(self, folders, tmp_path, monkeypatch):
        opened = []
        monkeypatch.setattr("typer.launch", opened.append)
        invoke(tmp_path, folders["sgd", 0], "--what", "model", "--open")
        assert opened == [(tmp_path / f"{folders['sgd', 0].name}.html").as_uri()]

    def test_names_of_layers_are_printed_whole(self, tmp_path):
        torch.save(named().state_dict(), tmp_path / "a.pt")
        given = ("--model", "tests.cli.test_measure:named", "--data", "tests.user_side:data", "--what", "layers")
        said = invoke(tmp_path, tmp_path / "a.pt", *given, "--no-page")
        assert "lambda_1[head.weight]" in said


class TestSeveral:
    def test_what_is_written(self, several, folders):
        out, said, found = several
        whole = ["measures.csv", "measures.html", "measures.json"]
        assert files(out) == sorted([*whole, *(f"{f.name}.json" for f in folders.values())])
        assert [n["name"] for n in found["nets"]] == [folder.name for folder in folders.values()]
        assert "<title>Measures: sgd and sam</title>" in (out / "measures.html").read_text(encoding="utf-8")
        assert said.splitlines()[-1] == f"Written: {out / 'measures.html'}"

    def test_the_table(self, several):
        _, said, found = several
        assert re.search(r"^quantity +sgd +sam +sam - sgd +sam is", said, re.MULTILINE), "the base comes first"
        values = {
            (n["group"], n["seed"]): n["sections"]["hessian"]["quantities"]["lambda_1"]["value"] for n in found["nets"]
        }
        differences = [values["sam", seed] - values["sgd", seed] for seed in (0, 1)]
        mean, half = sum(differences) / 2, 12.706205 * abs(differences[0] - differences[1]) / 2
        (row,) = re.findall(r"^lambda_1 .*$", said, re.MULTILINE)
        verdict = "not significant" if abs(mean) <= half else "flatter" if mean < 0 else "sharper"
        assert with_error(mean, half) in row and row.rstrip().endswith(verdict)
        assert "Networks: sgd 2, sam 2. Values are means ± 95 % t intervals over the seeds" in " ".join(said.split())

    def test_a_line_a_net(self, several, folders):
        lines = [line for line in several[1].splitlines() if line.startswith("[")]
        assert [line.split(":")[0] for line in lines] == [
            f"[{i}/4] {folder.name}" for i, folder in enumerate(folders.values(), 1)
        ]

    def test_the_same_run_twice_is_one(self, folders, tmp_path):
        folder = folders["sgd", 0]
        invoke(tmp_path, folder, f"{folder}/", "--what", "model", "--no-page")
        assert files(tmp_path) == [f"{folder.name}.csv", f"{folder.name}.json"]

    def test_processes_give_the_same_numbers(self, folders, monkeypatch):
        monkeypatch.setattr(pool, "START", "fork")
        runs = [open_run(folder) for folder in folders.values()][:3]
        view = View(what="model,hessian", settings=SETTINGS)
        done = []
        there = measure_all(runs, view, workers=2, on_done=lambda net: done.append(net.name))
        here = measure_all(runs, view)
        assert sorted(done) == sorted(run.name for run in runs)
        for a, b in zip(here, there, strict=True):
            assert (a.name, a.group, a.seed) == (b.name, b.group, b.seed)
            assert a.report.quantities == b.report.quantities


class TestStudy:
    """The runs of a study's table, by its name or file."""

    def measured(self, study, out, *given):
        file, runs = study
        said = invoke(out, file, "--runs", runs, "--what", "model", "--workers", 0, "--no-page", *given)
        nets = [(net["group"], net["seed"], net["name"]) for net in read(out / "measures.json")["nets"]]
        radii = {json.loads((runs / "runs" / name / "config.json").read_text())["rho"] for _, _, name in nets}
        return said, [net[:2] for net in nets], radii

    def test_the_chosen_values(self, study, tmp_path):
        arms = [("SGD", 0), ("SGD", 1), ("SAM", 0), ("SAM", 1)]
        said, nets, chosen = self.measured(study, tmp_path / "a")
        assert nets == arms and len(chosen) == 2 and "SAM - SGD" in said
        _, nets, first = self.measured(study, tmp_path / "b", "--no-tune")
        assert nets == arms and first == {None, 0.15}, "the radius of the preset"
        table = (study[1] / "studies" / "own.csv").read_text(encoding="utf-8").splitlines()
        values = dict(zip(table[0].split(","), table[2].split(","), strict=True))
        assert values["arm"] == "SAM" and {None, float(values["rho"])} == chosen

    def test_some_arms_and_seeds(self, study, tmp_path):
        said, nets, _ = self.measured(study, tmp_path, "--arm", "SAM", "--with", "seed=0..2")
        assert nets == [("SAM", 0), ("SAM", 1)] and "SAM: 2 of 3 seeds are finished." in said

    def test_the_folder_of_its_runs(self, study, refused):
        assert "two networks with seed" in refused(study[1], "--what", "model", "--workers", 0), "all radii are there"

    def test_refusals(self, study, refused, tmp_path):
        file, runs = study
        assert "has no arm 'SMA'; did you mean 'SAM'? (arms: 'SGD', 'SAM')" in refused(
            file, "--runs", runs, "--arm", "SMA"
        )
        assert f"is finished in {tmp_path}" in refused(file, "--runs", tmp_path)
        assert not (tmp_path / "runs").exists()


class TestFile:
    def test_weights_with_their_net_and_data(self, weights, tmp_path):
        invoke(tmp_path / "out", weights, *USER, "--what", "model", "--split", "test", "--no-page")
        found = read(tmp_path / "out" / "mine.json")
        (one,) = found["nets"]
        assert (one["name"], one["group"], one["seed"]) == ("mine", "mine", 0)
        torch.manual_seed(0)
        model, (_, _, (x, y)) = net(), clouds()
        want = nn.functional.cross_entropy(model(x), y).item()
        assert one["sections"]["model"]["quantities"]["loss"]["value"] == pytest.approx(want, rel=1e-6)
        assert one["conventions"]["split"] == "test"

    def test_two_files_are_two_groups(self, weights, tmp_path):
        other = shutil.copy(weights, tmp_path / "other.pt")
        said = invoke(tmp_path / "out", weights, other, *USER, "--what", "model", "--workers", 0, "--no-page")
        assert re.search(r"^quantity +mine +other +other - mine", said, re.MULTILINE)

    def test_the_name_of_a_file_gives_its_arm_and_seed(self, weights, tmp_path):
        files = [shutil.copy(weights, tmp_path / f"{name}.pt") for name in ("sgd-s0", "sgd-s1", "sam-s0", "sam-s1")]
        said = invoke(tmp_path / "out", *files, *USER, "--what", "model", "--workers", 0, "--no-page")
        assert re.search(r"^quantity +sgd +sam +sam - sgd", said, re.MULTILINE)


class TestRefusals:
    def test_targets(self, refused, folders, weights, tmp_path, monkeypatch):
        folder = folders["sgd", 0]
        assert "neither a folder nor a name" in refused(tmp_path / "absent")
        shutil.copytree(folder, tmp_path / "flatmin-runs" / "runs" / "by name")
        (tmp_path / "flatmin-runs" / "runs" / "by name" / "weights.pt").unlink()
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            assert "by name has no weights" in refused("by name")
        assert "is not a run folder: it has no config.json" in refused(tmp_path)
        assert "is not a run" in refused(folder.parent), "the folder of the runs"
        assert "leave out --model, --data and --key" in refused(folder, "--model", "mlp")
        assert "name its network and data with --model and --data" in refused(weights)
        assert "with --model and --data" in refused(weights, "--model", "mlp")
        assert "name a run folder, a file of weights" in refused("top=3")
        assert "there is no run, file or study 'smke'; did you mean 'smoke'?" in refused("smke")
        assert "--arm, --tune, --demo and --with need a study" in refused(folder, "--arm", "sam")

    def test_no_word_at_all(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["measure"])
        assert stop.value.code == 2 and "Missing argument" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            (["--what", "hesian"], "what must be of report, all, model, "),
            (["--what", ""], "got nothing."),
            (["--split", "training"], "split must be train, val or test, got 'training'."),
            (["--dtype", "float16"], "dtype must be float32 or float64"),
            (["--mode", "training"], "mode must be 'eval' or 'train', got 'training'."),
            (["--params", "9.*"], "no parameter matches '9.*'; the parameters are 0.weight, "),
            (["--examples", 51], "the train part has 50 examples, fewer than 51."),
            (["--split", "val", "--examples", 21], "the val part has 20 examples, fewer than 21."),
            (["--device", "nowhere"], "device=nowhere cannot be used here"),
            (["tops=3"], "unknown setting 'tops'; did you mean 'top'? (settings: top, bottom, "),
            (["rho=much"], "rho=much is not a number."),
            (["top=2.5"], "top=2.5 is not a whole number."),
            (["rho=-1"], "rho must be above 0, got -1.0."),
            (["points=4"], "points must be odd and at least 3"),
            (["rhos=0.2,0.1"], "rhos must be finite, ascending and above 0"),
            (["rhos="], "rhos must be finite, ascending and above 0"),
        ],
    )
    def test_words(self, refused, folders, given, sentence):
        assert sentence in refused(folders["sgd", 0], *given)

    def test_runs_that_cannot_be_measured(self, refused, folders, tmp_path):
        folder = shutil.copytree(folders["sgd", 0], tmp_path / "sgd-copy")
        (folder / "weights.pt").unlink()
        assert "has no weights (weights.pt is missing): the run used weights=false" in refused(folder)
        # Those before it are not measured in vain.
        assert "has no weights" in refused(*folders.values(), folder, "--workers", 0)
        (folder / "result.json").unlink()
        assert "is not finished" in refused(folder)

    def test_weights_of_another_net(self, refused, weights):
        said = refused(weights, "--model", "tests.cli.test_measure:named", "--data", "tests.user_side:data")
        assert said.startswith("flatmin: the weights in ") and "do not fit the model" in said
        assert said.endswith("(while mine was measured)\n")

    def test_missing_extras_are_said_before(self, refused, folders, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "matplotlib.figure", None)
            for option in (("--png",), ("--figures", "svg")):
                assert "pip install '.[plot]'" in refused(folders["sgd", 0], *option)
        assert "the formats of figures must be one or more of svg, pdf, png" in refused(
            folders["sgd", 0], "--figures", "jpg"
        )
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda name: None)
            assert "pip install '.[report]'" in refused(folders["sgd", 0])

    def test_what_every_net_refuses(self, refused, folders):
        given = (*list(folders.values())[:2], "--what", "model", "--workers", 0)
        assert "the train part has 50 examples, fewer than 51." in refused(*given, "--examples", 51)

    def test_two_runs_of_one_arm_and_seed(self, refused, folders, tmp_path):
        copy, given = shutil.copytree(folders["sgd", 0], tmp_path / "sgd-copy"), ("--what", "model", "--workers", 0)
        said = refused(folders["sgd", 0], copy, *given)
        assert "'sgd' has two networks with seed 0; leave one out." in said and "their settings are the same" in said
        config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        (copy / "config.json").write_text(json.dumps({**config, "lr": 0.05, "momentum": 0.5}), encoding="utf-8")
        said = refused(folders["sgd", 0], copy, *given)
        assert "they differ by lr=0.1 momentum=0.9 and lr=0.05 momentum=0.5." in said
        assert f"{folders['sgd', 0].name} and sgd-copy" in said and "flatmin measure STUDY" in said

    def test_what_the_data_raise_stays_what_it_is(self, weights):
        run = find(weights, model="tests.user_side:net", data="tests.cli.test_measure:damaged")
        with pytest.raises(ValueError, match="Expecting value"):
            measure_all([run], View(what="model"))


class TestWhatFails:
    def test_a_section_takes_nothing_else_away(self, tmp_path):
        """Status 3 says that something is missing; all else is printed and written."""
        torch.save(late().state_dict(), tmp_path / "a.pt")
        given = ("--model", "tests.cli.test_measure:late", "--data", "tests.user_side:data", *QUICK)
        said = invoke(tmp_path / "out", tmp_path / "a.pt", *given, "--what", "model,sharpness", status=3)
        words = " ".join(said.split())
        assert re.search(r"^loss +\d", said, re.MULTILINE) and re.search(r"^weight_norm +\d", said, re.MULTILINE)
        assert "worst case is missing: ValueError: invalid literal for int() with base 10: 'x' (test_me" in words
        (one,) = read(tmp_path / "out" / "a.json")["nets"]
        assert set(one["sections"]["model"]["quantities"]) == {"loss", "error_rate", "gradient_norm", "weight_norm"}
        sharpness = one["sections"]["sharpness"]
        assert "worst_case" not in sharpness["quantities"] and "worst case" in sharpness["missing"]
        assert "worst case is missing" in (tmp_path / "out" / "a.html").read_text(encoding="utf-8")

    def test_a_radius_at_which_the_net_overflows(self, folders, tmp_path):
        given = (folders["sgd", 0], *QUICK, "--what", "sharpness", "rho=1e30", "--no-page")
        said = invoke(tmp_path, *given, status=3)
        assert "use a smaller rho" in " ".join(said.split()) and re.search(r"^adaptive +\d", said, re.MULTILINE)

    def test_a_net_takes_no_other_net_away(self, weights, tmp_path):
        torch.save({"0.weight": torch.zeros(1)}, tmp_path / "other.pt")
        given = [tmp_path / "other.pt", weights, *TestFilesOfWeights.GIVEN, "--what", "model", "--workers", 0]
        said = invoke(tmp_path / "out", *given, status=3)
        assert "other could not be measured: the weights in" in said and "do not fit the model" in said
        assert re.search(r"^loss +\d", said, re.MULTILINE)
        assert files(tmp_path / "out") == ["measures.csv", "measures.json", "mine.json"]
        assert "do not fit" in read(tmp_path / "out" / "measures.json")["not_measured"]["other"]

    def test_a_process_that_ends_takes_no_other_net_away(self, tmp_path, monkeypatch):
        """As where memory runs out: each net that is left gets a process to itself."""
        monkeypatch.setattr(pool, "START", "fork")
        state, paths = named().state_dict(), [tmp_path / f"{name}.pt" for name in ("good", "other", "deadly")]
        torch.save(state, paths[0])
        torch.save({"0.weight": torch.zeros(1)}, paths[1])
        torch.save({k: torch.ones_like(v) for k, v in state.items()}, paths[2])
        given = ("--model", "tests.cli.test_measure:deadly", "--data", "tests.user_side:data", "--no-page")
        said = invoke(tmp_path / "out", *paths, *given, "--what", "model", "--workers", 1, status=3)
        assert (
            "deadly could not be measured: its process ended during the measurement, often because memory ran out"
            in said
        )
        assert "other could not be measured: the weights in" in said and "do not fit the model" in said
        assert files(tmp_path / "out") == ["good.json", "measures.csv", "measures.json"]

    def test_a_figure_takes_no_number_away(self, folders, tmp_path, monkeypatch):
        def broken(*_, **__):
            raise ZeroDivisionError("no scale")

        monkeypatch.setattr("flatmin.report.measurements.figures.eigenvalues", broken)
        name = folders["sgd", 0].name
        said = invoke(tmp_path, folders["sgd", 0], "--what", "model,hessian", status=3)
        assert "Ends of the spectrum could not be drawn: ZeroDivisionError: no scale" in said
        text = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
        assert "Ends of the spectrum could not be drawn: ZeroDivisionError: no scale" in text and "lambda_1" in text
        monkeypatch.setattr("flatmin.report.measurements.page.render", broken)
        said = invoke(tmp_path, folders["sgd", 0], "--what", "model,hessian", status=3)
        assert "the page could not be made: ZeroDivisionError: no scale" in said
        assert said.splitlines()[-1] == f"Written: {tmp_path / name}.csv"

    def test_outputs_with_logits(self, tmp_path):
        """huggingface/transformers#10459."""
        torch.manual_seed(0)
        torch.save(named().state_dict(), tmp_path / "a.pt")
        values = []
        for build in ("named", "answer"):
            given = ("--model", f"tests.cli.test_measure:{build}", "--data", "tests.user_side:data", *QUICK)
            invoke(tmp_path / build, tmp_path / "a.pt", *given, "--what", "model,hessian,sharpness", "--no-page")
            (one,) = read(tmp_path / build / "a.json")["nets"]
            values.append({n: q["value"] for s in one["sections"].values() for n, q in s["quantities"].items()})
        assert len(values[0]) > 10 and values[0] == values[1]

    def test_ctrl_c_keeps_what_was_measured(self, folders, tmp_path, monkeypatch, capsys):
        module = importlib.import_module("flatmin.measure.sections")

        def stop(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "worst_case", stop)
        name, given = folders["sgd", 0].name, ("--what", "model,sharpness,trace", "--out", str(tmp_path / "out"))
        with pytest.raises(SystemExit) as stopped:
            main(["measure", str(folders["sgd", 0]), *given])
        assert stopped.value.code == 130
        file = tmp_path / "out" / f"{name}.json"
        assert capsys.readouterr().err.startswith(f"Interrupted. Measurements so far: {file}. Landscapes continue ")
        (one,) = read(file)["nets"]
        assert "loss" in one["sections"]["model"]["quantities"]
        assert one["sections"]["sharpness"]["missing"] == {"Sharpness": "it was interrupted (KeyboardInterrupt)."}
        assert one["sections"]["trace"]["missing"] == {"Trace": "it was not reached."}
        monkeypatch.undo()
        invoke(tmp_path / "out", folders["sgd", 0], *given[:2], "--no-page", *QUICK)
        whole = read(tmp_path / "out" / f"{name}-2.json")
        monkeypatch.setattr(module, "error_rate", stop)
        with pytest.raises(SystemExit):
            main(["measure", str(folders["sgd", 0]), *given, *QUICK])
        assert read(tmp_path / "out" / f"{name}-2.json") == whole, "less does not take the place of more"


class TestView:
    def test_all_examples_in_batches(self, data):
        found = list(batches(data, View(batch=15)))
        assert [len(y) for _, y in found] == [15, 15, 15, 5]
        assert torch.equal(torch.cat([x for x, _ in found]), data.train.x)
        assert torch.equal(torch.cat([y for _, y in found]), data.train.y), "with the labels that were trained on"

    def test_some_are_drawn_by_the_seed_in_their_own_order(self, data):
        def drawn(seed):
            ((x, y),) = batches(data, View(examples=20, settings=ReportSettings(seed=seed)))
            rows = [int((data.train.x == one).all(1).nonzero()) for one in x]
            assert torch.equal(y, data.train.y[rows])
            return rows

        assert len(set(drawn(0))) == 20 and drawn(0) == sorted(drawn(0)) == drawn(0)
        assert drawn(0) != drawn(1) and drawn(0) != list(range(20))

    def test_the_part_in_words(self, data):
        assert split_of(data, View()) == "train, 30% of the labels wrong"
        assert split_of(data, View(split="test")) == "test"
        assert split_of(dataclasses.replace(data, clean=None), View()) == "train"

    @pytest.mark.parametrize("bad", [{"batch": 0}, {"examples": 0}])
    def test_bad_numbers(self, bad):
        with pytest.raises(ValueError, match="batch and examples must be at least 1"):
            View(**bad)

    def test_progress_is_passed_on_and_nothing_kept_without_a_folder(self, folders, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        told_of = []
        view = View(what="landscape", settings=SETTINGS)
        found = measure(open_run(folders["sgd", 0]), view, progress=lambda what, share: told_of.append(what))
        assert "plane" in told_of and found.report.result("plane").complete
        assert not list(tmp_path.iterdir())


class TestFilesOfWeights:
    GIVEN = ("--model", "tests.user_side:net", "--data", "tests.user_side:data", "--no-page")

    def test_of_one_name_go_by_their_folders(self, tmp_path):
        paths = [tmp_path / folder / name for folder in ("x/a", "y/a", "b") for name in ("best.pt", "last.pt")]
        for seed, path in enumerate([*paths, tmp_path / "b" / "best.pth"]):
            path.parent.mkdir(exist_ok=True, parents=True)
            torch.manual_seed(seed)
            torch.save(net().state_dict(), path)
        out, given = tmp_path / "out", (*self.GIVEN, "--what", "model", "--workers", 0)
        said = invoke(out, paths[0], paths[2], paths[4], *given)
        assert re.search(r"^quantity +x-a-best +y-a-best +b-best ", said, re.MULTILINE)
        assert files(out) == ["b-best.json", "measures.csv", "measures.json", "x-a-best.json", "y-a-best.json"]
        runs = find_all([tmp_path / "b" / "best.pth", paths[4], paths[4]], model="m:n", data="m:d")
        assert [run.name for run in runs] == ["b-best.pth", "b-best.pt"]

    def test_measured_in_turn_keep_their_numbers(self, tmp_path):
        for seed, folder in enumerate("ab"):
            (tmp_path / folder).mkdir()
            torch.manual_seed(seed)
            torch.save(net().state_dict(), tmp_path / folder / "best.pt")
        out, given = tmp_path / "out", (*self.GIVEN, "--what", "model")
        invoke(out, tmp_path / "a" / "best.pt", *given)
        first = (out / "best.json").read_text()
        said = invoke(out, tmp_path / "b" / "best.pt", *given)
        assert "best.json has other measurements; these are in best-2.json." in said
        assert (out / "best.json").read_text() == first != (out / "best-2.json").read_text()
        invoke(out, tmp_path / "a" / "best.pt", *given, "--split", "test")
        assert numbers(out) == ["best-2.json", "best-3.json", "best.json"], "other settings, other numbers"
        invoke(out, tmp_path / "b" / "best.pt", *given)
        invoke(out, tmp_path / "a" / "best.pt", *given)
        assert numbers(out) == ["best-2.json", "best-3.json", "best.json"], "the same ones take the place of the old"

    def test_with_several_weights(self, weights, tmp_path):
        state = torch.load(weights)["state_dict"]
        torch.save({"model": state, "ema": {f"module.{k}": 0.5 * v for k, v in state.items()}}, weights)
        given = (weights, *self.GIVEN, "--what", "model")
        assert "under 'model' are used; those under 'ema' fit too" in " ".join(invoke(tmp_path / "a", *given).split())
        assert "are used" not in invoke(tmp_path / "b", *given, "--key", "ema")
        one, other = (
            read(tmp_path / out / "mine.json")["nets"][0]["sections"]["model"]["quantities"]["weight_norm"]["value"]
            for out in "ab"
        )
        assert other == pytest.approx(0.5 * one, rel=1e-6)

    def test_are_measured_anew_when_they_have_changed(self, weights, tmp_path):
        given = (weights, *self.GIVEN, *QUICK, "plane=0", "--what", "landscape")
        invoke(tmp_path / "out", *given)
        torch.save({k: v + 0.1 for k, v in net().state_dict().items()}, weights)
        invoke(tmp_path / "out", *given)
        assert len(list((tmp_path / "out" / "landscapes" / "mine").iterdir())) == 2

    def test_in_a_folder_that_looks_like_a_setting(self, weights, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "seed=1").mkdir()
        weights.rename(tmp_path / "seed=1" / "w.pt")
        invoke("out", "seed=1/w.pt", *self.GIVEN, "--what", "model")
        assert numbers(tmp_path / "out") == ["w.json"]


def test_workers_for_one_net_are_refused(refused, folders):
    assert "--workers is for several networks" in refused(folders["sgd", 0], "--workers", 2)


def test_what_some_net_lacks_is_said(folders, tmp_path, monkeypatch):
    module = importlib.import_module("flatmin.measure.sections")
    real, calls = module.error_rate, []

    def once(problem):
        calls.append(problem)
        if len(calls) == 2:
            raise ValueError("no classes here.")
        return real(problem)

    monkeypatch.setattr(module, "error_rate", once)
    paths = [folders["sgd", 0], folders["sam", 0]]
    said = invoke(tmp_path, *paths, "--what", "model", "--no-page", "--workers", 0, status=3)
    assert f"error rate is missing for {paths[1].name}: ValueError: no classes here." in " ".join(said.split())
    assert re.search(r"^error_rate \* +0\.\d+ +- +- *$", said, re.MULTILINE), "that of the other is shown"
    assert "error_rate from 1 of 2 networks" in " ".join(said.split())
