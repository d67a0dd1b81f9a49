"""`flatmin settings`, and what the shell completes: both answer from the catalogue, without torch."""

import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from flatmin.cli.catalogue import as_text, catalogue, collect
from flatmin.cli.main import app
from flatmin.methods import METHODS
from flatmin.methods.names import compose
from flatmin.train.settings import preset_names


def shown(*words, code=0, width=80):
    result = CliRunner().invoke(app, ["settings", *words], env={"COLUMNS": str(width)})
    assert result.exit_code == code, result.output
    assert all(len(line) <= width for line in result.output.splitlines())
    return result.output


def test_the_catalogue_can_be_read_back():
    assert catalogue() == collect()
    assert all("\n" not in line and line.startswith("[") for line in as_text(catalogue()).splitlines())


def test_all_settings_have_their_default_and_their_help():
    text = shown()
    for group in ("The method", "Training", "The data", "The network", "The machine", "Evaluation", "Logging"):
        assert re.search(rf"^{group}", text, re.MULTILINE)
    assert re.search(r"^  epochs +30 +length of the training", text, re.MULTILINE)
    assert re.search(r"^  method +sam ", text, re.MULTILINE) and re.search(r"^  device +auto ", text, re.MULTILINE)
    assert "One of: sgd, adam, adamw." in " ".join(text.split())
    assert "model_params" not in text, "it is set as model.NAME"


@pytest.mark.parametrize(
    ("word", "there", "not_there"),
    [
        ("vasso+asam", ["vasso: VaSSO.", "theta", "asam: ASAM.", "weights_only"], ["sigma", "epochs"]),
        ("gcsam", ["gcsam: GCSAM.", "It has no parameters"], []),
        ("resnet18", ["model.max_pool", "model.stem"], ["dropout"]),
        ("measure", ["adaptive_rho", "probes"], ["epochs"]),
        ("study", ["choose_seeds", "[record]", "log_every", "examples"], ["batch_size"]),
        ("slurm", ["partition", "gpus_per_node"], ["address"]),
        ("theta", ["of vasso: weight of the newest gradient"], ["epochs"]),
        ("CUTOUT", ["cutout_p"], ["epochs"]),
        ("max_pool", ["model.max_pool", "of resnet18, resnet34"], []),
    ],
)
def test_a_word(word, there, not_there):
    text = shown(word)
    assert all(one in " ".join(text.split()) for one in there) and not any(one in text for one in not_there)


@pytest.mark.parametrize(
    ("word", "hint"), [("epohcs", "; did you mean 'epochs'?"), ("tilted-sam", "."), ("vaso", "; did you mean 'vasso'?")]
)
def test_a_word_that_nothing_has(word, hint):
    with pytest.raises(ValueError, match=re.escape(f"is called {word!r}{hint} See flatmin settings.")):
        CliRunner().invoke(app, ["settings", word], catch_exceptions=False)


def completed(shell, *words):
    """What the shell is offered for the last word; bash gives the parts of `key=value` one by one."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("COMP_")}
    if shell == "bash":
        parts = [part for word in words[:-1] for part in re.split("(=)", word) if part]
        last = [part for part in re.split("(=)", words[-1]) if part] or [""]
        env |= {"COMP_WORDS": "\n".join(["flatmin", *parts, *last]), "COMP_CWORD": str(len(parts) + len(last))}
    else:
        env |= {"_TYPER_COMPLETE_ARGS": " ".join(["flatmin", *words]), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    result = CliRunner().invoke(app, [], env={**env, "_FLATMIN_COMPLETE": f"complete_{shell}"}, prog_name="flatmin")
    return [line.partition("\t")[0] for line in result.output.split("\n") if line]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "pwsh"])
def test_the_script_of_a_shell_calls_this_command(shell):
    result = CliRunner().invoke(app, [], env={"_FLATMIN_COMPLETE": f"source_{shell}"}, prog_name="flatmin")
    assert result.exit_code == 0 and "flatmin" in result.output and "_FLATMIN_COMPLETE" in result.output


def test_the_script_is_for_the_command_flatmin_however_it_was_started():
    command = [sys.executable, "-m", "flatmin", "--show-completion", "bash"]
    env = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert "_FLATMIN_COMPLETE=complete_bash" in script and script.split()[-1] == "flatmin"


@pytest.mark.parametrize("shell", ["bash", "fish"])
class TestCompletion:
    def test_names(self, shell):
        assert completed(shell, "tr") == ["train"]
        assert completed(shell, "train", "cifar100-w") == ["cifar100-wrn28-10"]
        assert completed(shell, "study", "") == ["list", *preset_names("study")]
        assert completed(shell, "original", "v") == ["vasso"]
        assert completed(shell, "compare", "--preset", "dig") == ["digits"]
        assert completed(shell, "methods", "vas") == ["vasso"]
        assert "theta" in completed(shell, "settings", "the")
        assert completed(shell, "study", "x", "--executor", "s") == ["slurm"]
        assert completed(shell, "measure", "bisam-n") == ["bisam-noise"]
        assert completed(shell, "measure", "digits", "--mode", "") == ["eval", "train"]
        assert completed(shell, "theory", "o") == ["orbit"] and completed(shell, "theory", "ch") == ["check", "checker"]
        assert completed(shell, "theory", "orbit", "u") == ["usam"]

    def test_composed_methods_are_those_that_compose(self, shell):
        offered = completed(shell, "methods", "vasso+")
        assert {"vasso+asam", "vasso+bisam-log", "vasso+every-k"} <= set(offered)
        others = {kind for kind in METHODS if f"vasso+{kind}" not in offered}
        for name in others - {"vasso"}:
            with pytest.raises(ValueError, match="both set the direction"):
                compose(f"vasso+{name}")

    def test_keys_and_values(self, shell):
        def values(key, *words):
            prefix = "" if shell == "bash" else f"{key}="
            found = completed(shell, *words)
            assert all(one.startswith(prefix) for one in found)
            return [one.removeprefix(prefix) for one in found]

        assert completed(shell, "train", "smoke", "lr") == ["lr=", "lr_min="]
        assert completed(shell, "train", "smoke", "epo") == ["epochs=", "epochs=30"]
        assert {"momentum=", "log_every="} <= set(completed(shell, "train", "smoke", ""))
        assert "log_every=" not in completed(shell, "study", "empirical", "")
        assert values("optimizer", "train", "smoke", "optimizer=") == ["sgd", "adam", "adamw"]
        assert values("schedule", "train", "smoke", "lr=0.1", "schedule=co") == ["cosine", "constant"]
        assert values("method", "train", "smoke", "method=vasso+as") == ["vasso+asam"]
        assert values("data", "train", "smoke", "data=mn") == ["mnist"]
        assert values("nesterov", "train", "smoke", "nesterov=") == ["true", "false"]
        assert values("trackers", "train", "smoke", "trackers=wandb,m") == ["wandb,mlflow"]
        assert values("device", "train", "smoke", "device=") == ["auto", "cpu", "cuda"]
        assert values("nothing", "train", "smoke", "nothing=l") == []

    def test_parameters_of_what_is_named_before(self, shell):
        assert completed(shell, "train", "smoke", "method=vasso", "the") == ["theta=", "theta=0.9"]
        assert completed(shell, "train", "smoke", "the") == []
        keywords = completed(shell, "train", "smoke", "model=resnet18", "model.")
        assert keywords == ["model.max_pool=", "model.width=", "model.stem="]
        assert "partition=" in completed(shell, "study", "x", "--executor", "slurm", "--on", "")

    def test_runs(self, shell, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "flatmin-runs" / "runs" / "sam-s0").mkdir(parents=True)
        assert completed(shell, "show", "sa") == completed(shell, "eval", "") == ["sam-s0"]
        assert completed(shell, "measure", "RUN", "sa") == ["sam-s0"]
        assert completed(shell, "train", "flatmin-runs/") == ["flatmin-runs/runs/sam-s0"]


def test_neither_needs_torch():
    code = (
        "import os, sys, flatmin.cli.settings, flatmin.cli.main as cli\n"
        "os.environ |= {'_FLATMIN_COMPLETE': 'complete_bash', 'COMP_WORDS': 'flatmin methods va', 'COMP_CWORD': '2'}\n"
        "try: cli.app([], prog_name='flatmin')\n"
        "except SystemExit: pass\n"
        "flatmin.cli.settings.settings('rho')\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("vasso\n"), done.stderr
