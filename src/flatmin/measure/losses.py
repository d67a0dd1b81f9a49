"""Losses to measure beside the training loss: the error rate, and losses of normalised logits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatmin.measure.problem import Problem


def error_rate(problem: Problem, weights: Sequence[Tensor] | None = None) -> float:
    r"""The 0-1 loss: the share of targets that are not the class of the largest output.

    .. math::
        \frac{1}{T} \sum_i [\arg\max_c f_c(x_i) \neq y_i]

    Targets that the loss ignores do not count, class weights of the loss do not matter.

    Args:
        problem: the function; outputs of shape (N, K, ...) or else (N, ..., K), class indices of shape (N, ...).
        weights: where. Default: the model's own.

    Returns:
        A share in [0, 1]; NaN where an output is not finite.

    Raises:
        ValueError: outputs or targets of another kind.
    """
    ignored = problem.ignored
    wrong = counted = 0.0
    with problem.guard(), torch.no_grad():
        for batch in problem.batches:
            outputs, targets = problem.outputs(batch, weights), batch.targets
            kept = targets != ignored
            missed = ((answers(outputs, targets) != targets) & kept).sum()
            # A class that is chosen among NaNs is no answer.
            wrong += float(missed) if bool(torch.isfinite(outputs).all()) else math.nan
            counted += float(kept.sum())
    total = problem.reduced(torch.tensor([wrong, counted], dtype=torch.float64).to(problem.device)).tolist()
    return float(total[0] / total[1])


def answers(outputs: Any, targets: Any) -> Tensor:
    """The classes of the largest outputs; in dimension 1, as in torch's cross-entropy, or else the last.

    Raises:
        ValueError: outputs or targets of another kind.
    """
    if isinstance(outputs, Tensor) and isinstance(targets, Tensor) and not targets.is_floating_point():
        for dim in (1, -1) if outputs.dim() == targets.dim() + 1 else ():
            found = outputs.argmax(dim)
            if found.shape == targets.shape:
                return found
    given = [f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in (outputs, targets)]
    raise ValueError(
        "an accuracy or error rate needs outputs of shape (N, K, ...) or (N, ..., K) and class indices of shape "
        f"(N, ...); got {given[0]} and {given[1]}."
    )


class LogitNormalised(nn.Module):
    r"""A loss of the logits without their mean and length.

    .. math::
        \ell\left(\frac{z - \bar z}{\max(\|z - \bar z\|_2, 10^{-10})},\; y\right)

    over the classes of each example. Two nets that differ by the scale of their outputs only have the same loss, and
    so the same sharpness, where the plain cross-entropy of the more confident one is flatter.

    Args:
        loss: (logits, targets) -> scalar; a module such as nn.CrossEntropyLoss(), or a function.

    The classes are dimension 1, as for nn.CrossEntropyLoss. Source: Andriushchenko, Croce, Mueller, Hein & Flammarion,
    ICML 2023; the floor of the length is that of their code.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.inner = nn.CrossEntropyLoss() if loss is F.cross_entropy else loss
        self.__name__ = f"logit-normalised {getattr(self.inner, '__name__', type(self.inner).__name__)}"
        if hasattr(self.inner, "reduction"):
            self.reduction = self.inner.reduction

    @property
    def ignore_index(self) -> int:
        """As the inner loss's."""
        return int(getattr(self.inner, "ignore_index", -100))

    @property
    def weight(self) -> Any:
        """Class weights of the inner loss, or None."""
        return getattr(self.inner, "weight", None)

    def forward(self, logits: Tensor, targets: Any) -> Tensor:
        """The loss of the normalised logits."""
        classes = min(1, logits.dim() - 1)
        z = F.normalize(logits - logits.mean(classes, keepdim=True), dim=classes, eps=1e-10)
        if not hasattr(self, "reduction"):
            return self.inner(z, targets)
        # A copy of this module with another reduction shares its inner loss.
        inner: Any = copy.copy(self.inner)
        inner.reduction = self.reduction
        return inner(z, targets)  # type: ignore[no-any-return]
