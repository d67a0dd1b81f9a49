import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from flatmin.cli import main as cli
from flatmin.cli.main import app, main
from flatmin.study.dimensions import read_overrides
from flatmin.study.expand import grid_points
from flatmin.study.reading import read_study
from flatmin.train.preset import load_run

runner = CliRunner()


def run(*words):
    """Run `main` in this process; return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return stop.value.code


def commands():
    """Every command that is listed, by its words."""
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from ((name, sub, one) for sub, one in command.commands.items() if not one.hidden)
        else:
            yield name, "", command


def test_help_says_what_to_do_first():
    result = runner.invoke(app, [], env={"COLUMNS": "80"})
    assert "flatmin train digits method=vasso" in result.output
    for command in ("compare", "settings", "methods", "doctor"):
        assert command in result.output
    assert result.output.count("-completion") == 1, "named below the commands, and not among the options"


@pytest.mark.parametrize(("name", "sub", "command"), list(commands()), ids=lambda x: x if isinstance(x, str) else "")
def test_the_help_of_a_command_fits_and_its_examples_are_understood(name, sub, command):
    """Two examples or more; what they name is there, options and settings are known."""
    words = [name, sub] if sub else [name]
    text = runner.invoke(app, [*words, "--help"], env={"COLUMNS": "80"}).output
    assert text and all(len(line) <= 80 and "…" not in line for line in text.splitlines())
    examples = re.findall(r"^ *flatmin (.*)$", text.partition("Examples:")[2], re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        given = shlex.split(re.sub("   .*| > .*", "", example).strip())
        assert given[0] == name
        parsed = command.make_context(name, given[len(words) :]).params if given[: len(words)] == words else {}
        if name == "train":
            load_run(parsed["preset"], parsed["overrides"], here=False)
        if name in ("study", "search") and parsed["name"] != "list":
            overrides = read_overrides(parsed["overrides"] or [])[1]
            assert grid_points(read_study(parsed["name"], overrides, demo=parsed["demo"]))


def test_help_imports_no_torch():
    code = "import sys; import flatmin.cli.main; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_help_answers_at_once():
    """0.3 s on an idle machine; of processor time, since tests share theirs, the best of several."""

    def spent():
        times = os.times()
        return times.children_user + times.children_system

    times = []
    for _ in range(5):
        begun = spent()
        subprocess.run(
            [sys.executable, "-m", "flatmin.cli.main", "--help"], check=True, capture_output=True, timeout=60
        )
        times.append(spent() - begun)
        if times[-1] < 0.3:
            break
    assert min(times) < 0.9


def test_version():
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output.startswith("flatmin 0.")


def test_unknown_command_suggests(capsys):
    assert run("metods") == 2
    assert "Did you mean" in capsys.readouterr().err


def test_a_mistake_is_one_sentence(capsys):
    assert run("methods", "vaso") == 2
    said = capsys.readouterr()
    assert said.err.startswith("flatmin: unknown method 'vaso'; did you mean 'vasso'?")
    assert said.err.count("\n") == 1 and said.out == ""


@pytest.mark.parametrize("words", [["--debug", "methods", "vaso"], ["methods", "vaso", "--debug"]])
def test_debug_shows_the_traceback_anywhere(words, capsys):
    assert run(*words) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("inner"), ValueError("from another library"), KeyError("k")])
def test_a_bug_shows_its_traceback(error, capsys, monkeypatch):
    def broken(arguments):
        raise error

    monkeypatch.setattr(cli, "app", broken)
    assert run("methods") == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "bug" in said


def test_errors_of_the_system_name_the_file(capsys, monkeypatch):
    monkeypatch.setattr(cli, "app", lambda arguments: os.open("/no/such/file", os.O_RDONLY))
    assert run("methods") == 2
    assert "No such file or directory: '/no/such/file'" in capsys.readouterr().err


def test_package_import_is_lazy():
    code = "import sys, flatmin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_console_script_points_here():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="flatmin")
    module, _, attribute = script.value.partition(":")
    assert getattr(importlib.import_module(module), attribute) is main
