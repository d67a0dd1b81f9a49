"""Every example runs, fits one screen and learns."""

import ast
import logging
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "accelerate_loop": "accelerate",
    "hf_finetune": "transformers",
    "lightning_digits": "lightning",
    "peft_adapters": "peft",
    "skorch_digits": "skorch",
}


def test_all_are_here_and_fit_one_screen():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)
    for name in NEEDS:
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        code = text.replace(ast.get_docstring(ast.parse(text), clean=False), "")
        assert len([line for line in code.splitlines() if line.strip()]) < 60, name
        assert f"python examples/{name}.py" in text


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """What an example prints: one of Accelerate, whose state is the process's, in a process of its own, others here."""
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level

    def run(name):
        path = str(EXAMPLES / f"{name}.py")
        if name != "accelerate_loop":
            if name == "hf_finetune":  # what HF_HUB_OFFLINE says where it is set before the import
                monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            runpy.run_path(path, run_name="__main__")
            return capsys.readouterr().out
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, path], env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    yield run
    logger.setLevel(level)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NEEDS)
def test_runs_and_learns(name, printed):
    pytest.importorskip(NEEDS[name], reason=f"needs {NEEDS[name]}: run make test-frameworks")
    said = printed(name)
    trainings = [t for t in re.split(r"^.*(?:accuracy|perplexity).*$", said, flags=re.MULTILINE) if "loss" in t]
    assert len(trainings) == (6 if name == "peft_adapters" else 2), "the base and the methods"
    for printed in trainings:
        losses = [float(x) for x in re.findall(r"(?<!_)loss'?:? '?([\d.]+)", printed)][-4:]
        assert len(losses) == 4 and losses[-1] < 0.9 * losses[0], printed
    results = re.findall(r"^(\S+) +(?:test accuracy|perplexity of the last verse) ([\d.]+)", said, re.MULTILINE)
    assert len(results) == len(trainings) and "sam" in results[1][0]
    for _, value in results:
        assert 3 < float(value) < 20 if name == "hf_finetune" else float(value) > 70
