"""Archives of finished runs: packed, added to, unpacked, and drawn by another version; what is damaged is refused."""

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from flatmin.cli.main import app, main
from flatmin.report.runs import listing
from flatmin.study import code, stale
from flatmin.train import fingerprint

STUDY = """
title = "Three clouds"
train = "smoke"
seeds = [0, 1]
baseline = "SGD"
choose = ["rho"]
choose_seeds = [7]
columns = ["test_acc", "loss", "grad_norm@last"]
[settings]
data = "tests.user_side:data"
model = "tests.user_side:net"
epochs = 1
batch_size = 50
device = "cpu"
[record]
log_every = 1
diagnostics = true
[measure]
what = "model"
examples = 20
[axes]
rho = [0.1, 0.2]
[[arms]]
label = "SGD"
method = "sgd"
[[arms]]
label = "SAM"
method = "sam"
"""


def invoke(*given):
    found = CliRunner().invoke(app, [*map(str, given)], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture
def refused(capsys):
    def run(*given):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, given)])
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.err.count("\n") == 1, said.err
        return said.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The study's file and its folder, trained once."""
    folder = tmp_path_factory.mktemp("trained")
    file = folder / "clouds.toml"
    file.write_text(STUDY, encoding="utf-8")
    invoke("study", file, "--out", folder / "out", "--workers", 0, "--no-report")
    return file, folder / "out"


@pytest.fixture
def out(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path / "out")
    return tmp_path / "out"


def text_of(archive):
    return {
        path.relative_to(archive): path.read_text(encoding="utf-8") for path in archive.rglob("*") if path.is_file()
    }


def table(folder):
    return (folder / "studies" / "clouds.csv").read_text(encoding="utf-8")


class AnotherVersion:
    """The package after a change of one of its files."""

    def __init__(self, monkeypatch):
        for module in (code, fingerprint, listing, stale):
            monkeypatch.setattr(module, "package_digest", lambda: "f" * 64)


def test_the_choice_is_made_on_seeds_of_its_own(trained, refused, tmp_path):
    file, out = trained
    runs = [json.loads(path.read_text())["seed"] for path in out.glob("runs/*/result.json")]
    assert sorted(runs) == [0, 0, 1, 1, 7, 7], "both radii with seed 7, the chosen one and SGD with the others"
    said = " ".join(invoke("study", file, "--out", out, "--no-train", "--no-report").split())
    scores = {}
    for path in out.glob("runs/*/result.json"):
        found = json.loads(path.read_text())
        if found["seed"] == 7:
            lines = map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
            loss = next(line["val_loss"] for line in lines if line["epoch"] == found["chosen"]["epoch"])
            scores[found["rho"]] = (found["chosen"]["val_acc"], -loss)
    best = max(sorted(scores), key=scores.get)
    assert f"SAM rho={best:g} is chosen by mean validation accuracy in % with seed 7" in said
    later = invoke("study", file, "--dry-run", "--out", tmp_path / "none")
    assert later.count("after tuning") == 2 and "6 runs, 6 to do" in later
    assert "4 runs, 4 to do" in invoke("study", file, "rho=0.1", "--dry-run", "--out", tmp_path / "none")
    assert "seed 7 is in both seeds and choose_seeds" in refused(
        "study", file, "seed=7,8", "--dry-run", "--out", tmp_path / "none"
    )
    (tmp_path / "none.toml").write_text(STUDY.replace('choose = ["rho"]', ""), encoding="utf-8")
    assert "nothing to choose" in refused("study", tmp_path / "none.toml", "--dry-run")


def test_a_later_version_draws_the_table_and_says_what_trained_it(trained, out, tmp_path, monkeypatch, refused):
    file, archive = trained[0], tmp_path / "results" / "clouds"
    assert "6 runs added, 0 with new measurements, 0 already there, 0 runs left out" in invoke(
        "runs", "pack", out, archive
    )
    packed = text_of(archive)
    assert len(packed) == 7 and all(len(text) < 15_000 for text in packed.values())
    before = table(out)
    AnotherVersion(monkeypatch)
    new = tmp_path / "new"
    words = ("study", file, "--out", new, "--no-report")
    assert "no run of the study" in refused(*words, "--no-train"), "runs of other code are not taken by themselves"
    unlike = " ".join(refused(*words, "epochs=9", "--no-train", "--archive", archive).split())
    assert re.search(r"In the most similar run, [\w-]+, epochs is \d there and 9 here\.$", unlike)
    said = invoke(*words, "--no-train", "--archive", archive)
    assert table(new) == before and not (new / "runs").exists()
    old = json.loads(next(out.glob("runs/*/env.json")).read_text())["code"]
    assert (
        f"6 of the 6 finished runs come from the archive {archive}: 6 trained by flatmin" in said
        and f"code {old})" in said
    )
    assert "(code ffffffffff)" in said and "differs from the code" in said
    mixed = invoke(*words, "seed=0..2", "--workers", 0, "--archive", archive)
    assert "The other 2 runs were trained by the code that made the table." in mixed and "Rows whose runs were" in mixed
    assert len(list(new.glob("runs/*/result.json"))) == 2 and text_of(archive) == packed


def test_a_later_version_says_which_runs_it_does_not_take(trained, out, monkeypatch, refused):
    dry = ("study", trained[0], "--out", out, "--dry-run")
    names = sorted(path.name for path in (out / "runs").iterdir())
    assert "stale" not in invoke("runs", "list", out) and "No run is stale." in invoke("runs", "rm", "--stale", out)
    (out / "runs" / names[0] / "result.json").unlink()
    env = out / "runs" / names[1] / "env.json"
    env.write_text(env.read_text().replace('"flatmin": "0.', '"flatmin": "0.0.'))
    AnotherVersion(monkeypatch)
    said = " ".join(invoke(*dry).split())
    # Which of the two radii was chosen decides whether the plan knows the runs of the chosen one before the choice.
    made = "finished (and 1 unfinished )?runs in .* with settings of this study were made by different code of"
    assert re.search(rf"[45] {made}.*, by flatmin 0.0.|4 {made}", said)
    assert f"`flatmin runs rm --stale {out}` removes outdated runs." in said
    assert invoke("runs", "list", out).count(", stale ") == 6
    taken = invoke(*dry, "--archive", out)
    assert "6 runs, 1 to do" in taken and "1 unfinished run in" in taken, "what is finished is taken as it is"
    shown = invoke("runs", "rm", "--stale", out, "--yes")
    assert shown.count("made by different code of flatmin") == 5 and "made by flatmin 0.0." in shown
    assert "Removed these 6 runs." in shown and not list((out / "runs").iterdir())
    assert "name the runs to remove, or add --stale" in refused("runs", "rm")


def test_a_plan_says_that_a_module_or_the_data_have_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, numbers = tmp_path / "own_module.py", tmp_path / "rows.txt"
    module.write_text(
        "import numpy as np, torch\n"
        "def net():\n    return torch.nn.Linear(1, 2)\n"
        "def data():\n    x = np.loadtxt('rows.txt').reshape(-1, 1)\n    return [(x, np.arange(len(x)) % 2)] * 3\n"
    )
    numbers.write_text("1 2 3 4")
    text = STUDY.replace("tests.user_side", "own_module").replace("batch_size = 50", "batch_size = 4")
    text = text[: text.index("[record]")] + '[[arms]]\nlabel = "SGD"\nmethod = "sgd"\n'
    for line in ('choose = ["rho"]\n', "choose_seeds = [7]\n", 'columns = ["test_acc", "loss", "grad_norm@last"]\n'):
        text = text.replace(line, "")
    (tmp_path / "own.toml").write_text(text)
    words = ("study", "own.toml", "seed=0")
    invoke(*words, "--workers", 0, "--no-report")
    assert "trained again" not in invoke(*words, "--dry-run")
    source = module.read_text()
    module.write_text(source + "# changed\n")
    was = "1 finished run in flatmin-runs with settings of this study was made"
    assert f"{was} with another version of own_module" in invoke(*words, "--dry-run")
    module.write_text(source)
    numbers.write_text("1 2 3 5")
    assert f"{was} on different data" in invoke(*words, "--dry-run")
    assert "made on different data" in invoke("runs", "rm", "--stale", "--yes") and not list(tmp_path.glob("*/runs/*"))


def test_packing_adds_and_never_loses(out, tmp_path, refused):
    archive, half = tmp_path / "archive", tmp_path / "half"
    shutil.copytree(out, half)
    names = sorted(path.name for path in (half / "runs").iterdir())
    for name in names[:2]:
        shutil.rmtree(half / "runs" / name)
    (half / "runs" / names[2] / "result.json").unlink()
    card = next(path for name in names[3:] for path in (half / "runs" / name).glob("card-*.json"))
    card.unlink()
    assert f"left out: {names[2]}: it is not finished" in invoke("runs", "pack", half, archive)
    assert "3 runs added, 1 with new measurements, 2 already there" in invoke("runs", "pack", out, archive)
    whole = text_of(archive)
    for folder in (out, half):
        invoke("runs", "pack", folder, archive)
        assert text_of(archive) == whole
    back = tmp_path / "back"
    assert "6 runs added" in invoke("runs", "unpack", archive, back)
    assert "0 runs added, 0 with new measurements, 6 already there" in invoke("runs", "unpack", archive, back)
    invoke("runs", "pack", back, tmp_path / "twice")
    assert text_of(tmp_path / "twice") == whole
    for path in out.glob("runs/*/*.json*"):
        copy = back / "runs" / path.parent.name / path.name
        same = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
        if same is None:
            assert json.loads(copy.read_text()) == json.loads(path.read_text())
        else:
            assert [json.loads(line) for line in copy.read_text().splitlines()] == same
    result = out / "runs" / names[5] / "result.json"
    result.write_text(result.read_text().replace('"seconds": ', '"seconds": 1'))
    assert f"{names[5]} exists already with a different result.json; nothing was written" in refused(
        "runs", "pack", out, archive
    )
    assert "different result.json" in refused("runs", "unpack", archive, out)
    assert text_of(archive) == whole


def cut(path):
    path.write_text(path.read_text()[:-40])


def edited(path):
    path.write_text(path.read_text().replace('"seed": ', '"seed": 1', 1))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda file, sums: cut(file), "does not match its digest in SHA256SUMS: it was truncated or edited"),
        (lambda file, sums: edited(file), "does not match its digest in SHA256SUMS"),
        (lambda file, sums: file.unlink(), "is listed in SHA256SUMS but cannot be read"),
        (lambda file, sums: sums.write_text(sums.read_text().split("\n", 1)[1]), "is not listed in SHA256SUMS"),
        (lambda file, sums: cut(sums), "does not name a run file"),
        (lambda file, sums: sums.unlink(), "is not an archive of runs"),
    ],
)
def test_a_damaged_archive_is_one_sentence(trained, out, tmp_path, refused, harm, why):
    archive = tmp_path / "archive"
    invoke("runs", "pack", out, archive)
    harm(sorted(archive.glob("runs/*.json"))[0], archive / "SHA256SUMS")
    assert why in refused("study", trained[0], "--no-train", "--archive", archive, "--out", tmp_path / "new")
    assert why in refused("runs", "unpack", archive, tmp_path / "new") and not (tmp_path / "new").exists()


def test_what_is_no_store_is_one_sentence(tmp_path, refused):
    assert "is not the output folder (--out) of a study" in refused(
        "runs", "pack", tmp_path / "none", tmp_path / "archive"
    )
    (tmp_path / "out" / "runs" / "x").mkdir(parents=True)
    assert "no finished run of a study" in refused("runs", "pack", tmp_path / "out", tmp_path / "archive")
    assert not (tmp_path / "archive").exists()
