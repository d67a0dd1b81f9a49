"""Build the documentation site from docs/, the docstrings and the tutorials.

    python tools/site.py            # into build/site; --quick leaves out running the tutorials

Zensical reads build/pages: the pages of docs/; the tutorials, run and with their output, also as notebooks; and the
files outside of docs/ that pages link to. Every warning is an error, so a link that leads nowhere fails the build.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
PAGES = BUILD / "pages"
# Where files outside of docs/ stand on the site; others that a page links to go to repository/.
PLACES = {
    Path("README.md"): Path("index.md"),
    Path("CONTRIBUTING.md"): Path("contributing/index.md"),
    Path("CHANGELOG.md"): Path("changelog.md"),
}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".toml": "toml", ".cff": "yaml"}


def main(words: list[str] | None = None) -> int:
    """Write build/pages and the configuration beside it, and build build/site."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="show the tutorials without running them")
    options = parser.parse_args(words)
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.rmtree(BUILD / "site", ignore_errors=True)
    docs = ROOT / "docs"
    files = sorted(path.relative_to(ROOT) for path in docs.rglob("*") if path.is_file())
    collect([*files, Path("CONTRIBUTING.md"), Path("CHANGELOG.md")], run=not options.quick)
    settings = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    (BUILD / "zensical.toml").write_text(settings.replace('"methods/*"', methods()), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(BUILD / "zensical.toml")]
    done = subprocess.run(command, cwd=BUILD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout)
    # What is wrong in a docstring is only logged.
    return done.returncode or int("griffe: " in done.stdout)


def methods() -> str:
    """The entries of the navigation for the page of every method, under what it is used for."""
    from flatmin.methods import METHODS
    from flatmin.methods.table import USES

    sections = []
    for use, names in USES.items():
        pages = ", ".join(f'"methods/{name}.md"' for name in names if name in METHODS)
        sections.append(f'{{ "{use}" = [{pages}] }}')
    return ", ".join(sections)


def collect(files: list[Path], *, run: bool) -> None:
    """Write files of the repository as pages, and what they link to, until nothing is missing."""
    waiting, done = list(files), set(files)
    while waiting:
        file = waiting.pop()
        page = PAGES / place(file)
        page.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / file).is_dir():
            names = sorted(path.name for path in (ROOT / file).iterdir() if path.is_file())
            text = f"# {file}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
        elif is_tutorial(file):
            text = tutorial(ROOT / file, page, run=run)
        elif file.suffix == ".md":
            text = (ROOT / file).read_text(encoding="utf-8")
        elif "docs" in file.parts:
            shutil.copy(ROOT / file, page)
            continue
        else:
            code = (ROOT / file).read_text(encoding="utf-8").rstrip()
            text = f"# {file.name}\n\n````{LANGUAGES.get(file.suffix, '')}\n{code}\n````\n"
        source = file if not (ROOT / file).is_dir() else file / "index"

        def follow(path: Path) -> None:
            if path not in done and (ROOT / path).exists() and path.parts[:1] != ("docs",):
                done.add(path)
                waiting.append(path)

        page.write_text(relink(text, source, follow), encoding="utf-8")


def place(file: Path) -> Path:
    """Where a file of the repository stands on the site."""
    if file in PLACES:
        return PLACES[file]
    if file.parts[0] == "docs":
        inside = file.relative_to("docs")
        return inside.with_suffix(".md") if is_tutorial(file) else inside
    outside = Path("repository") / file
    if (ROOT / file).is_dir():
        return outside / "index.md"
    return outside if file.suffix == ".md" else outside.with_name(outside.name + ".md")


def is_tutorial(file: Path) -> bool:
    """Whether a file is a tutorial, written as a program."""
    return file.suffix == ".py" and file.parent == Path("docs/tutorials")


def relink(text: str, source: Path, follow: Callable[[Path], None]) -> str:
    """A page's text with its links between files of the repository as links between pages of the site."""
    here = place(source).parent if source.name != "index" else Path("repository") / source.parent

    def link(match: re.Match[str]) -> str:
        target, anchor = match[2], match[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = Path(os.path.normpath(source.parent / target))
        follow(path)
        return f"{match[1]}{os.path.relpath(place(path), here)}{anchor})" if (ROOT / path).exists() else match[0]

    return LINK.sub(link, text)


def tutorial(source: Path, page: Path, *, run: bool) -> str:
    """Run a tutorial, write it as a notebook and its pictures beside its page, and return the page's text.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell of the tutorial failed.
    """
    import jupytext
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter

    notebook = jupytext.read(source)
    if run:
        print(f"running {source.name}", flush=True)
        quiet = ["--log-level=ERROR"]  # not a warning that the kernel's own connection is not encrypted
        where = {"metadata": {"path": BUILD}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where, extra_arguments=quiet).execute()
    jupytext.write(notebook, page.with_suffix(".ipynb"))
    exporter = MarkdownExporter()
    text, resources = exporter.from_notebook_node(notebook, {"unique_key": page.stem, "output_files_dir": "."})
    for name, content in resources.get("outputs", {}).items():
        (page.parent / name).write_bytes(content)
    title, _, rest = text.partition("\n")
    return f"{title}\n\n[Open it as a notebook]({page.stem}.ipynb)\n{rest}"


if __name__ == "__main__":
    raise SystemExit(main())
