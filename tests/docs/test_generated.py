"""A method that is built in takes its part, one line in the table of names, and the command that writes the pages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/methods.md", "docs/loops.md")
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


def run(folder, *words):
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_pages_are_those_that_the_code_gives():
    done = run(ROOT, str(ROOT / "tools" / "generate.py"), "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_part_and_a_line_in_the_table_are_all_that_a_method_takes(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in (*PAGES, "tools/generate.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    methods = tmp_path / "src" / "flatmin" / "methods"
    with (methods / "direction.py").open("a") as file:
        file.write(PART)
    table = (methods / "table.py").read_text()
    (methods / "table.py").write_text(table.replace("    *RULES,\n", LINE))

    generate = str(tmp_path / "tools" / "generate.py")
    found = run(tmp_path, generate, "--check")
    assert found.returncode == 1, found.stderr
    assert "+| `sign-sam` | Climb along the sign |" in found.stdout and "3 page(s) are behind the code" in found.stdout
    assert not any("sign-sam" in (tmp_path / page).read_text() for page in PAGES)

    assert run(tmp_path, generate).returncode == 0
    readme, methods_page, loops = ((tmp_path / page).read_text() for page in PAGES)
    assert "| `sign-sam` | Climb along the sign | Nobody & Noone, ICML 2031 | 2 | 0.05 |" in readme
    assert "| `sign-sam` | d = sign(g), eps = rho d / ‖d‖ | 2 | 1 | 0.05 | | nobody uses it |" in methods_page
    assert "\n25 sign-sam " in methods_page and "stale-sam, sign-sam" in methods_page  # the matrix, and its refusals
    assert "| sign-sam | yes |" in loops
    assert run(tmp_path, generate, "--check").returncode == 0
    use = "import torch, flatmin; flatmin.wrap(torch.optim.SGD([torch.ones(2, requires_grad=True)], 0.1), 'sign-sam'); "
    done = run(tmp_path, "-c", f"{use}from flatmin.methods import Sign; print(flatmin.compose('sign-sam').direction)")
    assert done.stdout == "Sign()\n", done.stderr
