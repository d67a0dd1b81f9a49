"""`flatmin search`: search settings for the arms of a study on validation, at equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flatmin.cli import completion as complete
from flatmin.cli.console import make_console
from flatmin.cli.options import Demo, Download, Out, Study, Workers
from flatmin.cli.study import default_workers
from flatmin.cli.targets import HOME
from flatmin.report.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from flatmin.study.search import SearchResult


def search(
    name: Study,
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=LOW..HIGH",
            help="Settings to search: ranges such as lr=.01..1 rho=.01..1 weight_decay=1e-5..1e-2, or lists such as "
            "batch_size=64,128. KEY=VALUE fixes a setting for all runs. seed=0,1 sets the seeds of each trial "
            "(default: seed=0).",
            autocompletion=complete.words("train"),
        ),
    ],
    budget: Annotated[
        float,
        typer.Option(metavar="N", min=1, help="Gradient evaluations for each arm, in epochs of the base optimizer."),
    ],
    demo: Demo = False,
    out: Out = HOME,
    download: Download = False,
    workers: Workers = None,
) -> None:
    """Search the best settings for every arm of a study, with the same number of gradient evaluations for each arm.

    A method with two gradient evaluations per update gets half as many trials. The runs are stored: the same command
    reuses them, and with a larger budget it continues the search. At the end it writes a study with the best settings
    and new seeds. Needs the extra "search" (Optuna).

    Examples:
        flatmin search bisam-noise noise=0.25 rho=.02..1 --budget 300 --demo
        flatmin search empirical model=resnet18 rho=.02..1 lr=.02..1 --budget 4000
    """
    from flatmin.cli.progress import Progress
    from flatmin.study.dimensions import read_overrides
    from flatmin.study.reading import read_study
    from flatmin.study.search import search as run
    from flatmin.study.writing import best_study
    from flatmin.train.files import write_text

    dimensions, rest = read_overrides(overrides)
    if not any(word.startswith("seed=") for word in rest):
        rest.append("seed=0")
    spec = read_study(name, rest, demo=demo)
    console = make_console()
    try:
        with Progress(console) as progress:
            results = run(
                spec,
                dimensions,
                budget=budget,
                out=out,
                workers=default_workers() if workers is None else workers,
                on_event=progress,
                download=download,
            )
    except KeyboardInterrupt as interrupt:
        # Printed here, because typer ends the process on Ctrl-C without a message.
        typer.echo(str(interrupt) or "Interrupted; run the same command to continue.", err=True)
        raise typer.Exit(130) from None
    path = out / "studies" / f"{Path(name).stem}{'-demo' if demo else ''}-found.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, best_study(spec, dimensions, results, budget))
    _show(results, console)
    console.print(f"\nNext: flatmin study {path} --out {out}", markup=False, soft_wrap=True)


def _show(results: Sequence[SearchResult], console: Console) -> None:
    rows = [["arm", "trials", "epochs spent", "val %", "best settings"]]
    for one in results:
        best = one.best
        settings = "" if best is None else " ".join(f"{key}={value}" for key, value in best.settings.items())
        score = "-" if best is None else f"{best.score:.2f}"
        rows.append([one.grid_point.label, str(len(one.trials)), f"{one.spent:g}", score, settings])
    console.print()
    print_table(rows, console)
