"""`train`: a whole training run, which can be resumed from any checkpoint."""

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
    """Train one network with one method.

    The same configuration gives bit-identical numbers on the same CPU with the same number of threads, also if the run
    is interrupted and continues from a checkpoint; on a GPU, this needs `deterministic`. The global random state is
    restored afterwards. Under `torchrun`, all processes call this function; rank 0 writes files and calls the
    listeners.

    Args:
        config: configuration of the run.
        folder: folder of the run. Default: nothing is written, and there are no checkpoints.
        resume: continue from the folder's last good checkpoint, or start from the beginning if there is none.
        options: logging, measuring and checkpoints. Default `Options()`.
        labels: additional entries of config.json.
        data: the data of this configuration, if they are already loaded. Default: load them.
        content: expected content of the data. Default: not checked.
        on_event: called with every event of `flatmin.train.events`.
        on_epoch: called with the line of every epoch.
        on_end: called with the model and its selected weights, unless the run failed.

    Returns:
        The result of the run; `failure` says why the run stopped early, if it did.

    Raises:
        ValueError: the configuration names something unknown or contradicts itself, the folder has a checkpoint of
            another run, or another process is training in it.
        flatmin.train.fingerprint.OtherDataError: the data differ from `content`, or from those of the checkpoint.
        OSError: a file cannot be read or written.
        TrainingInterrupted: Ctrl-C or SIGTERM stopped a run with a folder and one process; a checkpoint was written.
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
            raise ValueError(
                "measuring needs whole weights, which parallel=fsdp does not have; use `flatmin measure` after the run."
            )
        trainer = Trainer(config, data=data, world=world, diagnostics=options.diagnostics)
        measuring.check(trainer, options)
        listeners: list[OnEvent] = [] if on_event is None else [on_event]
        if on_epoch is not None:
            listeners.append(lambda event: on_epoch(event.line) if isinstance(event, EpochEnded) else None)
        if options.trackers and folder is not None and world.first:
            # Before anything is written, because a package may be missing.
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
                raise OtherDataError(f"the data have changed since the run was planned: {changed_data(config)}")
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
    """Make sure that `resume` does not start over in the folder of a run that is finished or has other settings.

    Raises:
        ValueError: there is such a run, and no checkpoint to continue from.
    """
    finished = folder.finished and folder.result().failure is None
    if not folder.begun or (checkpoint.listed(folder.checkpoints) and not finished):
        return
    other = differences(identity(folder.config()[0]), config)
    if finished and not other:
        raise ValueError(f"the run in {folder.path} is finished, so there is nothing to continue; leave out resume.")
    if other and not (list(other) == ["epochs"] and checkpoint.listed(folder.checkpoints)):
        state = "finished run" if finished else "run"
        raise ValueError(
            f"{folder.path} has a {state} with other settings and no checkpoint to continue from: "
            f"{', '.join(other.values())}; name another folder, or leave out resume to start over in this one."
        )


def _trackers(
    options: Options, folder: RunFolder, resume: bool, listeners: list[OnEvent], stack: ExitStack
) -> list[OnEvent]:
    """The requested trackers. The stack closes them; a tracker that fails is disabled with a warning."""
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
