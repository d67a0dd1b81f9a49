"""`flatmin original` from end to end."""

import shlex

import pytest
from typer.testing import CliRunner

from flatmin.cli.main import app, main
from flatmin.originals.projects import PROJECTS
from flatmin.train.folder import RunFolder

TINY = [f"--set={word}" for word in ("data=digits", "model=mlp", "epochs=1", "cutout=none", "cutout_p=none")]
ON_DIGITS = ["--set=train_on_val=false", "--set=selection=val"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of one's own to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path


def invoke(*words, **environment):
    return CliRunner().invoke(app, ["original", *words], env={"COLUMNS": "200", **environment})


def done(*words):
    result = invoke(*words)
    assert result.exit_code == 0, result.exception or result.output
    return result.output.splitlines()


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.startswith("flatmin: ") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (["bisam", "--optim", "bisam_tanh", *TINY], "bisam-tanh"),
        (
            ["vasso", "python", "train.py", "--opt", "vasso-adam", "--dataset", "CIFAR10_cutout", *TINY, *ON_DIGITS],
            "vasso",
        ),
        (["vasso", *TINY, *ON_DIGITS, "--opt=sam-sgd", "--nesterov"], "sam"),
        (["empirical", "--experiment", "default", *TINY], "sgd"),
        (
            ["fundamental", "--experiment", "cifar100_wrn28_10_sam_diminish2", *TINY, "--set=statistics=none"],
            "sam",
        ),
    ],
)
def test_it_trains_what_it_prints(words, method, capsys, here):
    lines = done(*words, "--out", "there")
    (folder,) = (here / "there" / "runs").iterdir()
    assert RunFolder(folder).config()[0].method == method and RunFolder(folder).finished
    assert lines[0].startswith("flatmin train ") and any(line.startswith("epoch 1/1 ") for line in lines)
    printed = shlex.split(lines[0])[1:]
    assert "is finished; show it with" in refused(capsys, *printed, "--out", "there"), "the same settings"
    assert "is finished; show it with" in refused(capsys, "original", *words, "--out", "there")
    done(*words, "--out", "there", "--again")


def test_a_dry_run_prints_and_needs_no_data(here):
    words = ["vasso", "--opt", "vasso-sgd", "--rho", "0.2", "--dry-run", "--set", "epochs=3", "--set", "rho=0.1"]
    lines = done(*words)
    assert lines[0] == (
        "flatmin train cifar10-wrn28-10 method=vasso rho=0.1 theta=0.9 freeze_batchnorm=false model=resnet18 cutout=0 "
        "data_dir=./datasets train_on_val=true selection=max-test seed=1234 lr=0.05 weight_decay=0.0005 "
        "precision=float32 epochs=3"
    )
    assert lines[1:] and all(line.startswith("Note: ") for line in lines[1:])
    assert not list(here.iterdir())


def test_of_several_processes_one_speaks():
    words = ["bisam", "--dry-run"]
    assert invoke(*words, RANK="1").output == "" != invoke(*words, RANK="0").output


def test_the_list_has_every_project():
    lines = done("list")
    assert [line.split()[0] for line in lines] == list(PROJECTS)
    assert all(project.script in line for project, line in zip(PROJECTS.values(), lines, strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vaso"], "flatmin: unknown project 'vaso'; did you mean 'vasso'?"),
        (
            ["vasso", "--thta", "1"],
            "flatmin: --thta is not a flag of train.py of BingcongLi/VaSSO; did you mean '--theta'?",
        ),
        (["vasso", "--rho", "x"], "flatmin: --rho expects a number, got 'x'."),
        (["vasso", "--eta_min", "-1"], "flatmin: lr_min must be at least 0, got -1.0."),
        (["vasso", "--rho"], "flatmin: --rho expects a number, but no value follows it."),
        (["vasso", "--set", "epohcs=1"], "flatmin: unknown setting 'epohcs'; did you mean 'epochs'?"),
        (["vasso", "--set", "epochs"], "flatmin: 'epochs' is not a setting; write KEY=VALUE"),
        (["bisam"], "flatmin: there is no CIFAR-10 in data: expected "),
    ],
)
def test_mistakes_are_one_sentence(words, message, capsys, here):
    assert refused(capsys, "original", *words).startswith(message)
    assert not list(here.iterdir())
