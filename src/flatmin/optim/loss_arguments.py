"""Options of the user's loss: its form without reduction, its weights, and which targets it counts.

A loss is a module of torch or one's own, a function, or either with options bound by `functools.partial`.
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
    """Outputs and target by position, also where they came by name: those of this class, or torch's."""
    if len(args) == 1 and kwargs.keys() == {"target"}:
        return (*args, kwargs["target"]), {}
    for first in ("outputs", "input"):
        if not args and kwargs.keys() == {first, "target"}:
            return (kwargs[first], kwargs["target"]), {}
    return args, kwargs


def _function(loss: Any) -> Any:
    """The loss without its partial arguments and its compilation."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "_orig_mod", loss)


def _parameters(loss: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a call, by name; none where Python cannot tell."""
    loss = getattr(loss, "_orig_mod", loss)
    try:
        return inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    except (TypeError, ValueError):
        return {}


def required(loss: Any) -> list[str]:
    """The names of the arguments that a call cannot do without."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [n for n, p in _parameters(loss).items() if p.kind in by_position and p.default is p.empty]


def argument(loss: Any, name: str) -> Any:
    """An option of the loss: bound by a partial, a module's attribute, or a function's default; None: it has none."""
    if isinstance(loss, functools.partial) and name in loss.keywords:
        return loss.keywords[name]
    loss = _function(loss)
    if isinstance(loss, nn.Module) or hasattr(loss, name):
        return getattr(loss, name, None)
    parameter = _parameters(loss).get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def unreduced(loss: Any) -> Loss | None:
    """The loss with reduction="none", if it has a `reduction`."""
    # Setting an attribute of a copy of a compiled module would set that of the module inside.
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
    """The target that the loss ignores, if it has an `ignore_index`."""
    found = argument(loss, "ignore_index")
    return found if isinstance(found, (int, float)) else None


def class_weight(loss: Any, outputs: Any) -> Tensor | None:
    """The loss's `weight`, if that is one number for each class of the outputs."""
    found = argument(loss, "weight")
    if not (isinstance(found, Tensor) and isinstance(outputs, Tensor) and found.ndim == 1 < outputs.ndim):
        return None
    return found if len(found) in (outputs.shape[1], outputs.shape[-1]) else None


def counted_targets(loss: Any, outputs: Any, target: Any, batch: int) -> Tensor | None:
    """Which targets the loss counts: those that it does not ignore, of a class whose weight is not 0; None: all."""
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
    """What to call the loss in a message."""
    loss = _function(loss)
    return getattr(loss, "__name__", type(loss).__name__)


def check_classes(loss: Any, method: str) -> None:
    """Refuse losses of torch that have no class logits.

    Raises:
        TypeError: such a loss; the method's name is in the text.
    """
    kind = _function(loss)
    kind = kind if inspect.isfunction(kind) else type(kind)
    torchs = kind.__module__ in ("torch.nn.modules.loss", "torch.nn.functional")
    if torchs and kind.__name__ not in _BY_CLASS:
        raise TypeError(
            f"{method} climbs a bound of the 0-1 loss, which needs logits and indices of exclusive classes, as in "
            f"torch.nn.CrossEntropyLoss; {kind.__name__} has none. Choose a method that climbs the loss itself."
        )


def check_weights(loss: Any, target: Any, method: str) -> None:
    """Refuse weights that belong to the samples of one batch, where some of them are chosen.

    Raises:
        ValueError: a `weight` or `pos_weight` with the batch's dimension.
    """
    for name in ("weight", "pos_weight"):
        given = argument(loss, name)
        if not (isinstance(given, Tensor) and isinstance(target, Tensor) and target.is_floating_point()):
            continue
        if given.ndim == target.ndim > 0 and len(given) == len(target) > 1:
            raise ValueError(
                f"{name_of(loss)} has a {name} for each sample of a batch, and {method} descends on a part of the "
                f"batch. Give a {name} without the batch's dimension, or put the samples' weights beside the target: a "
                "loss of your own on (outputs, (target, weights)), with per_sample=."
            )
