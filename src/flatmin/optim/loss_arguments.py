"""Options of the user's loss: its form without reduction, its weights, and the targets that it ignores.

A loss is a module or a function, from torch or the user's own, possibly with options bound by `functools.partial`.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Loss = Callable[..., Tensor]

# Losses of torch on class logits and class indices.
_BY_CLASS = (
    "CrossEntropyLoss",
    "NLLLoss",
    "NLLLoss2d",
    "MultiMarginLoss",
    "cross_entropy",
    "nll_loss",
    "multi_margin_loss",
)


def in_order(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert outputs and target to positional arguments if they are given by name (flatmin's names or torch's)."""
    if len(args) == 1 and kwargs.keys() == {"target"}:
        return (*args, kwargs["target"]), {}
    for first in ("outputs", "input"):
        if not args and kwargs.keys() == {first, "target"}:
            return (kwargs[first], kwargs["target"]), {}
    return args, kwargs


def _function(loss: Any) -> Any:
    """The loss without `functools.partial` and `torch.compile`."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "_orig_mod", loss)


def _parameters(loss: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a call by name; empty if they cannot be inspected."""
    loss = getattr(loss, "_orig_mod", loss)
    try:
        return inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    except (TypeError, ValueError):
        return {}


def required(loss: Any) -> list[str]:
    """The names of the required arguments of a call."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [n for n, p in _parameters(loss).items() if p.kind in by_position and p.default is p.empty]


def argument(loss: Any, name: str) -> Any:
    """The value of an option: bound by a partial, a module's attribute, or a function's default; None if not there."""
    if isinstance(loss, functools.partial) and name in loss.keywords:
        return loss.keywords[name]
    loss = _function(loss)
    if isinstance(loss, nn.Module) or hasattr(loss, name):
        return getattr(loss, name, None)
    parameter = _parameters(loss).get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def unreduced(loss: Any) -> Loss | None:
    """The loss with reduction="none"; None if it has no `reduction`."""
    # Setting an attribute of a copy of a compiled module would set it on the module inside.
    loss = getattr(loss, "_orig_mod", loss)
    if isinstance(getattr(loss, "reduction", None), str):
        twin = copy.copy(loss)
        try:
            twin.reduction = "none"
        except (AttributeError, RuntimeError):  # a property, or a constant of a scripted module
            return None
        return twin  # type: ignore[no-any-return]
    return functools.partial(loss, reduction="none") if "reduction" in _parameters(loss) else None


def ignored_target(loss: Any) -> int | float | None:
    """The loss's `ignore_index`; None if it has none."""
    value = argument(loss, "ignore_index")
    return value if isinstance(value, (int, float)) else None


def class_weight(loss: Any, outputs: Any) -> Tensor | None:
    """The loss's `weight` if it has one entry for each class of the outputs; else None."""
    weight = argument(loss, "weight")
    if not (isinstance(weight, Tensor) and isinstance(outputs, Tensor) and weight.ndim == 1 < outputs.ndim):
        return None
    return weight if len(weight) in (outputs.shape[1], outputs.shape[-1]) else None


def counted_targets(loss: Any, outputs: Any, target: Any, batch: int) -> Tensor | None:
    """Which targets count: those without the `ignore_index` whose class has a weight other than 0. None: all."""
    if not isinstance(target, Tensor) or target.ndim == 0 or len(target) != batch:
        return None
    ignored, weight = ignored_target(loss), class_weight(loss, outputs)
    counted = None if ignored is None else target != ignored
    if weight is not None and not target.is_floating_point():
        index = target if counted is None else target.where(counted, 0)
        weighed = weight[index.long()] != 0
        counted = weighed if counted is None else counted & weighed
    return counted


def name_of(loss: Any) -> str:
    """The name of the loss in messages."""
    loss = _function(loss)
    return getattr(loss, "__name__", type(loss).__name__)


def check_classes(loss: Any, method: str) -> None:
    """Raise an error for losses of torch that do not take class logits.

    Raises:
        TypeError: such a loss.
    """
    kind = _function(loss)
    kind = kind if inspect.isfunction(kind) else type(kind)
    torchs = kind.__module__ in ("torch.nn.modules.loss", "torch.nn.functional")
    if torchs and kind.__name__ not in _BY_CLASS:
        raise TypeError(
            f"the ascent loss of {method} needs logits and indices of exclusive classes, as in "
            f"torch.nn.CrossEntropyLoss; {kind.__name__} has none. Choose a method without its own ascent loss."
        )


def check_weights(loss: Any, target: Any, method: str) -> None:
    """Raise an error for weights of the samples of one batch, which do not fit a part of the batch.

    Raises:
        ValueError: a `weight` or `pos_weight` with one entry for each sample.
    """
    for name in ("weight", "pos_weight"):
        given = argument(loss, name)
        if not (isinstance(given, Tensor) and isinstance(target, Tensor) and target.is_floating_point()):
            continue
        if given.ndim == target.ndim > 0 and len(given) == len(target) > 1:
            raise ValueError(
                f"{name_of(loss)} has a {name} for each sample of a batch, but {method} selects a part of the batch. "
                f"Pass a {name} without the batch dimension, or pass the weights of the samples with the target: a "
                "loss of your own on (outputs, (target, weights)), with per_sample=."
            )
