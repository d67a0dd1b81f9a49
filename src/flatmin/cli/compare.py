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
            help="Settings, such as epochs=10 optimizer=adamw rho.sam=0.2 theta=0.8. A list such as rho=.1,.2,.4 runs "
            "every method with each value. All settings: flatmin settings.",
            autocompletion=complete.words("train"),
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="Study to start from: a name from `flatmin study list`, or a .toml file.",
            autocompletion=complete.presets("study"),
        ),
    ] = "digits",
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="METHOD",
            help="Method to compare, a composition such as vasso+asam, or all (default: those of the preset). "
            "Repeatable.",
            autocompletion=complete.methods,
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(metavar="N", help="Number of seeds (default: as in the preset).")] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Share of the training labels to replace by wrong ones, from 0 to 1 (default: as in the preset)."
        ),
    ] = None,
    tune: Annotated[
        bool | None,
        typer.Option(
            "--tune/--no-tune", help="Choose rho, or the settings given as lists, on the validation part first."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Network: conv, mlp, resnet18, ..., or your own function as package.module:function (default: that of "
            "the preset).",
            autocompletion=complete.networks,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set by name, or your own function as package.module:function (default: that of the preset).",
            autocompletion=complete.data,
        ),
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
    """Compare methods: train a small network with each over several seeds, print a table and conclusions.

    Finished runs are stored in the output folder and reused; Ctrl-C loses at most the runs in progress. `flatmin study`
    has more options.

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
