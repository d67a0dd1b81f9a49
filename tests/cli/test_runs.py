"""`flatmin runs list` and `rm`, and `flatmin export`: what they say, and what they do not remove."""

import dataclasses
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from flatmin.cli.main import app, main
from flatmin.cli.runs import _bytes
from flatmin.report.runs.listing import check_removable
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.lock import hold
from flatmin.train.loop import train
from tests.helpers import same_bits

runner = CliRunner()
CONFIG = RunConfig(
    method="sam", rho=0.1, epochs=1, batch_size=25, data="tests.user_side:data", model="tests.user_side:net"
)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """flatmin-runs/runs in the working directory: finished, failed, stopped, damaged."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "flatmin-runs" / "runs"
    train(CONFIG, folder=RunFolder(folder / "good"))
    train(dataclasses.replace(CONFIG, method="sgd", rho=None, lr=1e30), folder=RunFolder(folder / "failed"))
    for name in ("stopped", "damaged"):
        RunFolder(folder / name).begin(dataclasses.replace(CONFIG, epochs=7), {}, label=name)
    (folder / "damaged" / "config.json").write_text("{")
    for i, name in enumerate(("good", "failed", "stopped", "damaged")):
        for path in (folder / name).rglob("*"):
            os.utime(path, (1e9, 1e9 + 1000 * i))
    return folder


def invoke(*given, answer=None):
    found = runner.invoke(app, [*map(str, given)], env={"COLUMNS": "100"}, catch_exceptions=False, input=answer)
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture
def refused(capsys):
    def run(*given):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, given)])
        said = capsys.readouterr()
        assert stop.value.code == 2, said.err
        assert said.err.startswith("flatmin: ") and said.err.count("\n") == 1 and said.out == ""
        return said.err

    return run


def names(*given):
    return [entry["name"] for entry in json.loads(invoke("runs", "list", *given, "--json"))]


class TestList:
    def test_a_table(self, runs):
        said = invoke("runs", "list")
        for row in (
            r"name +method +rho +seed +settings +state +epochs +test % +when +size$",
            r"good +sam +0\.1 +0 +- +finished +1/1 +\d+\.\d\d +2001-09-09 +\d",
            r"failed +sgd +- +0 +lr=1e\+30 +failed +0/1 +- ",
            r"stopped +sam +0\.1 +0 +- +stopped +0/7 +- ",
            r"damaged +- +- +- +- +damaged +- +- ",
        ):
            assert re.search(f"^{row}", said, re.MULTILINE), row
        assert "All on tests.user_side:data with tests.user_side:net." in said
        assert re.search(r"^4 runs, [\d.]+ kB$", said, re.MULTILINE)
        assert said.splitlines()[-1].startswith("damaged: the run in flatmin-runs/runs/damaged cannot be read: trunc")

    def test_what_tells_runs_apart(self, runs):
        """Every setting that is not that of the most, those of the method and the network by their own names."""
        for i in range(3):
            more = dataclasses.replace(CONFIG, weight_decay=0.1 * (i == 1), epochs=2, seed=i)
            RunFolder(runs / f"more-{i}").begin(more, {}, label="more")
        other = dataclasses.replace(CONFIG, method="vasso", params={"direction.theta": 0.8}, data="digits", epochs=2)
        RunFolder(runs / "other").begin(dataclasses.replace(other, workers=3), {}, label="other")
        said = invoke("runs", "list")
        for row in (r"more-1 +sam +0\.1 +1 .* weight_decay=0\.1", r"other +vasso .* digits .* direction\.theta=0\.8"):
            assert re.search(f"^{row}", said, re.MULTILINE), row
        assert "workers" not in said and "seed=" not in said

    def test_numbers_for_programs(self, runs):
        found = {entry["name"]: entry for entry in json.loads(invoke("runs", "list", "--json"))}
        good, chosen = found["good"], RunFolder(runs / "good").result().chosen
        assert (good["method"], good["rho"], good["epochs"], good["done"], good["state"]) == (
            "sam",
            0.1,
            1,
            1,
            "finished",
        )
        assert (good["epoch"], good["val_acc"], good["test_acc"]) == (1, chosen["val_acc"], chosen["test_acc"])
        assert good["changed"] == 1e9 and good["size"] == sum(p.stat().st_size for p in (runs / "good").rglob("*"))
        assert "not finite" in found["failed"]["failure"] and found["stopped"]["test_acc"] is None
        assert found["damaged"]["state"] == "damaged" and "cannot be read" in found["damaged"]["problem"]

    def test_order(self, runs):
        assert names() == ["damaged", "stopped", "failed", "good"], "the newest first"
        assert names("--sort", "name") == ["damaged", "failed", "good", "stopped"]
        assert names("--sort", "test")[0] == "good"
        assert names("--sort", "method")[-2:] == ["failed", "damaged"], "what is not known comes last"
        assert names("--sort", "size")[-1] == "damaged"

    def test_a_run_that_goes_on(self, runs):
        with hold(runs / "stopped"):
            assert re.search(r"^stopped +.* running", invoke("runs", "list"), re.MULTILINE)

    def test_a_page_is_no_work_on_the_run(self, runs):
        (runs / "good" / "show.html").write_text("page")
        assert names() == ["damaged", "stopped", "failed", "good"]

    def test_folders(self, runs, refused, tmp_path):
        assert names(runs.parent) == names(runs) == names()
        (tmp_path / "empty").mkdir()
        assert "There are no runs in empty." in invoke("runs", "list", "empty")
        assert "there is no folder 'nowhere'" in refused("runs", "list", "nowhere")
        assert "--sort tset is not known; did you mean 'test'?" in refused("runs", "list", "--sort", "tset")

    def test_one(self, runs):
        for name in ("failed", "stopped", "damaged"):
            invoke("runs", "rm", name, "--yes")
        assert re.search(r"^1 run, ", invoke("runs", "list"), re.MULTILINE)

    @pytest.mark.slow
    def test_ten_thousand_runs_take_less_than_two_seconds(self, runs):
        """Of a processor, the least of three calls: what else the machine does takes its share of the caches."""
        for name in ("failed", "stopped", "damaged"):
            shutil.rmtree(runs / name)
        files = {path.name: path.read_bytes() for path in (runs / "good").iterdir()}
        for number in range(9_999):
            folder = runs / f"run-{number}"
            folder.mkdir()
            for name, content in files.items():
                (folder / name).write_bytes(content)
        for how in ([], ["--json"]):
            seconds = []
            for _ in range(3):
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                said = subprocess.run(
                    [sys.executable, "-m", "flatmin", "runs", "list", *how], check=True, capture_output=True, text=True
                ).stdout
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                assert said.count("run-") >= 9_999
                seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert min(seconds) < 2


class TestRemove:
    def test_after_the_question(self, runs):
        said = invoke("runs", "rm", "good", "flatmin-runs/runs/failed", "good", answer="y\n")
        assert "flatmin-runs/runs/good  " in said and "Remove these 2 runs? [y/N]" in said
        assert said.endswith("Removed these 2 runs.\n")
        assert sorted(path.name for path in runs.iterdir()) == ["damaged", "stopped"]

    @pytest.mark.parametrize("answer", ["n\n", "\n"])
    def test_not_without_it(self, runs, answer):
        assert invoke("runs", "rm", "good", answer=answer).endswith("Nothing was removed.\n")
        assert (runs / "good").is_dir()

    def test_nobody_answers(self, runs, capsys, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO())
        with pytest.raises(SystemExit) as stop:
            main(["runs", "rm", "good"])
        assert stop.value.code == 2 and "because there was no answer; add --yes" in capsys.readouterr().err
        assert (runs / "good").is_dir()

    def test_without_asking(self, runs):
        invoke("runs", "rm", "stopped", "damaged", "--yes")
        assert sorted(path.name for path in runs.iterdir()) == ["failed", "good"]

    def test_what_is_no_run_stays(self, runs, refused, tmp_path):
        other = tmp_path / "model"
        other.mkdir()
        (other / "config.json").write_text('{"method": "sam", "architectures": ["x"]}')
        assert "model is not a run (it has no env.json); nothing was removed." in refused(
            "runs", "rm", "good", other, "--yes"
        )
        assert "is not a run (it has no config.json)" in refused("runs", "rm", runs, "--yes")
        assert "there is no run 'goood'" in refused("runs", "rm", "goood", "--yes")
        (tmp_path / "link").symlink_to(runs / "good")
        assert "link is not a run (it is a link)" in refused("runs", "rm", tmp_path / "link", "--yes")
        assert (runs / "good").is_dir() and other.is_dir()

    def test_a_run_that_goes_on_stays(self, runs, refused):
        with hold(runs / "stopped"):
            said = refused("runs", "rm", "good", "stopped", "--yes")
            assert "flatmin-runs/runs/stopped is still running; stop it first, or add --force" in said
            assert (runs / "good").is_dir() and (runs / "stopped").is_dir()
            invoke("runs", "rm", "stopped", "--yes", "--force")
        assert not (runs / "stopped").exists()

    def test_one_that_goes_on_while_the_question_stands_stays(self, runs, monkeypatch):
        asked = []

        def busy(folders, *, force):
            asked.append(folders)
            if len(asked) == 2:
                raise ValueError("going on")
            check_removable(folders, force=force)

        monkeypatch.setattr("flatmin.report.runs.listing.check_removable", busy)
        found = runner.invoke(app, ["runs", "rm", "good"], input="y\n")
        assert isinstance(found.exception, ValueError) and (runs / "good").is_dir()


class TestExport:
    def test_a_file_for_others(self, runs, tmp_path):
        assert invoke("export", "good", "out/w.pt").startswith("Written: out/w.pt (0.0 MB)")
        want = torch.load(runs / "good" / "weights.pt", weights_only=True)
        assert same_bits(torch.load(tmp_path / "out" / "w.pt", weights_only=True), want)

    def test_refusals(self, runs, refused, tmp_path):
        assert "must end in .pt, .pth or .safetensors" in refused("export", "good", "w.onnx")
        assert "is not finished" in refused("export", "stopped", "w.pt")
        assert "failed: the training loss was not finite" in refused("export", "failed", "w.pt")
        (tmp_path / "w.pt").write_text("mine")
        assert "already exists" in refused("export", "good", "w.pt")
        invoke("export", "good", "w.pt", "--force")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["flatmin-runs", "w.pt"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_900, "99.9 kB"), (123_456, "123 kB"), (5e12, "5000 GB")],
)
def test_sizes(size, text):
    assert _bytes(size) == text
