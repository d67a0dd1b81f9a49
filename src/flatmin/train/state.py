"""The state of a run in a checkpoint."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from flatmin.train.config import RunConfig, differences, identity
from flatmin.train.fingerprint import Content, OtherDataError
from flatmin.train.processes import on_cpu
from flatmin.train.result import Epoch
from flatmin.train.schedule import BY_LENGTH
from flatmin.train.trainer import build_recipe

if TYPE_CHECKING:
    from flatmin.train.run import TrainingRun


def state_of(run: TrainingRun, *, inside: bool) -> dict[str, Any]:
    """The state that a run needs to continue; all processes must call this.

    Args:
        run: the run.
        inside: whether the current epoch is unfinished.
    """
    return {
        "config": identity(run.config),
        "content": None if run.content is None else {"digest": run.content.digest, "sums": list(run.content.sums)},
        "processes": run.world.size,
        "epoch": run.epoch,
        "position": run.position,
        "trainer": run.trainer.state_dict(inside=inside),
        "logged": list(run.logged),
        "lines": [dataclasses.asdict(line) for line in run.lines],
        "best": None if run.best is None else run.best.epoch,
        "best_state": run.best_state,
        "skips": run.monitor.skips,
        "ranks": run.world.all_gather(_own(run)),
    }


def restore(run: TrainingRun, state: dict[str, Any]) -> None:
    """Restore a run from the state that `state_of` returned.

    The number of epochs may differ, see `fixed_length`.

    Raises:
        OtherDataError: the state belongs to a run on other data.
        ValueError: the state belongs to another run.
    """
    where = f"the checkpoint in {run.folder and run.folder.checkpoints}"
    other = differences(state["config"], run.config)
    why = _not_with(run, state) if list(other) == ["epochs"] else ""
    if other and why is not None:
        reason = f" ({why})" if why else ""
        raise ValueError(
            f"{where} belongs to another run: {', '.join(other.values())}{reason}; use the same settings, or another "
            "folder."
        )
    content = state.get("content")  # checkpoints of earlier versions have none
    if content is not None and run.content is not None:
        before = Content(digest=content["digest"], sums=tuple(content["sums"]))
        if not before.agrees(run.content):
            raise OtherDataError(f"{where} belongs to a run on other data: {changed_data(run.config)}")
    if state["processes"] != run.world.size:
        raise ValueError(
            f"the checkpoint was written by {state['processes']} process(es), but this run has {run.world.size}; "
            f"start {state['processes']} process(es)."
        )
    own = state["ranks"][run.world.rank]
    if own["optimizer"] is not None:
        state["trainer"]["optimizer"] = own["optimizer"]
    run.trainer.load_state_dict(state["trainer"])
    run.trainer.previous = own["previous"]
    run.epoch, run.position, run.monitor.skips = state["epoch"], state["position"], state["skips"]
    run.meter.load_state_dict(own["tally"], run.config.device)
    run.logged = tuple(state["logged"])
    run.monitor.begin(len(run.meter))
    run.lines = [Epoch(**line) for line in state["lines"]]
    run.best = next((line for line in run.lines if line.epoch == state["best"]), None)
    run.best_state = state["best_state"]
    torch.set_rng_state(own["cpu"])
    if own["cuda"] is not None:
        torch.cuda.set_rng_state(own["cuda"])


def fixed_length(config: RunConfig) -> str | None:
    """Why a run cannot continue with another number of epochs; None if it can.

    It can continue, exactly as an uninterrupted run would, if neither the learning rates nor the method's own rules
    depend on the length of the training.
    """
    if config.schedule in BY_LENGTH:
        return f"its {config.schedule} schedule depends on the number of epochs"
    recipe = build_recipe(config)
    if recipe.for_length(1) != recipe.for_length(2):
        return f"{config.method} depends on the length of the training"
    return None


def _not_with(run: TrainingRun, state: dict[str, Any]) -> str | None:
    """Why a run with another number of epochs cannot continue from a state."""
    done = state["epoch"] + (state["position"] > 0)
    if done > run.config.epochs:
        return f"it has already reached epoch {done}"
    return fixed_length(run.config)


def changed_data(config: RunConfig) -> str:
    """What to do about changed data, for an error message."""
    if ":" in config.data:
        return (
            f"data={config.data} returned other samples, because a file that it reads has changed or it draws random "
            "numbers without a fixed seed; restore the file or fix the seed, or start over."
        )
    return f"the files in data_dir={config.data_dir} have changed; restore them, or start over."


def _own(run: TrainingRun) -> dict[str, Any]:
    """The part of the state that each process has for itself."""
    cuda = torch.cuda.get_rng_state() if run.config.device == "cuda" else None
    state = {
        "cpu": torch.get_rng_state(),
        "cuda": cuda,
        "previous": run.trainer.previous,
        "tally": run.meter.state_dict(),
        "optimizer": None,
    }
    if run.config.ascent_sync != "all":
        state["optimizer"] = on_cpu(run.trainer.optimizer.state_dict())
    return state
