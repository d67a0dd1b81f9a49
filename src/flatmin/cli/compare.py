"""`flatmin compare`: compare methods on one task over several seeds, with a table and a report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from flatmin.cli import completion as complete
from flatmin.cli.options import Archive, DryRun, Figures, OpenPage, Out, Plugin, Report, Workers
from flatmin.cli.study import perform
from flatmin.cli.targets import HOME


def compare(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings, e.g. epochs=10 optimizer=adamw rho.sam=0.2 theta=0.8; a list such as rho=.1,.2,.4 makes "
            "an axis.",
            autocompletion=complete.words("train"),
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help="A study of the package, or a .toml file.", autocompletion=complete.presets("study")),
    ] = "digits",
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="METHOD",
            help="A method, a composition such as vasso+asam, or all. Repeatable.",
            autocompletion=complete.methods,
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(metavar="N", help="How many seeds.")] = None,
    noise: Annotated[
        float | None, typer.Option(help="Share of the training labels that are replaced by wrong ones.")
    ] = None,
    tune: Annotated[
        bool | None, typer.Option("--tune/--no-tune", help="Choose rho (or the given axes) on the validation part.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="conv, mlp, resnet18, ..., or your own as package.module:function.", autocompletion=complete.networks
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="digits, or your own as package.module:function.", autocompletion=complete.data),
    ] = None,
    plugin: Plugin = None,
    archive: Archive = None,
    dry_run: DryRun = False,
    out: Out = HOME,
    workers: Workers = None,
    report: Report = True,
    figures: Figures = "",
    open_report: OpenPage = False,
) -> None:
    """Train a small network with several methods over several seeds, and print the table and conclusions.

    A study with one arm for each method: `flatmin study` has more options. Finished runs are stored in the folder and
    reused; Ctrl-C loses at most the runs in progress.

    Examples:
        flatmin compare
        flatmin compare epochs=10 -m sgd -m sam -m vasso+asam --seeds 3
    """
    from flatmin.study.comparison import comparison
    from flatmin.train.settings import parse, split_override

    words = list(overrides or ())
    kept = [parse("weights", text, bool) for key, text in map(split_override, words) if key == "weights"]
    spec = comparison(
        preset,
        [word for word in words if split_override(word)[0] != "weights"],
        methods=tuple(method) if method else None,
        seeds=seeds,
        noise=noise,
        tune=tune,
        model=model,
        data=data,
        plugins=tuple(plugin) if plugin else None,
    )
    perform(
        dataclasses.replace(spec, name=Path(preset).stem),
        out=out,
        workers=workers,
        dry_run=dry_run,
        weights=kept[-1] if kept else True,
        archive=archive,
        figures=figures,
        table_name="comparison",
        page=out / "report.html" if report else None,
        open_page=open_report,
    )
