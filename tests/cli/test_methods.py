import re
import sys
import textwrap

import pytest
from typer.testing import CliRunner

from flatmin.cli.main import app
from flatmin.methods import ELSEWHERE, METHODS

runner = CliRunner()

PLUGIN = '''
from dataclasses import dataclass
from flatmin.methods import Direction
from flatmin.methods import Method


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
        for part in method.parts:
            for parameter, value in part.parameters().items():
                assert f"{parameter}={value!r}" in flat
    assert "…" not in text and max(map(len, text.splitlines())) <= width


def test_the_case_of_a_name_does_not_matter():
    assert output("VaSSO + ASAM") == output("vasso+asam")


def test_numbers_of_a_row():
    row = next(line for line in output().splitlines() if line.startswith("asam "))
    assert row.split()[:4] == ["asam", "0.5", "2", "1"]


@pytest.mark.parametrize("width", [80, 100])
def test_rules_stand_apart_from_methods_and_each_has_one_line(width):
    text = output(width=width)
    first, rules = text.partition("grads: gradient")[0].split("\nRules")
    rows = [{line.split()[0] for line in part.splitlines() if line.strip()} for part in (first, rules)]
    kinds = {name: {part.kind for part in method.parts} for name, method in METHODS.items()}
    expected = {name for name, set_ in kinds.items() if set_ and set_ <= {"schedule", "radius", "mask"}} - {"sgd"}
    assert rows[1] & set(METHODS) == expected
    assert rows[0] & set(METHODS) == set(METHODS) - expected
    tables = [line for part in (first, rules) for line in part.splitlines() if line.split()[:1]]
    assert sum(line.split()[0] in METHODS for line in tables) == len(METHODS)


def test_the_matrix_fits_a_terminal_and_has_every_name():
    text = output("--matrix", width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(re.search(rf"^ *\d+ {re.escape(name)} ", text, re.MULTILINE) for name in METHODS)
    assert "Methods that set the geometry, of which only one can be used: asam, usam, " in " ".join(text.split())
    flat = re.sub(r"\s+", " ", text)
    assert "need the losses at w of the samples of pass 2, which momentum-sam does not have" in flat


def test_a_part_of_a_plugin_is_in_the_matrix(plugin):
    row = next(line for line in output("--matrix", "--plugin", plugin).splitlines() if " back " in line)
    assert row.split()[0] == str(len(METHODS) + 1) and row.endswith(".")


def test_the_base_has_no_radius():
    row = next(line for line in output().splitlines() if line.startswith("sgd "))
    assert row.split()[:4] == ["sgd", "-", "1", "0"]


def test_a_composition_part_by_part():
    text = output("vasso+asam")
    assert "EMA(theta=0.9)" in text and "Adaptive(" in text and "SameLoss()" in text
    assert re.search(r"rho\s+0\.5 ", text) and "2 gradients per step" in text
    assert "VaSSO" in text and "ASAM" in text


def test_needs_are_said():
    assert "criterion=flatmin.Criterion" in re.sub(r"\s+", "", output("bisam-log"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vasso+fsam"], "'vasso' and 'fsam' both set the direction"),
        (["assam"], "did you mean 'asam'"),
        (["sam", "--matrix"], "leave out 'sam'"),
        (["--plugin", "no_such_module_xyz"], "no_such_module_xyz"),
    ],
)
def test_refusals(words, message):
    result = runner.invoke(app, ["methods", *words])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_a_plugin_in_the_working_directory(plugin):
    listed = output("--plugin", plugin)
    assert re.search(r"^back .* direction ", listed, re.MULTILINE) and "\n    strength=1.0" in listed
    text = output("back+asam", "--plugin", plugin)
    assert "Backwards(strength=1.0)" in text and "nobody, nowhere, 2026" in text


@pytest.mark.parametrize("word", [*ELSEWHERE, "Flat_LoRA"])
def test_a_method_that_is_no_recipe_is_an_answer(word):
    place = ELSEWHERE[word.lower().replace("_", "-")]
    assert " ".join(output(word).split()) == f"{word} is not a method of the table but {place}."
    assert f"Not methods of this table, but in flatmin: {', '.join(ELSEWHERE)};" in re.sub(r"\s+", " ", output())


def test_the_plugin_text_is_one_small_file():
    assert len(textwrap.dedent(PLUGIN).splitlines()) < 40


def test_the_loops_have_every_method_and_reason():
    text = output("--loops", width=80)
    assert all(f"\n{name} " in text for name in METHODS)
    assert all(f"| {name} |" in output("--loops", "--markdown") for name in METHODS)


def test_one_table_at_a_time():
    result = runner.invoke(app, ["methods", "--loops", "--matrix"])
    assert isinstance(result.exception, ValueError) and "--loops cannot be combined" in str(result.exception)
