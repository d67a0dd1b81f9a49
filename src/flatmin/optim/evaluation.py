"""One pass of a manual training loop, as a context manager."""

from __future__ import annotations

from types import TracebackType

import torch

from flatmin.optim.step import Step


class Evaluation:
    """One pass of an update: a context around its forward and backward.

    Attributes:
        role: "ascent" or "descent".
        index: number of the pass in the step, counted from 0.
        chunk: the micro-batch to run on, counted from 0; None: the whole batch.
        entered: whether the context has been entered.
    """

    def __init__(self, step: Step, *, bracketed: bool = True) -> None:
        self._step, self._bracketed = step, bracketed
        self.role = "descent" if step.request is None else step.request.role
        self.index = step.index
        self.chunk = None if step.request is None else step.request.chunk
        self.entered = False

    def __enter__(self) -> Evaluation:
        self.entered = True
        try:
            with torch.no_grad():
                self._step.enter(bracketed=self._bracketed)
        except BaseException:
            self._step.abort()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if value is not None:
            self._step.fail(value)
        elif not self._step.over:  # abort() inside the context ends the update
            self.end()

    def end(self) -> None:
        """Take the gradients of the pass. After the last pass, u is in the `.grad` of the weights."""
        try:
            with torch.no_grad():
                self._step.leave()
        except BaseException:
            self._step.abort()
            raise
