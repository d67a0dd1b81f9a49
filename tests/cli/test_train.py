"""`flatmin train` from end to end."""

import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from flatmin.cli.main import app, main
from flatmin.cli.training import Training
from flatmin.data.cifar import RELEASES
from flatmin.train import events, trackers
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.result import Epoch, Result
from tests.helpers import same_bits

FINISHED = ["config.json", "data.json", "env.json", "metrics.jsonl", "result.json", "weights.pt"]

# A net that waits while there is a file `slow`, and sends its process Ctrl-C in the update that a file `stop` names.
OWN = """
import os, pathlib, signal, time
import torch
from torch import nn

def data():
    g = torch.Generator().manual_seed(0)
    return tuple((torch.randn(n, 6, generator=g), torch.arange(n) % 3) for n in (50, 20, 30))

def wide():
    return nn.Linear(6, 4)

class Net(nn.Linear):
    def forward(self, x):
        if self.training:
            self.passes = getattr(self, "passes", []) + [None]  # a number would count once an update
            if os.path.exists("slow"):
                time.sleep(0.05)
            if os.path.exists("stop") and len(self.passes) == int(pathlib.Path("stop").read_text()):
                signal.raise_signal(signal.SIGINT)
        return super().forward(x)

def net():
    return Net(6, 3)
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of one's own to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own(here):
    """Settings of a run with a net and data of one's own: 16 updates."""
    (here / "train_own.py").write_text(OWN)
    yield ["smoke", "data=train_own:data", "model=train_own:net", "batch_size=16", "epochs=4", "--name", "own"]
    sys.modules.pop("train_own", None)


class Said:
    """Exit code and output of one call of the command, in this process."""

    def __init__(self, *words):
        found = CliRunner().invoke(app, ["train", *map(str, words)], env={"COLUMNS": "80"})
        error = found.exception
        self.error = None if isinstance(error, SystemExit) else error
        self.code = found.exit_code
        self.out, self.err = found.stdout.splitlines(), found.stderr


def done(*words):
    """A call that goes well."""
    said = Said(*words)
    assert said.code == 0, said.error or said.err
    return said


def refused(capsys, *words, code=2):
    """The one sentence with which a call is refused; nothing is left on disk by it."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["train", *map(str, words)])
    said = capsys.readouterr()
    assert stop.value.code == code
    assert said.err.startswith("flatmin: ") and said.err.count("\n") == 1, said.err
    assert not any(line.startswith("epoch ") for line in said.out.splitlines()), "it began to train"
    assert sorted(Path.cwd().rglob("*")) == before
    return said.err.removeprefix("flatmin: ").rstrip("\n")


def runs(out="flatmin-runs"):
    return sorted((Path(out) / "runs").iterdir())


def only_run(out="flatmin-runs"):
    (found,) = runs(out)
    return found


def content(path):
    return {one.name: one.read_bytes() for one in path.rglob("*") if one.is_file()}


class TestARun:
    def test_output_and_folder(self):
        said = done("smoke", "epochs=3")
        assert said.out[0] == (
            "sam, rho 0.15: mlp (8,970 parameters) on digits (900 samples, 15 updates per epoch), float32 on cpu"
        )
        line = (
            r"epoch \d/3  lr [\d.]+  loss \d\.\d{3} -> \d\.\d{3}  train [\d.]+ %  val [\d.]+ %  [\d.]+ s, "
            r"[\d,]+ images/s"
        )
        assert all(re.fullmatch(line + r"  left about (a second|[\d.]+ seconds)", one) for one in said.out[1:3])
        assert re.fullmatch(line, said.out[3]), "nothing is left after the last"
        pattern = r"Test accuracy \d+\.\d\d %, top-5 \d+\.\d\d % \(weights of epoch \d, the best on validation\)\."
        assert re.fullmatch(pattern, said.out[4])
        assert len(said.out) == 5 and said.err == ""
        path = only_run()
        assert re.fullmatch(r"sam-smoke-s0-[0-9a-f]{10}", path.name)
        assert sorted(one.name for one in path.iterdir()) == FINISHED
        config = json.loads((path / "config.json").read_text())
        assert (config["label"], config["epochs"], config["rho"]) == ("sam smoke", 3, 0.15)
        result = json.loads((path / "result.json").read_text())
        assert (result["label"], result["key"]) == (config["label"], config["key"])
        assert result["key"].startswith(path.name[-10:])
        assert f"{result['chosen']['test_acc']:.2f} %" in said.out[4]
        assert len(RunFolder(path).lines(expected=3)) == 3

    def test_settings_options_name_and_place(self, here):
        words = ["method=vasso", "theta=0.7", "rho=0.2", "epochs=1", "log_every=5", "weights=false", "measure_every=1"]
        said = done("smoke", *words, "measures=sharpness", "measure_examples=50", "--name", "mine", "--out", "there")
        path = here / "there" / "runs" / "mine"
        assert sorted({*FINISHED, "steps.jsonl", "measures.jsonl"} - {"weights.pt"}) == [
            one.name for one in sorted(path.iterdir())
        ]
        config, labels = RunFolder(path).config()
        assert (config.method, config.params, config.rho) == ("vasso", {"direction.theta": 0.7}, 0.2)
        assert labels["label"] == "mine"
        assert len(RunFolder(path).steps()) == 3
        assert said.out[2].startswith("  measured: ")
        assert said.out[0].startswith("vasso, rho 0.2: mlp ")

    @pytest.mark.parametrize(
        ("words", "ending"),
        [
            (["selection=last"], "(weights of the last epoch)."),
            (["selection=max-test"], "(weights of epoch 1, the best on the test part: an overestimate)."),
        ],
    )
    def test_what_was_chosen_is_said(self, words, ending):
        assert done("smoke", "epochs=1", *words).out[-1].endswith(ending)

    def test_what_else_a_line_can_say(self):
        said = done("smoke", "epochs=2", "method=sgd", "noise=0.2", "test_every=2", "measure=true", "lr=0")
        assert said.out[0].startswith("sgd: mlp ")
        assert "->" not in said.out[1] and "memorised" in said.out[1] and "test" not in said.out[1]
        assert re.search(r"test [\d.]+ %  memorised \d+ %", said.out[2])
        assert said.out[-2].startswith("lambda_max ")
        assert re.match(
            r"Note: the network has not learned: the training loss of the kept weights is (at|above) chance",
            said.out[-1],
        )

    def test_a_preset_of_ones_own(self, here):
        (here / "My Preset.toml").write_text('method = "asam"\nmodel = "mlp"\nepochs = 1\n[rho]\nasam = 0.7\n')
        done("My Preset.toml", "seed=3")
        assert only_run().name.startswith("asam-my-preset-s3-")
        assert RunFolder(only_run()).config()[0].rho == 0.7

    def test_the_name_tells_apart_what_differs_in_the_outcome(self):
        for words in (["epochs=1"], ["epochs=1", "lr=0.2"], ["epochs=1", "method=sgd"], ["epochs=1", "seed=1"]):
            done("smoke", *words)
        assert len(runs()) == 4
        said = Said("smoke", "epochs=1", "data_dir=elsewhere", "workers=2", "log_every=3")
        assert "is finished; show it with" in str(said.error)

    def test_a_run_that_fails_says_why(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["train", "smoke", "lr=1e30"])
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert re.fullmatch(
            r"flatmin: the run stopped: the training loss was not finite in step \d, batch \d of epoch 1 "
            r"\(nonfinite\.json lists its samples\); try a smaller lr or rho\.\n",
            said.err,
        )
        assert "Test accuracy" not in said.out
        assert not (only_run() / "weights.pt").exists()
        assert json.loads((only_run() / "nonfinite.json").read_text())["samples"]


class TestDryRun:
    def test_settings_and_cost_and_nothing_on_disk(self, here):
        said = done("smoke", "epochs=3", "--dry-run")
        shown = dict(line.split(" = ", 1) for line in said.out if " = " in line)
        assert list(shown) == [field.name for field in dataclasses.fields(RunConfig)]
        assert (shown["epochs"], shown["device"], shown["rho"]) == ("3", "cpu", "0.15")
        assert said.out[-1] == (
            "45 updates of 2 gradient evaluations each on average; 8,970 parameters; train 900, validation 100, "
            "test 797 samples."
        )
        assert not list(here.iterdir())

    def test_a_finished_run_does_not_matter(self):
        done("smoke", "epochs=1")
        assert done("smoke", "epochs=1", "--dry-run").out[-1].startswith("15 updates")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["batch_size=901"], r"^batch_size=901 is larger than the 900 training samples"),
            (["warmup=5"], r"^warmup must be shorter than the training of 2 epochs"),
            (["method=sam-on"], r"^Layers: no layer matches"),
            (["--track", "tensorbord"], r"^unknown tracker 'tensorbord'; did you mean 'tensorboard'\?"),
        ],
    )
    def test_it_checks_everything(self, capsys, words, message):
        assert re.search(message, refused(capsys, "smoke", "--dry-run", *words))


class TestAgainAndResume:
    def test_a_finished_run_is_not_done_again_by_itself(self, capsys):
        done("smoke", "epochs=1")
        path = only_run()
        before = content(path)
        for more in ([], ["--resume"]):
            said = refused(capsys, "smoke", "epochs=1", *more)
            where = path.relative_to(Path.cwd()) if path.is_absolute() else path
            assert said == (
                f"the run in {where} is finished; show it with `flatmin show {where}`, or start it over with --again."
            )
        assert content(path) == before

    def test_again(self):
        done("smoke", "epochs=1", "--name", "x")
        path = only_run()
        (path / "nonfinite.json").write_text("{}")
        weights = torch.load(path / "weights.pt")
        done("smoke", "epochs=1", "--name", "x", "--again")
        assert sorted(one.name for one in path.iterdir()) == FINISHED
        assert same_bits(torch.load(path / "weights.pt"), weights)
        done("smoke", "epochs=2", "seed=1", "--name", "x", "--again")
        assert RunFolder(path).config()[0].seed == 1 and len(RunFolder(path).lines()) == 2

    def test_resume_where_nothing_is_begins(self):
        assert "Going on" not in "".join(done("smoke", "epochs=1", "--resume").out)
        assert (only_run() / "result.json").exists()

    def test_resume_and_again(self, capsys):
        words = "--resume continues a run and --again starts it over; leave out one of them."
        assert refused(capsys, "smoke", "--resume", "--again") == words

    def interrupted(self, own, at=7):
        """A run with Ctrl-C in one of its passes; two make an update."""
        Path("stop").write_text(str(at))
        said = Said(*own)
        Path("stop").unlink()
        assert said.code == 130 and said.error is None
        return said

    def test_ctrl_c_keeps_a_checkpoint_and_resume_goes_on(self, own, capsys):
        said = self.interrupted(own)
        assert said.err == (
            "Interrupted after 4 of 16 updates. A checkpoint was saved; to continue, run the same command with "
            "--resume.\n"
        )
        path = only_run()
        assert not (path / "result.json").exists()
        message = refused(capsys, *own)
        assert (
            message
            == "the run in flatmin-runs/runs/own is unfinished; continue it with --resume, or start it over with "
            "--again."
        )
        gone_on = done(*own, "--resume")
        assert gone_on.out[1] == "Continuing after update 4 of 16."
        assert [line.split()[1] for line in gone_on.out if line.startswith("epoch")] == ["1/4", "2/4", "3/4", "4/4"]
        alone = [*own[:-1], "alone"]
        done(*alone)
        one, two = (torch.load(f"flatmin-runs/runs/{name}/weights.pt") for name in ("own", "alone"))
        assert same_bits(one, two)

    def test_by_its_folder(self, own):
        self.interrupted(own)
        before = json.loads(Path("flatmin-runs/runs/own/config.json").read_text())
        said = done("flatmin-runs/runs/own", "--resume", "log_every=1")
        assert said.out[1] == "Continuing after update 4 of 16."
        result = json.loads(Path("flatmin-runs/runs/own/result.json").read_text())
        assert (result["label"], result["key"]) == (before["label"], before["key"])
        assert json.loads(Path("flatmin-runs/runs/own/config.json").read_text()) == before
        assert [step["step"] for step in RunFolder(Path("flatmin-runs/runs/own")).steps()] == list(range(5, 17))

    def test_by_its_folder_from_the_start(self, own):
        self.interrupted(own)
        for checkpoint in Path("flatmin-runs/runs/own/checkpoints").iterdir():
            checkpoint.unlink()
        before = json.loads(Path("flatmin-runs/runs/own/config.json").read_text())
        assert "Going on" not in "".join(done("flatmin-runs/runs/own", "--resume").out)
        assert json.loads(Path("flatmin-runs/runs/own/config.json").read_text()) == before

    def test_a_folder_by_mistake(self, capsys):
        done("smoke", "epochs=1", "--name", "x")
        path = "flatmin-runs/runs/x"
        assert refused(capsys, path) == f"{path} is a run folder; add --resume to continue the run."
        fixed = (
            f"{path} is a run folder, and the settings of the run are fixed: leave out %s, or name a preset to start "
        )
        fixed += "another run."
        assert refused(capsys, path, "--resume", "lr=0.2") == fixed % "lr=0.2"
        assert refused(capsys, path, "--resume", "--name", "y") == fixed % "--name"
        assert "is finished; show it with" in refused(capsys, path, "--resume")
        words = "flatmin-runs/runs is not a run folder: it has no config.json (runs are in FOLDER/runs)."
        assert refused(capsys, "flatmin-runs/runs", "--resume") == words

    def test_other_settings_under_the_same_name(self, own, capsys):
        self.interrupted(own)
        before = content(only_run())
        for words, message in (
            (["lr=0.2"], "lr is 0.1 there and 0.2 here"),
            (["method=vasso"], "method is 'sam' there and 'vasso' here"),
            (
                ["lr=0.2", "seed=1"],
                "lr is 0.1 there and 0.2 here, seed is 0 there and 1 here; use another",
            ),
            (
                ["epochs=9"],
                "(epochs is 4 there and 9 here): its cosine schedule depends on",
            ),
            (["model=tests.user_side:net"], "model is 'train_own:net' there and 'tests.user_side:net' here"),
        ):
            said = refused(capsys, *own, *words, "--resume")
            assert message in said
        assert content(only_run()) == before

    @pytest.mark.parametrize("named", [[], ["--name", "x"]])
    def test_more_epochs_go_on_where_the_rates_do_not_depend_on_them(self, named):
        """With the numbers of one run that nothing interrupts, also of an average of the weights."""
        words = ["smoke", "schedule=multistep", "milestones=1", "ema=0.9", "method=vasso", *named]
        done(*words, "epochs=2")
        first = only_run()
        said = done(*words, "epochs=3", "--resume")
        assert "Continuing after update 30 of 45." in said.out
        longer = first if named else next(path for path in runs() if path != first)
        if not named:
            assert said.out[0] == f"Note: {longer.name} continues {first.name}, in which epochs is 2 there and 3 here."
            assert len(RunFolder(first).lines(expected=2)) == 2 and RunFolder(first).finished
        done(*words, "epochs=3", "--out", "alone")
        alone = only_run("alone")
        assert alone.name == longer.name and RunFolder(longer).config() == RunFolder(alone).config()
        assert len(RunFolder(longer).steps()) == len(RunFolder(alone).steps())
        assert same_bits(torch.load(longer / "weights.pt"), torch.load(alone / "weights.pt"))

    def test_a_resume_that_begins_anew_says_so_and_why(self):
        done("smoke", "epochs=1")
        first = only_run().name
        (said,) = (line for line in done("smoke", "epochs=2", "--resume").out if line.startswith("Note: "))
        assert re.fullmatch(
            r"Note: there is no run with these settings to continue, so sam-smoke-s0-\w+ starts from the beginning: in "
            rf"{re.escape(first)} epochs is 1 there and 2 here, and its cosine schedule depends on the number of "
            r"epochs\.",
            said,
        )
        said = done("smoke", "epochs=1", "lr=0.2", "--resume").out[0]
        assert said.endswith(f"starts from the beginning; in {first}, lr is 0.1 there and 0.2 here.")

    def test_other_data_are_not_gone_on_with(self, own, here, capsys):
        self.interrupted(own)
        (here / "train_own.py").write_text(OWN.replace("manual_seed(0)", "manual_seed(12)"))
        sys.modules.pop("train_own")
        said = refused(capsys, *own, "--resume")
        assert "belongs to a run on other data: data=train_own:data returned other samples, because a file" in said
        assert "has another, unfinished run: the data differ" in refused(capsys, *own)
        assert "belongs to a run on other data" in refused(capsys, "flatmin-runs/runs/own", "--resume")
        unnamed = own[: own.index("--name")]
        done(*unnamed)
        (here / "train_own.py").write_text(OWN)
        sys.modules.pop("train_own")
        done(*unnamed)
        assert len(runs()) == 3, "under other names"
        assert "is finished; show it with" in str(Said(*unnamed).error)

    def test_a_run_that_stopped_by_itself_is_not_finished(self, capsys):
        assert Said("smoke", "lr=1e30").code == 2
        assert "unfinished; continue it with --resume" in refused(capsys, "smoke", "lr=1e30")

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', '{"version": 99}'])
    def test_a_result_that_cannot_be_read(self, capsys, text):
        done("smoke", "epochs=1", "--name", "x")
        Path("flatmin-runs/runs/x/result.json").write_text(text)
        said = refused(capsys, "smoke", "epochs=1", "--name", "x")
        assert said.startswith("the result of the run in flatmin-runs/runs/x cannot be read: ")
        done("smoke", "epochs=1", "--name", "x", "--again")

    @pytest.mark.skipif(os.name != "posix", reason="sends a signal")
    def test_ctrl_c_of_another_process(self, own, here):
        """The update in progress is finished; a sentence, exit code 130, and --resume continues."""
        (here / "slow").touch()
        process = subprocess.Popen(
            [sys.executable, "-m", "flatmin", "train", *own, "epochs=60"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A test runner in the background may have been started with Ctrl-C ignored; its children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        lines = here / "flatmin-runs/runs/own/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (lines.exists() and lines.read_text().count("\n")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert re.fullmatch(r"Interrupted after \d+ of 240 updates\. A checkpoint was saved; .* --resume\.\n", err)
        (here / "slow").unlink()
        said = done(*own, "epochs=60", "--resume")
        assert said.out[1] == f"Continuing after update {re.search(r'[0-9]+', err)[0]} of 240."
        assert len(RunFolder(only_run()).lines()) == 60
        assert out.splitlines()[0] == said.out[0] and "\x1b" not in out


class TestRefused:
    """Bad input is said in one sentence before the first step, and nothing is left on disk."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["smok"], r"^unknown preset 'smok'; did you mean 'smoke'\? \(presets: "),
            (["mine.toml"], r"^preset file 'mine\.toml' does not exist\.$"),
            (
                ["smoke", "--name", "../../x"],
                r"^--name '\.\./\.\./x' is not a valid name for a file or folder: it is a path",
            ),
            (["smoke", "--name", "/tmp/x"], r"^--name '/tmp/x' is not a valid name .*: it is a path"),
            (["smoke", "--name", "a\\b"], r"^--name 'a\\\\b' is not a valid name .*: it is a path"),
            (["smoke", "--name", ""], r"^--name '' is not a valid name .*: it is empty"),
            (["smoke", "--name", ".."], r"^--name '\.\.' is not a valid name .*: names must not begin .* or end with"),
            (["smoke", "--name", "a\nb"], r"^--name 'a\\nb' is not a valid name .*: names must not contain '\\n'"),
            (["smoke", "--name", "a:b"], r"^--name 'a:b' is not a valid name .*: names must not contain ':'"),
            (["smoke", "--name", "nul.txt"], r"^--name 'nul\.txt' is not a valid name .*: Windows reserves this name"),
            (["smoke", "--name", "x" * 300], r"^--name 'x+\.\.\.' is not a valid name .*: it is longer than 200 bytes"),
            (["smoke", "epoch=3"], r"^unknown setting 'epoch'; did you mean 'epochs'\?"),
            (["smoke", "theta=0.3"], r"^unknown setting 'theta'"),
            (["smoke", "epochs"], r"^'epochs' is not a setting; write KEY=VALUE"),
            (["smoke", "epochs=many"], r"^epochs=many is not a whole number\.$"),
            (["smoke", "epochs=0"], r"^epochs must be at least 1, got 0\.$"),
            (["smoke", "lr=nan"], r"^lr must be at least 0, got nan\.$"),
            (["smoke", "batch_size=901"], r"^batch_size=901 is larger than the 900 training samples; use 900 or few"),
            (["smoke", "train_size=50"], r"^batch_size=64 is larger than the 50 training samples"),
            (["smoke", "train_size=901"], r"^train_size=901 is more than the 900 training samples of digits\.$"),
            (["smoke", "accumulate=65"], r"^accumulate=65 is more than the 64"),
            (["smoke", "precision=bf17"], r"^precision=bf17 is not known; did you mean 'bf16'\?"),
            (["smoke", "device=gpu"], r"^device=gpu is not known.*\(device: cpu, cuda\)"),
            (["smoke", "device=meta"], r"^device=meta is not known \(device: cpu, cuda\)"),
            (["smoke", "graph=true", "device=cpu"], r"^graph=true captures a CUDA graph; it needs device=cuda\.$"),
            (["smoke", "method=samm"], r"^unknown method 'samm'; did you mean 'sam'"),
            (["smoke", "method=sgd", "rho=0.1"], r"^sgd has no radius; leave out rho\.$"),
            (["smoke", "method=vasso", "theta=2"], r"theta must be"),
            (["smoke", "method=micro-sam", "accumulate=2"], r"^micro-sam already splits each batch"),
            (["smoke", "method=sgdhess", "precision=fp16"], r"fp16|scaler"),
            (["smoke", "model=con"], r"^unknown model 'con'; did you mean 'conv'\?"),
            (
                ["smoke", "model=tests.user_side:net"],
                r"^the model does not take inputs of shape \(1, 8, 8\) from digits",
            ),
            (["smoke", "model.widht=3"], r"^model=mlp has no option 'widht'"),
            (["smoke", "model=nowhere:net"], r"^model: there is no module 'nowhere'"),
            (["smoke", "data=digit"], r"^unknown data 'digit'; did you mean 'digits'\?"),
            (["smoke", "data=nowhere:data"], r"^data: there is no module 'nowhere'"),
            (["smoke", "plugins=nowhere"], r"^plugin: there is no module 'nowhere'"),
            (
                ["smoke", "crop=2"],
                r"^crop needs images stored as bytes, which data=digits does not have; leave out crop\.$",
            ),
            (["smoke", "statistics=cifar"], r"^statistics=cifar is not known; did you mean 'cifar10'\?"),
            (["smoke", "noise_kind=asymmetric", "noise=0.2"], r"^noise_kind=asymmetric is defined for"),
            (["smoke", "train_on_val=true", "selection=last"], r"^the digits data set has its own validation part"),
            (["smoke", "train_on_val=true"], r"^train_on_val=true leaves no validation part to choose on"),
            (["smoke", "schedule=multistep"], r"^multistep needs milestones"),
            (["smoke", "warmup_lr=0.1"], r"^warmup_lr = 0\.1 has no effect without a warm-up"),
            (["smoke", "label_smoothing=1", "smoothing=others"], r"^label_smoothing must be at least 0 and below 1"),
            (["smoke", "measure_every=1", "measures=hesian"], r"^measures=hesian: what must be of "),
            (["smoke", "ascent_sync=none"], r"^ascent_sync=none is for several processes, but there is only one"),
            (["smoke", "--track", "tensorbord"], r"^unknown tracker 'tensorbord'; did you mean 'tensorboard'\?"),
            (["smoke", "trackers=x"], r"^unknown tracker 'x'"),
            (["smoke", "--out", "/dev/null/x"], r"Not a directory: '/dev/null/x"),
            (["cifar10-resnet18"], r"^there is no CIFAR-10 in data: .* Set data_dir=FOLDER, or add --download\.$"),
            (["smoke", "data=images", "data_dir=nowhere"], r"^there is no folder nowhere/train; .*data_dir=FOLDER\.$"),
            (["fashion-mnist"], r"Set data_dir=FOLDER\.$"),
            (["fashion-mnist", "--download"], r"data_dir=FOLDER \(--download supports only cifar10, cifar100, .*\)\.$"),
            (["tiny-imagenet-resnet18"], r"^there is no folder data/train; .*Set data_dir=FOLDER\.$"),
        ],
    )
    def test_one_sentence(self, capsys, words, message):
        assert re.search(message, refused(capsys, *words))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self, capsys):
        assert refused(capsys, "smoke", "device=cuda").startswith("device=cuda cannot be used here: ")

    def test_a_place_that_cannot_be_written(self, here, capsys):
        (here / "file").write_text("")
        assert "file" in refused(capsys, "smoke", "--out", "file")

    def test_a_package_that_is_missing(self, capsys, monkeypatch):
        monkeypatch.setattr(trackers, "_installed", lambda module: False)
        for more in ([], ["--dry-run"]):
            said = refused(capsys, "smoke", "--track", "wandb", *more)
            assert said.endswith(
                "wandb, which is not installed; to install it: pip install '.[wandb]' in a clone of flatmin."
            )

    def test_an_unreadable_image(self, here, capsys):
        image = pytest.importorskip("PIL.Image")
        for part, count in (("train", 8), ("test", 2)):
            for name in ("cat", "dog"):
                folder = here / "pictures" / part / name
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                    image.fromarray(pixels).save(folder / f"{number}.png")
        words = ["smoke", "data=images", "data_dir=pictures", "image_size=16", "model=conv", "batch_size=4", "epochs=1"]
        broken = here / "pictures/train/dog/3.png"
        whole = broken.read_bytes()
        broken.write_bytes(whole[:60])
        said = refused(capsys, *words)
        assert said.startswith("pictures/train/dog/3.png cannot be read as an image: ")
        assert said.endswith("replace the file or remove it.")
        broken.write_bytes(whole)
        done(*words)

    def test_a_class_that_is_empty_or_unknown(self, here, capsys):
        for part in ("train", "test"):
            for name in ("cat", "dog"):
                (here / "pictures" / part / name).mkdir(parents=True)
        words = ["smoke", "data=images", "data_dir=pictures"]
        assert refused(capsys, *words).startswith("pictures/train/cat contains no images; expected files that end in ")

    def test_a_bug_of_ones_own_shows_its_traceback(self, here, capsys):
        (here / "train_bug.py").write_text("def data():\n    return 1 / 0\n")
        with pytest.raises(SystemExit) as stop:
            main(["train", "smoke", "data=train_bug:data"])
        assert stop.value.code == 1 and "ZeroDivisionError" in capsys.readouterr().err
        assert not (here / "flatmin-runs").exists()


# -- CIFAR in files of the binary release ------------------------------------------------------------------------

RECORDS = 16


@pytest.fixture
def release(monkeypatch):
    """Files of 16 records each in place of 10 000 or 50 000, written and packed where a test asks for them."""
    for name in ("cifar10", "cifar100"):
        known = RELEASES[name]
        small_release = dataclasses.replace(known, records=dict.fromkeys(known.records, RECORDS))
        monkeypatch.setitem(RELEASES, name, small_release)

    def write(name, folder):
        known, rng = RELEASES[name], np.random.default_rng(0)
        folder.mkdir(parents=True, exist_ok=True)
        for file in (*known.train, known.test):
            labels = [rng.integers(0, classes, RECORDS, dtype=np.uint8) for classes in known.classes]
            pixels = rng.integers(0, 256, (RECORDS, 3 * 32 * 32), dtype=np.uint8)
            (folder / file).write_bytes(np.concatenate([np.stack(labels, 1), pixels], 1).tobytes())
        return folder

    def pack(name, folder):
        known = RELEASES[name]
        folder.mkdir(parents=True, exist_ok=True)
        source = write(name, folder / "source")
        with tarfile.open(folder / known.archive, "w:gz") as archive:
            archive.add(source, arcname=known.folders[0])
        for file in source.iterdir():
            file.unlink()
        source.rmdir()
        path = folder / known.archive
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(RELEASES, name, dataclasses.replace(known, md5=md5, url=path.resolve().as_uri()))
        return path

    write.pack = pack
    return write


QUICK = ["model=conv", "batch_size=8", "epochs=1"]


class TestCifar:
    @pytest.mark.parametrize("name", ["cifar10-resnet18", "cifar100-resnet56"])
    def test_a_preset_with_another_net(self, release, here, name):
        data = name.partition("-")[0]
        release(data, here / "data" / RELEASES[data].folders[0])
        said = done(name, *QUICK, "val_share=0.25")
        train = 60 if data == "cifar10" else 12
        assert f"on {data} ({train} samples, {-(-train // 8)} updates per epoch)" in said.out[0]
        config = RunFolder(only_run()).config()[0]
        assert (config.cutout, config.split_seed, config.data_dir) == (16, 42, "data")

    def test_the_protocol_of_vasso(self, release, here):
        release("cifar10", here / "there")
        words = ["data_dir=there", "train_on_val=true", "selection=max-test", *QUICK]
        said = done("cifar10-wrn28-10", *words)
        assert "(80 samples, 10 updates per epoch)" in said.out[0]
        accuracy = re.search(r"val ([\d.]+) %  test ([\d.]+) %", said.out[1])
        assert accuracy[1] == accuracy[2]
        assert any(
            line.endswith("(weights of epoch 1, the best on the test part: an overestimate).") for line in said.out
        )

    @pytest.mark.parametrize("words", [["noise=0.4", "noise_kind=asymmetric"], ["noise=0.2"], ["data=cifar100-coarse"]])
    def test_kinds_of_noise_and_labels(self, release, here, words):
        release("cifar100", here / "data")
        done("cifar100-resnet18", *QUICK, *words, "val_share=0.25")

    def test_an_archive_of_another_checksum(self, release, here, capsys):
        archive = release.pack("cifar10", here / "data")
        with archive.open("ab") as file:
            file.write(b"more")
        said = refused(capsys, "cifar10-resnet18", *QUICK)
        assert re.match(r"data/cifar-10-binary\.tar\.gz has MD5 [0-9a-f]{32}, expected [0-9a-f]{32} of ", said)
        assert said.endswith("delete it and download the archive again, or unpack it and give the folder.")

    def test_a_file_that_is_cut_short(self, release, here, capsys):
        release("cifar10", here / "data")
        os.truncate(here / "data/data_batch_3.bin", 100)
        said = refused(capsys, "cifar10-resnet18", *QUICK)
        assert said.startswith("data/data_batch_3.bin has 100 bytes, expected 49168 (16 records of 3073 bytes)")

    def test_download(self, release, here):
        archive = release.pack("cifar10", here / "server")
        said = done("cifar10-resnet18", *QUICK, "--download")
        assert (here / "data" / archive.name).read_bytes() == archive.read_bytes()
        assert said.out[0].startswith("sam, rho 0.05: conv ")
        archive.unlink()
        done("cifar10-resnet18", *QUICK, "--download", "--again")

    def test_a_download_that_fails(self, release, here, capsys):
        archive = release.pack("cifar10", here / "server")
        (here / "data").mkdir()
        os.truncate(archive, 100)
        said = refused(capsys, "cifar10-resnet18", *QUICK, "--download")
        assert re.match(r"the download of file:.* has MD5 .*, expected .*: try again", said)
        archive.unlink()
        assert "could not be downloaded" in refused(capsys, "cifar10-resnet18", *QUICK, "--download")

    @pytest.mark.slow
    @pytest.mark.parametrize(("data", "method"), [("cifar10", "sam"), ("cifar100", "vasso+asam")])
    def test_the_real_data(self, data, method):
        """The protocol of a preset with a small net, few images and two epochs."""
        folder = os.environ.get("FLATMIN_CIFAR")
        if not folder:
            pytest.skip("FLATMIN_CIFAR names no folder with the binary release of CIFAR-10 and CIFAR-100")
        words = ["model=conv", "train_size=2048", "val_share=0.02", "epochs=2", "batch_size=64", "lr=0.05", "cutout=0"]
        said = done(f"{data}-resnet18", f"data_dir={folder}", f"method={method}", *words)
        assert f"on {data} (2,048 samples, 32 updates per epoch)" in said.out[0]
        first, second = RunFolder(only_run()).lines(expected=2)
        assert second.train_loss < first.train_loss and second.rho == (0.05 if data == "cifar10" else 1.0)
        chosen = RunFolder(only_run()).result().chosen
        classes = 10 if data == "cifar10" else 100
        assert chosen["test_acc"] > 100 / classes and chosen["test_top5"] > 500 / classes


# -- what is shown -----------------------------------------------------------------------------------------------


def epoch(number, **changes):
    usual = {"epoch": number, "lr": 0.1, "rho": 0.05, "train_loss": 1.0, "val_acc": 90.0, "val_loss": 0.3}
    usual |= {"test_acc": None, "memorised": None, "seconds": 0.5, "train_acc": 88.0, "images_per_second": 1234.0}
    return Epoch(**(usual | changes))


CHOSEN = {"selection": "val", "epoch": 1, "val_acc": 90.0, "test_acc": 89.0, "test_top5": None, "test_loss": 0.4}
RESULT = Result(
    **{"method": "sam", "rho": 0.05, "gradient_evaluations": 2.0, "seed": 0, "epochs": 2, "noise": 0.0},
    **{"trained": True, "last": None, "best": None, "train_ce": 0.1, "lambda_max": None, "seconds": 1.0},
    chosen=CHOSEN,
)
BEGAN = events.Began(
    name="x",
    config=RunConfig(method="sam", rho=0.05, epochs=2),
    environment={"device": "cpu"},
    parameters=12345,
    samples=1000,
    steps=10,
    gradient_evaluations=2.0,
)
STORY = (
    BEGAN,
    events.Ticked(step=3, epoch=1),
    events.Stepped(step=5, epoch=1, lr=0.1, rho=0.05, loss=1.5, seconds=0.1, images=50, diagnostics={}),
    events.EpochEnded(line=epoch(1, perturbed_loss=1.25, skipped=2, peak_memory=3 * 2**30), step=10),
    events.Measured(epoch=1, step=10, values={"hessian.top": 12.3456, "trace": 2}),
    events.Warned(text="[red]something[/red]"),
    events.EpochEnded(line=epoch(2, test_acc=89.0, memorised=12.0), step=20),
    events.Ended(result=RESULT),
)


@pytest.mark.parametrize("terminal", [False, True])
def test_every_event_is_shown(terminal):
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
    with Training(console) as display:
        display.downloading(5_000_000, 170_000_000)
        display.downloading(6_000_000, None)
        for event in STORY:
            display(event)
    text = console.file.getvalue()
    for said in (
        "sam, rho 0.05: conv (12,345 parameters) on digits (1,000 samples, 10 updates per epoch), float32 on cpu",
        "epoch 1/2  lr 0.1  loss 1.000 -> 1.250  train 88.0 %  val 90.0 %  0.5 s, 1,234 images/s  3.0 GiB  2 updates "
        "skipped  left about a second",
        "  measured: hessian.top 12.35, trace 2",
        "Note: [red]something[/red]",
        "epoch 2/2  lr 0.1  loss 1.000  train 88.0 %  val 90.0 %  test 89.0 %  memorised 12 %  0.5 s, 1,234 images/s",
        "Test accuracy 89.00 % (weights of epoch 1, the best on validation).",
    ):
        assert said in text
    if not terminal:
        assert "Downloading" not in text and "\x1b" not in text
        assert len(text.splitlines()) == 6, "without a terminal, one line an event that is worth one"


def test_time_that_is_left(monkeypatch):
    """From the updates done in this part of the run alone."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=300, force_terminal=False)
    with Training(console) as display:
        display(dataclasses.replace(BEGAN, config=RunConfig(method="sam", epochs=100), epoch=50, step=500))
        now[0] = 36.0
        display(events.EpochEnded(line=epoch(51), step=510))
        now[0] = 7200.0
        display(events.EpochEnded(line=epoch(52), step=520))
    first, second = (line for line in console.file.getvalue().splitlines() if line.startswith("epoch"))
    assert first.endswith("left about 29 minutes")
    assert second.endswith("left about 2 days")
    assert "Continuing after update 500 of 1000." in console.file.getvalue()
