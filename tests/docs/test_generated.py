"""A method that is built in takes its part, one line in the table of names, and the command that writes the pages.

So does a new import, which changes the picture in `docs/design.md`.
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

from tools import generate

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/methods.md", "docs/loops.md", "docs/design.md")
OTHERS = ("docs/train.md", "docs/study.md", "docs/measure.md")  # nothing of a method stands there
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
        summary="Climb along the sign.",
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
    picture = re.search(r"```mermaid\n(.*?)```", (ROOT / "docs/design.md").read_text(), re.DOTALL)[1]
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
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/design.md", tmp_path / "docs")
    shutil.copytree(ROOT / "src" / "flatmin", tmp_path / "flatmin", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(generate, "SOURCES", tmp_path / "flatmin")
    monkeypatch.setattr(generate, "PARTS", {k: v for k, v in generate.PARTS.items() if k[0] == "docs/design.md"})
    file = tmp_path / "flatmin" / "models" / "zoo.py"
    for_checkers = "if TYPE_CHECKING:\n    from flatmin.measure import trace\n"
    file.write_text(f"{file.read_text()}\n\n{for_checkers}\n\ndef load():\n    from flatmin.data import digits\n")
    assert generate.main(["--check"], tmp_path) == 1
    found = capsys.readouterr().out
    assert "+models --> data" in found and "+models --> measure" not in found


@pytest.mark.slow
def test_a_part_and_a_line_in_the_table_are_all_that_a_method_takes(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in (*PAGES, *OTHERS, "tools/generate.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    methods = tmp_path / "src" / "flatmin" / "methods"
    with (methods / "direction.py").open("a") as file:
        file.write(PART)
    table = (methods / "table.py").read_text()
    (methods / "table.py").write_text(table.replace("    *RULES,\n", LINE))

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
    assert "+| `sign-sam` | Climb along the sign |" in told and "4 page(s) are behind the code" in told
    readme, methods_page, loops, _ = ((tmp_path / page).read_text() for page in PAGES)
    assert "| `sign-sam` | Climb along the sign | Nobody & Noone, ICML 2031 | 2 | 0.05 |" in readme
    assert "| `sign-sam` | d = sign(g), eps = rho d / ‖d‖ | 2 | 1 | 0.05 | | nobody uses it |" in methods_page
    assert re.search(r"^\d+ sign-sam ", methods_page, re.MULTILINE)  # the matrix, and its refusals
    assert re.search(r"Methods that set the direction, of which only one can be used:[^.]* sign-sam\b", methods_page)
    assert "| sign-sam | yes |" in loops
