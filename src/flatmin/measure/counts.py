"""Candidate weights of a batch in a mean loss: examples, entries of the targets, class weights, and so on."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatmin.measure.nested import Axes, Pair, axis_of, first_tensor, tensors

Reduction = Literal["mean", "sum"]
_IGNORED = -100  # default ignore_index of torch's cross-entropy
_VALUES = 24  # number of labels that are tried as the ignored label


@dataclass(frozen=True, eq=False)
class BatchWeight:
    """A candidate for the weight of a batch in the mean.

    Args:
        text: description of what is counted. Two weights with the same text are the same.
        of: (tensor) -> weight of each entry. Default None: counts examples.
        where: name of the tensor, as given by `tensors` for (inputs, targets). Default "": the first target tensor.
        ignored: label that is not counted. Default None.
    """

    text: str
    of: Callable[[Tensor], Tensor] | None = None
    where: str = ""
    ignored: int | None = None

    def _tensor(self, pair: Pair) -> Tensor:
        return first_tensor(pair[1]) if not self.where else dict(tensors(pair))[self.where]

    def rows(self, pair: Pair, count: int, axes: Axes) -> Tensor | None:
        """The weight of each example, shape (count,); None if the examples cannot be separated."""
        if self.of is None:
            return torch.ones(count, dtype=torch.float64)
        tensor = self._tensor(pair)
        axis = axis_of(tensor, count, axes)
        if axis is None:
            return None
        weights = self.of(tensor)
        if axis >= weights.dim() or weights.shape[axis] != count:
            return None  # examples and positions share one dimension
        return weights.double().movedim(axis, 0).reshape(count, -1).sum(1).cpu()

    def total(self, pair: Pair) -> float:
        """The weight of a batch."""
        if self.of is None:
            return float(len(first_tensor(pair[1])))
        return float(self.of(self._tensor(pair)).double().sum())


@dataclass(frozen=True, eq=False)
class CallerWeight:
    """Batch weights given by the caller's function `terms=`."""

    terms: Callable[[Any, Any], float]
    text: str = "terms="
    ignored: int | None = None

    def rows(self, pair: Pair, count: int, axes: Axes) -> Tensor | None:
        """None, because the weights of single examples are not known."""
        return None

    def total(self, pair: Pair) -> float:
        """The weight of a batch.

        Raises:
            ValueError: the function does not return a finite number >= 0.
        """
        value: Any = self.terms(*pair)
        try:
            weight = float(value)
        except (TypeError, ValueError, RuntimeError):
            weight = math.nan
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"terms= must return the number of terms of a batch, a number >= 0, got {value!r}.")
        return weight


@dataclass(frozen=True)
class WeightRule:
    """How the losses of batches are combined into the loss of all data.

    Args:
        count: the weight of a batch.
        reduction: whether the loss of a batch is the mean or the sum of its terms.
        trial: how the trial that confirmed the rule separated examples: "apart" or "together", and the dimensions that
            may index the examples. None if there was no trial, or the rule has no effect.
    """

    count: BatchWeight | CallerWeight
    reduction: Reduction
    trial: tuple[str, Axes] | None = None

    def total(self, pair: Pair) -> float:
        """The weight of a batch."""
        return self.count.total(pair)


def options_of(loss: Any) -> dict[str, Any]:
    """The options that a loss declares: its attributes, and the keywords of a functools.partial."""
    options: dict[str, Any] = {}
    while isinstance(loss, functools.partial):
        options = {**loss.keywords, **options}
        loss = loss.func
    for name in ("ignore_index", "weight", "reduction"):
        if hasattr(loss, name):
            options.setdefault(name, getattr(loss, name))
    return options


def is_of_torch(loss: Any) -> bool:
    """Whether `loss` is one of torch's own losses, possibly inside a `LogitNormalised` or a functools.partial."""
    loss = getattr(loss, "inner", loss)
    while isinstance(loss, functools.partial):
        loss = loss.func
    return type(loss).__module__ == "torch.nn.modules.loss" or getattr(loss, "__module__", "") == "torch.nn.functional"


def _vectors(loss: Any) -> Iterator[tuple[str, Tensor]]:
    """Vectors used by a loss that may be class weights: attributes, buffers, keywords, closure and global variables."""
    options = options_of(loss)
    while isinstance(loss, functools.partial):
        loss = loss.func
    closed = getattr(loss, "__closure__", None) or ()
    names = getattr(getattr(loss, "__code__", None), "co_freevars", ())
    inside = {n: c.cell_contents for n, c in zip(names, closed, strict=False) if _is_filled(c)}
    variables = getattr(loss, "__globals__", {})
    used = getattr(getattr(loss, "__code__", None), "co_names", ())
    inside |= {name: variables[name] for name in used if name in variables}
    held = dict(loss.named_buffers()) if isinstance(loss, nn.Module) else {}
    for name, value in {**inside, **getattr(loss, "__dict__", {}), **held, **options}.items():
        if isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point():
            yield name, value.detach()


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _unlike(value: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t != value


def _like(value: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t == value


def _weighted(weight: Tensor, ignored: int) -> Callable[[Tensor], Tensor]:
    def of(t: Tensor) -> Tensor:
        counted = (t != ignored) & (t >= 0) & (t < len(weight))
        return torch.where(counted, weight.to(t.device)[t.clamp(0, len(weight) - 1).long()], 0.0)

    return of


def _shifted(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: of(t)[..., 1:] if t.dim() > 1 else of(t)


def _positions(t: Tensor) -> Tensor:
    """Weights that sum to one for each distribution over classes, which are in dimension 1."""
    return torch.full_like(t, 1.0 / (t.shape[1] if t.dim() > 1 else 1))


def candidates(loss: Any, pairs: Sequence[Pair], labels: Sequence[int]) -> list[BatchWeight]:
    """All weights that are tried, first those that the loss declares. Each of `labels` may be the ignored label."""
    options = options_of(loss)
    first = first_tensor(pairs[0][1])
    examples = BatchWeight("examples")
    entries = BatchWeight("entries of the targets", torch.ones_like)
    weights: list[BatchWeight] = []
    if first.is_floating_point() or first.is_complex():
        soft = loss is F.cross_entropy or isinstance(getattr(loss, "inner", loss), nn.CrossEntropyLoss)
        soft = soft or (isinstance(loss, functools.partial) and loss.func is F.cross_entropy)
        weights += [BatchWeight("distributions over classes", _positions)] if soft else []
        weights += [entries, examples, BatchWeight("finite entries of the targets", torch.isfinite)]
        weights += [
            BatchWeight("sum of the targets", lambda t: t),
            BatchWeight("targets that are not zero", lambda t: t != 0),
        ]
    else:
        given = options.get("ignore_index")
        said = given if isinstance(given, int) else _IGNORED
        weighted = [
            BatchWeight(f"class weights {name} of the targets", _weighted(vector, said), ignored=said)
            for name, vector in _vectors(loss)
        ]
        # Only labels that occur in the data make a difference.
        other = [v for v in labels if v != said]
        weights += sorted(weighted, key=lambda c: c.text != "class weights weight of the targets")
        for v in (said, *other):
            text = f"targets other than {v}"
            weights += [BatchWeight(text, _unlike(v), ignored=v)]
            weights += (
                [BatchWeight(f"{text} but the first", _shifted(_unlike(v)), ignored=v)] if first.dim() > 1 else []
            )
            weights += [BatchWeight(f"targets that are {v}", _like(v))]
            weights += [examples, entries] if v == said else []
        weights += (
            [BatchWeight("entries of the targets but the first", _shifted(torch.ones_like))] if first.dim() > 1 else []
        )
    for name, tensor in tensors(pairs[0]):
        if tensor is first or not tensor.dim():
            continue
        whole = f"entries of (inputs, targets){name}"
        kinds: list[tuple[str, Callable[[Tensor], Tensor]]] = []
        if not tensor.is_floating_point():
            kinds += [(f"{whole} other than {_IGNORED}", _unlike(_IGNORED)), (f"{whole} other than 0", _unlike(0))]
            kinds += [(f"{whole} that are 0", lambda t: t == 0)]  # a mask that marks padding
        elif name.startswith("[1]"):
            kinds += [(f"sum of {whole}", lambda t: t), (whole, torch.ones_like)]
        for text, of in kinds:
            weights.append(BatchWeight(text, of, name))
            if tensor.dim() > 1:
                weights.append(BatchWeight(f"{text} but the first", _shifted(of), name))
    return weights


def labels_of(pairs: Sequence[Pair]) -> list[int]:
    """The labels that occur in the targets; empty if the targets are not integers."""
    firsts = [first_tensor(targets) for _, targets in pairs]
    seen = [set(t.unique().tolist()) for t in firsts if not (t.is_floating_point() or t.is_complex())]
    return sorted(set().union(*seen))


def may_be_ignored(seen: set[int]) -> list[int]:
    """Labels that may be ignored: the smallest, the largest and the common choices first, at most `_VALUES`."""
    order = sorted(seen)
    usual = [v for v in (-1, 0, 255) if v in seen]
    return list(dict.fromkeys([*order[:1], *order[-1:], *usual, *order]))[:_VALUES]


def cast_loss(loss: Any, dtype: torch.dtype) -> Any:
    """Return a copy of a loss module with its buffers cast to `dtype`; any other loss unchanged."""
    if not isinstance(loss, nn.Module) or next(loss.parameters(), None) is not None:
        return loss
    if all(b.dtype == dtype for b in loss.buffers() if b.is_floating_point()):
        return loss
    return copy.deepcopy(loss).to(dtype)
