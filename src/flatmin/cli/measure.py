"""`flatmin measure`: curvature, sharpness and landscapes of trained networks, as a report or a comparison."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flatmin.cli import completion as complete
from flatmin.cli.console import make_console
from flatmin.cli.options import Figures, OpenPage, Out, Page, Split, Workers

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from flatmin.study.measured import NetReport, Unmeasured

_SETTING = re.compile(r"[a-z_]+=")


def measure(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [KEY=VALUE...]",
            help="Run folders (FOLDER/runs/...) or a file of weights; settings such as top=10 rho=0.1 plane=0, see "
            "flatmin settings measure.",
            autocompletion=complete.words("measure", also=complete.runs),
        ),
    ],
    what: Annotated[
        str,
        typer.Option(
            help="report, all, or of model, hessian, trace, density, sharpness, flatness, layers, published, "
            "landscape, joined by commas.",
            autocompletion=complete.several_of("measures"),
        ),
    ] = "report",
    split: Split = "train",
    examples: Annotated[int | None, typer.Option(metavar="N", min=1, help="Number of examples (default: all).")] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Examples per forward pass.")] = 150,
    params: Annotated[str, typer.Option(help="Patterns of parameter names, separated by commas.")] = "*",
    mode: Annotated[str, typer.Option(help="eval, or train: BatchNorm with batch statistics.")] = "eval",
    dtype: Annotated[
        str, typer.Option(help="float32, float64, or bfloat16 (autocast; accurate to some percent).")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    model: Annotated[
        str | None, typer.Option(help="For a file of weights: its network, as pkg.module:function.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="For a file of weights: its data, as pkg.module:function.")] = None,
    key: Annotated[
        str | None,
        typer.Option(help="For a file with several matching sets of weights: which one, such as ema or state_dict."),
    ] = None,
    out: Out = Path("flatmin-measures"),
    workers: Workers = None,
    page: Page = True,
    png: Annotated[bool, typer.Option("--png", help="Also write the report of each network as a picture.")] = False,
    figures: Figures = "",
    open_page: OpenPage = False,
) -> None:
    """Measure the flatness of trained networks: numbers with their errors, pictures, and a comparison over seeds.

    For one network the command prints its report. For several it prints a table by arm, with paired differences to
    sgd. It names what could not be measured and why, and exits with 3; everything else is written. Existing files of
    other networks or settings are not overwritten: new files get a number.

    Examples:
        flatmin measure RUN
        flatmin measure RUN RUN2 --what hessian,sharpness top=10 rho=0.1
    """
    import torch

    from flatmin.cli.study import default_workers
    from flatmin.cli.targets import run_folder
    from flatmin.measure.report import ReportSettings, chosen
    from flatmin.report.figures import static
    from flatmin.report.figures.files import endings
    from flatmin.report.html import require_figures
    from flatmin.report.html import write as write_page
    from flatmin.report.measurements import picture as draw_report
    from flatmin.report.measurements.figures import save_figures
    from flatmin.report.measurements.page import render
    from flatmin.study.measured import as_json
    from flatmin.study.measuring import View, find_all, identity, measure_all
    from flatmin.train.files import write_json
    from flatmin.train.fingerprint import environment
    from flatmin.train.settings import content_hash, read_table
    from flatmin.words import reason

    chosen(what)
    if page:
        require_figures()
    if png:
        static.require()
    kinds = endings(figures) if figures else ()
    words = [word for word in targets if _SETTING.match(word) and not Path(word).exists()]
    # A path, or the name of a run.
    paths = [Path(word) if Path(word).is_file() else run_folder(word) for word in targets if word not in words]
    if not paths:
        raise ValueError("name at least one run folder or file of weights.")
    runs = find_all(paths, model=model, data=data, key=key)
    view = View(
        what=what,
        settings=ReportSettings(**read_table(ReportSettings, words)),
        split=split,  # type: ignore[arg-type]
        examples=examples,
        batch=batch,
        params=params,
        mode=mode,  # type: ignore[arg-type]
        dtype=dtype,
        device=device,
        landscapes=out / "landscapes",
    )
    several = len(runs) > 1
    if workers and (not several or device != "cpu"):
        raise ValueError("--workers is for several networks on the CPU; this command uses one process.")
    processes = (default_workers() if workers is None else workers) if several and device == "cpu" else 0
    console = make_console()
    about = environment(device, 1 if processes else torch.get_num_threads())
    files: dict[str, _File] = {}
    for run in runs:
        files[run.name] = _File.free(out, run.name, identity(run, view), files.values())
    whole = files[runs[0].name]
    if several:
        every = content_hash(what, *(file.of for file in files.values()))
        whole = _File.free(out, "measures", every, files.values())
    failed: list[Unmeasured] = []
    keep = partial(_keep, files, about)
    try:
        with _Bar(console, len(runs)) as bar:

            def done(net: NetReport) -> None:
                keep(net, done=True)
                bar.done(net)

            nets = measure_all(
                runs,
                view,
                workers=processes,
                progress=bar.part,
                on_done=done,
                # At once, so that nothing that comes later takes it away.
                on_part=keep,
                on_failed=failed.append if several else None,
            )
    except KeyboardInterrupt:
        stored = [str(file.json) for file in files.values() if file.read()]
        typer.echo(
            f"Interrupted; {'what was measured is in ' + ', '.join(stored) if stored else 'nothing was measured yet'}; "
            "landscapes are stored and continue from there.",
            err=True,
        )
        raise typer.Exit(130) from None
    if not nets:
        whys = " ".join(f"{why} (while {names} was measured)" for why, names in _by_reason(failed))
        raise ValueError(f"no network could be measured: {whys}")
    _print(nets, console)
    lacking = bool(failed) or any(net.report.missing for net in nets)
    if several:
        write_json(whole.json, as_json(nets, about, failed, of=whole.of))
    written = [whole.json]
    notes = [f"{names} could not be measured: {why}" for why, names in _by_reason(failed)]
    undrawn: list[str] = []

    def draw(what: str, make: Callable[[], Path | list[Path]]) -> None:
        try:
            made = make()
            written.extend(made if isinstance(made, list) else [made])
        except Exception as error:
            undrawn.append(f"{what} could not be made: {reason(error)}")

    for net in nets if png else ():
        picture = files[net.name].json.with_suffix(".png")
        draw(f"the picture of {net.name}", partial(draw_report.save, net, picture, on_missing=undrawn.append))
    if kinds:
        folder = whole.json.with_name(f"{whole.json.stem}-figures")
        draw("the figures", lambda: save_figures(nets, folder, kinds, on_missing=undrawn.append))
    if page:
        command = ["flatmin", *sys.argv[1:]]
        draw(
            "the page",
            lambda: write_page(
                render(nets, command=command, environment=about, failed=failed, on_missing=undrawn.append),
                whole.json.with_suffix(".html"),
            ),
        )
    console.print()
    remarks = (file.remark for file in (*files.values(), whole) if file.remark)
    for note in dict.fromkeys([*notes, *undrawn, *remarks]):
        console.print(note, markup=False, soft_wrap=True, highlight=False)
    for path in written:
        console.print(f"Written: {path}", markup=False, soft_wrap=True, highlight=False)
    if page and open_page and written[-1].suffix == ".html":
        typer.launch(written[-1].resolve().as_uri())
    if lacking or undrawn:
        raise typer.Exit(3)


def _by_reason(failed: Sequence[Unmeasured]) -> list[tuple[str, str]]:
    """Each reason with the names of the networks."""
    names_of: dict[str, list[str]] = {}
    for net in failed:
        names_of.setdefault(net.why, []).append(net.name)
    return [(why, ", ".join(names)) for why, names in names_of.items()]


@dataclass(frozen=True)
class _File:
    """Where numbers are kept: beside those of other nets and settings, in place of the same ones."""

    json: Path
    of: str
    remark: str

    @classmethod
    def free(cls, folder: Path, name: str, of: str, others: Iterable[_File]) -> _File:
        """The file of this name, or the first numbered one that holds no other numbers."""
        taken = {other.json for other in others}
        for number in itertools.count(1):
            file = folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
            candidate = cls(
                file, of, "" if number == 1 else f"{name}.json holds other numbers; these are in {file.name}."
            )
            if file not in taken and (not file.exists() or candidate.read()):
                return candidate
        raise AssertionError

    def read(self) -> dict[str, Any]:
        """What the file holds, if that is of this net and these settings; else nothing."""
        try:
            table = json.loads(self.json.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return table if isinstance(table, dict) and table.get("of") == self.of else {}


def _keep(files: Mapping[str, _File], about: dict[str, object], net: NetReport, *, done: bool = False) -> None:
    """Write the numbers of a network; of an unfinished one only if they are more than the file has."""
    from flatmin.study.measured import as_json
    from flatmin.train.files import write_json

    file, table = files[net.name], as_json([net], about, of=files[net.name].of)
    if done or _numbers_in(table) >= _numbers_in(file.read()):
        file.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(file.json, table)


def _numbers_in(table: Mapping[str, Any]) -> int:
    sections = [section for net in table.get("nets", []) for section in net["sections"].values()]
    return sum(len(section["quantities"]) + len(section["results"]) for section in sections)


class _Bar:
    """A bar over nets and, where one is measured here, what of it is being measured."""

    def __init__(self, console: Console, nets: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console, self._nets, self._done = console, nets, 0
        self._bar = Progress(
            TextColumn("Measuring {task.fields[count]}"),
            BarColumn(),
            TextColumn("{task.fields[part]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=1.0 if nets == 1 else nets, count=self._count(), part="")

    def _count(self) -> str:
        return "" if self._nets == 1 else f"{self._done}/{self._nets}"

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def part(self, what: str, share: float) -> None:
        """Show what is being measured and the share done."""
        self._bar.update(self._task, part=what.replace("_", " "), completed=share if self._nets == 1 else None)

    def done(self, net: NetReport) -> None:
        """Show that a network is done."""
        self._done += 1
        seconds = sum(section.seconds for section in net.report.sections)
        if self._nets > 1:
            self._bar.update(self._task, advance=1, count=self._count())
            if not self._console.is_terminal:
                self._console.print(f"[{self._count()}] {net.name}: {seconds:.1f} s", markup=False, highlight=False)


def _print(nets: Sequence[NetReport], console: Console) -> None:
    from flatmin.report.measurements.page import sentence
    from flatmin.study.measured import compare_reports, groups_of, left_out, remarks, unlike

    console.print()
    console.print(sentence(nets[0]), markup=False, highlight=False, soft_wrap=False)
    for remark in remarks(nets):
        console.print(remark, markup=False, highlight=False)
    console.print()
    if len(nets) == 1:
        for section in nets[0].report.sections:
            if section.quantities:
                console.print(f"[bold]{section.title}[/bold]")
                console.print(_numbers(section.quantities))
                console.print()
            for measure_name, why in section.missing.items():
                console.print(f"{measure_name} is missing: {why}", markup=False, highlight=False)
        return
    counts = ", ".join(f"{name} {len(members)}" for name, members in groups_of(nets).items())
    console.print(_comparison(nets))
    console.print(
        f"[dim]Nets: {counts}. Mean ± 95 % t interval over the seeds; differences paired. Not significant: the "
        "interval of the difference covers 0.[/dim]"
    )
    for words in left_out(nets):
        console.print(words, markup=False, highlight=False)
    noted = {row.quantity.name: row.notes for row in compare_reports(nets) if row.notes}
    if noted:
        console.print(
            "* of some net: " + "; ".join(f"{name} {', '.join(names)}" for name, names in noted.items()),
            markup=False,
            highlight=False,
        )
    for words in unlike(nets):
        console.print(f"The networks were measured with different settings: {words}.", markup=False, highlight=False)


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")


def _numbers(quantities: Sequence[object]) -> Table:
    from rich.text import Text

    from flatmin.measure.report import Quantity
    from flatmin.study.measured import with_error

    table = _table()
    table.show_header = False
    table.add_column("quantity", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for q in quantities:
        assert isinstance(q, Quantity)
        about = Text(q.text)
        if q.note:
            about.append(f" ({q.note})", style="yellow")
        table.add_row(Text(q.name), with_error(q.value, q.error), about)
    return table


def _comparison(nets: Sequence[NetReport]) -> Table:
    from rich.text import Text

    from flatmin.study.measured import compare_reports, groups_of, stat_text

    groups = list(groups_of(nets))
    base, others = groups[0], groups[1:]
    table = _table()
    table.add_column("quantity", no_wrap=True)
    for name in groups:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for name in others:
        table.add_column(Text(f"{name} - {base}"), justify="right", no_wrap=True)
        table.add_column(Text(f"{name} is"), no_wrap=True)
    for row in compare_reports(nets):
        cells: list[Text | str] = [Text(row.quantity.name + " *" * bool(row.notes))]
        cells += ["-" if (stat := row.groups.get(name)) is None else stat_text(stat) for name in groups]
        for name in others:
            stat = row.difference.get(name)
            cells += ["-" if stat is None else stat_text(stat), row.verdict(name)]
        table.add_row(*cells)
    return table
