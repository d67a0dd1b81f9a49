"""Runs the closures of a step, one for each micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.methods import Gradients, accumulate
from flatmin.optim.containers import detached, loss_in
from flatmin.optim.other_gradients import OtherGradients

Closure = Callable[[], Any]


def as_list(closure: Closure | Sequence[Closure]) -> list[Closure]:
    """The closures as a list.

    Raises:
        TypeError: a closure is not callable.
        ValueError: the list is empty.
    """
    closures: list[Any] = list(closure) if isinstance(closure, (list, tuple)) else [closure]
    for one in closures:
        if not callable(one):
            raise TypeError(f"closure must be callable, got {type(one).__name__}.")
    if not closures:
        raise ValueError("step() got an empty list of closures.")
    return closures


def run_all(closures: Sequence[Closure], weights: Sequence[Tensor], others: OtherGradients) -> Any:
    """Run all closures; leave the mean of their gradients in the weights and return the mean of their losses.

    The gradients are summed outside the closures, because each closure may clear them.
    """
    share = 1.0 / len(closures)
    losses: list[Any] = []
    total: Gradients = []
    for closure in closures:
        for w in weights:
            w.grad = None
        if others.any:
            others.restart()
        losses.append(detached(loss_in(closure())))
        with torch.no_grad():
            total = accumulate(total, [w.grad for w in weights], share)
            if others.any:
                others.collect(share)
    for w, g in zip(weights, total, strict=True):
        w.grad = g
    return mean_loss(losses)


def mean_loss(losses: Sequence[Any]) -> Any:
    """The mean of the losses of micro-batches; None if a closure returned no loss."""
    if any(x is None for x in losses):
        return None
    bad = next((x for x in losses if not isinstance(x, (Tensor, int, float))), None)
    if bad is not None:
        raise TypeError(
            "each closure of a list must return the loss, or a dict, tuple or object that holds it as 'loss' or as its "
            f"first item; got {type(bad).__name__}."
        )
    return sum(losses) / len(losses)


class Probe:
    """Finds out whether a closure clears gradients, by setting one gradient to zeros before the closure.

    Args:
        weight: the weight whose gradient is set.

    Attributes:
        added: whether the closure added to this gradient instead of clearing it.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self.added = False

    def put(self) -> None:
        """Set the gradient; call it before the closure."""
        self._weight.grad = self._zeros = torch.zeros_like(self._weight)

    def judge(self) -> None:
        """Look at the gradient after the closure; remove it if the closure has not used it."""
        g = self._weight.grad
        if g is None or g is not self._zeros:
            return
        if g._version == 0:
            self._weight.grad = None
        self.added = g._version == 1
