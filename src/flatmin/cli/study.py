"""`flatmin study`: do many runs from a preset, and tabulate them beside the published numbers."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flatmin.cli import completion as complete
from flatmin.cli.console import make_console
from flatmin.cli.options import Archive, Demo, Download, DryRun, Figures, OpenPage, Out, Report, Study, Workers
from flatmin.cli.targets import HOME
from flatmin.report.terminal import print_table, print_text

if TYPE_CHECKING:
    from rich.console import Console

    from flatmin.study.costs import Sizes
    from flatmin.study.plan import StudyPlan
    from flatmin.study.spec import StudySpec
    from flatmin.study.tabulate import StudyTable

# Sorted by name, the table itself is the first CSV file.
FILES = {".md": "markdown", ".csv": "comma_separated", ".seeds.csv": "per_seed", ".tex": "latex"}
MAX_WORKERS = 8  # each process loads torch, so more are rarely faster


def study(
    name: Study,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings of all runs, such as model=resnet20. A list such as rho=.1,.2 or seed=0..4 does the runs "
            "with each value.",
            autocompletion=complete.words("train"),
        ),
    ] = None,
    demo: Demo = False,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines", help="Add arms with the base optimizer: with more regularisation, and at SAM's cost."
        ),
    ] = False,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Choose the values of lists, or the settings that the study names, on validation first."
        ),
    ] = False,
    choose: Annotated[
        str | None,
        typer.Option(metavar="KEY,...", help="Settings given as lists to choose on validation, such as rho,lr."),
    ] = None,
    retry: Annotated[
        bool,
        typer.Option("--retry", help="Repeat failed runs and incomplete measurements."),
    ] = False,
    archive: Archive = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Train missing runs, or only tabulate the finished runs.")
    ] = True,
    dry_run: DryRun = False,
    out: Out = HOME,
    download: Download = False,
    workers: Workers = None,
    executor: Annotated[
        str,
        typer.Option(
            help="Where runs are executed: local (processes on this machine), ray or slurm.",
            autocompletion=complete.one_of("local", "ray", "slurm"),
        ),
    ] = "local",
    on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Setting of the executor; see `flatmin settings ray` and `flatmin settings slurm`. Repeatable.",
            autocompletion=complete.words("executor"),
        ),
    ] = None,
    report: Report = True,
    figures: Figures = "",
    table_name: Annotated[
        str | None,
        typer.Option(
            "--table", metavar="NAME", help="Name of the tables in OUT/studies (default: the name of the study)."
        ),
    ] = None,
    open_report: OpenPage = False,
) -> None:
    """Run a study, such as a paper's table: train every arm with every setting and seed, and write the table.

    All studies with the same output folder share its finished runs, so you can add seeds or values at any time. After
    Ctrl-C or a crash, the same command continues; interrupted runs resume from their last checkpoint.

    Examples:
        flatmin study list
        flatmin study vasso-noise --demo --dry-run
        flatmin study digits seed=0..4 --out my-runs
    """
    from flatmin.study.baselines import with_baselines
    from flatmin.study.executors import executor_settings
    from flatmin.study.expand import tuned
    from flatmin.study.reading import read_study
    from flatmin.train.files import check_name

    if name == "list":
        _list(make_console())
        return
    if table_name is not None:
        check_name(table_name, "--table")
    settings = executor_settings(executor, on or ())
    spec = read_study(name, overrides or (), demo=demo)
    if tune:
        spec = tuned(spec)
    if choose is not None:
        spec = dataclasses.replace(spec, choose=tuple(key.strip() for key in choose.split(",") if key.strip()))
    if baselines:
        spec = with_baselines(spec)
    files = table_name or f"{Path(name).stem}{'-demo' if demo else ''}"
    perform(
        spec,
        out=out,
        workers=workers,
        dry_run=dry_run,
        train=train,
        retry=retry,
        archive=archive,
        download=download,
        figures=figures,
        executor=executor,
        settings=settings,
        table_name=files,
        page=out / "studies" / f"{files}.html" if report else None,
        open_page=open_report,
    )


def perform(
    spec: StudySpec,
    *,
    out: Path,
    workers: int | None,
    table_name: str,
    page: Path | None,
    open_page: bool = False,
    dry_run: bool = False,
    train: bool = True,
    retry: bool = False,
    archive: Path | None = None,
    download: bool = False,
    weights: bool = True,
    figures: str = "",
    executor: str = "local",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Run a study, print its table and write its files; `flatmin compare` uses this too.

    Args:
        spec: the study.
        out: folder of the runs; the tables go to OUT/studies.
        workers: number of concurrent runs; None: one per core.
        table_name: name of the table files.
        page: file of the HTML page; None: no page.
        open_page: open the page in a browser.
        dry_run: only print the plan.
        train: train missing runs; False: only tabulate the finished ones.
        retry: repeat failed runs and incomplete measurements.
        archive: archive with finished runs.
        download: download missing data.
        figures: endings of the figure files, such as "svg,pdf"; "": no figures.
        weights: whether runs save their trained weights.
        executor: where runs are executed: "local", "ray" or "slurm".
        settings: settings of the executor.

    Raises:
        ValueError: options contradict each other, or the plan cannot be made.
        typer.Exit: interrupted by Ctrl-C.
    """
    from flatmin.cli.training import Training
    from flatmin.report.figures.files import endings
    from flatmin.report.html import require_figures, write
    from flatmin.report.studies.files import save_figures
    from flatmin.report.studies.page import render
    from flatmin.study.comparison import without_unfit
    from flatmin.study.expand import grid_points
    from flatmin.study.plan import plan

    console = make_console()
    if page is not None and not dry_run:
        require_figures()
    kinds = endings(figures) if figures else ()
    asked = any((settings or {}).get(key) for key in ("gpus", "gpus_per_node"))
    if asked and any(grid_point.config.device == "cpu" for grid_point in grid_points(spec)):
        raise ValueError(
            "GPUs are requested, but the runs use the CPU: set device=cuda (device=auto depends on this machine), or "
            "leave out the GPUs."
        )
    if retry and not train:
        raise ValueError("--retry repeats runs, but --no-train does none; leave out one of them.")
    spec = without_unfit(spec)
    with Training(console) as display:
        todo = plan(
            spec,
            out,
            make=train and not dry_run,
            retry=retry,
            archive=archive,
            download=download,
            progress=display.downloading,
            weights=weights,
        )
    workers = default_workers() if workers is None else workers
    if dry_run:
        _describe(todo, workers, console)
        return
    if not train and not todo.finished:
        near = todo.archive.nearest(todo.open) if todo.archive is not None else ""
        raise ValueError(
            f"no run of the study {spec.name} is finished in {archive or out}, so there is nothing to tabulate; leave "
            f"out --no-train. {near}".rstrip()
        )
    table = _run(todo, workers, executor, settings or {}, console) if train else _finished(todo, console)
    files = _write(table, out / "studies", table_name)
    if page is not None:
        write(render(table, command=["flatmin", *sys.argv[1:]]), page)
    show_table(table, console)
    others = "".join(f", {path.name.removeprefix(table_name)}" for path in files[1:])
    console.print(f"\nTables: {files[0]}{others}", markup=False, soft_wrap=True)
    drawn = save_figures(table, out / "studies" / f"{table_name}-figures", kinds) if kinds else []
    if drawn:
        console.print(f"Figures: {drawn[0].parent} ({len(drawn)} files)", markup=False, soft_wrap=True)
    if page is not None:
        console.print(f"Report: {page}", markup=False, soft_wrap=True)
    if open_page and page is not None:
        typer.launch(page.resolve().as_uri())


def _run(todo: StudyPlan, workers: int, executor: str, settings: Mapping[str, Any], console: Console) -> StudyTable:
    from flatmin.cli.progress import Progress
    from flatmin.study.studies import study as run

    try:
        with Progress(console) as progress:
            return run(todo, workers=workers, on_event=progress, executor=executor, settings=settings)
    except KeyboardInterrupt as interrupt:
        # Printed here, because typer ends the process on Ctrl-C without a message.
        typer.echo(str(interrupt) or "Interrupted; run the same command to continue.", err=True)
        raise typer.Exit(130) from None


def _finished(todo: StudyPlan, console: Console) -> StudyTable:
    """The table of the finished runs; prints the warnings of the plan."""
    from flatmin.study.tabulate import tabulate

    for text in todo.warnings:
        console.print(f"Note: {text}", markup=False, highlight=False, soft_wrap=True)
    return tabulate(todo, todo.finished)


def default_workers() -> int:
    """One process per core that this process may use, at most `MAX_WORKERS`."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_WORKERS)


def _list(console: Console) -> None:
    """Print the studies of the package, with their numbers of runs and their titles."""
    from flatmin.study.reading import read_study
    from flatmin.train.settings import preset_names, read_preset

    rows = [["study", "runs", "demo runs", "title"]]
    for name in preset_names("study"):
        spec = read_study(name)
        scaled_down = _runs(read_study(name, demo=True)) if "demo" in read_preset(name, "study") else 0
        rows.append([name, str(_runs(spec)), str(scaled_down or "-"), spec.title])
    print_table(rows, console)


def _runs(spec: StudySpec) -> int:
    from flatmin.study.expand import grid_points

    return sum(len(grid_point.configs) for grid_point in grid_points(spec))


def _describe(todo: StudyPlan, workers: int, console: Console) -> None:
    """Print the runs of a study, their state, and the cost of those that are to do."""
    from flatmin.study.costs import Sizes
    from flatmin.study.trial import check_runs

    total, sizes = 0.0, Sizes()
    # An error is raised before anything is printed; missing data are none, because the runs may be elsewhere.
    notes = check_runs([run.config for run in (*todo.missing, *todo.waiting)], todo.contents, here=False, sizes=sizes)
    rows = [["run", "row", "seed", "epochs", "gradients", "state"]]
    missing = {run.name for run in todo.missing}
    unmeasured = {run.name for run in todo.unmeasured}
    seen: set[str] = set()
    waiting = {run.name for run in todo.waiting}
    for part in (todo.choice, todo) if todo.choice else (todo,):
        for (i, seed), run in part.runs.items():
            if run.name in seen:
                continue
            seen.add(run.name)
            cost = sizes.cost(run.config)
            total += cost if run.name in missing | waiting else 0.0
            state = "to do" if run.name in missing else "to measure" if run.name in unmeasured else "finished"
            name, label = run.name, part.grid_points[i].label
            if run.name in waiting:
                name, label, state = f"{run.stem}-...", part.grid_points[i].arm, "after tuning"
            rows.append([name, label, str(seed), str(run.config.epochs), f"{cost:,.0f}", state])
    print_table(rows, console)
    text = f"\n{len(seen)} run{'s' * (len(seen) != 1)}, {len(missing | waiting)} to do: "
    text += f"{total:,.0f} gradient evaluations of one batch each"
    if nets := sum(run.view is not None for run in (*todo.open, *todo.waiting)):
        text += f", and {nets} network{'s' if nets > 1 else ''} to measure"
    console.print(text + _duration(todo, workers, sizes), markup=False, soft_wrap=True)
    for note in (*todo.warnings, *notes, *todo.spec.notes):
        console.print(note, markup=False, soft_wrap=True)


def _duration(todo: StudyPlan, workers: int, sizes: Sizes) -> str:
    """The estimated time as text, or why it cannot be estimated on this machine."""
    from flatmin.study.costs import guess_seconds
    from flatmin.words import duration, explained

    runs = [*todo.missing, *todo.waiting]
    if not runs:
        return "."
    try:
        seconds = guess_seconds([run.config for run in runs], workers, sizes)
    except Exception as error:
        if not explained(error):
            raise
        return f"; the time cannot be estimated: {error}"
    processes = f"{workers} processes" if workers > 1 else "1 process"
    return f", {duration(seconds)} of training in {processes} here, estimated from one gradient of each network."


def show_table(table: StudyTable, console: Console) -> None:
    """Print the table, its conclusions, and notes on how to read it."""
    from flatmin.report.terminal import print_table
    from flatmin.study.conclusions import verdicts
    from flatmin.study.tables import body, header, remarks, troubles

    console.print()
    print_text(table.spec.title, console, style="bold")
    console.print()
    names = header(table)
    # The sentences below report the p values at equal cost.
    shown = [i for i, name in enumerate(names) if not (name.startswith("p") and name.endswith("equal grads"))]
    cells = [[row[i] for i in shown] for row in (names, *body(table))]
    print_table(cells, console, styles=["yellow" if row.flags else "" for row in table.rows])
    for texts in (troubles(table), verdicts(table), remarks(table)):
        if texts:
            console.print()
        for text in texts:
            print_text(text, console, hanging="- ")


def _write(table: StudyTable, folder: Path, name: str) -> list[Path]:
    """Write the table in all formats."""
    from flatmin.study import tables
    from flatmin.train.files import write_text

    os.makedirs(folder, exist_ok=True)
    written = []
    for suffix, maker in FILES.items():
        path = folder / f"{name}{suffix}"
        write_text(path, getattr(tables, maker)(table))
        written.append(path)
    return written
