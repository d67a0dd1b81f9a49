"""A training of two processes under DistributedDataParallel that may be killed at any moment and started again."""

from __future__ import annotations

import io
import os
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flatmin
from tests.dist.pool import end_with_parent
from tests.helpers import BASES, batch, noisy_net, recipe_of, wrap_fitting

WORLD = 2


@dataclass(frozen=True)
class Plan:
    """What is trained, where its checkpoint lies, and how slowly it goes.

    every: steps between checkpoints. pace: seconds that each step and the middle of each write take, so that a kill
    finds something to interrupt.
    """

    method: str
    folder: Path
    steps: int
    every: int = 2
    pace: float = 0.0

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def half_written(self) -> Path:
        return self.folder / "checkpoint.pt.tmp"

    def saved(self) -> dict | None:
        """The last checkpoint."""
        return torch.load(self.checkpoint, weights_only=True) if self.checkpoint.exists() else None


class Training:
    """One rank's model, optimizer and scheduler, from the last checkpoint if there is one."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.rank = plan, rank
        saved = plan.saved()
        # What a checkpoint left out would continue from other values than those that were lost.
        seed = 0 if saved is None else 9
        net = noisy_net(seed)
        self.model = DistributedDataParallel(net)
        self.criterion = flatmin.Criterion(nn.CrossEntropyLoss())
        self.optimizer = wrap_fitting(
            BASES["sgd"](net.parameters()),
            recipe_of(plan.method),
            rho=0.1,
            model=self.model,
            criterion=self.criterion,
            seed=seed,
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, plan.steps)
        torch.manual_seed(100 * (seed + 1) + rank)
        self.step = 0
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])
            torch.set_rng_state(saved["rng"][rank])
            self.step = saved["step"]

    def advance(self) -> None:
        """One step on this rank's batch."""
        x, y = batch(WORLD * self.step + self.rank)

        def closure():
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(x), y)
            loss.backward()
            return loss

        self.optimizer.step(closure)
        self.scheduler.step()
        self.step += 1
        time.sleep(self.plan.pace)

    def save(self, half_way) -> None:
        """Write the checkpoint so that at any moment a whole one is there; `half_way` is called in the middle."""
        rng = [torch.empty_like(torch.get_rng_state()) for _ in range(WORLD)]
        dist.all_gather(rng, torch.get_rng_state())
        if self.rank != 0:
            return
        written = io.BytesIO()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": rng,
            "step": self.step,
        }
        torch.save(state, written)
        content = written.getvalue()
        with open(self.plan.half_written, "wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            half_way(self.step)
            file.write(content[len(content) // 2 :])
        os.replace(self.plan.half_written, self.plan.checkpoint)


def train(rank: int, plan: Plan, store: Path, hold: int | None, pipe: Connection) -> None:
    """The life of one rank; says its steps into the pipe.

    `hold`: the first checkpoint at this step or later is never finished; there it waits to be killed.
    """
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)

    def half_way(step: int) -> None:
        time.sleep(plan.pace)
        if hold is not None and step >= hold:
            pipe.send(("held", step))
            threading.Event().wait()

    try:
        dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=WORLD)
        training = Training(plan, rank)
        pipe.send(("start", training.step))
        while training.step < plan.steps:
            training.advance()
            pipe.send(("step", training.step))
            if training.step % plan.every == 0 or training.step == plan.steps:
                training.save(half_way)
        pipe.send(("end", training.step))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
    # Closing the process group can deadlock in torch; nothing is left to do.
    os._exit(0)
