"""One pass of a manual loop, as a context."""

from __future__ import annotations

from types import TracebackType

import torch

from flatmin.optim.step import Step


class Evaluation:
    """One pass of an update: a context around forward and backward.

    Attributes:
        role: "ascent" or "descent".
        index: 0 for the first pass of the step.
        chunk: which micro-batch it runs on; None: the whole batch.
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
        elif not self._step.over:  # abort() inside ends the update
            self.end()

    def end(self) -> None:
        """Take the gradients of the pass; after the last one u lies in the weights' gradients."""
        try:
            with torch.no_grad():
                self._step.leave()
        except BaseException:
            self._step.abort()
            raise
