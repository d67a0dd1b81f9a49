import re
import sys
import textwrap

import pytest
from typer.testing import CliRunner

from flatmin.cli.main import app
from flatmin.recipes import METHODS

runner = CliRunner()

PLUGIN = '''
from dataclasses import dataclass
from flatmin.parts import Direction
from flatmin.recipes import Method


@dataclass(frozen=True, kw_only=True)
class Backwards(Direction):
    """d = -g, a descent before the descent."""

    strength: float = 1.0

    def __call__(self, g, state, c):
        return [-self.strength * x for x in g], {}


METHODS = {
    "back": Method(name="back", title="Back", parts=(Backwards(),), formula="d = -g", paper="nobody, nowhere, 2026")
}
'''


def output(*words, width=100):
    result = runner.invoke(app, ["methods", *words], env={"COLUMNS": str(width)}, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A module with a method of its own, found in the working directory."""
    (tmp_path / "my_methods_for_test.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "my_methods_for_test"
    sys.modules.pop("my_methods_for_test", None)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_every_method_with_everything(width):
    text = output(width=width)
    flat = re.sub(r"\s+", " ", text)
    for method in METHODS.values():
        assert re.search(rf"^{re.escape(method.name)} ", text, re.MULTILINE)
        for word in (*re.sub(r"\s+", " ", method.formula).split(), *method.paper.split()):
            assert word in flat
        for parameter, value in method.recipe().parameters().items():
            assert f"{parameter.partition('.')[2]}={value!r}" in flat
    assert "…" not in text and max(map(len, text.splitlines())) <= width


def test_numbers_of_a_row():
    row = next(line for line in output().splitlines() if line.startswith("asam "))
    assert row.split()[:4] == ["asam", "0.5", "2", "1"]


def test_the_base_has_no_radius():
    row = next(line for line in output().splitlines() if line.startswith("sgd "))
    assert row.split()[:4] == ["sgd", "-", "1", "0"]


def test_a_composition_part_by_part():
    text = output("vasso+asam")
    assert "EMA(theta=0.9)" in text and "Adaptive(" in text and "SameLoss()" in text
    assert re.search(r"rho\s+0\.5 ", text) and "2 gradients a step" in text
    assert "VaSSO" in text and "ASAM" in text


def test_needs_are_said():
    assert "criterion=flatmin.Criterion" in re.sub(r"\s+", "", output("bisam-log"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vasso+fsam"], "'vasso' and 'fsam' both set the direction"),
        (["assam"], "did you mean 'asam'"),
        (["--plugin", "no_such_module_xyz"], "no_such_module_xyz"),
    ],
)
def test_refusals(words, message):
    result = runner.invoke(app, ["methods", *words])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_a_plugin_in_the_working_directory(plugin):
    assert re.search(r"^back .*strength=1\.0", output("--plugin", plugin), re.MULTILINE)
    text = output("back+asam", "--plugin", plugin)
    assert "Backwards(strength=1.0)" in text and "nobody, nowhere, 2026" in text


def test_the_plugin_text_is_one_small_file():
    assert len(textwrap.dedent(PLUGIN).splitlines()) < 40
