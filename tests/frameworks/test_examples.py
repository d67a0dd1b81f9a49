"""Every example runs, fits one screen and learns."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "accelerate_loop": "accelerate",
    "hf_finetune": "transformers",
    "lightning_digits": "lightning",
    "skorch_digits": "skorch",
}


def test_all_are_here_and_fit_one_screen():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)
    for name in NEEDS:
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        code = text.replace(ast.get_docstring(ast.parse(text), clean=False), "")
        assert len([line for line in code.splitlines() if line.strip()]) < 60, name
        assert f"python examples/{name}.py" in text


@pytest.mark.parametrize("name", NEEDS)
def test_runs_and_learns(name, tmp_path):
    pytest.importorskip(NEEDS[name], reason=f"needs {NEEDS[name]}: run make test-frameworks")
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    trainings = re.split(r"^.*(?:accuracy|perplexity).*$", run.stdout, flags=re.MULTILINE)[:-1]
    assert len(trainings) == 2, "the base and SAM"
    for printed in trainings:
        losses = [float(x) for x in re.findall(r"(?<!_)loss'?:? '?([\d.]+)", printed)][-4:]
        assert len(losses) == 4 and losses[-1] < 0.9 * losses[0], printed
    results = re.findall(r"^(\S+) +(?:test accuracy|perplexity of the last verse) ([\d.]+)", run.stdout, re.MULTILINE)
    assert len(results) == 2 and results[1][0] == "sam"
    for _, value in results:
        assert 3 < float(value) < 20 if name == "hf_finetune" else float(value) > 70
