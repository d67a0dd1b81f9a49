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
from flatmin.cli.catalogue import catalogue
from flatmin.cli.main import app, main
from flatmin.cli.settings import find
from flatmin.methods import compose
from flatmin.originals.projects import find_project
from flatmin.study.dimensions import read_overrides
from flatmin.study.expand import grid_points
from flatmin.study.reading import read_study
from flatmin.theory.demonstrations import DEMONSTRATIONS
from flatmin.train.preset import load_run

runner = CliRunner()


def run(*words):
    """Run `main` in this process; return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return stop.value.code


def commands(group=None, words=()):
    """The words of `flatmin` itself, of every command and of every subcommand; hidden ones are included."""
    group = group or typer.main.get_command(app)
    yield words
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


def parsed(words):
    """The names of the commands on a command line, and the values of the last one."""
    command, names, context = typer.main.get_command(app), ["flatmin"], None
    while hasattr(command, "commands"):
        context = command.make_context(names[-1], [], parent=context, resilient_parsing=True)
        name, command, words = command.resolve_command(context, words)
        names.append(name)
    return names[1:], command.make_context(names[-1], list(words)).params


def test_help_says_what_to_do_first():
    result = runner.invoke(app, [], env={"COLUMNS": "80"})
    assert "flatmin train digits method=vasso" in result.output
    for command in ("compare", "settings", "methods", "doctor"):
        assert command in result.output
    assert "--install-completion" in result.output and "--show-completion" in result.output
    assert result.output.count("-completion") == 2, "named below the commands, and not among the options"


@pytest.mark.parametrize("words", list(commands()), ids=lambda words: " ".join(words) or "flatmin")
def test_the_help_of_a_command_fits_and_its_examples_are_understood(words):
    """Two examples or more, without placeholders; what they name is there, options and settings are known."""
    text = runner.invoke(app, [*words, "--help"], env={"COLUMNS": "80"}).output
    assert text and all(len(line) <= 80 and "…" not in line for line in text.splitlines())
    title = "Examples:" if words else "First steps:"
    examples = re.findall(r"^ *flatmin (.*)$", text.partition(title)[2].partition("╭")[0], re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        given = shlex.split(re.sub("   .*| > .*", "", example).strip())
        names, values = parsed(given)
        assert not words or names[0] == words[0]
        if names == ["train"]:
            load_run(values["preset"], values["overrides"] or [], here=False)
        elif names[0] in ("study", "search") and values["name"] != "list":
            overrides = read_overrides(values["overrides"] or [])[1]
            assert grid_points(read_study(values["name"], overrides, demo=values["demo"]))
        elif names == ["theory", "one"]:
            assert set(values["names"]) <= set(DEMONSTRATIONS)
        elif names == ["original"] and values["project"] != "list":
            assert find_project(values["project"]).translate(values["command"])
        elif names == ["settings"] and values["word"]:
            assert find(values["word"], catalogue())
        elif names == ["methods"] and values["name"]:
            assert compose(values["name"])


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
    monkeypatch.setattr(cli, "app", lambda arguments, prog_name: os.open("/no/such/file", os.O_RDONLY))
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
