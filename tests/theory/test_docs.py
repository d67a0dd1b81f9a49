"""What the page on the theory claims: commands are understood, the session is what is printed, figures are there."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flatmin.cli.main import app
from flatmin.theory.demonstrations import DEMONSTRATIONS

PAGE = Path(__file__).parents[2] / "docs/theory/index.md"
TEXT = PAGE.read_text(encoding="utf-8")
LINES = [shlex.split(line.split("#")[0]) for line in re.findall(r"^    flatmin theory (.*)$", TEXT, re.MULTILINE)]


def output(words):
    result = CliRunner().invoke(app, ["theory", *words], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_every_command_is_understood(words, monkeypatch):
    if words[0] in ("list", "check", "rules"):
        assert output(words)
    else:
        monkeypatch.setattr("flatmin.cli.theory._show", lambda wanted, out, kinds: None)
        output(words)


def test_sessions_are_what_is_printed():
    sessions = re.findall(r"^```console\n\$ flatmin theory ([^\n]*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert sessions
    for line, printed in sessions:
        shown, dots, _ = printed.partition("...\n")
        said = output(shlex.split(line))
        assert said.startswith(shown) and (dots or said == shown)


def test_every_demonstration_has_its_command_and_a_small_figure():
    for name in DEMONSTRATIONS:
        assert [name] in LINES
        assert f"]({name}.png)" in TEXT
        assert 10_000 < (PAGE.parent / f"{name}.png").stat().st_size < 120_000
