"""One training run from its first step to its result, resumable at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext

import torch
from torch import nn

from flatmin.data.dataset import Data
from flatmin.train import checkpoint, measuring
from flatmin.train.config import RunConfig, derive_seed, differences, identity
from flatmin.train.events import EpochEnded, OnEvent, Warned
from flatmin.train.fingerprint import Content, OtherDataError, content_of
from flatmin.train.folder import RunFolder
from flatmin.train.interrupt import Interruption
from flatmin.train.numerics import numerics
from flatmin.train.options import Options
from flatmin.train.processes import world_of
from flatmin.train.result import Epoch, Result
from flatmin.train.run import TrainingRun
from flatmin.train.sources import check_machine
from flatmin.train.state import changed_data
from flatmin.train.trainer import Trainer


def train(
    config: RunConfig,
    *,
    folder: RunFolder | None = None,
    resume: bool = False,
    options: Options | None = None,
    labels: Mapping[str, str] | None = None,
    data: Data | None = None,
    content: Content | None = None,
    on_event: OnEvent | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_end: Callable[[nn.Module], None] | None = None,
) -> Result:
    """Train once.

    The same configuration gives the same numbers bit for bit on one CPU with one number of threads, also if the run is
    interrupted and continues from a checkpoint; on a GPU with `deterministic`. The global random state is left as it
    was. Under `torchrun` all processes call this; rank 0 writes files and calls the listeners.

    Args:
        config: the run.
        folder: where it is written. Default: nowhere, and without checkpoints.
        resume: continue from the folder's last good checkpoint, or from the start if there is none.
        options: Default `Options()`.
        labels: further entries of config.json.
        data: already loaded data of this configuration. Default: loaded here.
        content: what the data must be. Default: any.
        on_event: called with the events of `flatmin.train.events`.
        on_epoch: called with every epoch's line.
        on_end: called with the model and its chosen weights; not where the run failed.

    Returns:
        What the run ended with; `failure` says why, if it did not reach its end.

    Raises:
        ValueError: a configuration that names something unknown or that does not fit together, or a folder with the
            checkpoint of another run, or in which another process trains.
        flatmin.train.fingerprint.OtherDataError: the data are not `content`, or not those of the checkpoint.
        OSError: a file could not be read or written.
        TrainingInterrupted: by Ctrl-C or SIGTERM, with a folder and in one process, after writing a checkpoint.
    """
    options = Options() if options is None else options
    check_machine(config)
    devices = [] if config.device == "cpu" else [torch.device(config.device)]
    with ExitStack() as stack:
        stack.enter_context(numerics(config))
        world = stack.enter_context(world_of(config.device))
        stack.enter_context(torch.random.fork_rng(devices=devices))
        torch.manual_seed(derive_seed(config.seed, "training" if world.first else f"training:{world.rank}"))
        if config.parallel == "fsdp" and world.size > 1 and (config.measure or options.measure_every):
            raise ValueError("measuring needs whole weights; with parallel=fsdp use `flatmin measure` after the run.")
        trainer = Trainer(config, data=data, world=world, diagnostics=options.diagnostics)
        measuring.check(trainer, options)
        listeners: list[OnEvent] = [] if on_event is None else [on_event]
        if on_epoch is not None:
            listeners.append(lambda event: on_epoch(event.line) if isinstance(event, EpochEnded) else None)
        if options.trackers and folder is not None and world.first:
            # Before anything is written: a package may be missing.
            listeners += _trackers(options, folder, resume, listeners, stack)
        if folder is not None and world.first:
            stack.enter_context(folder.hold())
        if resume and folder is not None and world.first:
            _check_resumable(folder, config)
        words = dict(labels or {})
        content_here = None
        if folder is not None or content is not None:
            content_here = content_of(config, trainer.data)
            if content is not None and content_here is not None and not content.agrees(content_here):
                raise OtherDataError(f"the data are not those that the run was planned with: {changed_data(config)}")
            words |= {} if content_here is None else {"content": content_here.digest}
        run = TrainingRun(trainer, folder, options, listeners if world.first else [], content_here)
        run.begin(resume, words)
        handled = folder is not None and world.size == 1 and options.signals
        with Interruption() if handled else nullcontext() as interruption:
            result = run.go(interruption, words)
        if on_end is not None and result.failure is None:
            on_end(trainer.model)
        return result


def _check_resumable(folder: RunFolder, config: RunConfig) -> None:
    """Refuse to start over in place of a run that is finished or has other settings.

    Raises:
        ValueError: there is such a run and no checkpoint that could be continued.
    """
    finished = folder.finished and folder.result().failure is None
    if not folder.begun or (checkpoint.listed(folder.checkpoints) and not finished):
        return
    other = differences(identity(folder.config()[0]), config)
    if finished and not other:
        raise ValueError(f"{folder.path} holds a finished run, so there is nothing to continue; leave out resume.")
    if other and not (list(other) == ["epochs"] and checkpoint.listed(folder.checkpoints)):
        state = "finished run" if finished else "run"
        raise ValueError(
            f"{folder.path} holds a {state} of other settings and no checkpoint to continue from: "
            f"{', '.join(other.values())}; name another folder, or leave out resume to start over in this one."
        )


def _trackers(
    options: Options, folder: RunFolder, resume: bool, listeners: list[OnEvent], stack: ExitStack
) -> list[OnEvent]:
    """The requested trackers, closed with the stack; one that fails is disabled with a warning."""
    from flatmin.train.trackers import Safely, make_tracker

    def warn(text: str) -> None:
        for listener in listeners:
            listener(Warned(text=text))

    trackers: list[OnEvent] = []
    for name in options.trackers:
        tracker = make_tracker(name, folder=folder.path, run=folder.path.name, project=options.project, resume=resume)
        safe = Safely(tracker, warn)
        stack.callback(safe.close)
        trackers.append(safe)
    return trackers
