"""Nested data (tuples, lists, mappings of tensors): visit its tensors, and select examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Any, Any]  # inputs and targets
Axes = tuple[int, int]  # dimensions that may index the examples, the more likely one first


def tensors(part: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested data with their names."""
    if isinstance(part, Tensor):
        yield name, part
    elif isinstance(part, Mapping):
        for key, value in part.items():
            yield from tensors(value, f"{name}[{key!r}]")
    elif isinstance(part, (tuple, list)):
        for i, value in enumerate(part):
            yield from tensors(value, f"{name}[{i}]")


def first_tensor(part: Any) -> Tensor:
    """Return the first tensor of possibly nested targets, preferring tensors with at least one dimension.

    Raises:
        ValueError: the targets contain no tensor.
    """
    all_tensors = [tensor for _, tensor in tensors(part)]
    if not all_tensors:
        raise ValueError(f"the targets must contain a tensor, got {type(part).__name__}.")
    return next((t for t in all_tensors if t.dim()), all_tensors[0])


def mapped(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of nested data, and return data of the same structure."""
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, Mapping):
        changed = {k: mapped(v, change) for k, v in part.items()}
        if type(part) is dict:
            return changed
        clone: Any = copy.copy(part)  # outputs of language models have attributes too
        for key, value in changed.items():
            clone[key] = value
        return clone
    if isinstance(part, tuple) and hasattr(part, "_make"):
        return part._make(mapped(v, change) for v in part)
    return type(part)(mapped(v, change) for v in part) if isinstance(part, (tuple, list)) else part


def axis_of(tensor: Tensor, count: int, axes: Sequence[int] = (0, 1)) -> int | None:
    """Return the first dimension in `axes` whose size is `count`, the number of examples; None if there is none."""
    return next((d for d in axes if d < tensor.dim() and tensor.shape[d] == count), None)


def cut(part: Any, rows: slice | Tensor, count: int, axes: Sequence[int] = (0, 1)) -> Any:
    """Select rows out of `count` examples: views for a slice, copies for indices. Other tensors stay unchanged."""

    def of_tensor(tensor: Tensor) -> Tensor:
        axis = axis_of(tensor, count, axes)
        if axis is None:
            return tensor
        if isinstance(rows, slice):
            return tensor.narrow(axis, rows.start, rows.stop - rows.start)
        return tensor.index_select(axis, rows.to(tensor.device))

    return mapped(part, of_tensor)


def joined(parts: Sequence[tuple[Pair, int]], axes: Axes) -> Pair | None:
    """Concatenate several (pair, number of examples) into one batch; None if their shapes do not match."""
    lists = [[t for _, t in tensors(pair)] for pair, _ in parts]
    if any(len(one) != len(lists[0]) for one in lists):
        return None
    pieces: list[Tensor] = []
    for row in zip(*lists, strict=True):
        along = {axis_of(t, n, axes) for t, (_, n) in zip(row, parts, strict=True)}
        axis = along.pop()
        if along or (axis is None and not all(torch.equal(t, row[0]) for t in row)):
            return None
        others = [t.shape if axis is None else (*t.shape[:axis], *t.shape[axis + 1 :]) for t in row]
        if any(shape != others[0] for shape in others):
            return None
        pieces.append(row[0] if axis is None else torch.cat(row, axis))
    left = iter(pieces)
    whole: Pair = mapped(parts[0][0], lambda _: next(left))
    return whole
