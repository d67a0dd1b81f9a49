"""A run's state as a checkpoint holds it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from flatmin.train.config import identity
from flatmin.train.processes import on_cpu
from flatmin.train.result import Epoch

if TYPE_CHECKING:
    from flatmin.train.run import Run


def state_of(run: Run, *, inside: bool) -> dict[str, Any]:
    """What a run needs to go on; all processes must call it.

    Args:
        run: which.
        inside: whether the present epoch goes on.
    """
    return {
        "config": identity(run.config),
        "processes": run.world.size,
        "epoch": run.epoch,
        "position": run.position,
        "trainer": run.trainer.state_dict(inside=inside),
        "logged": list(run.logged),
        "lines": [dataclasses.asdict(line) for line in run.lines],
        "best": None if run.best is None else run.best.epoch,
        "best_state": run.best_state,
        "skips": run.watch.skips,
        "ranks": run.world.gathered(_own(run)),
    }


def restore(run: Run, state: dict[str, Any]) -> None:
    """Put a run where `state_of` was called.

    Raises:
        ValueError: the state is another run's.
    """
    known, mine = state["config"], identity(run.config)
    for key in mine:
        if known.get(key) != mine[key]:
            raise ValueError(
                f"the checkpoint in {run.folder and run.folder.checkpoints} is of another run: {key} is "
                f"{known.get(key)!r} there and {mine[key]!r} here; use the same settings, or another folder."
            )
    if state["processes"] != run.world.size:
        raise ValueError(
            f"the checkpoint was written by {state['processes']} process(es), and this run has {run.world.size}; "
            "start as many, so that the run goes on as it was."
        )
    own = state["ranks"][run.world.rank]
    if own["optimizer"] is not None:
        state["trainer"]["optimizer"] = own["optimizer"]
    run.trainer.load_state_dict(state["trainer"])
    run.trainer.previous = own["previous"]
    run.epoch, run.position, run.watch.skips = state["epoch"], state["position"], state["skips"]
    run.tally.load_state_dict(own["tally"], run.config.device)
    run.logged = tuple(state["logged"])
    run.watch.begin(len(run.tally))
    run.lines = [Epoch(**line) for line in state["lines"]]
    run.best = next((line for line in run.lines if line.epoch == state["best"]), None)
    run.best_state = state["best_state"]
    torch.set_rng_state(own["cpu"])
    if own["cuda"] is not None:
        torch.cuda.set_rng_state(own["cuda"])


def _own(run: Run) -> dict[str, Any]:
    """What each process has for itself."""
    cuda = torch.cuda.get_rng_state() if run.config.device == "cuda" else None
    found = {
        "cpu": torch.get_rng_state(),
        "cuda": cuda,
        "previous": run.trainer.previous,
        "tally": run.tally.state_dict(),
        "optimizer": None,
    }
    if run.config.ascent_sync != "all":
        found["optimizer"] = on_cpu(run.trainer.optimizer.state_dict())
    return found
