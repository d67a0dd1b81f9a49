"""The loss object through which a method can climb another loss than it descends."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flatmin.parts import Objective, SameLoss


class Speaker(Protocol):
    """What the criterion asks of the optimizer it is bound to."""

    def current_role(self) -> str:
        """Which pass is open: "ascent" or "descent"."""


class Criterion(nn.Module):
    """An ordinary loss that knows which pass it is in.

    Replace the loss constructor and hand the object to the optimizer; nothing else in the loop changes:

        >>> import torch, flatmin
        >>> model = torch.nn.Linear(4, 3)
        >>> criterion = flatmin.Criterion(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
        >>> optimizer = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "bisam-log", criterion=criterion)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).shape
        torch.Size([])

    In an ascent pass of a method with its own ascent loss, the returned tensor has the *value* of the wrapped loss
    and the *gradient* of the ascent loss, so that what a loop logs is always the descent loss. Without gradients
    (evaluation), in descent passes, unbound, or with methods that climb the same loss it is the wrapped loss.

    Args:
        loss: callable (outputs, target) -> scalar, e.g. `torch.nn.CrossEntropyLoss()`.

    Raises:
        TypeError: loss is not callable.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"Criterion wraps a callable (outputs, target) -> loss, got {type(loss).__name__}.")
        self.loss = loss
        self.ascent_calls = 0
        self._objective: Objective = SameLoss()
        self._speaker: weakref.ref[Any] | None = None

    def bind(self, speaker: Speaker, objective: Objective) -> None:
        """Called by the optimizer. A criterion serves one optimizer, the one bound last."""
        self._speaker, self._objective = weakref.ref(speaker), objective

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        speaker = None if self._speaker is None else self._speaker()
        climbs = speaker is not None and torch.is_grad_enabled() and speaker.current_role() == "ascent"
        ascent = self._objective.ascent(outputs, target) if climbs else None
        if ascent is None:
            return self.loss(outputs, target)
        self.ascent_calls += 1
        with torch.no_grad():
            descent = self.loss(outputs, target)
        return _ValueOf.apply(descent, ascent)  # type: ignore[no-any-return, no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_speaker": None, "_objective": SameLoss()}

    def extra_repr(self) -> str:
        return "" if isinstance(self.loss, nn.Module) else repr(self.loss)


class _ValueOf(torch.autograd.Function):
    """The value of one scalar with the gradient of another, exact also where either is not finite."""

    @staticmethod
    def forward(value: Tensor, source: Tensor) -> Tensor:
        return value.to(source.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad
