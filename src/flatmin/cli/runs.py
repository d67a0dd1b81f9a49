"""`flatmin runs`: list and remove runs, and keep finished ones in archives."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flatmin.cli import completion as complete
from flatmin.cli.console import make_console
from flatmin.cli.options import AsJson, Runs
from flatmin.cli.targets import HOME, run_folder

if TYPE_CHECKING:
    from rich.console import Console

    from flatmin.report.runs.listing import Entry

runs = typer.Typer(help="List and remove runs, and keep finished ones as text.", no_args_is_help=True)

# None sorts last, in either direction.
_KEYS: dict[str, tuple[Callable[[Entry], Any], bool]] = {
    "when": (lambda entry: entry.changed, True),
    "name": (lambda entry: entry.name, False),
    "method": (lambda entry: entry.digest and entry.digest.method, False),
    "data": (lambda entry: entry.digest and entry.digest.data, False),
    "model": (lambda entry: entry.digest and entry.digest.model, False),
    "state": (lambda entry: entry.state, False),
    "test": (lambda entry: entry.test_acc, True),
    "size": (lambda entry: entry.size, True),
}


_STYLES = {"failed": "yellow", "damaged": "red", "going on": "green"}


@runs.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The runs are in FOLDER/runs.")] = HOME,
    sort: Annotated[str, typer.Option(help=f"By {', '.join(_KEYS)}.", autocompletion=complete.one_of(*_KEYS))] = "when",
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder.

    Examples:
        flatmin runs list
        flatmin runs list FOLDER --sort test --json
    """
    from flatmin.report.runs.listing import entries
    from flatmin.words import suggest

    if sort not in _KEYS:
        raise ValueError(f"--sort {sort} is not known{suggest(sort, _KEYS)} (by {', '.join(_KEYS)})")
    listed = _sorted(entries(folder), sort)
    if as_json:
        typer.echo(json.dumps([entry.as_json() for entry in listed], indent=1))
        return
    console = make_console()
    if not listed:
        console.print(f"There are no runs in {folder}.", markup=False, highlight=False, soft_wrap=True)
        return
    _print(listed, console)
    total = sum(entry.size for entry in listed)
    console.print(f"{len(listed)} run{'s' * (len(listed) != 1)}, {_bytes(total)}", style="dim", highlight=False)
    for entry in listed:
        if entry.problem:
            console.print(f"{entry.name}: {entry.problem}", markup=False, highlight=False, soft_wrap=True)


@runs.command("rm")
def remove_runs(
    targets: Runs,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also remove runs in progress.")] = False,
) -> None:
    """Remove runs with all files in their folders.

    Examples:
        flatmin runs rm RUN
        flatmin runs rm RUN RUN2 --yes
    """
    from flatmin.report.runs.listing import check_removable, remove, size_of

    folders = list({path.resolve(): path for path in map(run_folder, targets)}.values())
    check_removable(folders, force=force)
    for folder in folders:
        typer.echo(f"{folder}  {_bytes(size_of(folder))}")
    what = "this run" if len(folders) == 1 else f"these {len(folders)} runs"
    if not yes:
        try:
            agreed = typer.confirm(f"Remove {what}?")
        except typer.Abort:
            raise ValueError("nothing was removed: there was no answer; add --yes to remove without asking.") from None
        if not agreed:
            typer.echo("Nothing was removed.")
            return
    # Somebody may have continued one while the question stood there.
    check_removable(folders, force=force)
    remove(folders)
    typer.echo(f"Removed {what}.")


@runs.command("pack")
def pack_runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The --out of studies; the runs are in FOLDER/runs.")
    ],
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Folder of the archive, such as results/NAME.")],
) -> None:
    """Write the finished runs of a study's folder to an archive: a small text file each, without weights.

    Runs that are in the archive stay there; one with another result there is refused. `flatmin study --archive ARCHIVE`
    draws tables and pages from it.

    Examples:
        flatmin runs pack flatmin-runs results/my-study
        flatmin runs pack FOLDER ARCHIVE
    """
    from flatmin.study.archive import pack

    done = pack(folder, archive)
    for name, why in done.left.items():
        typer.echo(f"left out: {name}: {why}")
    typer.echo(
        f"{archive}: {_counted(done.added)} added, {done.changed} with new measurements, {done.same} there before, "
        f"{_counted(len(done.left))} left out."
    )


@runs.command("unpack")
def unpack_runs(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Folder of an archive that `runs pack` wrote.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The runs go to FOLDER/runs.")],
) -> None:
    """Write the runs of an archive as run folders, without weights, beside those that are there.

    The flatmin that trained them takes them for finished, so the same study goes on from them.

    Examples:
        flatmin runs unpack results/my-study flatmin-runs
        flatmin runs unpack ARCHIVE FOLDER
    """
    from flatmin.study.archive import unpack

    done = unpack(archive, folder)
    typer.echo(
        f"{folder / 'runs'}: {_counted(done.added)} added, {done.changed} with new measurements, {done.same} there "
        "before."
    )


def _counted(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _sorted(every: Sequence[Entry], key: str) -> list[Entry]:
    read, down = _KEYS[key]
    with_value = [entry for entry in every if read(entry) is not None]
    return [*sorted(with_value, key=read, reverse=down), *(entry for entry in every if read(entry) is None)]


def _print(listed: Sequence[Entry], console: Console) -> None:
    """Columns side by side, numbers to the right; rich's own tables take seconds for thousands of rows."""
    from rich.text import Text

    rows = [("name", "method", "data", "model", "state", "epochs", "test %", "when", "size"), *map(_row, listed)]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([*map(str.ljust, row[:5], wide[:5]), *map(str.rjust, row[5:], wide[5:])]) for row in rows]
    if not console.is_terminal:
        typer.echo("\n".join(lines))
        return
    styles = ["bold", *(_STYLES.get(entry.state, "") for entry in listed)]
    for line, style in zip(lines, styles, strict=True):
        console.print(Text(line, style=style), soft_wrap=True)


def _row(entry: Entry) -> tuple[str, ...]:
    what = entry.digest
    return (
        entry.name,
        *(("-",) * 3 if what is None else (what.method, what.data, what.model)),
        entry.state,
        "-" if what is None else f"{what.done}/{what.epochs}",
        "-" if entry.test_acc is None else f"{entry.test_acc:.2f}",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.changed)),
        _bytes(entry.size),
    )


def _bytes(size: int) -> str:
    """A size in the largest fitting unit."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
