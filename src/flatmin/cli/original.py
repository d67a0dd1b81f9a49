"""`flatmin original`: the command lines of the original research projects."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flatmin.cli.train import RUNS, perform


def original(
    project: Annotated[str, typer.Argument(metavar="PROJECT", help="list, or a project of the list.")],
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FLAGS", help="Flags of its script, as they are; `python SCRIPT` before them is left out."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Settings of flatmin train on top; one each, may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it is here, and stop.")] = False,
    out: Annotated[Path, typer.Option(help="Where runs are kept.")] = RUNS,
    download: Annotated[bool, typer.Option("--download", help="Get the data if they are not there.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last good checkpoint, if there is one.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Begin anew where a run is already.")] = False,
) -> None:
    """Train by the command line of an original project, after saying what it is in words of flatmin train.

    flatmin original vasso python train.py --opt vasso-sgd --dataset CIFAR10_cutout
    """
    from flatmin.train.originals.project import check
    from flatmin.train.originals.projects import PROJECTS, find_project

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
