"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatmin.cli import completion as complete

Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Output folder.")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", metavar="N", min=0, help="Number of processes, with one thread each (default: one per core)."
    ),
]
Demo = Annotated[bool, typer.Option("--demo", help="Run the scaled-down version (minutes on two CPU cores).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print what would be done, and stop.")]
Report = Annotated[bool, typer.Option("--report/--no-report", help="Write the HTML page.")]
Page = Annotated[bool, typer.Option("--page/--no-page", help="Write the HTML page.")]
OpenPage = Annotated[bool, typer.Option("--open", help="Open the page in a browser.")]
Figures = Annotated[
    str,
    typer.Option(
        "--figures",
        metavar="FORMATS",
        help="Also write the figures as files for papers, in these formats: svg, pdf or png, or several as in svg,pdf.",
        autocompletion=complete.one_of("svg", "pdf", "png", "svg,pdf"),
    ),
]
Archive = Annotated[
    Path | None,
    typer.Option(
        "--archive",
        metavar="FOLDER",
        help="Reuse the finished runs in this archive (see `flatmin runs pack`) or folder, of any version of flatmin.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last good checkpoint, if there is one.")]
Again = Annotated[bool, typer.Option("--again", help="Start over if the run already exists.")]
Download = Annotated[bool, typer.Option("--download", help="Download the data if they are not in data_dir.")]
Plugin = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="MODULE", help="Python module that defines further methods. Repeatable."),
]
Split = Annotated[
    str,
    typer.Option(
        "--split",
        metavar="PART",
        help="Part of the data: train (with its label noise), val or test.",
        autocompletion=complete.one_of("train", "val", "test"),
    ),
]

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Run folder, or name of a run in flatmin-runs/runs (see `flatmin runs list`).",
        autocompletion=complete.runs,
    ),
]
Runs = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...",
        help="Run folders, or names of runs in flatmin-runs/runs (see `flatmin runs list`).",
        autocompletion=complete.runs,
    ),
]
Study = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="Name of a study (`flatmin study list` lists them), or a .toml file.",
        autocompletion=complete.presets("study", "list"),
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings, such as method=vasso rho=0.1 epochs=10. `flatmin settings` lists all.",
        autocompletion=complete.words("train", "logging"),
    ),
]
