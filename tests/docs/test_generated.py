"""A built-in method takes its part, a line in the table of names, its use, and the command that writes the pages.

So does a new import, which changes the picture in `docs/contributing/design.md`.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from flatmin.methods import ELSEWHERE, METHODS
from flatmin.methods.table import USES
from tools import generate

ROOT = Path(__file__).resolve().parents[2]
# The pages that a new method changes, beside the one of its own.
PAGES = (
    "README.md",
    "docs/methods/index.md",
    "docs/methods/composing.md",
    "docs/loops/support.md",
    "docs/contributing/design.md",
)
NEIGHBOUR = "docs/methods/sagm.md"  # lists the methods of the same use
PART = '''

@dataclass(frozen=True, kw_only=True)
class Sign(Direction):
    """d = sign(g), along which every entry moves alike."""

    def __call__(self, g: Tensors | None, state: State, c: StepContext) -> tuple[Tensors | None, NewState]:
        assert g is not None
        return list(torch._foreach_sign(g)), {}


__all__ += ["Sign"]
'''
LINE = """    Method(
        name="sign-sam",
        title="Sign SAM",
        parts=(direction.Sign(),),
        formula="d = sign(g),  eps = rho d / ||d||",
        paper="Nobody & Noone, A Scratch Method, ICML 2031",
        summary="Perturb along the sign.",
        note="nobody uses it",
    ),
    *RULES,
"""


# The copy of tools/generate.py checks and writes: exit codes, what is said, and whether a page names the method.
STEPS = """
import contextlib, io, json, sys
from pathlib import Path
import torch, flatmin
from flatmin.methods import Sign
root = Path(sys.argv[1])
sys.path.insert(0, str(root / "tools"))
import generate
said = []
for words in (["--check"], []):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = generate.main(words)
    said.append((code, text.getvalue(), any("sign-sam" in (root / page).read_text() for page in sys.argv[2:])))
flatmin.wrap(torch.optim.SGD([torch.ones(2, requires_grad=True)], 0.1), "sign-sam")
assert flatmin.compose("sign-sam").direction == Sign()
print(json.dumps(said))
"""


def test_the_pages_are_those_that_the_code_gives(capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().out


def reached(arrows):
    """All pairs of boxes with a way from one to the other."""
    while more := {(a, d) for (a, b), (c, d) in itertools.product(arrows, arrows) if b == c} - arrows:
        arrows = arrows | more
    return arrows


def test_the_picture_has_all_imports_and_no_others():
    picture = re.search(r"```mermaid\n(.*?)```", (ROOT / "docs/contributing/design.md").read_text(), re.DOTALL)[1]
    boxes = {box: re.findall(r"<b>(\w+)</b>", text) for box, text in re.findall(r'^(\w+)\["(.*)"\]$', picture, re.M)}
    boxes |= {name: [name] for name in re.findall(r"^subgraph (\w+) ", picture, re.M)}
    drawn = re.findall(r"^(\w+) --> (\w+)$", picture, re.M)
    shown = {}
    for folder, start in {"flatmin": "", "flatmin.optim": "optim_", "flatmin.methods": "methods_"}.items():
        inside = {b: ns for b, ns in boxes.items() if (b.startswith(start) if start else "_" not in b)}
        shown[folder] = set(itertools.chain(*inside.values()))
        arrows = {pair for a, b in drawn if a in inside for pair in itertools.product(boxes[a], boxes[b])}
        graph = grimp.build_graph("flatmin", exclude_type_checking_imports=True, cache_dir=None)
        modules = graph.find_children(folder)
        for module in modules:
            graph.squash_module(module)
        imports = {(a, b) for a in modules for b in modules if graph.direct_import_exists(importer=a, imported=b)}
        short = {(a.removeprefix(f"{folder}."), b.removeprefix(f"{folder}.")) for a, b in reached(imports)}
        assert reached(arrows) == {(a, b) for a, b in short if a != b and {a, b} <= shown[folder]}
        assert not any(arrow in reached(arrows - {arrow}) for arrow in arrows)  # none follows from others
        if folder != "flatmin.optim":
            assert shown[folder] == {module.removeprefix(f"{folder}.") for module in modules} - {"__main__"}
    assert {"sam", "step", "program", "perturb", "base_optimizer"} < shown["flatmin.optim"]


def test_the_check_fails_for_a_new_import_unless_it_is_for_type_checkers(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs" / "contributing").mkdir(parents=True)
    shutil.copy(ROOT / "docs/contributing/design.md", tmp_path / "docs" / "contributing")
    shutil.copytree(ROOT / "src" / "flatmin", tmp_path / "flatmin", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(generate, "SOURCES", tmp_path / "flatmin")
    monkeypatch.setattr(
        generate, "PARTS", {k: v for k, v in generate.PARTS.items() if k[0] == "docs/contributing/design.md"}
    )
    monkeypatch.setattr(generate, "FILES", {})
    file = tmp_path / "flatmin" / "models" / "zoo.py"
    for_checkers = "if TYPE_CHECKING:\n    from flatmin.measure import trace\n"
    file.write_text(f"{file.read_text()}\n\n{for_checkers}\n\ndef load():\n    from flatmin.data import digits\n")
    assert generate.main(["--check"], tmp_path) == 1
    found = capsys.readouterr().out
    assert "+models --> data" in found and "+models --> measure" not in found


def test_every_method_has_one_use():
    listed = [name for names in USES.values() for name in names]
    assert sorted(listed) == sorted([*METHODS, *ELSEWHERE])


def test_a_method_without_a_use_stops_the_pages():
    with pytest.raises(ValueError, match=r"'sign-sam' must be listed once in USES of src/flatmin/methods/table.py"):
        generate.by_use({**METHODS, "sign-sam": METHODS["sam"]})


def test_pages_of_methods_that_are_gone_are_reported_and_deleted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "PARTS", {})
    monkeypatch.setattr(generate, "FILES", {})
    folder = tmp_path / "docs" / "methods"
    folder.mkdir(parents=True)
    page = (ROOT / "docs/methods/sam.md").read_text()
    for name, text in {"sam": page, "gone-sam": page, "composing": "# Compose methods"}.items():
        (folder / f"{name}.md").write_text(text)
    assert generate.main(["--check"], tmp_path) == 1
    assert "no method has docs/methods/gone-sam.md" in capsys.readouterr().out and len(list(folder.iterdir())) == 3
    assert generate.main([], tmp_path) == 0 and "deleted docs/methods/gone-sam.md" in capsys.readouterr().out
    assert generate.main(["--check"], tmp_path) == 0
    assert {path.name for path in folder.iterdir()} == {"sam.md", "composing.md"}


@pytest.mark.parametrize("name", METHODS)
def test_the_page_of_a_method_has_every_parameter_with_its_meaning(name):
    page = (ROOT / "docs/methods" / f"{name}.md").read_text()
    table = page.partition("## Parameters")[2].partition("\n## ")[0]
    for part in METHODS[name].parts:
        for key, value in part.parameters().items():
            row = re.search(rf"^\| `{part.kind}\.{key}` \| `(.*)` \| (.*) \|$", table, re.MULTILINE)
            assert row and row[1] == repr(value) and len(row[2]) > 5
    assert page.startswith(f"{generate.MARK}\n\n# ") and re.split("[,;]  ", METHODS[name].formula)[0] in page
    assert "nan" not in page and page.count("```") % 2 == 0 and not re.search(r"\n\n\n", page)


def test_costs_are_those_of_the_newest_measurement():
    """Read again, in another way, from the file that has the last word on momentum-sam."""
    results = "benchmarks/results/2026-11-21-cost-turns.md"
    row = re.search(r"^\| momentum-sam \|.*\|$", (ROOT / results).read_text(), re.MULTILINE)[0].split(" | ")
    text = "\n".join(generate.measured("momentum-sam"))
    assert f"| mlp200 | {row[1]} | {row[3]} | " in text and f"(../../{results})" in text
    assert generate.measured("no-such-method") == []


@pytest.mark.slow
def test_a_part_a_line_in_the_table_and_a_use_are_all_that_a_method_takes(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for folder in ("docs", "tools", "benchmarks/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path / name)
    methods = tmp_path / "src" / "flatmin" / "methods"
    with (methods / "direction.py").open("a") as file:
        file.write(PART)
    table = (methods / "table.py").read_text()
    (methods / "table.py").write_text(table.replace("    *RULES,\n", LINE).replace('"sagm")', '"sagm", "sign-sam")'))

    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(tmp_path), *PAGES],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (behind, told, early), (wrote, _, late) = json.loads(done.stdout)
    assert (behind, wrote) == (1, 0) and not early and late
    assert "docs/methods/sign-sam.md as generated" in told and f"{NEIGHBOUR} as generated" in told
    readme, methods_page, composing, loops, _ = ((tmp_path / page).read_text() for page in PAGES)
    assert "[`sign-sam`](docs/methods/sign-sam.md)" in readme
    line = "| [`sign-sam`](sign-sam.md) | Perturb along the sign. | 2 | 0.05 | Nobody & Noone, ICML 2031 |"
    assert line in methods_page
    assert re.search(r"^\d+ sign-sam ", composing, re.MULTILINE)  # the matrix, and its refusals
    assert re.search(r"Methods that set the direction, of which only one can be used:[^.]* sign-sam\b", composing)
    assert "| sign-sam | yes |" in loops
    page = (tmp_path / "docs/methods/sign-sam.md").read_text()
    assert page.startswith(f"{generate.MARK}\n\n# Sign SAM: `sign-sam`\n\nPerturb along the sign.\n")
    assert "d = sign(g)\neps = rho d / ||d||\n" in page and "\nNobody uses it.\n" in page
