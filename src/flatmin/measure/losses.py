"""Losses other than the training loss: the error rate, and losses of normalised logits."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatmin.measure.problem import Problem


def error_rate(problem: Problem, weights: Sequence[Tensor] | None = None) -> float:
    """The error rate (0-1 loss): the share of targets whose class does not have the largest output.

        (1 / T) sum_i [argmax_c f_c(x_i) != y_i]

    Targets that the loss ignores are not counted. Class weights of the loss are not used.

    Args:
        problem: the function. Its logits have shape (N, K, ...) or (N, ..., K), see `logits_of`; its targets are class
            indices of shape (N, ...).
        weights: weights at which to evaluate, one tensor per selected weight. Default None: the model's own.

    Returns:
        A share in [0, 1]; NaN if an output is not finite.

    Raises:
        ValueError: the outputs are not logits, or the targets are not class indices.
    """
    ignored = problem.ignored
    wrong = counted = 0.0
    with problem.guard(), torch.no_grad():
        for batch in problem.batches:
            outputs, targets = problem.outputs(batch, weights), batch.targets
            given = answers(outputs, targets)
            counts = targets != ignored
            missed = ((given != targets) & counts).sum()
            # The argmax of outputs with NaN is meaningless.
            wrong += float(missed) if bool(torch.isfinite(logits_of(outputs)).all()) else math.nan
            counted += float(counts.sum())
    total = problem.reduced(torch.tensor([wrong, counted], dtype=torch.float64).to(problem.device)).tolist()
    return float(total[0] / total[1])


def answers(outputs: Any, targets: Any) -> Tensor:
    """Return the predicted classes: the argmax over dimension 1, as in torch's cross-entropy, or the last dimension.

    Args:
        outputs: outputs of a model; see `logits_of`.
        targets: class indices. Their shape decides which dimension holds the classes.

    Raises:
        ValueError: the outputs are not logits, or the targets are not class indices.
    """
    logits = logits_of(outputs)
    dim = class_dimension(logits, targets)
    if dim is None:
        given = targets if isinstance(targets, Tensor) else None
        about = type(targets).__name__ if given is None else f"{given.dtype} {tuple(given.shape)}"
        raise ValueError(
            "an accuracy or error rate needs outputs of shape (N, K, ...) or (N, ..., K) and class indices of shape "
            f"(N, ...); got {logits.dtype} {tuple(logits.shape)} and {about}."
        )
    return logits.argmax(dim)


def class_dimension(logits: Tensor, targets: Any) -> int | None:
    """The dimension of the classes, 1 or the last, by the shape of the class indices; None if neither matches."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or logits.dim() != targets.dim() + 1:
        return None
    shape = list(logits.shape)
    return next((dim for dim in (1, logits.dim() - 1) if shape[:dim] + shape[dim + 1 :] == list(targets.shape)), None)


def logits_of(outputs: Any) -> Tensor:
    """Return the logits from a model's outputs.

    They are: the outputs themselves if these are one tensor; the attribute or key "logits", as in Hugging Face models;
    or the only floating-point tensor.

    Raises:
        ValueError: there is no such tensor, or several.
    """
    return _split(outputs)[0]


def with_logits(outputs: Any, logits: Tensor) -> Any:
    """Return the same outputs with other logits; see `logits_of`.

    Raises:
        ValueError: the outputs have no tensor of logits, or several.
    """
    return _split(outputs)[1](logits)


def _split(outputs: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The logits, and a function that returns the outputs with other logits."""
    if isinstance(outputs, Tensor):
        return outputs, lambda logits: logits
    parts = _parts(outputs)
    floating = [k for k, v in parts.items() if isinstance(v, Tensor) and v.is_floating_point()]
    named = ["logits"] if "logits" in floating else floating
    if len(named) != 1:
        contents = f"{len(named)} tensors, none called 'logits'" if named else "no tensor"
        raise ValueError(
            f"cannot find the logits in the model's output, a {type(outputs).__name__} with {contents}; use a model "
            "that returns only the logits, or an object with .logits."
        )
    (name,) = named
    logits: Tensor = parts[name]

    def put(other: Tensor) -> Any:
        if isinstance(outputs, tuple):
            made = [other if k == name else v for k, v in parts.items()]
            return outputs._make(made) if hasattr(outputs, "_make") else tuple(made)
        if isinstance(outputs, list):
            return [other if k == name else v for k, v in parts.items()]
        clone = copy.copy(outputs)
        if isinstance(clone, MutableMapping):
            clone[name] = other
        else:
            object.__setattr__(clone, name, other)
        return clone

    return logits, put


def _parts(outputs: Any) -> dict[Any, Any]:
    """The entries of the outputs by name or position."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if isinstance(outputs, tuple) and hasattr(outputs, "_asdict"):
        return dict(outputs._asdict())
    if isinstance(outputs, (tuple, list)):
        return dict(enumerate(outputs))
    if dataclasses.is_dataclass(outputs):
        return {f.name: getattr(outputs, f.name) for f in dataclasses.fields(outputs)}
    named = {"logits": outputs.logits} if hasattr(outputs, "logits") else {}
    return {**getattr(outputs, "__dict__", {}), **named}


class LogitNormalised(nn.Module):
    """A loss of normalised logits: without the mean over classes, and divided by their norm.

        l((z - mean(z)) / max(||z - mean(z)||_2, 1e-10), y)

    The mean and the norm are taken over the classes of each example. Two networks whose outputs differ only in scale
    have the same loss and so the same sharpness. With plain cross-entropy, the more confident one would be flatter.

    The logits are found by `logits_of`, and the loss is called with the outputs in which the normalised logits replace
    them. The classes are in dimension 1, as for nn.CrossEntropyLoss, or in the last dimension if the targets have shape
    (N, ...) and the logits (N, ..., K).

    Args:
        loss: (logits, targets) -> scalar; a module such as nn.CrossEntropyLoss(), or a function.

    Source: Andriushchenko, Croce, Mueller, Hein & Flammarion, ICML 2023. The lower bound of the norm is from their
    code.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.inner = nn.CrossEntropyLoss() if loss is F.cross_entropy else loss
        self.__name__ = f"logit-normalised {getattr(self.inner, '__name__', type(self.inner).__name__)}"
        if hasattr(self.inner, "reduction"):
            self.reduction = self.inner.reduction

    @property
    def ignore_index(self) -> int:
        """The ignored label of the inner loss (default -100)."""
        return int(getattr(self.inner, "ignore_index", -100))

    @property
    def weight(self) -> Any:
        """Class weights of the inner loss, or None."""
        return getattr(self.inner, "weight", None)

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of the normalised logits."""
        logits = logits_of(outputs)
        classes = class_dimension(logits, targets)
        classes = min(1, logits.dim() - 1) if classes is None else classes
        normal = F.normalize(logits - logits.mean(classes, keepdim=True), dim=classes, eps=1e-10)
        z = with_logits(outputs, normal)
        if not hasattr(self, "reduction"):
            return self.inner(z, targets)
        # A copy of this module with another `reduction` shares the inner loss, so the inner loss must not be changed.
        inner: Any = copy.copy(self.inner)
        inner.reduction = self.reduction
        return inner(z, targets)  # type: ignore[no-any-return]
