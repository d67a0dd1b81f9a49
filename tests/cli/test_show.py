"""`flatmin show`: runs of `train` and of `compare` in the terminal and as a page, and how it refuses."""

import dataclasses
import importlib
import re

import pytest
from typer.testing import CliRunner

from flatmin.cli.main import app, main
from flatmin.report import html as page
from flatmin.study.executors import execute
from flatmin.study.store import Run, Store
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.lock import hold
from flatmin.train.loop import train
from flatmin.train.options import Options

runner = CliRunner()
CONFIG = RunConfig(
    method="sam",
    rho=0.1,
    epochs=3,
    batch_size=25,
    data="tests.user_side:data",
    model="tests.user_side:net",
    measure=True,
)
LOGGED = Options(log_every=1, diagnostics=True, measure_every=2, measures="hessian")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working directory with runs: finished with everything, failed, stopped; and two of a comparison."""
    home = tmp_path_factory.mktemp("home")
    runs = home / "flatmin-runs" / "runs"
    train(CONFIG, folder=RunFolder(runs / "full"), options=LOGGED)
    train(dataclasses.replace(CONFIG, lr=1e30), folder=RunFolder(runs / "failed"))
    with pytest.raises(ZeroDivisionError):
        train(CONFIG, folder=RunFolder(runs / "stopped"), on_epoch=lambda line: 1 / 0)
    store = Store(home / "study")
    arms = [Run(label=f"{m} arm", config=dataclasses.replace(CONFIG, method=m, rho=rho), code="c")
            for m, rho in (("sgd", None), ("sam", 0.1))]  # fmt: skip
    execute(arms, store, workers=0, on_event=lambda event: None)
    return home


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(page, "_plotly_js", lambda: "/* plotly.js */")
    yield
    for path in home.rglob("*.html"):
        path.unlink()


def invoke(*given):
    found = runner.invoke(app, ["show", *map(str, given)], env={"COLUMNS": "100"}, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def pages(home):
    return sorted(str(path.relative_to(home)) for path in home.rglob("*.html"))


@pytest.fixture
def refused(capsys, home):
    def run(*given):
        with pytest.raises(SystemExit) as stop:
            main(["show", *map(str, given)])
        said = capsys.readouterr()
        assert stop.value.code == 2, said.err
        assert said.err.startswith("flatmin: ") and said.err.count("\n") == 1 and said.out == ""
        assert pages(home) == []
        return said.err

    return run


class TestOneRun:
    def test_by_name_and_by_folder(self, home):
        for word in ("full", "flatmin-runs/runs/full", home / "flatmin-runs" / "runs" / "full"):
            said = invoke(word, "--no-page")
            assert said.startswith("sam, rho 0.1: tests.user_side:net on tests.user_side:data, 3 of 3 epochs")
            assert re.search(r"^lambda_max +\d", said, re.MULTILINE) and "perturbed loss" in said
        assert pages(home) == []

    def test_its_page_lies_in_its_folder(self, home):
        assert invoke("full").endswith("Page: flatmin-runs/runs/full/show.html\n")
        assert pages(home) == ["flatmin-runs/runs/full/show.html"]
        text = (home / "flatmin-runs/runs/full/show.html").read_text()
        for title in ("Losses", "Accuracy", "Angle of the two gradients", "Largest eigenvalues", "Settings"):
            assert f"<h2>{title}</h2>" in text

    def test_the_page_elsewhere(self, home):
        invoke("full", "--out", "a/b.html")
        assert pages(home) == ["a/b.html"]

    def test_figures_for_papers(self, home, refused):
        pytest.importorskip("matplotlib")
        assert "got 'jpg'" in refused("full", "--figures", "jpg") and "got 'jpg'" in refused(
            "no-such", "--figures", "jpg"
        )
        said = invoke("full", "--figures", "svg,png", "--no-page")
        written = sorted((home / "flatmin-runs/runs/full/show-figures").iterdir())
        assert f"Figures: flatmin-runs/runs/full/show-figures ({len(written)} files)" in said
        assert {"accuracy.png", "losses.svg"} <= {path.name for path in written} and pages(home) == []

    def test_it_is_opened_on_request(self, home, monkeypatch):
        opened = []
        monkeypatch.setattr("typer.launch", opened.append)
        invoke("full")
        assert opened == []
        invoke("full", "--open")
        assert opened == [(home / "flatmin-runs/runs/full/show.html").as_uri()]

    def test_a_failed_one(self):
        said = " ".join(invoke("failed").split())
        assert "failed failed: the training loss was not finite in step" in said and "nonfinite.json" in said
        assert "No epoch is finished yet." in said

    def test_one_that_goes_on(self, home):
        folder = home / "flatmin-runs" / "runs" / "stopped"
        assert "1 of 3 epochs, stopped." in invoke("stopped", "--no-page")
        with hold(folder):
            assert "1 of 3 epochs, running." in invoke("stopped", "--no-page")
            invoke("stopped")


class TestSeveral:
    def test_what_differs(self, home):
        said = invoke("full", "failed", "stopped")
        assert "3 runs: 1 finished, 1 failed, 1 stopped." in said
        assert re.search(r"^lr +0\.1 +1e\+30 +0\.1 *$", said, re.MULTILINE)
        assert said.endswith("Page: flatmin-runs/show.html\n") and pages(home) == ["flatmin-runs/show.html"]
        assert "<h2>Differences</h2>" in (home / "flatmin-runs/show.html").read_text()

    def test_runs_of_a_comparison(self, home):
        folders = sorted((home / "study" / "runs").iterdir())
        said = invoke(*folders)
        assert re.search(r"^method +sam +sgd *$", said, re.MULTILINE)
        assert re.search(r"^rho +0\.1 +- *$", said, re.MULTILINE)

    def test_one_named_twice_is_one(self):
        assert invoke("full", "flatmin-runs/runs/full", "--no-page").startswith("sam, rho 0.1: ")


class TestRefusals:
    def test_no_run(self, home, refused):
        assert "there is no run 'ful': neither a folder nor a name in flatmin-runs/runs; did you mean 'full'?" in (
            refused("ful")
        )
        assert "study is not a run folder: it has no config.json." in refused("study")

    def test_a_damaged_run(self, home, refused):
        metrics = home / "flatmin-runs" / "runs" / "stopped" / "metrics.jsonl"
        kept = metrics.read_text()
        try:
            metrics.write_text("{\n" + kept)
            assert "line 1 of flatmin-runs/runs/stopped/metrics.jsonl is damaged" in refused("full", "stopped")
        finally:
            metrics.write_text(kept)

    def test_a_page_of_another_kind(self, refused):
        assert "--out must be a file that ends in .html; got 'page.pdf'" in refused("full", "--out", "page.pdf")

    def test_without_plotly(self, home, refused, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "plotly" else find(name))
        assert "pip install '.[report]'" in refused("full", "no-such-run"), "said before any work"
        assert "3 of 3 epochs" in invoke("full", "--no-page")
