"""Losses to measure beside the training loss: the error rate, and losses of normalised logits."""

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
    r"""The 0-1 loss: the share of targets that are not the class of the largest output.

    .. math::
        \frac{1}{T} \sum_i [\arg\max_c f_c(x_i) \neq y_i]

    Targets that the loss ignores do not count, class weights of the loss do not matter.

    Args:
        problem: the function; logits of shape (N, K, ...) or else (N, ..., K), see `logits_of`, and class indices of
            shape (N, ...).
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
            given = answers(outputs, targets)
            counts = targets != ignored
            missed = ((given != targets) & counts).sum()
            # A class that is chosen among NaNs is no answer.
            wrong += float(missed) if bool(torch.isfinite(logits_of(outputs)).all()) else math.nan
            counted += float(counts.sum())
    total = problem.reduced(torch.tensor([wrong, counted], dtype=torch.float64).to(problem.device)).tolist()
    return float(total[0] / total[1])


def answers(outputs: Any, targets: Any) -> Tensor:
    """The classes of the largest outputs; in dimension 1, as in torch's cross-entropy, or else the last.

    Args:
        outputs: of a model; see `logits_of`.
        targets: class indices.

    Raises:
        ValueError: outputs or targets of another kind.
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
    """The dimension of the classes: 1, or else the last, as the shape of the class indices has it; None without any."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or logits.dim() != targets.dim() + 1:
        return None
    shape = list(logits.shape)
    return next((dim for dim in (1, logits.dim() - 1) if shape[:dim] + shape[dim + 1 :] == list(targets.shape)), None)


def logits_of(outputs: Any) -> Tensor:
    """The logits among a model's outputs.

    Those are the outputs if they are one tensor; what they call "logits", as an attribute or a key, as Hugging Face's
    models do; or their only tensor of floating-point numbers.

    Raises:
        ValueError: none or several.
    """
    return _split(outputs)[0]


def with_logits(outputs: Any, logits: Tensor) -> Any:
    """The same outputs with other logits; see `logits_of`.

    Raises:
        ValueError: outputs whose logits are not known.
    """
    return _split(outputs)[1](logits)


def _split(outputs: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The logits, and what makes outputs of this kind with others."""
    if isinstance(outputs, Tensor):
        return outputs, lambda logits: logits
    parts = _parts(outputs)
    floating = [k for k, v in parts.items() if isinstance(v, Tensor) and v.is_floating_point()]
    named = ["logits"] if "logits" in floating else floating
    if len(named) != 1:
        contents = f"{len(named)} tensors and none called 'logits'" if named else "no tensor"
        raise ValueError(
            f"the model returned a {type(outputs).__name__} with {contents}, so its logits are not known; give a model "
            "that returns the logits alone, or an object with .logits."
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
    """The entries of outputs by name or place."""
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
    r"""A loss of the logits without their mean and length.

    .. math::
        \ell\left(\frac{z - \bar z}{\max(\|z - \bar z\|_2, 10^{-10})},\; y\right)

    over the classes of each example. Two nets that differ by the scale of their outputs only have the same loss, and
    so the same sharpness, where the plain cross-entropy of the more confident one is flatter.

    Args:
        loss: (logits, targets) -> scalar; a module such as nn.CrossEntropyLoss(), or a function.

    The logits are the outputs, or those among them, see `logits_of`; the loss is given the outputs with these in their
    place. The classes are dimension 1, as for nn.CrossEntropyLoss, or the last where the targets have the shape of
    (N, ...) for logits of (N, ..., K). Source: Andriushchenko, Croce, Mueller, Hein & Flammarion,
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

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of the normalised logits."""
        logits = logits_of(outputs)
        classes = class_dimension(logits, targets)
        classes = min(1, logits.dim() - 1) if classes is None else classes
        normal = F.normalize(logits - logits.mean(classes, keepdim=True), dim=classes, eps=1e-10)
        z = with_logits(outputs, normal)
        if not hasattr(self, "reduction"):
            return self.inner(z, targets)
        # A copy of this module with another reduction shares its inner loss.
        inner: Any = copy.copy(self.inner)
        inner.reduction = self.reduction
        return inner(z, targets)  # type: ignore[no-any-return]
