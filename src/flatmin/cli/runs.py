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
from flatmin.cli.options import AsJson
from flatmin.cli.targets import HOME, run_folder
from flatmin.report.terminal import print_table, print_text

if TYPE_CHECKING:
    from rich.console import Console

    from flatmin.report.runs.listing import Entry

runs = typer.Typer(
    help="List and remove runs, and pack finished runs into archives.",
    epilog="Examples:\n  flatmin runs list --sort test\n  flatmin runs rm --stale",
    no_args_is_help=True,
)

# Runs without a value are listed last, in either direction.
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


_STYLES = {"failed": "yellow", "damaged": "red", "running": "green"}


@runs.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with the runs, in FOLDER/runs.")] = HOME,
    sort: Annotated[
        str, typer.Option(help=f"Order: {', '.join(_KEYS)}.", autocompletion=complete.one_of(*_KEYS))
    ] = "when",
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder with their settings, state and test accuracy.

    Examples:
        flatmin runs list
        flatmin runs list my-runs --sort test --json
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
    if any(entry.digest is not None and entry.digest.stale for entry in listed):
        console.print(
            "stale: a study would train this run again; see `flatmin runs rm --help`.", markup=False, highlight=False
        )
    for entry in listed:
        if entry.problem:
            console.print(f"{entry.name}: {entry.problem}", markup=False, highlight=False, soft_wrap=True)


@runs.command("rm")
def remove_runs(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN...",
            help="Run folders, or names of runs in flatmin-runs/runs.",
            autocompletion=complete.runs,
        ),
    ] = None,
    stale: Annotated[
        bool,
        typer.Option(
            "--stale",
            help="Remove all stale runs in FOLDER/runs; give FOLDER in place of RUN (default: flatmin-runs).",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also remove runs in progress.")] = False,
) -> None:
    """Remove runs with all files in their folders.

    A run of a study is stale if flatmin, torch, your own modules or the data have changed since it was trained. The
    study then trains it again, and the stale run remains beside the new one.

    Examples:
        flatmin runs rm first second --yes
        flatmin runs rm --stale my-runs
    """
    from flatmin.report.runs.listing import check_removable, remove, size_of

    if stale:
        reasons = _stale(targets or [])
        folders = list(reasons)
        if not folders:
            typer.echo("No run is stale.")
            return
    elif targets:
        folders = list({path.resolve(): path for path in map(run_folder, targets)}.values())
        reasons = dict.fromkeys(folders, "")
    else:
        raise ValueError("no runs are named: name the runs to remove, or add --stale.")
    check_removable(folders, force=force)
    for folder in folders:
        typer.echo("  ".join(filter(None, (str(folder), _bytes(size_of(folder)), reasons[folder]))))
    what = "this run" if len(folders) == 1 else f"these {len(folders)} runs"
    if not yes:
        try:
            agreed = typer.confirm(f"Remove {what}?")
        except typer.Abort:
            raise ValueError(
                "nothing was removed, because there was no answer; add --yes to remove without asking."
            ) from None
        if not agreed:
            typer.echo("Nothing was removed.")
            return
    # Another process may have continued a run while the question was open.
    check_removable(folders, force=force)
    remove(folders)
    typer.echo(f"Removed {what}.")


def _stale(targets: Sequence[str]) -> dict[Path, str]:
    """The stale runs in a folder, and why each one is stale.

    Raises:
        ValueError: several folders are given, or the folder does not exist.
    """
    from flatmin.report.runs.listing import entries
    from flatmin.study.code import Contents
    from flatmin.study.stale import stale

    if len(targets) > 1:
        raise ValueError(f"--stale takes one folder, with the runs in FOLDER/runs; got {', '.join(targets)}.")
    contents = Contents()
    found = {entry.path: stale(entry.path, contents) for entry in entries(Path(targets[0]) if targets else HOME)}
    return {path: why for path, why in found.items() if why is not None}


@runs.command("pack")
def pack_runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Output folder (--out) of studies; the runs are in FOLDER/runs.")
    ],
    archive: Annotated[
        Path, typer.Argument(metavar="ARCHIVE", help="Folder of the archive, such as results/my-study.")
    ],
) -> None:
    """Write finished runs to an archive: one small text file per run, without weights.

    Runs that are already in the archive stay there. A run that is in the archive with another result is an error.
    `flatmin study STUDY --archive ARCHIVE` makes tables and pages from an archive.

    Examples:
        flatmin runs pack flatmin-runs results/my-study
        flatmin runs pack my-runs results/digits
    """
    from flatmin.study.archive import pack

    done = pack(folder, archive)
    for name, why in done.left.items():
        typer.echo(f"left out: {name}: {why}")
    typer.echo(
        f"{archive}: {_counted(done.added)} added, {done.changed} with new measurements, {done.same} already there, "
        f"{_counted(len(done.left))} left out."
    )


@runs.command("unpack")
def unpack_runs(
    archive: Annotated[
        Path, typer.Argument(metavar="ARCHIVE", help="Folder of an archive that `flatmin runs pack` wrote.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write to; the runs go to FOLDER/runs.")],
) -> None:
    """Write the runs of an archive as run folders, without weights; existing runs stay.

    The version of flatmin that trained the runs treats them as finished, so the same study continues from them.

    Examples:
        flatmin runs unpack results/my-study flatmin-runs
        flatmin runs unpack results/digits my-runs
    """
    from flatmin.study.archive import unpack

    done = unpack(archive, folder)
    typer.echo(
        f"{folder / 'runs'}: {_counted(done.added)} added, {done.changed} with new measurements, {done.same} already "
        "there."
    )


def _counted(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _sorted(every: Sequence[Entry], key: str) -> list[Entry]:
    read, down = _KEYS[key]
    with_value = [entry for entry in every if read(entry) is not None]
    return [*sorted(with_value, key=read, reverse=down), *(entry for entry in every if read(entry) is None)]


def _print(listed: Sequence[Entry], console: Console) -> None:
    """Print one line per run; data and model that all runs share are printed below the table."""
    from flatmin.report.runs.listing import unusual

    rows = [_row(entry, words) for entry, words in zip(listed, unusual(listed), strict=True)]
    names, shared = list(rows[0]), []
    for name, of in (("data", "on"), ("model", "with")):
        values = {row[name] for row in rows} - {"-"}
        if len(values) <= 1:
            shared += [f"{of} {value}" for value in values]
            names.remove(name)
    if all(row["settings"] == "-" for row in rows):
        names.remove("settings")
    styles = [_STYLES.get(entry.state, "") for entry in listed]
    print_table([names, *([row[name] for name in names] for row in rows)], console, styles=styles)
    if shared and len(rows) > 1:
        print_text(f"All {' '.join(shared)}.", console, style="dim")


def _row(entry: Entry, settings: str) -> dict[str, str]:
    what = entry.digest
    return {
        "name": entry.name,
        "method": "-" if what is None else what.method,
        "rho": "-" if what is None or what.rho is None else f"{what.rho:g}",
        "seed": "-" if what is None else str(what.seed),
        "data": "-" if what is None else what.data,
        "model": "-" if what is None else what.model,
        "settings": settings or "-",
        "state": f"{entry.state}, stale" if what is not None and what.stale else entry.state,
        "epochs": "-" if what is None else f"{what.done}/{what.epochs}",
        "test %": "-" if entry.test_acc is None else f"{entry.test_acc:.2f}",
        "when": _when(entry.changed),
        "size": _bytes(entry.size),
    }


def _when(changed: float) -> str:
    """The time if it was today, the day and month if it was this year, else the date."""
    then, now = time.localtime(changed), time.localtime()
    if then[:3] == now[:3]:
        return time.strftime("%H:%M", then)
    return time.strftime("%d %b" if then.tm_year == now.tm_year else "%Y-%m-%d", then)


def _bytes(size: int) -> str:
    """A size in bytes with a suitable unit."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
