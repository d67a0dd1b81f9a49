"""The Hessian of a mean loss as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class Operator(Protocol):
    """A symmetric matrix known by its products with vectors."""

    @property
    def size(self) -> int:
        """Number of rows."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""

    @property
    def device(self) -> torch.device:
        """Of the vectors."""

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with a vector of shape (size,)."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; training flags and buffers are put back on leaving, also after an exception."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        with torch.no_grad():
            for module, name, buffer, version, kept in buffers:
                module._buffers[name] = buffer
                if buffer._version != version:  # writing to an unchanged one would spoil graphs that hold it
                    buffer.copy_(kept)


class Hessian:
    """H = d^2/dw^2 of L(w) = (1/N) sum_i loss_i(w), over a data set given in batches.

    Every batch counts by its number of examples, so an uneven last batch is exact. Products are by double backward
    (Pearlmutter 1994). The loss is taken in eval mode and without weight decay. `.grad`, buffers and training flags
    are left as they were.

    Args:
        model: maps inputs to logits.
        loss: mean loss of a batch, (logits, targets) -> scalar; twice differentiable.
        batches: pairs (inputs, targets).
        params: with respect to which weights. Default: all of the model's that require gradients.
        keep_graph: keep the graph of every batch's gradient: a product then costs about two gradients instead of
            three, and memory grows with the data. Default True.

    Raises:
        ValueError: no batches, no parameters, or a loss that is not a scalar.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Iterable[Batch],
        *,
        params: Sequence[Tensor] | None = None,
        keep_graph: bool = True,
    ) -> None:
        self._model, self._loss, self._batches = model, loss, list(batches)
        self.params = list(params) if params is not None else [p for p in model.parameters() if p.requires_grad]
        self.examples = sum(len(target) for _, target in self._batches)
        if not self.params:
            raise ValueError("the model has no parameter that requires a gradient, so it has no Hessian.")
        if not self.examples:
            raise ValueError("the Hessian needs at least one batch with at least one example.")
        self.size = sum(p.numel() for p in self.params)
        self.dtype, self.device = self.params[0].dtype, self.params[0].device
        self.products = 0
        self._graphs = list(self._gradients()) if keep_graph else None

    def _gradients(self) -> Iterator[tuple[float, list[Tensor]]]:
        """(weight, gradient with a graph) of each batch."""
        for inputs, targets in self._batches:
            with evaluating(self._model), torch.enable_grad():
                value = self._loss(self._model(inputs), targets)
                if value.dim():
                    raise ValueError(f"the loss must be the mean over a batch, got shape {tuple(value.shape)}.")
                grads = torch.autograd.grad(value, self.params, create_graph=True, materialize_grads=True)
            yield len(targets) / self.examples, list(grads)

    def matvec(self, vector: Tensor) -> Tensor:
        """H v, shape (size,).

        Args:
            vector: shape (size,), in the order of `params`.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"the Hessian takes vectors of shape ({self.size},), got {tuple(vector.shape)}.")
        pieces = vector.detach().to(self.dtype).split([p.numel() for p in self.params])
        v = [piece.view_as(p) for piece, p in zip(pieces, self.params, strict=True)]
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for weight, grads in self._graphs if self._graphs is not None else self._gradients():
            reached = [(g, u) for g, u in zip(grads, v, strict=True) if g.requires_grad]
            if reached:
                outputs, seeds = zip(*reached, strict=True)
                rows = torch.autograd.grad(
                    outputs, self.params, seeds, retain_graph=self._graphs is not None, materialize_grads=True
                )
                total.add_(torch.cat([row.reshape(-1) for row in rows]), alpha=weight)
        self.products += 1
        return total
