"""`flatmin study`: many runs from a preset, their table, and published numbers beside."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from flatmin.cli.compare import default_workers
from flatmin.cli.console import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from flatmin.study.spec import StudySpec
    from flatmin.study.studies import StudyPlan, StudyTable

FILES = {"md": "markdown", "csv": "comma_separated", "tex": "latex"}


def study(
    name: Annotated[str, typer.Argument(metavar="STUDY", help="list, a study of the package, or a .toml file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="For all runs; lists make axes: rho=.1,.2 model=resnet20 seed=0..4."),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The small twin: minutes on two cores.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and what they cost.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the runs and the tables.")] = Path("flatmin-runs"),
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes of one thread each. Default: one a core.")
    ] = None,
) -> None:
    """Remake a paper's table: train every arm at every point of the axes with every seed, and sum up.

    Finished runs are kept and shared by all studies in the folder, so one can be extended at any time by more seeds or
    values. Ctrl-C loses at most the runs that are under way.
    """
    from flatmin.study.reading import read_study
    from flatmin.study.studies import plan

    console = make_console()
    if name == "list":
        _list(console)
        return
    spec = read_study(name, overrides or (), demo=demo)
    todo = plan(spec, out, make=not dry_run)
    if dry_run:
        _describe(todo, console)
        return
    table = _run(todo, out, default_workers() if workers is None else workers, console)
    _show(table, console)
    for path in _write(table, out / "studies", f"{Path(name).stem}{'-demo' if demo else ''}"):
        console.print(str(path), markup=False, soft_wrap=True)


def _run(todo: StudyPlan, out: Path, workers: int, console: Console) -> StudyTable:
    from flatmin.cli.progress import Progress
    from flatmin.study.studies import study as run

    try:
        with Progress(console) as progress:
            return run(todo, out=out, workers=workers, on_event=progress)
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
        twin = _runs(read_study(name, demo=True)) if "demo" in read_preset(name, "study") else 0
        rows.append([name, str(_runs(spec)), str(twin or "-"), spec.title])
    _print_rows(rows, console)


def _runs(spec: StudySpec) -> int:
    from flatmin.study.unfold import cells

    return sum(len(cell.configs) for cell in cells(spec))


def _describe(todo: StudyPlan, console: Console) -> None:
    """The runs of a study, what is there already, and what the others cost."""
    from flatmin.study.costs import cost_of

    rows = [["run", "row", "seed", "epochs", "gradients", "state"]]
    total = 0.0
    missing = {run.name for run in todo.missing}
    seen: set[str] = set()
    for (i, seed), run in todo.runs.items():
        if run.name in seen:
            continue
        seen.add(run.name)
        cost = cost_of(run.config)
        total += cost if run.name in missing else 0.0
        state = "to do" if run.name in missing else "finished"
        rows.append([run.name, todo.cells[i].label, str(seed), str(run.config.epochs), f"{cost:,.0f}", state])
    _print_rows(rows, console)
    console.print(
        f"\n{len(seen)} runs, {len(missing)} to do: {total:,.0f} gradient evaluations on a batch each.",
        markup=False,
        soft_wrap=True,
    )
    for note in todo.spec.notes:
        console.print(note, markup=False, soft_wrap=True)


def _show(table: StudyTable, console: Console) -> None:
    from flatmin.study.tables import body, header, remarks

    console.print(f"\n{table.spec.title}\n", markup=False)
    _print_rows([header(table), *body(table)], console)
    console.print()
    for text in remarks(table):
        console.print(text, markup=False, soft_wrap=True)


def _print_rows(rows: Sequence[Sequence[str]], console: Console) -> None:
    """Columns side by side; numbers to the right."""
    from flatmin.study.tables import widths

    wide = widths(rows)
    for row in rows:
        cells = [
            cell.rjust(width) if _number(cell) else cell.ljust(width) for cell, width in zip(row, wide, strict=True)
        ]
        console.print("  ".join(cells).rstrip(), markup=False, highlight=False, soft_wrap=True)


def _number(cell: str) -> bool:
    word = cell.partition(" ")[0].replace(",", "")
    try:
        return not math.isnan(float(word))
    except ValueError:
        return cell == "-"


def _write(table: StudyTable, folder: Path, name: str) -> list[Path]:
    """The table in all forms."""
    from flatmin.study import tables
    from flatmin.train.files import write_atomically

    os.makedirs(folder, exist_ok=True)
    written = []
    for suffix, maker in FILES.items():
        path = folder / f"{name}.{suffix}"
        write_atomically(path, partial(_put, getattr(tables, maker)(table).encode()))
        written.append(path)
    return written


def _put(content: bytes, file: IO[bytes]) -> None:
    file.write(content)
