"""`python -m conformance`: processes that die or hang, the table, the page, the exit status."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from conformance import __main__ as command
from conformance import adapters, runner, table
from conformance.behaviours import ALL, BY_NAME
from conformance.verdict import ABSENT, FAIL, PASS, BehaviourOutcome, at_most, within

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
BAD = """
import os, sys, time
import flatmin
from conformance.adapter import Adapter, Subject

class Odd(Subject):
    def step(self, closure):
        if len(self.param_groups[0]["params"]) == 1:
            time.sleep(60)
        if self.param_groups[0]["rho"] == 0:
            print("last words", file=sys.stderr, flush=True)
            os._exit(3)
        return super().step(closure)

class ADAPTER(Adapter):
    title = "odd"

    def build(self, params, base, *, rho, form=None, model=None, **options):
        self.claims(form, options)
        return Odd(flatmin.SAM(base.make(params), rho=rho))
"""


def test_a_process_that_dies_or_hangs_costs_its_own_behaviour(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(BAD)
    names = ["one global norm", "rho zero is the base", "asam", "addresses stay", "zero gradient"]
    chosen = [dataclasses.replace(BY_NAME[n], limit_s=1.0 if n == "zero gradient" else 60.0) for n in names]
    seen = []
    outcomes = runner.run(str(path), chosen, lambda adapter, outcome: seen.append(outcome))
    assert outcomes == sorted(seen, key=lambda o: names.index(o.behaviour)) and len(seen) == len(names)
    assert [o.status for o in outcomes] == [PASS, FAIL, ABSENT, PASS, FAIL]
    assert outcomes[1].figure == "the process ended with 3: last words"
    assert outcomes[4].figure == "no answer in time"


def test_an_adapter_that_cannot_be_loaded_says_why(tmp_path):
    path = tmp_path / "no_such.py"
    assert adapters.missing(str(path)) == f"no file {path}"
    path.write_text("import no_such_package_at_all")
    assert "no_such_package_at_all" in adapters.missing(str(path))
    assert "no_such_module_at_all" in adapters.missing("no_such_module_at_all")


def run_of(monkeypatch, *failing):
    def run(adapter, chosen, progress):
        return [
            BehaviourOutcome(b.name, FAIL if b.name in failing else PASS, "off by 1" * (b.name in failing))
            for b in chosen
        ]

    monkeypatch.setattr(runner, "run", run)


@pytest.mark.parametrize("adapter", ["flatmin", "single_file"])
def test_the_exit_status_is_flatmins(monkeypatch, capsys, tmp_path, adapter):
    run_of(monkeypatch)
    assert command.main([adapter]) == 0
    run_of(monkeypatch, "one global norm")
    assert command.main([adapter, "--json", str(tmp_path / "x.json")]) == (adapter == "flatmin")
    out = capsys.readouterr().out
    assert "one global norm: off by 1" in out and f"{len(ALL) - 1}/{len(ALL)}" in out
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["columns"][0]["outcomes"]["one global norm"]["status"] == FAIL


def test_behaviours_are_chosen_by_name_or_theme(monkeypatch, capsys):
    run_of(monkeypatch)
    assert command.main(["flatmin", "--only", "scaler and", "--only", "numerics"]) == 0
    out = capsys.readouterr().out
    assert "scaler and clipping" in out and "fp16 norm" in out and "tied weights" not in out
    assert command.main(["flatmin", "--only", "nothing like it"]) == 2
    assert "nothing like it" in capsys.readouterr().err
    assert command.main(["--list", "--only", "tied"]) == 0
    assert "moved and counted once" in capsys.readouterr().out


def test_a_name_that_is_not_installed_is_said(capsys):
    assert command.main(["no_such_module_at_all"]) == 2
    assert "no_such_module_at_all: not installed" in capsys.readouterr().err


def test_the_table_goes_between_the_markers(monkeypatch, capsys, tmp_path):
    run_of(monkeypatch, "asam")
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{table.BEGIN}\nstale text\n{table.END}\n\nafter\n")
    for _ in range(2):
        command.main(["single_file", "--into", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale text" not in text
    assert text.count("| asam | **fail** |") == 1 and "- asam: `off by 1`" in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="to write between"):
        command.main(["single_file", "--into", str(page)])


def test_figures_on_the_page_name_no_machine():
    column = table.AdapterColumn(
        "x", "1", {"asam": BehaviourOutcome("asam", FAIL, "in /home/me/env/lib/a.py: <X object at 0x7f3a>")}
    )
    text = table.page([column], "")
    assert "/home" not in text and "0x7f" not in text and "a.py" in text


def test_a_figure_that_is_nan_is_no_pass():
    for judge in (lambda: at_most(float("nan"), 1.0, "x"), lambda: within(float("nan"), 1.0, 0.5, "x")):
        with pytest.raises(AssertionError, match="nan"):
            judge()


def test_the_page_has_every_behaviour_and_flatmin_passes_all():
    text = PAGE.read_text(encoding="utf-8").split(table.BEGIN)[1].split(table.END)[0]
    rows = dict(re.findall(r"^\| ([a-z][^|]*?) \| ([^|]*?) \|", text, re.MULTILINE))
    assert [name for name in rows if name in BY_NAME] == [b.name for b in ALL]
    assert {rows[b.name] for b in ALL} == {"pass"}
    for b in ALL:
        assert f"- **{b.name}**: {b.demand} *{b.why}*" in text, "run python -m conformance --into docs/conformance.md"


def test_the_adapter_on_the_page_runs(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    path = tmp_path / "my_adapter.py"
    path.write_text("import flatmin\n" + code)
    mine = adapters.load(str(path))
    statuses = [BY_NAME[n].run(mine).status for n in ("sam with sgd", "asam", "loop by hand", "scaler and clipping")]
    assert statuses == [PASS, ABSENT, PASS, ABSENT]


def test_adapters_of_other_packages_are_imported_only_when_asked_for():
    import subprocess
    import sys

    code = "import sys, conformance.__main__; print({*sys.modules} & {'flatmin', 'torchzero', 'heavyball', 'temperon'})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
