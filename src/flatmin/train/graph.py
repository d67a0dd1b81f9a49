"""A whole update, with all its passes and the base optimizer's step, as one CUDA graph."""

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

# Updates before the capture, which create the base optimizer's state, the recipe's memory and buffers.
_EAGER = 5


class Graphed:
    """Runs a trainer's updates: the first few without a graph, then by replaying a captured one.

    A graph repeats the same kernels on the same memory. Batches of another size (the last one of an epoch) therefore
    run without it, the learning rate is stored in a tensor, and an update must not depend on its number or on random
    numbers.

    Args:
        trainer: trainer whose updates are run.

    Raises:
        ValueError: the recipe or the configuration cannot be captured.
    """

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        reason = capture_refusal(trainer.recipe)
        if reason is not None:
            raise ValueError(f"graph=true does not support {config.method}: it {reason}.")
        if config.precision == "fp16":
            raise ValueError(
                "graph=true does not support precision=fp16, whose scaler waits for the GPU in every update; set "
                "precision=bf16."
            )
        if trainer.world.size > 1:
            raise ValueError("graph=true supports a single process only; leave it out under torchrun.")
        self._trainer = trainer
        self._size = config.batch_size
        self._eager = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._gradients = 0

    def step(self, batch: Batch, update: Callable[[Batch], Step]) -> Step:
        """Do one update.

        Args:
            batch: batch of the update.
            update: does the update without a graph.

        Raises:
            ValueError: the model draws random numbers; a graph cannot draw the same ones in both passes.
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
        """Do an update on a separate stream, as a capture does, and check that it draws no random numbers."""
        before = torch.cuda.get_rng_state(), torch.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step = update(batch)
        torch.cuda.current_stream().wait_stream(stream)
        after = torch.cuda.get_rng_state(), torch.get_rng_state()
        if not all(map(torch.equal, before, after)):
            raise ValueError(
                "graph=true does not support this model: it draws random numbers (dropout), and a graph cannot draw "
                "the same ones in both passes; leave out graph."
            )
        return step

    def _capture(self, batch: Batch, update: Callable[[Batch], Step]) -> torch.cuda.CUDAGraph:
        self._x, self._y = batch.x.clone(), batch.y.clone()
        before = self._trainer.gradients
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # old graphs hold memory, which must not be freed during the capture
        torch.cuda.synchronize()
        # Capture only the calls of this thread, because other threads pin batches at the same time.
        capture = torch.cuda.graph(graph, capture_error_mode="thread_local")
        with Captured(self._trainer.optimizer) as self._captured, capture:
            self._step = update(Batch(self._x, self._y, batch.index))
        self._gradients = self._trainer.gradients - before
        return graph


def tensor_rate(lr: float, device: str) -> Tensor:
    """A learning rate as a tensor, which a captured step reads in every replay."""
    return torch.tensor(lr, dtype=torch.float32, device=device)
