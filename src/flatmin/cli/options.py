"""Options and arguments that several commands have, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatmin.cli import completion as complete

Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder that everything is written to.")]
Workers = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", min=0, help="Processes with one thread each (default: one per core)."),
]
Demo = Annotated[bool, typer.Option("--demo", help="The scaled-down version (minutes on two CPU cores).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and print what would be done, and stop.")]
Report = Annotated[bool, typer.Option("--report/--no-report", help="Write the HTML page.")]
Page = Annotated[bool, typer.Option("--page/--no-page", help="Write the HTML page.")]
OpenPage = Annotated[bool, typer.Option("--open", help="Open the page in a browser.")]
Figures = Annotated[
    str,
    typer.Option(
        "--figures", metavar="ENDINGS", help="Also write the figures as files for papers: svg, pdf or png, or svg,pdf."
    ),
]
Archive = Annotated[
    Path | None,
    typer.Option(
        "--archive",
        metavar="FOLDER",
        help="Take finished runs of this archive (see runs pack) or folder, whatever version trained them.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last good checkpoint, if there is one.")]
Again = Annotated[bool, typer.Option("--again", help="Start over where a run exists already.")]
Download = Annotated[bool, typer.Option("--download", help="Download the data if they are not in data_dir.")]
Plugin = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="MODULE", help="A module that defines further methods. Repeatable."),
]
Split = Annotated[
    str,
    typer.Option(
        "--split",
        metavar="PART",
        help="train (with the labels of training), val or test.",
        autocompletion=complete.one_of("train", "val", "test"),
    ),
]

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run folder, or the name of a run in flatmin-runs/runs.", autocompletion=complete.runs
    ),
]
Runs = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...", help="Run folders, or names of runs in flatmin-runs/runs.", autocompletion=complete.runs
    ),
]
Study = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="A study of the package (see flatmin study list), or a .toml file.",
        autocompletion=complete.presets("study", "list"),
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings, such as method=vasso rho=0.1 epochs=10; all of them: flatmin settings.",
        autocompletion=complete.words("train", "logging"),
    ),
]
