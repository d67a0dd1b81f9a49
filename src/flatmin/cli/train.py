"""`flatmin train`: train one network, in one process or under torchrun."""

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
            help="Preset with the settings, such as digits; a .toml file; or a run folder, with --resume.",
            autocompletion=complete.presets_and_runs,
        ),
    ],
    overrides: Settings = None,
    resume: Resume = False,
    again: Again = False,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the run folder (default: derived from the settings)."),
    ] = None,
    out: Out = RUNS,
    download: Download = False,
    track: Annotated[
        str | None,
        typer.Option(
            metavar="TRACKERS",
            help="Also log to these trackers, separated by commas: tensorboard, wandb, mlflow, trackio.",
            autocompletion=complete.several_of("trackers"),
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train one network with one method.

    A checkpoint is written after every epoch and on Ctrl-C; --resume continues from it. For several processes, use
    torchrun --nproc-per-node N -m flatmin train ...

    Examples:
        flatmin train digits --name first
        flatmin train digits method=vasso rho=0.1 epochs=10 --name second
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
    """Train one run and show its progress on the console; other commands use this too.

    Args:
        preset: a preset, a .toml file, or a run folder.
        overrides: settings, such as "epochs=10".
        out: output folder; the run goes to OUT/runs. Default "flatmin-runs".
        name: name of the run folder. Default: derived from the settings.
        resume: continue from the last good checkpoint. Default False.
        again: start over if the run already exists. Default False.
        download: download missing data. Default False.
        dry_run: only check and print the settings. Default False.

    Raises:
        ValueError: the settings or the name are not valid, or the run already exists.
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
                # Printed here, because typer ends the process on Ctrl-C without a message.
                typer.echo(str(interrupt), err=True)
                raise typer.Exit(130) from None
    if result.failure is not None:
        if world.first:
            typer.echo(f"flatmin: the run stopped: {result.failure}.", err=True)
        raise typer.Exit(2)


def _load(config: RunConfig, download: bool, world: World, display: Training) -> Data:
    """Load the data; the first process downloads missing files while the others wait.

    Raises:
        FileNotFoundError: files are missing; the message names the options of this command. `load_data` raises others.
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
            error.add_note("Set data_dir=FOLDER, or add --download.")
        elif config.data in DATASETS:
            only = f" (--download supports only {', '.join(downloadable)})." if download else "."
            error.add_note(f"Set data_dir=FOLDER{only}")
        raise


def _settings(
    preset: str, overrides: Sequence[str], *, name: str | None, resume: bool
) -> tuple[RunConfig, Options, tuple[RunFolder, dict[str, str]] | None]:
    """Configuration and options of the run; if the preset is a run folder, also its folder and labels.

    Raises:
        ValueError: settings are given with a run folder, or are not valid.
    """
    from flatmin.train.folder import RunFolder
    from flatmin.train.preset import load_options, load_run

    if (Path(preset) / "config.json").is_file():
        folder = RunFolder(Path(preset))
        if not resume:
            raise ValueError(f"{preset} is a run folder; add --resume to continue the run.")
        options, rest = load_options(overrides)
        if rest or name is not None:
            raise ValueError(
                f"{preset} is a run folder, and the settings of the run are fixed: leave out "
                f"{rest[0] if rest else '--name'}, or name a preset to start another run."
            )
        config, labels = folder.config()
        return config, options, (folder, labels)
    if Path(preset).is_dir() and len(Path(preset).parts) > 1:
        raise ValueError(f"{preset} is not a run folder: it has no config.json (runs are in FOLDER/runs).")
    config, options = load_run(preset, overrides)
    return config, options, None


def _new(
    preset: str, config: RunConfig, content: Content | None, *, name: str | None, out: Path
) -> tuple[RunFolder, dict[str, str]]:
    """Folder and labels of a new run, derived from its settings."""
    from flatmin.train.folder import RunFolder

    labels = {"label": name or f"{config.method} {preset}", "key": _key(config, content)}
    return RunFolder(out / "runs" / (name or default_name(preset, config, content))), labels


def default_name(preset: str, config: RunConfig, content: Content | None) -> str:
    """Method, preset, seed, and ten digits of a digest of all settings that decide the outcome."""
    return f"{_slug(preset, config)}-s{config.seed}-{_key(config, content)[:10]}"


def _slug(preset: str, config: RunConfig) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", f"{config.method}-{Path(preset).stem}".lower()).strip("-")[:100]


def _key(config: RunConfig, content: Content | None) -> str:
    """Digest of the settings and the data; data that are part of an installed package enter by name."""
    from flatmin.methods import former_word
    from flatmin.train.config import identity
    from flatmin.train.settings import content_hash

    # Earlier names of parameters, so that the folders of existing runs are found.
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
    """Make sure that no existing run is overwritten; return a note to print before the run starts, or None.

    Raises:
        ValueError: a run exists and neither --resume nor --again was given, or it has other settings or data.
    """
    from flatmin.train.state import fixed_length

    if resume and again:
        raise ValueError("--resume continues a run and --again starts it over; leave out one of them.")
    if again:
        return None
    if not folder.begun:
        return _before(folder, preset, config, content, updates) if resume else None
    try:
        done = folder.finished and folder.result().failure is None
    except ValueError as error:
        raise ValueError(
            f"the result of the run in {folder.path} cannot be read: {error}; start over with --again."
        ) from error
    other = _differ(folder, config, content)
    reached, way_out = _reached(folder), "use another --name, or replace the existing run with --again."
    # The checkpoint decides whether the data are the same up to rounding.
    open_ = list(other) == ["epochs"] or (list(other) == ["content"] and reached >= 0 and not done)
    if other and not (resume and open_):
        what = "finished" if done else "unfinished"
        raise ValueError(f"{folder.path} has another, {what} run: {', '.join(other.values())}; {way_out}")
    if "epochs" in other:
        why = fixed_length(config) or ("it has no checkpoint" if reached < 0 else None)
        if why is not None:
            raise ValueError(
                f"the run in {folder.path} cannot continue with another number of epochs ({other['epochs']}): {why}; "
                f"{way_out}"
            )
    elif done:
        raise ValueError(
            f"the run in {folder.path} is finished; show it with `flatmin show {folder.path}`, or start it over with "
            "--again."
        )
    if not resume:
        raise ValueError(
            f"the run in {folder.path} is unfinished; continue it with --resume, or start it over with --again."
        )
    if reached < 0:
        return f"{folder.path} has no checkpoint, so the run starts from the beginning."
    return None


def _before(folder: RunFolder, preset: str, config: RunConfig, content: Content | None, updates: int) -> str:
    """Prepare to continue a run with fewer epochs, if there is one; otherwise say how the most similar run differs."""
    from flatmin.train.folder import RunFolder
    from flatmin.train.state import fixed_length

    runs: list[tuple[RunFolder, dict[str, str]]] = []
    for place in sorted(folder.path.parent.glob(f"{glob.escape(_slug(preset, config))}-s*")):
        with suppress(ValueError):  # a run that cannot be read cannot be continued either
            there = RunFolder(place)
            runs.append((there, _differ(there, config, content)))
    why = fixed_length(config)
    fewer = [run for run in runs if list(run[1]) == ["epochs"] and 0 <= _reached(run[0]) <= updates]
    if fewer and why is None:
        there, other = max(fewer, key=lambda run: _reached(run[0]))
        folder.take_over(there)
        return f"{folder.path.name} continues {there.path.name}, in which {other['epochs']}."
    begins = f"there is no run with these settings to continue, so {folder.path.name} starts from the beginning"
    if not runs:
        return f"{begins}."
    there, other = min(runs, key=lambda run: len(run[1]))
    if not other:
        return (
            f"{there.path} is a run with these settings of an earlier version, which did not record its data, so "
            f"{folder.path.name} starts from the beginning; to continue the earlier run: "
            f"`flatmin train {there.path} --resume`."
        )
    if list(other) == ["epochs"]:
        return f"{begins}: in {there.path.name} {other['epochs']}, and {why or 'it has no checkpoint that fits'}."
    return f"{begins}; in {there.path.name}, {', '.join(other.values())}."


def _reached(folder: RunFolder) -> int:
    """The number of updates at the last checkpoint; -1 if there is none."""
    from flatmin.train import checkpoint

    return max((checkpoint.step_of(path) for path in checkpoint.listed(folder.checkpoints)), default=-1)


def _differ(folder: RunFolder, config: RunConfig, content: Content | None) -> dict[str, str]:
    """How the settings of the existing run differ, by name; "content" means other data.

    Raises:
        ValueError: the run cannot be read.
    """
    from flatmin.train.config import differences, identity

    recorded, labels = folder.config()
    other = differences(identity(recorded), config)
    if content is not None and labels.get("content", content.digest) != content.digest:
        other["content"] = "the data differ"
    return other
