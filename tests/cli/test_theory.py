"""The command `flatmin theory`."""

import dataclasses
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import flatmin.theory.demonstrations as demonstrations
from flatmin.cli.main import app, main
from flatmin.theory.classes import WORDS
from flatmin.theory.demonstrations.demonstration import Demonstration
from flatmin.theory.named import FUNCTIONS
from flatmin.theory.parse import FORMS

runner = CliRunner()


def output(*words, code=0):
    result = runner.invoke(app, ["theory", *words], env={"COLUMNS": "100"})
    assert result.exit_code == code, result.output
    return result.output


def mistake(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["theory", *words])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.count("\n") == 1 and said.out == ""
    return said.err


def test_list_names_every_demonstration():
    said = output("list")
    for name in demonstrations.DEMONSTRATIONS:
        assert f"\n{name} " in said


def test_a_demonstration_prints_its_table_and_claims_and_draws(tmp_path):
    said = output("orbit", "--out", str(tmp_path), "--png", "--svg")
    assert "0.2142857" in said and "0.001010101" in said
    assert said.count("\nok    ") == 6 and "FAIL" not in said
    assert "1 demonstration, 6 claims, all hold" in said
    assert {path.name for path in tmp_path.iterdir()} == {"orbit.png", "orbit.svg"}


def test_figures_are_png_unless_asked_for_and_may_be_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output("checker", "--no-figure")
    assert not list(tmp_path.iterdir())
    output("checker")
    assert [path.name for path in (tmp_path / "flatmin-theory").iterdir()] == ["checker.png"]
    output("checker", "--svg", "--out", "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["checker.svg"]


def test_a_claim_that_fails_is_named_and_ends_with_code_1(monkeypatch):
    found = demonstrations.find("checker").run()
    wrong = dataclasses.replace(found.claims[2], text="a planted claim", expected="Theorem 9.9 FFFFF")
    planted = dataclasses.replace(found, claims=(*found.claims[:2], wrong))
    monkeypatch.setitem(
        demonstrations.DEMONSTRATIONS, "checker", Demonstration("checker", "title", "source", lambda: planted)
    )
    said = output("checker", "--no-figure", code=1)
    assert "FAIL  a planted claim: Theorem 3.2 FFFFF, expected Theorem 9.9 FFFFF" in said
    assert "3 claims, 1 of them fails" in said
    assert "flatmin theory: checker: a claim does not hold: a planted claim" in said


def test_all_runs_what_there_is_and_sums_up(monkeypatch):
    fast = {name: demonstrations.DEMONSTRATIONS[name] for name in ("orbit", "checker")}
    monkeypatch.setattr(demonstrations, "DEMONSTRATIONS", fast)
    said = output("all", "--no-figure")
    assert "2 demonstrations, 26 claims, all hold" in said


@pytest.mark.slow
def test_all_takes_less_than_a_minute_of_work(tmp_path):
    """Measured as processor time: the cores of a test machine are shared."""
    pytest.importorskip("sklearn")
    code = (
        "import sys, time\nfrom flatmin.cli.main import main\n"
        "try:\n    main(['theory', 'all', '--out', sys.argv[1]])\n"
        "finally:\n    print('seconds', time.process_time())"
    )
    begun = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=280
    )
    assert "all hold" in found.stdout
    assert float(found.stdout.rsplit(maxsplit=1)[-1]) < 90 and time.perf_counter() - begun < 280
    assert {path.stem for path in tmp_path.iterdir()} == set(demonstrations.DEMONSTRATIONS)


def test_check_prints_the_verdict():
    said = output("check", "0.1", "0.1", "--on", "quadratic:1,4")
    assert "theorem: none applies" in said and "final distance from the minimiser: 0.025" in said
    said = output("check", "diminish1", "0.1", "--class", "convex, L=4, unique")
    assert "theorem: Theorem 3.2 (SAM, convex)" in said and said.count("follows") == 5
    said = output("check", "0.1", "0.1", "--class", "L=4", "--method", "usam")
    assert "Section 4 (unnormalised SAM)" in said


def test_check_says_that_L_is_missing():
    said = output("check", "0.1", "0.1", "--class", "convex", "--method", "usam")
    assert "The theorems need the Lipschitz constant L: add it to the class, as in --class 'L=4'." in said
    assert "L is needed" not in output("check", "diminish1", "0.1", "--class", "convex, unique")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["orbt"], "unknown demonstration 'orbt'; did you mean 'orbit'?"),
        (["chek", "0.1", "0.1"], "unknown demonstration 'chek'; did you mean 'check"),
        (["check", "0.1", "0.1"], "give either a function, as in --on quadratic:1,4, or a class, as in --class"),
        (["check", "0.1", "0.1", "--on", "square", "--class", "L=4"], "give either a function"),
        (["check", "0", "0.1", "--on", "square"], "step sizes must be positive"),
        (["check", "-0.1", "0.1", "--on", "square"], "c must be a finite number >= 0, got -0.1"),
        (["check", "0.1", "-0.1", "--on", "square"], "c must be a finite number >= 0, got -0.1"),
        (["check", "diminsh1", "0.1", "--on", "square"], "unknown rule 'diminsh1'; did you mean 'diminish1'?"),
        (["check", "0.1", "0.1", "--on", "sqare"], "unknown function 'sqare'; did you mean 'square'?"),
        (["check", "0.1", "0.1", "--class", "convx"], "unknown word 'convx'; did you mean 'convex'?"),
        (["check", "0.1", "0.1", "--class", "L=-4"], "L must be positive and finite"),
        (["check", "0.1", "0.1", "--on", "square", "--method", "sma"], "unknown method 'sma'; did you mean"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    said = mistake(capsys, *words)
    assert said.startswith("flatmin: ") and sentence in said


def test_no_matplotlib_is_said_before_the_runs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install '.[plot]'" in mistake(capsys, "all")


def test_rules_has_the_whole_grammar():
    said = output("rules")
    for word in (*FORMS, *FUNCTIONS, *WORDS, "L=4", "kl=0.5"):
        assert f"\n{word} " in said, word


def test_help():
    said = output("--help")
    for word in ("list", "all", "check", "rules"):
        assert word in said
    assert "one" not in [line.strip("│ ").split(" ")[0] for line in said.splitlines()]
