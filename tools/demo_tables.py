"""Write docs/studies/demo-tables.md: the demo of every study, run by `flatmin study NAME --demo`, with its table.

    python tools/demo_tables.py [NAME ...] [--out FOLDER] [--kept]

Takes about an hour on two idle cores for all of them. With `--kept` a table that is in FOLDER/studies already is taken
as it is. Sections of studies that are not named stay as they are in the page.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from flatmin.train.settings import preset_names, read_preset

PAGE = Path(__file__).resolve().parents[1] / "docs/studies/demo-tables.md"
HEAD = """# Demo tables

Each section shows what `flatmin study NAME --demo` prints for one study of the package. A demo trains small networks on
the handwritten digits that come with scikit-learn, so it takes minutes and needs no GPU. It shows the shape of the
table and says nothing about the paper's own task.

[Read the table](index.md#read-the-table) explains the columns, [List of studies](list.md) what each study reproduces.
This page is written by `python tools/demo_tables.py`.
"""
_SECTION = re.compile(r"^## (\S+)\n.*?(?=^## |\Z)", re.M | re.S)


def main(words: list[str] | None = None) -> int:
    """Run the demos and write the page."""
    names = [name for name in preset_names("study") if "demo" in read_preset(name, "study")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *names], metavar="NAME", help="default: every study")
    parser.add_argument("--out", type=Path, default=Path("flatmin-runs"), help="folder of the runs")
    parser.add_argument("--kept", action="store_true", help="take tables that are there")
    options = parser.parse_args(words)
    sections = {match[1]: match[0] for match in _SECTION.finditer(PAGE.read_text())} if PAGE.exists() else {}
    for name in options.names or names:
        sections[name] = section(name, options.out, kept=options.kept)
        body = "\n".join(sections[name].strip() + "\n" for name in names if name in sections)
        PAGE.write_text(f"{HEAD}\n{body}")
    return 0


def section(name: str, out: Path, *, kept: bool) -> str:
    """One study's part of the page."""
    path = out / "studies" / f"{name}-demo.md"
    note = path.with_suffix(".took")
    if not (kept and path.exists() and note.exists()):
        command = [sys.executable, "-m", "flatmin", "study", name, "--demo", "--no-report", "--out", str(out)]
        begun = time.monotonic()
        print(f"{name} ...", end=" ", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - begun
        print(f"{seconds:.0f} s", flush=True)
        note.write_text(f"{seconds:.0f} s, {os.cpu_count()} CPU cores, torch {torch.__version__}")
    title, _, rest = path.read_text().partition("\n")
    return f"## {name}\n\n**{title.removeprefix('# ')}** (`flatmin study {name} --demo`, {note.read_text()})\n{rest}"


if __name__ == "__main__":
    raise SystemExit(main())
