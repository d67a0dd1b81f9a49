"""A method of one's own, as one small file in a package, is there for everything."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flatmin.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''
"""Climb along the sign of a smoothed gradient."""
from dataclasses import dataclass
from typing import ClassVar

import torch
from flatmin.methods import Direction, check_range, filled
from flatmin.methods import Method


@dataclass(frozen=True, kw_only=True)
class SmoothSign(Direction):
    """d = sign(m), m = (1 - beta) m + beta g."""

    slots: ClassVar = {"m": "param"}
    beta: float = 0.5

    def __post_init__(self):
        check_range(self, "beta", 0.0, 1.0, open_low=True)

    def __call__(self, g, state, c):
        m = list(torch._foreach_lerp(filled(state["m"], g), g, self.beta))
        return list(torch._foreach_sign(m)), {"m": m}


METHODS = {
    "smooth-sign": Method(
        name="smooth-sign", title="Smooth sign", parts=(SmoothSign(),), formula="d = sign(m)", paper="none yet"
    )
}
'''


@pytest.fixture(params=["--plugin", "entry point"])
def package(tmp_path, request, monkeypatch):
    """The folder, which is on the path, and the words that announce the plugin to a command."""
    (tmp_path / "smooth_sign.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    if request.param == "entry point":
        info = tmp_path / "smooth_sign-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: smooth-sign\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[flatmin.methods]\nsmooth-sign = smooth_sign:METHODS\n")
    yield tmp_path, [] if request.param == "entry point" else ["--plugin", "smooth_sign"]
    sys.modules.pop("smooth_sign", None)


def command(*words):
    """What the command prints in this process."""
    result = CliRunner().invoke(app, [*words], env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run(words, folder, **env):
    path = os.pathsep.join([str(folder), str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "160", "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed_composes_and_is_compared(package):
    folder, words = package
    assert "smooth-sign" in command("methods", *words)
    composed = command("methods", "smooth-sign+asam", *words)
    assert "SmoothSign" in composed and "Adaptive" in composed
    out = folder / "out"
    options = ["--preset", "smoke", "-m", "sgd", "-m", "smooth-sign", "--seeds", "1", "--no-report", "--out", str(out)]
    compare = ["compare", "epochs=2", "rho.smooth-sign=0.1", *options, *words]
    # That a plugin reaches worker processes is tested in study/test_comparison.py.
    assert "smooth-sign" in command(*compare, "--workers", "0")
    results = [json.loads(p.read_text()) for p in out.glob("runs/smooth-sign*/result.json")]
    assert len(results) == 1 and results[0]["gradient_evaluations"] == 2 and results[0]["rho"] == 0.1


@pytest.mark.slow
def test_it_passes_what_every_method_must_and_one_that_breaks_the_contract_is_caught(tmp_path):
    """The suite finds the plugins that it is told of, and fails a part that moves a weight behind the engine's back."""
    call = "    def __call__(self, g, state, c):"
    (tmp_path / "smooth_sign.py").write_text(SOURCE)
    broken = SOURCE.replace(call, call + "\n        c.w[0].data.add_(1e-3)").replace("smooth-sign", "broken")
    (tmp_path / "broken.py").write_text(broken)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/optim/test_every_method.py"]
    chosen = ["-k", "smooth-sign or (broken and lr_zero)"]
    with pytest.raises(AssertionError, match=r"FAILED .*lr_zero.*broken") as error:
        run([*words, *chosen], tmp_path, FLATMIN_TEST_PLUGINS="smooth_sign,broken")
    counts = re.search(r"(\d+) failed, (\d+) passed", str(error.value))
    assert counts is not None and int(counts[1]) == 1 and int(counts[2]) >= 9
