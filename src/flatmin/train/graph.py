"""A whole update, all its passes and the base's step, as one CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flatmin.optim.capture import Captured
from flatmin.optim.support import capture_refusal
from flatmin.train.feed import Batch

if TYPE_CHECKING:
    from flatmin.train.trainer import Step, Trainer

# Before the capture: what an update makes once (the base's state, the recipe's memory, buffers) must be there.
_EAGER = 5


class Graphed:
    """Runs a trainer's updates: the first few one kernel after the other, then by repeating a captured one.

    A graph repeats the same kernels on the same memory. So batches of another size (the last of an epoch) run as
    usual, the learning rate lies in a tensor, and what an update does must not depend on its number or on draws.

    Args:
        trainer: whose updates are run.

    Raises:
        ValueError: a recipe or a set-up that cannot be captured.
    """

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        reason = capture_refusal(trainer.recipe)
        if reason is not None:
            raise ValueError(f"graph=true cannot serve {config.method}: it {reason}.")
        if config.precision == "fp16":
            raise ValueError("graph=true cannot serve precision=fp16, whose scaler waits for every update; use bf16.")
        if trainer.world.size > 1:
            raise ValueError("graph=true is for one process; leave it out under torchrun.")
        self._trainer = trainer
        self._size = config.batch_size
        self._eager = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._gradients = 0

    def step(self, batch: Batch, update: Callable[[Batch], Step]) -> Step:
        """One update.

        Args:
            batch: what it sees.
            update: runs it kernel by kernel.

        Raises:
            ValueError: the model draws random numbers, which a graph cannot give to both passes alike.
        """
        if len(batch) != self._size:
            return update(batch)
        if self._graph is None and self._eager < _EAGER:
            self._eager += 1
            return self._watched(batch, update)
        if self._graph is None:
            graph = self._graph = self._capture(batch, update)
        else:
            graph = self._graph
            self._captured.repeat()
            self._trainer.gradients += self._gradients
        self._x.copy_(batch.x)
        self._y.copy_(batch.y)
        graph.replay()
        return self._step.copied()

    def _watched(self, batch: Batch, update: Callable[[Batch], Step]) -> Step:
        """An update on a stream of its own, as captures are, that must not draw."""
        before = torch.cuda.get_rng_state(), torch.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step = update(batch)
        torch.cuda.current_stream().wait_stream(stream)
        after = torch.cuda.get_rng_state(), torch.get_rng_state()
        if not all(map(torch.equal, before, after)):
            raise ValueError(
                "graph=true cannot serve this model: it draws random numbers (dropout), and a graph cannot give both "
                "passes the same masks; leave out graph."
            )
        return step

    def _capture(self, batch: Batch, update: Callable[[Batch], Step]) -> torch.cuda.CUDAGraph:
        self._x, self._y = batch.x.clone(), batch.y.clone()
        before = self._trainer.gradients
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # old graphs hold memory, and none may be freed during the capture
        torch.cuda.synchronize()
        # Only this thread's calls are captured: others pin batches meanwhile.
        capture = torch.cuda.graph(graph, capture_error_mode="thread_local")
        with Captured(self._trainer.optimizer) as self._captured, capture:
            self._step = update(Batch(self._x, self._y, batch.index))
        self._gradients = self._trainer.gradients - before
        return graph


def tensor_rate(lr: float, device: str) -> Tensor:
    """A learning rate that a captured step reads anew each time."""
    return torch.tensor(lr, dtype=torch.float32, device=device)
