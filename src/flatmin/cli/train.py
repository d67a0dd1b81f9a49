"""`flatmin train`: one run, resumable, alone or under torchrun."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flatmin.cli.console import make_console

if TYPE_CHECKING:
    from flatmin.cli.training import Training
    from flatmin.data.base import Data
    from flatmin.train.config import RunConfig
    from flatmin.train.folder import RunFolder
    from flatmin.train.options import Options
    from flatmin.train.processes import World

RUNS = Path("flatmin-runs")


def train(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="A preset, a .toml file, or a run's folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. method=vasso rho=0.1 theta=0.8 epochs=10 seed=1."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last good checkpoint, if there is one.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Begin anew where a run is already.")] = False,
    name: Annotated[str | None, typer.Option(help="Of the run's folder. Default: from its settings.")] = None,
    out: Annotated[Path, typer.Option(help="Where runs are kept.")] = RUNS,
    download: Annotated[bool, typer.Option("--download", help="Get the data if they are not in data_dir.")] = False,
    track: Annotated[
        str | None, typer.Option(help="Trackers beside the JSON lines: tensorboard,wandb,mlflow,trackio.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show the settings.")] = False,
) -> None:
    """Train one network with one method.

    Ctrl-C writes a checkpoint; so does every epoch. Several processes: torchrun --nproc-per-node N -m flatmin train ...
    """
    words = [*(overrides or ())] + ([f"trackers={track}"] if track else [])
    perform(preset, words, out=out, name=name, resume=resume, again=again, download=download, dry_run=dry_run)


def perform(
    preset: str,
    words: Sequence[str],
    *,
    out: Path = RUNS,
    name: str | None = None,
    resume: bool = False,
    again: bool = False,
    download: bool = False,
    dry_run: bool = False,
) -> None:
    """What the command does, for other commands too: one run, shown on the console.

    Args:
        preset: a preset, a .toml file, or a run's folder.
        words: like "epochs=10".
        out: where runs are kept. Default "flatmin-runs".
        name: of the run's folder. Default: from its settings.
        resume: go on from the last good checkpoint. Default False.
        again: begin anew where a run is already. Default False.
        download: get data that are missing. Default False.
        dry_run: check everything and show the settings only. Default False.

    Raises:
        ValueError: what `load_run` and the run raise, or a run that is there already.
        FileNotFoundError: the data are not there.
        typer.Exit: the run was interrupted, or stopped by itself.
    """
    from flatmin.cli.training import Training, print_settings
    from flatmin.train.interrupt import Interrupted
    from flatmin.train.loop import train as run
    from flatmin.train.processes import world_of
    from flatmin.train.sources import check_machine
    from flatmin.train.trackers import make_tracker

    config, options, folder, labels = _settings(preset, words, name=name, out=out, resume=resume)
    check_machine(config)
    with world_of(config.device) as world:
        console = make_console(quiet=not world.first)
        if world.first and not dry_run:
            _check_folder(folder, resume=resume, again=again)
        with Training(console) as display:
            data = _load(config, download, world, display)
            if dry_run:
                for tracker in options.trackers:
                    make_tracker(tracker, folder=folder.path, run=folder.path.name)
                print_settings(config, data, world, console)
                return
            try:
                result = run(
                    config,
                    folder=folder,
                    resume=resume,
                    options=options,
                    labels=labels,
                    data=data,
                    on_event=display,
                )
            except Interrupted as interrupt:
                display.stop()
                # Said here, because typer ends the process on Ctrl-C without a word.
                typer.echo(str(interrupt), err=True)
                raise typer.Exit(130) from None
    if result.failure is not None:
        if world.first:
            typer.echo(f"flatmin: the run stopped: {result.failure}.", err=True)
        raise typer.Exit(2)


def _load(config: RunConfig, download: bool, world: World, display: Training) -> Data:
    """The data; the first process downloads what is missing while the others wait.

    Raises:
        FileNotFoundError: with the options of this command, and what `load_data` raises.
    """
    from flatmin.data.named import DATASETS
    from flatmin.train.sources import load_data

    try:
        if not download:
            return load_data(config)
        found = load_data(config, download=True, progress=display.downloading) if world.first else None
        world.wait()
        return load_data(config) if found is None else found
    except FileNotFoundError as error:
        known = [name for name, one in DATASETS.items() if one.downloads]
        if config.data in known:
            error.add_note("In this command: data_dir=FOLDER, --download.")
        elif config.data in DATASETS:
            only = f"; --download is for {', '.join(known)} only." if download else "."
            error.add_note(f"In this command: data_dir=FOLDER{only}")
        raise


def _settings(
    preset: str, words: Sequence[str], *, name: str | None, out: Path, resume: bool
) -> tuple[RunConfig, Options, RunFolder, dict[str, str]]:
    """Configuration, options, folder and labels of the run.

    Raises:
        ValueError: a run's folder with settings of its own, and what `load_run` raises.
    """
    from flatmin.train.folder import RunFolder
    from flatmin.train.preset import load_options, load_run

    if (Path(preset) / "config.json").is_file():
        folder = RunFolder(Path(preset))
        if not resume:
            raise ValueError(f"{preset} is a run; add --resume to go on with it.")
        options, rest = load_options(words)
        if rest or name is not None:
            raise ValueError(
                f"{preset} is a run, whose settings are fixed: leave out {rest[0] if rest else '--name'}, or name a "
                "preset for another run."
            )
        config, labels = folder.config()
        return config, options, folder, labels
    if Path(preset).is_dir() and len(Path(preset).parts) > 1:
        raise ValueError(f"{preset} is not a run: there is no config.json in it (runs are in FOLDER/runs).")
    config, options = load_run(preset, words)
    labels = {"label": name or f"{config.method} {preset}", **_key(config)}
    return config, options, RunFolder(out / "runs" / (name or default_name(preset, config))), labels


def default_name(preset: str, config: RunConfig) -> str:
    """Method, preset, seed, and ten digits that tell apart what differs in anything that decides the outcome."""
    slug = re.sub(r"[^a-z0-9.+]+", "-", f"{config.method}-{Path(preset).stem}".lower()).strip("-")
    return f"{slug}-s{config.seed}-{_key(config)['key'][:10]}"


def _key(config: RunConfig) -> dict[str, str]:
    from flatmin.train.config import identity
    from flatmin.train.settings import content_hash

    return {"key": content_hash(identity(config))}


def _check_folder(folder: RunFolder, *, resume: bool, again: bool) -> None:
    """Refuse to lose a run that is there.

    Raises:
        ValueError: there is one, and nothing says what to do with it.
    """
    if resume and again:
        raise ValueError("--resume goes on with a run and --again begins it anew; give one of them.")
    if again or not folder.begun:
        return
    try:
        done = folder.finished and folder.result().failure is None
    except ValueError as error:
        raise ValueError(f"{folder.path} holds a run whose result cannot be read: {error}; use --again.") from error
    if done:
        raise ValueError(
            f"{folder.path} holds this run, finished; look at it with `flatmin show {folder.path}`, or begin it anew "
            "with --again."
        )
    if not resume:
        raise ValueError(f"{folder.path} holds this run, not finished; go on with --resume, or anew with --again.")
