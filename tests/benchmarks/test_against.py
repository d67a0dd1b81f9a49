"""A step beside that of another commit: each package runs in its own process, and a slower one is seen."""

import random
import subprocess

import pytest

from benchmarks import against
from benchmarks.results import BenchmarkResult, Spread, Table

PACKAGE = """
def wrap(base, method, model):
    if method != "sam":
        raise ValueError("unknown method")
    def step(closure):
        for _ in range({passes}):
            closure()
    base.step = step
    return base
"""


def package(folder, passes):
    (folder / "flatmin").mkdir(parents=True)
    (folder / "flatmin" / "__init__.py").write_text(PACKAGE.format(passes=passes))
    return folder


@pytest.mark.slow  # a measurement, in processes of its own
def test_a_package_that_takes_more_time_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(against, "RESTARTS", 1)
    slow, fast = package(tmp_path / "slow", 12), package(tmp_path / "fast", 2)
    asked = {"net": "mlp20", "method": "sam", "base": "default", "batch": None, "repeats": 3}
    sources = {against.NEW: slow, against.OLD: fast, against.CONTROL: fast}
    rows = against.sample(sources, asked, 2, random.Random(0))
    over = {label: Spread.of([2 * b / (a + c) for a, b, c in of]).median for label, of in rows.items()}
    assert over[against.NEW] > 3
    assert over[against.CONTROL] < 2
    with pytest.raises(RuntimeError, match=r"asam on mlp20 does not run .*unknown method"):
        against.sample({against.OLD: fast}, {**asked, "method": "asam"}, 1, random.Random(0))


def test_the_gate_is_the_spread_of_the_control():
    even = [[1.0, x, 1.0] for x in (0.98, 1.0, 1.0, 1.02)]
    for new, passes in (([0.9] * 4, True), ([1.0, 1.0, 1.1, 1.1], True), ([1.05, 1.05, 1.1, 1.1], False)):
        result, table = BenchmarkResult("step"), Table("", against.HEADERS)
        against.judge("net", "sam", {against.NEW: [[1.0, x, 1.0] for x in new], against.CONTROL: even}, table, result)
        assert result.gates[0].passed == passes
        assert table.rows[0][1].startswith(f"{(new[1] + new[2]) / 2:.3f} ")


def test_the_other_commit_is_unpacked_and_taken_away(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *words], cwd=tmp_path, check=True)

    monkeypatch.setattr(against, "ROOT", tmp_path)
    git("init", "-q")
    source = package(tmp_path / "src", 1) / "flatmin" / "__init__.py"
    git("add", "src")
    git("commit", "-qm", "first")
    before = source.read_text()
    source.write_text("")
    git("commit", "-qam", "second")
    with against.source_of(against.commit_of("HEAD~1")) as old:
        assert (old / "flatmin" / "__init__.py").read_text() == before
    assert not old.exists()
    with pytest.raises(ValueError, match="no such commit"):
        against.commit_of("nowhere")
