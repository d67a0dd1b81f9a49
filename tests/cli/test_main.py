import importlib
import os
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from flatmin.cli import main as cli
from flatmin.cli.main import app, main

runner = CliRunner()


def run(*words):
    """Run `main` in this process; return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return stop.value.code


def test_help_names_every_command():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("compare", "methods", "doctor"):
        assert command in result.output


def test_help_imports_no_torch():
    code = "import sys; import flatmin.cli.main; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_help_answers_at_once():
    """0.3 s on an idle machine; the best of several, and some slack, since tests share theirs."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "flatmin.cli.main", "--help"], check=True, capture_output=True, timeout=60
        )
        times.append(time.perf_counter() - begun)
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
