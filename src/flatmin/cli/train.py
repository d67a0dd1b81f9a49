"""`flatmin train`: one run, resumable, alone or under torchrun."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flatmin.cli import completion as complete
from flatmin.cli.console import make_console
from flatmin.cli.options import Again, Download, DryRun, Out, Resume, Settings

if TYPE_CHECKING:
    from flatmin.cli.training import Training
    from flatmin.data.dataset import Data
    from flatmin.train.config import RunConfig
    from flatmin.train.fingerprint import Content
    from flatmin.train.folder import RunFolder
    from flatmin.train.options import Options
    from flatmin.train.processes import World

RUNS = Path("flatmin-runs")


def train(
    preset: Annotated[
        str,
        typer.Argument(
            metavar="PRESET",
            help="A preset, a .toml file, or a run folder.",
            autocompletion=complete.presets_and_runs,
        ),
    ],
    overrides: Settings = None,
    resume: Resume = False,
    again: Again = False,
    name: Annotated[
        str | None, typer.Option(help="Name of the run folder (default: derived from the settings).")
    ] = None,
    out: Out = RUNS,
    download: Download = False,
    track: Annotated[
        str | None,
        typer.Option(
            help="Trackers beside the JSON lines: tensorboard,wandb,mlflow,trackio.",
            autocompletion=complete.several_of("trackers"),
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train one network with one method.

    Every epoch and Ctrl-C write a checkpoint. Several processes: torchrun --nproc-per-node N -m flatmin train ...

    Examples:
        flatmin train digits method=vasso rho=0.1 epochs=10
        flatmin train cifar10-resnet18 --download --dry-run
    """
    settings = [*(overrides or ())] + ([f"trackers={track}"] if track else [])
    perform(preset, settings, out=out, name=name, resume=resume, again=again, download=download, dry_run=dry_run)


def perform(
    preset: str,
    overrides: Sequence[str],
    *,
    out: Path = RUNS,
    name: str | None = None,
    resume: bool = False,
    again: bool = False,
    download: bool = False,
    dry_run: bool = False,
) -> None:
    """Train one run and show it on the console; other commands use it too.

    Args:
        preset: a preset, a .toml file, or a run folder.
        overrides: such as "epochs=10".
        out: folder of the runs. Default "flatmin-runs".
        name: name of the run folder. Default: derived from the settings.
        resume: continue from the last good checkpoint. Default False.
        again: start over where a run exists already. Default False.
        download: download missing data. Default False.
        dry_run: only check and show the settings. Default False.

    Raises:
        ValueError: what `load_run` and the run raise, an invalid name, or a run that exists already.
        FileNotFoundError: the data are missing.
        typer.Exit: the run was interrupted or stopped early.
    """
    from flatmin.cli.training import Training, print_settings
    from flatmin.study.costs import Sizes
    from flatmin.study.trial import try_out
    from flatmin.train.events import Warned
    from flatmin.train.files import check_name
    from flatmin.train.fingerprint import content_of
    from flatmin.train.interrupt import TrainingInterrupted
    from flatmin.train.loop import train as run
    from flatmin.train.processes import world_of
    from flatmin.train.sources import check_machine
    from flatmin.train.trackers import make_tracker
    from flatmin.train.trainer import updates

    if name is not None:
        check_name(name, "--name")
    config, options, run_there = _settings(preset, overrides, name=name, resume=resume)
    check_machine(config)
    with world_of(config.device) as world:
        console = make_console(quiet=not world.first)
        with Training(console) as display:
            data = _load(config, download, world, display)
            content = content_of(config, data)
            folder, labels = run_there or _new(preset, config, content, name=name, out=out)
            if world.first and not dry_run:
                total = updates(config, len(data.train), world.size)
                note = _prepare(folder, preset, config, content, updates=total, resume=resume, again=again)
                if note is not None:
                    display(Warned(text=note))
            if dry_run:
                for tracker in options.trackers:
                    make_tracker(tracker, folder=folder.path, run=folder.path.name)
                print_settings(config, data, world, console)
                if world.size == 1:
                    sizes = Sizes()
                    sizes.take(config, data)
                    for note in try_out([config], sizes):
                        display(Warned(text=note))
                return
            try:
                result = run(
                    config,
                    folder=folder,
                    resume=resume,
                    options=options,
                    labels=labels,
                    data=data,
                    content=content,
                    on_event=display,
                )
            except TrainingInterrupted as interrupt:
                display.stop()
                # Said here, because typer ends the process on Ctrl-C without a word.
                typer.echo(str(interrupt), err=True)
                raise typer.Exit(130) from None
    if result.failure is not None:
        if world.first:
            typer.echo(f"flatmin: the run stopped: {result.failure}.", err=True)
        raise typer.Exit(2)


def _load(config: RunConfig, download: bool, world: World, display: Training) -> Data:
    """The data; the first process downloads missing files while the others wait.

    Raises:
        FileNotFoundError: with the options of this command, and what `load_data` raises.
    """
    from flatmin.data.named import DATASETS
    from flatmin.train.sources import load_data

    try:
        if not download:
            return load_data(config)
        data = load_data(config, download=True, progress=display.downloading) if world.first else None
        world.wait()
        return load_data(config) if data is None else data
    except FileNotFoundError as error:
        downloadable = [name for name, one in DATASETS.items() if one.downloads]
        if config.data in downloadable:
            error.add_note("With this command: data_dir=FOLDER, --download.")
        elif config.data in DATASETS:
            only = f"; --download is for {', '.join(downloadable)} only." if download else "."
            error.add_note(f"With this command: data_dir=FOLDER{only}")
        raise


def _settings(
    preset: str, overrides: Sequence[str], *, name: str | None, resume: bool
) -> tuple[RunConfig, Options, tuple[RunFolder, dict[str, str]] | None]:
    """Configuration and options of the run; also its folder and labels if the preset is a run folder.

    Raises:
        ValueError: a run folder together with settings, and what `load_run` raises.
    """
    from flatmin.train.folder import RunFolder
    from flatmin.train.preset import load_options, load_run

    if (Path(preset) / "config.json").is_file():
        folder = RunFolder(Path(preset))
        if not resume:
            raise ValueError(f"{preset} is a run; add --resume to continue it.")
        options, rest = load_options(overrides)
        if rest or name is not None:
            raise ValueError(
                f"{preset} is a run and its settings are fixed: leave out {rest[0] if rest else '--name'}, or name a "
                "preset for another run."
            )
        config, labels = folder.config()
        return config, options, (folder, labels)
    if Path(preset).is_dir() and len(Path(preset).parts) > 1:
        raise ValueError(f"{preset} is not a run: there is no config.json in it (runs are in FOLDER/runs).")
    config, options = load_run(preset, overrides)
    return config, options, None


def _new(
    preset: str, config: RunConfig, content: Content | None, *, name: str | None, out: Path
) -> tuple[RunFolder, dict[str, str]]:
    """Folder and labels of a run, derived from its settings."""
    from flatmin.train.folder import RunFolder

    labels = {"label": name or f"{config.method} {preset}", "key": _key(config, content)}
    return RunFolder(out / "runs" / (name or default_name(preset, config, content))), labels


def default_name(preset: str, config: RunConfig, content: Content | None) -> str:
    """Method, preset, seed, and ten digits of a digest of everything that decides the outcome."""
    return f"{_slug(preset, config)}-s{config.seed}-{_key(config, content)[:10]}"


def _slug(preset: str, config: RunConfig) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", f"{config.method}-{Path(preset).stem}".lower()).strip("-")[:100]


def _key(config: RunConfig, content: Content | None) -> str:
    """Digest of the settings and the data; data that ship with a package count by their name."""
    from flatmin.methods import former_word
    from flatmin.train.config import identity
    from flatmin.train.settings import content_hash

    # Folders keep the names that runs of earlier versions have.
    params = {former_word(name): value for name, value in config.params.items()}
    return content_hash({**identity(config), "params": params}, *([] if content is None else [content.digest]))


def _prepare(
    folder: RunFolder,
    preset: str,
    config: RunConfig,
    content: Content | None,
    *,
    updates: int,
    resume: bool,
    again: bool,
) -> str | None:
    """Check that no existing run is lost; return a note to show before the run starts or continues, or None.

    Raises:
        ValueError: a run exists and neither --resume nor --again was given, or it has other settings or data.
    """
    from flatmin.train.state import fixed_length

    if resume and again:
        raise ValueError("--resume continues a run and --again starts it over; give one of them.")
    if again:
        return None
    if not folder.begun:
        return _before(folder, preset, config, content, updates) if resume else None
    try:
        done = folder.finished and folder.result().failure is None
    except ValueError as error:
        raise ValueError(f"{folder.path} holds a run whose result cannot be read: {error}; use --again.") from error
    other = _differ(folder, config, content)
    reached, way_out = _reached(folder), "give this one another --name, or replace the other with --again."
    # Whether the data are the same up to rounding, the checkpoint tells.
    open_ = list(other) == ["epochs"] or (list(other) == ["content"] and reached >= 0 and not done)
    if other and not (resume and open_):
        what = "finished" if done else "not finished"
        raise ValueError(f"{folder.path} holds another run, {what}: {', '.join(other.values())}; {way_out}")
    if "epochs" in other:
        why = fixed_length(config) or ("it has no checkpoint" if reached < 0 else None)
        if why is not None:
            raise ValueError(
                f"{folder.path} holds a run in which {other['epochs']}, and it cannot continue to that: {why}; "
                f"{way_out}"
            )
    elif done:
        raise ValueError(
            f"{folder.path} holds this run, finished; show it with `flatmin show {folder.path}`, or start it over "
            "with --again."
        )
    if not resume:
        raise ValueError(
            f"{folder.path} holds this run, unfinished; continue it with --resume, or start over with --again."
        )
    if reached < 0:
        return f"there is no checkpoint in {folder.path}, so the run starts from the beginning."
    return None


def _before(folder: RunFolder, preset: str, config: RunConfig, content: Content | None, updates: int) -> str:
    """Prepare to continue a run of fewer epochs, if there is one; otherwise say how the nearest run differs."""
    from flatmin.train.folder import RunFolder
    from flatmin.train.state import fixed_length

    runs: list[tuple[RunFolder, dict[str, str]]] = []
    for place in sorted(folder.path.parent.glob(f"{glob.escape(_slug(preset, config))}-s*")):
        with suppress(ValueError):  # it cannot be read, so there is nothing to continue
            there = RunFolder(place)
            runs.append((there, _differ(there, config, content)))
    why = fixed_length(config)
    fewer = [run for run in runs if list(run[1]) == ["epochs"] and 0 <= _reached(run[0]) <= updates]
    if fewer and why is None:
        there, other = max(fewer, key=lambda run: _reached(run[0]))
        folder.take_over(there)
        return f"{folder.path.name} continues {there.path.name}, in which {other['epochs']}."
    begins = f"there is no run of these settings to continue, so {folder.path.name} starts from the beginning"
    if not runs:
        return f"{begins}."
    there, other = min(runs, key=lambda run: len(run[1]))
    if not other:
        return (
            f"{there.path} is a run of these settings by an earlier version, which did not record its data, so "
            f"{folder.path.name} starts from the beginning; `flatmin train {there.path} --resume` continues the other."
        )
    if list(other) == ["epochs"]:
        return f"{begins}: in {there.path.name} {other['epochs']}, and {why or 'it has no checkpoint that fits'}."
    return f"{begins}; in {there.path.name}, {', '.join(other.values())}."


def _reached(folder: RunFolder) -> int:
    """The update of the last checkpoint; -1 if there is none."""
    from flatmin.train import checkpoint

    return max((checkpoint.step_of(path) for path in checkpoint.listed(folder.checkpoints)), default=-1)


def _differ(folder: RunFolder, config: RunConfig, content: Content | None) -> dict[str, str]:
    """How the settings of the existing run differ, by name; "content" stands for other data.

    Raises:
        ValueError: it cannot be read.
    """
    from flatmin.train.config import differences, identity

    recorded, labels = folder.config()
    other = differences(identity(recorded), config)
    if content is not None and labels.get("content", content.digest) != content.digest:
        other["content"] = "the data have other content"
    return other
