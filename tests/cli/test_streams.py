"""Whatever a terminal, a pipe or a locale cannot take, the command continues and its files are whole and in UTF-8."""

import csv
import io
import os
import subprocess
import sys
import unicodedata

import pytest

from flatmin.cli.console import make_console
from flatmin.report.terminal import print_table
from flatmin.streams import Lasting, fitted, plain, settle_streams

LABEL = "größer, ρ = 0.15 → ∞ 日本"
STUDY = f"""
title = "Radien ρ ± ✓"
train = "smoke"
seeds = [0]
[settings]
epochs = 1
[[arms]]
label = "SGD"
method = "sgd"
[[arms]]
label = "{LABEL}"
method = "sam"
rho = 0.15
"""
MINE = """
import torch

x, y = torch.linspace(-1, 1, 320).view(64, 5), torch.arange(64) % 2


def load():
    return (x, y), (x[:8], y[:8]), (x[8:16], y[8:16])


def build():
    print("ρ ✓", flush=True)
    return torch.nn.Linear(5, 2)
"""
posix = pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX")


def stream(encoding, errors="strict"):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)


def written(text):
    text.flush()
    return text.buffer.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "latin-1", "shift_jis", "utf-8", "utf-16"])
def test_every_encoding_takes_every_text(encoding, monkeypatch):
    """As PYTHONIOENCODING=cp1252 on Windows makes it (lightning#13213 and many more)."""
    out = stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    settle_streams()
    everything = "".join(map(chr, range(1, 0x3000))) + "日本😀\udcff" * (encoding != "utf-16")
    print(everything + "a ± b")
    text = written(out).decode(encoding, "replace")
    assert text.rstrip().endswith(("a ± b", "a +- b")) and "flatmin" not in text


def test_what_stands_for_a_character():
    signs = "±×−–…→λρεβΔφ₁²öÅéß─│┌━█▃✓日a%"
    words = "+- x - - ... -> lambda rho epsilon beta Delta phi 1 2 o A e ss - | + - # # ? ? a %"
    assert [plain(char) for char in signs] == words.split()
    assert all(plain(chr(i)).isascii() for i in range(0x2FFF) if unicodedata.category(chr(i)) != "Cs")
    assert fitted("5 ± 1, ö", "cp1252") == "5 ± 1, ö" and fitted("5 ± 1, ö", "ascii") == "5 +- 1, o"


@pytest.mark.parametrize(("chosen", "shown"), [("strict", b"+- ?"), ("surrogateescape", b"+- ?"), ("ignore", b" ")])
def test_a_chosen_error_handler_stays(chosen, shown, monkeypatch):
    """The C locale brings surrogateescape; PYTHONIOENCODING=ascii:ignore is somebody's will."""
    out = stream("ascii", chosen)
    monkeypatch.setattr(sys, "stdout", out)
    settle_streams()
    print("± ✓", end="")
    assert written(out) == shown


def test_columns_stand_below_each_other_in_ascii(monkeypatch):
    out = stream("ascii")
    monkeypatch.setattr(sys, "stdout", out)
    settle_streams()
    print_table([["arm", "test %"], ["ρ", "95.1 ±0.4"], ["SAM", "9.0"]], make_console())
    assert written(out).decode().splitlines() == [
        "arm      test %", "-" * 15, "rho  95.1 +-0.4", "SAM         9.0",
    ]  # fmt: skip


def test_closed_output_and_dumb_terminals(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    make_console().print("nobody hears it")
    terminal = stream("utf-8")
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "60")
    assert not make_console().is_terminal and make_console().width == 60
    monkeypatch.setenv("COLUMNS", "1")
    assert make_console().width == 20, "a word in a line"
    monkeypatch.setenv("TERM", "xterm")
    assert make_console().is_terminal


def test_what_cannot_be_written_is_dropped():
    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            raise OSError(28, "No space left on device")

    raw = Lasting(Full())
    text = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8")
    for _ in range(3):
        print("x" * 10_000, file=text, flush=True)
    assert raw.problem.errno == 28


def flatmin(*words, out, env, tmp_path):
    settings = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONIO"))}
    return subprocess.run(
        [sys.executable, "-m", "flatmin", *map(str, words)],
        stdout=out,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**settings, "OMP_NUM_THREADS": "1", **env},
        timeout=120,
        check=False,
    )


@posix
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_study_is_whole_in_any_locale_and_without_a_reader(tmp_path, workers):
    """As in `LC_ALL=C flatmin study ... | head -0`, with a network that prints, as users' do."""
    (tmp_path / "own.toml").write_text(STUDY, encoding="utf-8")
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    source, sink = os.pipe()
    os.close(source)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "60"}
    words = ["study", "own.toml", "model=mine:build", "data=mine:load", "--out", "out", "--workers", workers]
    ended = flatmin(*words, "--no-report", out=sink, env=locale, tmp_path=tmp_path)
    os.close(sink)
    assert ended.returncode == 0, ended.stderr
    table = list(csv.DictReader(io.StringIO((tmp_path / "out" / "studies" / "own.csv").read_text(encoding="utf-8"))))
    assert [row["arm"] for row in table] == ["SGD", LABEL] and all(row["n"] == "1" for row in table)


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no full device")
def test_a_full_disk_is_said(tmp_path):
    with open("/dev/full", "wb") as full:
        ended = flatmin("--version", out=full, env={}, tmp_path=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.decode() == (
        "flatmin: the output could not be printed (No space left on device); all files are complete.\n"
    )
