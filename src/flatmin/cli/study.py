"""`flatmin study`: many runs from a preset, their table, and published numbers beside."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flatmin.cli.compare import default_workers
from flatmin.cli.console import make_console, print_rows

if TYPE_CHECKING:
    from rich.console import Console

    from flatmin.study.costs import Sizes
    from flatmin.study.plan import StudyPlan
    from flatmin.study.spec import StudySpec
    from flatmin.study.tabulate import StudyTable

FILES = {"md": "markdown", "csv": "comma_separated", "tex": "latex"}


def study(
    name: Annotated[str, typer.Argument(metavar="STUDY", help="list, a study of the package, or a .toml file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="For all runs; lists make axes: rho=.1,.2 model=resnet20 seed=0..4."),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The small twin: minutes on two cores.")] = False,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also plain training: regularised more, or at SAM's cost.")
    ] = False,
    choose: Annotated[
        str | None, typer.Option(metavar="KEY,...", help="Axes whose value is chosen on validation, e.g. rho,lr.")
    ] = None,
    retry: Annotated[
        bool,
        typer.Option("--retry", help="Do runs again that failed and reports that lack something."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and what they cost.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the runs and the tables.")] = Path("flatmin-runs"),
    workers: Annotated[
        int | None, typer.Option(min=0, help="Runs at a time, of one thread each. Default: one a core.")
    ] = None,
    executor: Annotated[str, typer.Option(help="local (processes here), ray or slurm; --on sets how.")] = "local",
    on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="A setting of the executor, e.g. address=HOST:PORT partition=gpu. Repeatable."
        ),
    ] = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write the HTML page.")] = True,
    table_name: Annotated[
        str | None, typer.Option("--table", metavar="NAME", help="Of the files in OUT/studies. Default: the study's.")
    ] = None,
    open_report: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Remake a paper's table: train every arm at every point of the axes with every seed, and sum up.

    Finished runs are kept and shared by all studies in the folder, so one can be extended at any time by more seeds or
    values. After Ctrl-C or a crash the same command goes on, with runs that were under way from their last checkpoint.
    """
    from flatmin.study.baselines import with_baselines
    from flatmin.study.executors import executor_settings
    from flatmin.study.expand import grid_points
    from flatmin.study.page import require_figures, write
    from flatmin.study.plan import plan
    from flatmin.study.reading import read_study
    from flatmin.study.study_page import render
    from flatmin.train.files import check_name

    console = make_console()
    if name == "list":
        _list(console)
        return
    if report and not dry_run:
        require_figures()
    if table_name is not None:
        check_name(table_name, "--table")
    settings = executor_settings(executor, on or ())
    spec = read_study(name, overrides or (), demo=demo)
    if choose is not None:
        spec = dataclasses.replace(spec, choose=tuple(key.strip() for key in choose.split(",") if key.strip()))
    if baselines:
        spec = with_baselines(spec)
    asked = any(settings.get(key) for key in ("gpus", "gpus_per_node"))
    if asked and any(grid_point.config.device == "cpu" for grid_point in grid_points(spec)):
        raise ValueError(
            "the runs are on the CPU and need no GPU: set device=cuda (device=auto goes by this machine), or leave out "
            "the GPUs."
        )
    todo = plan(spec, out, make=not dry_run, retry=retry)
    workers = default_workers() if workers is None else workers
    if dry_run:
        _describe(todo, workers, console)
        return
    table = _run(todo, workers, executor, settings, console)
    files = _write(table, out / "studies", table_name or f"{Path(name).stem}{'-demo' if demo else ''}")
    if report:
        page = render(table, command=["flatmin", *sys.argv[1:]])
        files.append(write(page, files[0].with_suffix(".html")))
    _show(table, console)
    for path in files:
        console.print(str(path), markup=False, soft_wrap=True)
    if open_report and report:
        typer.launch(files[-1].resolve().as_uri())


def _run(todo: StudyPlan, workers: int, executor: str, settings: Mapping[str, Any], console: Console) -> StudyTable:
    from flatmin.cli.progress import Progress
    from flatmin.study.studies import study as run

    try:
        with Progress(console) as progress:
            return run(todo, workers=workers, on_event=progress, executor=executor, settings=settings)
    except KeyboardInterrupt as interrupt:
        # Said here, because typer ends the process on Ctrl-C without a word.
        typer.echo(str(interrupt) or "Interrupted; the same command goes on from the finished runs.", err=True)
        raise typer.Exit(130) from None


def _list(console: Console) -> None:
    """Every study of the package with what it remakes."""
    from flatmin.study.reading import read_study
    from flatmin.train.settings import preset_names, read_preset

    rows = [["study", "runs", "demo", "what it remakes"]]
    for name in preset_names("study"):
        spec = read_study(name)
        scaled_down = _runs(read_study(name, demo=True)) if "demo" in read_preset(name, "study") else 0
        rows.append([name, str(_runs(spec)), str(scaled_down or "-"), spec.title])
    print_rows(rows, console)


def _runs(spec: StudySpec) -> int:
    from flatmin.study.expand import grid_points

    return sum(len(grid_point.configs) for grid_point in grid_points(spec))


def _describe(todo: StudyPlan, workers: int, console: Console) -> None:
    """The runs of a study, what is there already, and what the others cost."""
    from flatmin.study.costs import Sizes

    rows = [["run", "row", "seed", "epochs", "gradients", "state"]]
    total, sizes = 0.0, Sizes()
    missing = {run.name for run in todo.missing}
    unmeasured = {run.name for run in todo.unmeasured}
    seen: set[str] = set()
    for (i, seed), run in todo.runs.items():
        if run.name in seen:
            continue
        seen.add(run.name)
        cost = sizes.cost(run.config)
        total += cost if run.name in missing else 0.0
        state = "to do" if run.name in missing else "to measure" if run.name in unmeasured else "finished"
        rows.append([run.name, todo.grid_points[i].label, str(seed), str(run.config.epochs), f"{cost:,.0f}", state])
    print_rows(rows, console)
    text = f"\n{len(seen)} runs, {len(missing)} to do: {total:,.0f} gradient evaluations on a batch each"
    if nets := sum(run.view is not None for run in todo.open):
        text += f", and {nets} network{'s' if nets > 1 else ''} to measure"
    console.print(text + _duration(todo, workers, sizes), markup=False, soft_wrap=True)
    for note in (*todo.warnings, *todo.spec.notes):
        console.print(note, markup=False, soft_wrap=True)


def _duration(todo: StudyPlan, workers: int, sizes: Sizes) -> str:
    """The estimated time in words; why there is none, if a network or its data cannot be had here."""
    from flatmin.study.costs import guess_seconds
    from flatmin.words import explained

    if not todo.missing:
        return "."
    try:
        seconds = guess_seconds([run.config for run in todo.missing], workers, sizes)
    except Exception as error:
        if not explained(error):
            raise
        return f"; their time cannot be estimated: {error}"
    processes = f"{workers} processes" if workers > 1 else "1 process"
    return f", {_span(seconds)} of training in {processes} here, by one gradient of each network."


def _span(seconds: float) -> str:
    """A duration in two figures."""
    for size, name in ((86400 * 365, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"about {float(f'{seconds / size:.2g}'):g} {name}"
    return "about a second" if seconds < 2 else f"about {float(f'{seconds:.2g}'):g} seconds"


def _show(table: StudyTable, console: Console) -> None:
    from flatmin.study.tables import body, header, remarks

    console.print(f"\n{table.spec.title}\n", markup=False)
    print_rows([header(table), *body(table)], console)
    console.print()
    for text in remarks(table):
        console.print(text, markup=False, soft_wrap=True)


def _write(table: StudyTable, folder: Path, name: str) -> list[Path]:
    """The table in all forms."""
    from flatmin.study import tables
    from flatmin.train.files import write_text

    os.makedirs(folder, exist_ok=True)
    written = []
    for suffix, maker in FILES.items():
        path = folder / f"{name}.{suffix}"
        write_text(path, getattr(tables, maker)(table))
        written.append(path)
    return written
