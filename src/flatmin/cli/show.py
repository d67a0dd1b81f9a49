"""`flatmin show`: summarise runs in the terminal and on an HTML page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from flatmin.cli.console import make_console
from flatmin.cli.options import Figures, OpenPage, Page, Runs
from flatmin.cli.targets import HOME, run_folder


def show(
    runs: Runs,
    page: Page = True,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="HTML file of the page (default: RUN/show.html; for several runs, flatmin-runs/show.html).",
        ),
    ] = None,
    figures: Figures = "",
    open_page: OpenPage = False,
) -> None:
    """Summarise runs: results, learning curves, and the settings in which they differ.

    Unfinished runs are shown with the epochs that they have done.

    Examples:
        flatmin show first
        flatmin show first second --out both.html --open
    """
    from flatmin.report.figures.files import endings, save_all
    from flatmin.report.html import require_figures, write
    from flatmin.report.runs.curves import charts
    from flatmin.report.runs.history import read_all
    from flatmin.report.runs.page import render
    from flatmin.report.runs.terminal import print_runs
    from flatmin.train.folder import PAGE

    if page:
        require_figures()
    kinds = endings(figures) if figures else ()
    if out is not None and out.suffix != ".html":
        raise ValueError(f"--out must be a file that ends in .html; got {str(out)!r}.")
    histories = read_all(run_folder(word) for word in runs)
    console = make_console()
    print_runs(histories, console)
    target = out or (histories[0].path if len(histories) == 1 else HOME) / PAGE
    folder = target.with_name(f"{target.stem}-figures")
    if written := [path for kind in kinds for path in save_all(charts(histories), folder, kind)]:
        console.print(f"\nFigures: {folder} ({len(written)} files)", markup=False, soft_wrap=True, highlight=False)
    if not page:
        return
    path = write(render(histories, command=["flatmin", *sys.argv[1:]]), target)
    console.print(f"\nPage: {path}", markup=False, soft_wrap=True, highlight=False)
    if open_page:
        typer.launch(path.resolve().as_uri())
