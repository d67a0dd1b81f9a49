"""`flatmin compare`: compare methods on one task over several seeds, with a table and a report."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from flatmin.cli import completion as complete
from flatmin.cli.console import make_console
from flatmin.cli.options import OpenPage, Out, Plugin, Report, Workers
from flatmin.cli.targets import HOME

MAX_WORKERS = 8  # each one loads torch; more rarely pays


def compare(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings, e.g. epochs=10 lr=0.05 rho.sam=0.2 theta=0.8; a list such as rho=.1,.2,.4 makes an axis.",
            autocompletion=complete.words("train"),
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help="A preset of the package, or a .toml file.", autocompletion=complete.presets("compare")),
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
    out: Out = HOME,
    workers: Workers = None,
    report: Report = True,
    open_report: OpenPage = False,
) -> None:
    """Train a small network with several methods over several seeds, and print the table and conclusions.

    Finished runs are stored in the folder and reused; Ctrl-C loses at most the runs in progress.

    Examples:
        flatmin compare
        flatmin compare epochs=10 -m sgd -m sam -m vasso+asam --seeds 3
    """
    from flatmin.cli.progress import Progress
    from flatmin.report import html as page
    from flatmin.report.comparison.page import write_report
    from flatmin.report.comparison.terminal import print_summary
    from flatmin.study.compare import compare as run_comparison
    from flatmin.study.config import load

    if report:
        page.require_figures()
    config = load(
        preset,
        overrides or (),
        methods=tuple(method) if method else None,
        seeds=seeds,
        noise=noise,
        tune=tune,
        model=model,
        data=data,
        plugins=tuple(plugin) if plugin else None,
    )
    console = make_console()
    try:
        with Progress(console) as progress:
            summary = run_comparison(
                config,
                out=out,
                workers=default_workers() if workers is None else workers,
                on_event=progress,
                command=["flatmin", *sys.argv[1:]],
            )
    except KeyboardInterrupt as interrupt:
        # Said here, because typer ends the process on Ctrl-C without a word.
        typer.echo(str(interrupt) or "Interrupted; the same command continues from the finished runs.", err=True)
        raise typer.Exit(130) from None
    path = write_report(summary, out / "report.html") if report else None
    console.print()
    print_summary(summary, console)
    if path is not None:
        console.print(f"\nReport: {path}", markup=False, soft_wrap=True)
        if open_report:
            typer.launch(path.resolve().as_uri())


def default_workers() -> int:
    """One per core that this process may use, at most `MAX_WORKERS`."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_WORKERS)
