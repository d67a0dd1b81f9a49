"""The loss object through which a method can climb another loss than it descends, or choose among the samples."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from flatmin.parts import EverySample, Need
from flatmin.recipes import Recipe

PerSample = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PassView:
    """What a criterion must know of the pass it is called in.

    role: "ascent" or "descent". perturbed: whether the weights are away from w. graph: whether somebody will ask for
    second derivatives.
    """

    role: Literal["ascent", "descent"]
    perturbed: bool = False
    graph: bool = False


class Speaker(Protocol):
    """What the criterion asks of the optimizer it is bound to."""

    def current_pass(self) -> PassView:
        """The pass that a loss computed now belongs to."""

    def saw(self, outputs: Tensor, target: Tensor, loss: Tensor, *, perturbed: bool) -> None:
        """Told of every loss computed in training at w, and at w + eps in the descent pass."""


@dataclass(slots=True)
class Seen:
    """What one call saw, with graph, for products with second derivatives."""

    outputs: Tensor
    loss: Tensor
    scores: Tensor | None


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
    and the *gradient* of the ascent loss, so that what a loop logs is always the descent loss. In the descent pass of a
    method that chooses among the samples it is the mean over the chosen ones. Without gradients (evaluation), unbound,
    or with methods that do neither it is the wrapped loss.

    Args:
        loss: callable (outputs, target) -> scalar, e.g. `torch.nn.CrossEntropyLoss()`.
        per_sample: callable (outputs, target) -> one loss per sample, for methods that need it. Default: `loss` with
            reduction="none", if it is a module with a `reduction` and without class weights.

    Raises:
        TypeError: loss is not callable.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], per_sample: PerSample | None = None) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"Criterion wraps a callable (outputs, target) -> loss, got {type(loss).__name__}.")
        self.loss = loss
        self._per_sample = per_sample
        self._recipe = Recipe()
        self._speaker: weakref.ref[Any] | None = None
        self.forget()

    def bind(self, speaker: Speaker, recipe: Recipe) -> None:
        """Called by the optimizer. A criterion serves one optimizer, the one bound last."""
        self._speaker, self._recipe = weakref.ref(speaker), recipe

    def forget(self) -> None:
        """Drop what the passes of an update have left; called by the optimizer."""
        self.calls = 0
        self._first: list[Tensor] = []
        self.seen: list[Seen] = []

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        speaker = None if self._speaker is None else self._speaker()
        if speaker is None or not torch.is_grad_enabled():
            return self.loss(outputs, target)
        now: PassView = speaker.current_pass()
        self.calls += 1
        descent = now.role == "descent"
        ascent = None if descent else self._recipe.objective.ascent(outputs, target)
        if ascent is not None:
            with torch.no_grad():
                value = self.loss(outputs, target)
            loss: Tensor = _ValueOf.apply(value, ascent)  # type: ignore[no-untyped-call]
        else:
            loss = self._chosen(outputs, target) if descent and now.perturbed else self.loss(outputs, target)
        if not descent and self.selects:
            with torch.no_grad():
                self._first.append(self.per_sample(outputs, target))
        if now.graph:
            per_sample = Need.PER_SAMPLE in self._recipe.needs
            self.seen.append(Seen(outputs, loss, self.per_sample(outputs, target) if per_sample else None))
        if descent or not now.perturbed:
            speaker.saw(outputs, target, loss, perturbed=now.perturbed)
        return loss

    def take_seen(self) -> list[Seen]:
        """What the calls since the last backward saw; called by the optimizer."""
        seen, self.seen = self.seen, []
        return seen

    @property
    def selects(self) -> bool:
        """Whether the recipe it is bound to chooses among the samples."""
        return not isinstance(self._recipe.samples, EverySample)

    def _chosen(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The loss at w + eps of the samples that the recipe descends on."""
        if not self.selects:
            return self.loss(outputs, target)
        second = self.per_sample(outputs, target)
        first = self._first.pop(0) if self._first else None
        if first is None or first.shape != second.shape:
            raise RuntimeError(
                "this method compares each sample's loss at w and at w + eps; call the criterion equally often, on the "
                "same batches, in both passes."
            )
        index = self._recipe.samples(first, second.detach())
        if index is None:
            return self.loss(outputs, target)
        chosen = second[index]
        return chosen.sum() if getattr(self.loss, "reduction", "mean") == "sum" else chosen.mean()

    def per_sample(self, outputs: Tensor, target: Tensor) -> Tensor:
        """One loss per sample, shape (N,); further dimensions are averaged.

        Raises:
            TypeError: the wrapped loss gives none, and no `per_sample` was given.
            ValueError: a result of another length than the batch.
        """
        self.check_per_sample()
        if self._per_sample is not None:
            losses = self._per_sample(outputs, target)
        else:
            twin: Any = copy.copy(self.loss)
            twin.reduction = "none"
            losses = twin(outputs, target)
        if losses.ndim == 0 or len(losses) != len(outputs):
            raise ValueError(
                f"per-sample losses must have the batch's length {len(outputs)}, got shape {tuple(losses.shape)}."
            )
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses

    def check_per_sample(self) -> None:
        """Raise TypeError if there is no way to per-sample losses."""
        if self._per_sample is not None:
            return
        name = type(self.loss).__name__
        if getattr(self.loss, "reduction", None) not in ("mean", "sum"):
            raise TypeError(
                f"{name} gives no per-sample losses; pass Criterion(loss, per_sample=function of (outputs, target))."
            )
        if getattr(self.loss, "weight", None) is not None:
            raise TypeError(
                f"{name} weighs the classes, and the mean over some samples would need their weights; pass "
                "Criterion(loss, per_sample=function of (outputs, target))."
            )

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in ("_first", "seen")}
        return {**kept, "_speaker": None, "_recipe": Recipe(), "calls": 0, "_first": [], "seen": []}

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
