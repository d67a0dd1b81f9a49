"""`flatmin compare`: compare methods on one task over several seeds, with a table and a report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from flatmin.cli.study import perform


def compare(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings, e.g. epochs=10 optimizer=adamw rho.sam=0.2 theta=0.8; a list such as rho=.1,.2,.4 makes "
            "an axis.",
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="A study of the package, or a .toml file.")] = "digits",
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="A method, a composition such as vasso+asam, or all. Repeatable."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds.")] = None,
    noise: Annotated[
        float | None, typer.Option(help="Share of the training labels that are replaced by wrong ones.")
    ] = None,
    tune: Annotated[
        bool | None, typer.Option("--tune/--no-tune", help="Choose rho (or the given axes) on the validation part.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="conv, mlp, resnet18, ..., or your own as package.module:function.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="digits, or your own as package.module:function.")] = None,
    plugin: Annotated[list[str] | None, typer.Option(help="A module that defines further methods. Repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and their cost, and stop.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the runs and the report.")] = Path("flatmin-runs"),
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes with one thread each (default: one per core).")
    ] = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write the HTML report.")] = True,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Train a small network with several methods over several seeds, and print the table and conclusions.

    A study with one arm for each method: `flatmin study` has more options. Finished runs are stored in the folder and
    reused; Ctrl-C loses at most the runs in progress.
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
        weights=all(kept),
        table_name="comparison",
        page=out / "report.html" if report else None,
        open_page=open_report,
    )
