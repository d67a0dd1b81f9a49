"""`flatmin original`: the command lines of the papers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flatmin.cli.train import RUNS, perform


def original(
    project: Annotated[str, typer.Argument(metavar="PROJECT", help="list, or one of the listed projects.")],
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="FLAGS", help="Flags of its script, unchanged; a leading `python SCRIPT` is ignored."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Further settings of flatmin train, one per option. Repeatable."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the translation and stop.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = RUNS,
    download: Annotated[bool, typer.Option("--download", help="Download missing data.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last good checkpoint, if there is one.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Start over where a run exists already.")] = False,
) -> None:
    """Translate a research repository's command line to `flatmin train` settings and run it.

    flatmin original vasso python train.py --opt vasso-sgd --dataset CIFAR10_cutout
    """
    from flatmin.originals.project import check
    from flatmin.originals.projects import PROJECTS, find_project

    if project == "list":
        for one in PROJECTS.values():
            typer.echo(f"{one.name:<12} {one.script}: {one.paper}")
        return
    translation = find_project(project).translate(command or ()).with_overrides(settings or ())
    check(translation.command)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(translation.line)
        for note in translation.notes:
            typer.echo(f"Note: {note}")
    if not dry_run:
        preset, *overrides = translation.command
        perform(preset, overrides, out=out, resume=resume, again=again, download=download)
