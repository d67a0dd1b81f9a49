"""`flatmin measure`: measure curvature, sharpness and landscapes of trained networks, and compare them."""

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
from flatmin.cli.options import Demo, Figures, OpenPage, Out, Page, Split, Workers
from flatmin.cli.targets import HOME
from flatmin.words import elapsed

if TYPE_CHECKING:
    from rich.console import Console

    from flatmin.study.measured import NetReport, Unmeasured
    from flatmin.study.spec import StudySpec

_SETTING = re.compile(r"[a-z_]+=")


def measure(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET",
            help="Networks to measure: run folders, or names of runs (see `flatmin runs list`); a study, by name or "
            ".toml file, for the runs of its table; or files of weights. Also settings, such as top=10 rho=0.1 plane=0 "
            "(see `flatmin settings measure`).",
            autocompletion=complete.words("measure", also=complete.runs_and_studies),
        ),
    ],
    what: Annotated[
        str,
        typer.Option(
            metavar="SECTIONS",
            help="Sections to measure: report, all, or a list of model, hessian, trace, density, sharpness, flatness, "
            "layers, published, landscape, radius, separated by commas (radius: of the run's own method; not part of "
            "all).",
            autocompletion=complete.several_of("measures"),
        ),
    ] = "report",
    split: Split = "train",
    examples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of samples to measure on (default: all).")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Samples per forward pass.")] = 150,
    params: Annotated[
        str,
        typer.Option(
            metavar="PATTERNS",
            help="Parameters to measure: patterns of names, separated by commas, such as 'layer4.*,fc.*'.",
        ),
    ] = "*",
    mode: Annotated[
        str,
        typer.Option(
            help="eval, or train (BatchNorm with batch statistics).", autocompletion=complete.one_of("eval", "train")
        ),
    ] = "eval",
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, float64, or bfloat16 (autocast, accurate to a few percent).",
            autocompletion=complete.one_of("float32", "float64", "bfloat16"),
        ),
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.", autocompletion=complete.one_of("cpu", "cuda"))] = "cpu",
    model: Annotated[
        str | None,
        typer.Option(metavar="FUNCTION", help="For a file of weights: its network, as package.module:function."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FUNCTION", help="For a file of weights: its data, as package.module:function."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="For a file with several sets of weights that fit: the one to use, such as ema or state_dict."
        ),
    ] = None,
    runs_folder: Annotated[
        Path, typer.Option("--runs", metavar="FOLDER", help="For a study: its output folder (--out).")
    ] = HOME,
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="ARM", help="For a study: arm or row of its table (default: all). Repeatable."),
    ] = None,
    tune: Annotated[
        bool | None,
        typer.Option(
            "--tune/--no-tune",
            help="For a study: measure the runs with the settings chosen on validation, or with those of the preset "
            "(default: the chosen ones, if tuning is finished).",
        ),
    ] = None,
    demo: Demo = False,
    changed: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="KEY=VALUE",
            help="For a study: a setting of its command line, such as seeds=5 or lr=0.05. Repeatable.",
            autocompletion=complete.words("train"),
        ),
    ] = None,
    out: Out = Path("flatmin-measures"),
    workers: Workers = None,
    page: Page = True,
    png: Annotated[bool, typer.Option("--png", help="Also write the report of each network as a PNG picture.")] = False,
    figures: Figures = "",
    open_page: OpenPage = False,
) -> None:
    """Measure the flatness of trained networks: quantities with their errors, figures, and comparisons over seeds.

    For one network it prints a report; for several, a table by arm with paired differences to sgd. If something cannot
    be measured, it says why, writes everything else, and exits with code 3. Files of other networks or settings are not
    overwritten: new files get a number.

    Examples:
        flatmin measure first
        flatmin measure first --what hessian,sharpness top=10 rho=0.1
        flatmin measure digits --arm sgd --arm sam
    """
    import torch

    from flatmin.cli.study import default_workers
    from flatmin.measure.report import ReportSettings, chosen
    from flatmin.report.figures import static
    from flatmin.report.figures.files import endings
    from flatmin.report.html import require_figures
    from flatmin.report.html import write as write_page
    from flatmin.report.measurements import picture as draw_report
    from flatmin.report.measurements.figures import save_figures
    from flatmin.report.measurements.page import render
    from flatmin.report.measurements.terminal import print_nets
    from flatmin.study.measured import as_csv, as_json
    from flatmin.study.measuring import View, find_all, identity, measure_all
    from flatmin.train.files import write_json, write_text
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
    studies, paths = _sorted_out([word for word in targets if word not in words])
    if not studies and (arm or changed or tune is not None or demo):
        raise ValueError("--arm, --tune, --demo and --with need a study; name one, such as digits.")
    runs, lacking_runs = find_all(paths, model=model, data=data, key=key) if paths else [], []
    for name in studies:
        from flatmin.study.networks import networks_of

        found, unfinished = networks_of(
            _study(name, changed or (), tune, demo, runs_folder), runs_folder, arms=arm or ()
        )
        runs += found
        lacking_runs += unfinished
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
        raise ValueError(
            "--workers is for several networks on the CPU; a single network, or a GPU, uses one process. Leave it out."
        )
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
                # Written at once, so that a later error loses nothing.
                on_part=keep,
                on_failed=failed.append if several else None,
            )
    except KeyboardInterrupt:
        stored = [str(file.json) for file in files.values() if file.read()]
        typer.echo(
            f"Interrupted. {'Measurements so far: ' + ', '.join(stored) if stored else 'Nothing was measured yet'}. "
            "Landscapes continue where they stopped if you run the same command.",
            err=True,
        )
        raise typer.Exit(130) from None
    if not nets:
        whys = " ".join(f"{why} (network: {names})" for why, names in _by_reason(failed))
        raise ValueError(f"no network could be measured: {whys}")
    print_nets(nets, console)
    lacking = bool(failed) or any(net.report.missing for net in nets)
    if several:
        write_json(whole.json, as_json(nets, about, failed, of=whole.of))
    write_text(whole.json.with_suffix(".csv"), as_csv(nets))
    written = [whole.json, whole.json.with_suffix(".csv")]
    notes = [*lacking_runs, *(f"{names} could not be measured: {why}" for why, names in _by_reason(failed))]
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


def _sorted_out(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Split words into studies and paths of runs or files of weights.

    Raises:
        ValueError: there is no word, or a word is none of these.
    """
    from flatmin.cli.targets import run_folder
    from flatmin.train.settings import preset_names
    from flatmin.words import suggest

    if not words:
        raise ValueError("nothing to measure: name a run folder, a file of weights or a study.")
    names = preset_names("study")
    studies: list[str] = []
    paths: list[Path] = []
    for word in words:
        path = Path(word)
        if path.suffix == ".toml" and path.is_file():
            studies.append(word)
        elif path.is_file():
            paths.append(path)
        elif path.is_dir() or ((HOME / "runs" / path.name).is_dir() and path.name == word):
            folder = run_folder(word)
            inside = sorted(folder.glob("runs/*/config.json")) if not (folder / "config.json").is_file() else []
            paths += [file.parent for file in inside] or [folder]
        elif word in names:
            studies.append(word)
        elif path.name == word and (hint := suggest(word, names)):
            raise ValueError(
                f"there is no run, file or study {word!r}{hint} (runs: flatmin runs list; studies: flatmin study list)"
            )
        else:
            paths.append(run_folder(word))
    return studies, paths


def _study(name: str, changed: Sequence[str], tune: bool | None, demo: bool, runs: Path) -> StudySpec:
    """The study with the settings of its command line."""
    from flatmin.study.comparison import comparison, without_unfit
    from flatmin.study.expand import tuned
    from flatmin.study.networks import searched
    from flatmin.study.reading import read_study

    spec = without_unfit(read_study(name, changed, demo=True) if demo else comparison(name, changed))
    return searched(spec, runs) if tune is None else tuned(spec) if tune else spec


def _by_reason(failed: Sequence[Unmeasured]) -> list[tuple[str, str]]:
    """Each reason with the names of the networks."""
    names_of: dict[str, list[str]] = {}
    for net in failed:
        names_of.setdefault(net.why, []).append(net.name)
    return [(why, ", ".join(names)) for why, names in names_of.items()]


@dataclass(frozen=True)
class _File:
    """The file of measurements of a network; it does not replace the files of other networks or settings."""

    json: Path
    of: str
    remark: str

    @classmethod
    def free(cls, folder: Path, name: str, of: str, others: Iterable[_File]) -> _File:
        """The file of this name, or the first numbered one that has no other measurements."""
        taken = {other.json for other in others}
        for number in itertools.count(1):
            file = folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
            candidate = cls(
                file, of, "" if number == 1 else f"{name}.json has other measurements; these are in {file.name}."
            )
            if file not in taken and (not file.exists() or candidate.read()):
                return candidate
        raise AssertionError

    def read(self) -> dict[str, Any]:
        """The content of the file, if it is for this network and these settings; else an empty table."""
        try:
            table = json.loads(self.json.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return table if isinstance(table, dict) and table.get("of") == self.of else {}


def _keep(files: Mapping[str, _File], about: dict[str, object], net: NetReport, *, done: bool = False) -> None:
    """Write the measurements of a network; if it is unfinished, only if the file has fewer."""
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
    """A progress bar over networks; for a network in this process, it also shows the current measurement."""

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
        """Show the current measurement and the share that is done."""
        self._bar.update(self._task, part=what.replace("_", " "), completed=share if self._nets == 1 else None)

    def done(self, net: NetReport) -> None:
        """Show that a network is done."""
        self._done += 1
        seconds = sum(section.seconds for section in net.report.sections)
        if self._nets > 1:
            self._bar.update(self._task, advance=1, count=self._count())
            if not self._console.is_terminal:
                self._console.print(f"[{self._count()}] {net.name}: {elapsed(seconds)}", markup=False, highlight=False)
