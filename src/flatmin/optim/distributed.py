"""Data-parallel replicas: which replicas share an ascent."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from flatmin.methods import Gradients, Recipe
from flatmin.optim.support import Loop, in_group, processes, refusal
from flatmin.optim.tensors import is_sharded

AscentSync = Literal["all", "none"] | int


def lent(gradient: Tensor) -> bool:
    """Whether a gradient is a view of a DistributedDataParallel bucket, which the next backward overwrites."""
    if not in_group():
        return False
    return gradient._is_view() and not (gradient.is_sparse or is_sharded(gradient))


class Replicas:
    """Keeps pass 1 local to a replica or to a group of replicas, according to `ascent_sync`.

    Args:
        ascent_sync: "all", "none", or how many consecutive ranks share one ascent.
        model: the model with its `DistributedDataParallel` modules.
        recipe: the recipe.

    Attributes:
        modules: the `DistributedDataParallel` modules of the model.
        local: whether pass 1 runs without all replicas.

    Raises:
        ValueError: an unknown word or size, no `DistributedDataParallel` module, or a recipe or module that does not
            support local ascents.
    """

    def __init__(self, ascent_sync: AscentSync, model: nn.Module | None, recipe: Recipe) -> None:
        self.modules = [] if model is None else [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        self._size, self._group = _group_size(ascent_sync), None
        world = processes()
        self.local = self._size is not None and self._size < world
        if self._size is None:
            return
        self._check(recipe)
        if self.local and self._size > 1:
            if world % self._size:
                raise ValueError(f"ascent_sync={self._size} must divide the number of processes, {world}.")
            self._group, _ = distributed.new_subgroups(self._size)

    def _check(self, recipe: Recipe) -> None:
        if not self.modules:
            raise ValueError(
                "ascent_sync needs a DistributedDataParallel module, built after the process group: pass it as model=."
            )
        if any(m.static_graph for m in self.modules):
            raise ValueError(
                "ascent_sync other than 'all' needs a DistributedDataParallel without static_graph=True, which would "
                "use the graph of the first pass, without communication, for all passes."
            )
        if why := refusal(recipe, Loop.LOCAL):
            raise ValueError(f"{recipe.name} {why}: use ascent_sync='all'.")

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Context of a pass without communication."""
        with contextlib.ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(module.no_sync())
            yield

    @staticmethod
    def lends(grads: Gradients) -> bool:
        """Whether gradients are views of a bucket, which change with the next backward pass."""
        return any(g is not None and lent(g) for g in grads)

    def agree_(self, flag: Tensor) -> None:
        """Set a scalar to its maximum over the replicas, if their first passes differ."""
        if self.local:
            distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.modules[0].process_group)

    def average(self, grads: Gradients, weights: Sequence[Tensor]) -> Gradients:
        """The mean gradients over this process's group, in one message; None where no process has a gradient."""
        if self._group is None or not self.local:
            return grads
        assert self._size is not None
        zeros = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)]
        dense = [g.to_dense() if g.is_sparse else g for g in zeros]
        wide = functools.reduce(torch.promote_types, (g.dtype for g in dense), torch.float32)
        present = torch.tensor([g is not None for g in grads], dtype=wide, device=dense[0].device)
        message = torch.cat([present, *(g.reshape(-1).to(present) for g in dense)])
        distributed.all_reduce(message, group=self._group)
        held, *parts = message.split([len(grads), *(g.numel() for g in dense)])
        # The flags of the other processes are needed only if a gradient is missing here.
        counts = held.tolist() if any(g is None for g in grads) else [1.0] * len(grads)
        return [
            (p / self._size).view_as(g).to(g.dtype) if count else None
            for p, g, count in zip(parts, dense, counts, strict=True)
        ]


def _group_size(ascent_sync: AscentSync) -> int | None:
    if ascent_sync == "all":
        return None
    if ascent_sync == "none":
        return 1
    if isinstance(ascent_sync, int) and not isinstance(ascent_sync, bool) and ascent_sync >= 1:
        return ascent_sync
    raise ValueError(f"ascent_sync must be 'all', 'none' or a number of ranks, got {ascent_sync!r}.")
