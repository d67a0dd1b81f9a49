"""`flatmin original`: run the command line of a research repository with `flatmin train`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from flatmin.cli import completion as complete
from flatmin.cli.options import Again, Download, DryRun, Out, Resume
from flatmin.cli.train import RUNS, perform


def original(
    project: Annotated[
        str,
        typer.Argument(
            metavar="PROJECT",
            help="Research project, such as vasso; `flatmin original list` lists all.",
            autocompletion=complete.originals,
        ),
    ],
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FLAGS", help="Flags of the project's script, unchanged; a leading `python SCRIPT` is ignored."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Additional setting of flatmin train, such as epochs=1. Repeatable.",
            autocompletion=complete.words("train", "logging"),
        ),
    ] = None,
    dry_run: DryRun = False,
    out: Out = RUNS,
    download: Download = False,
    resume: Resume = False,
    again: Again = False,
) -> None:
    """Translate a research repository's command line to `flatmin train` settings, and run it.

    It prints the resulting `flatmin train` command, and notes on differences from the original script.

    Examples:
        flatmin original list
        flatmin original vasso --opt vasso-sgd --dataset CIFAR10_cutout --dry-run
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
