"""Nested data: the tensors of it, and some of its examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Any, Any]  # inputs and targets
Axes = tuple[int, int]  # dimensions that may run over the examples, the likelier first


def tensors(part: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested data, with names."""
    if isinstance(part, Tensor):
        yield name, part
    elif isinstance(part, Mapping):
        for key, value in part.items():
            yield from tensors(value, f"{name}[{key!r}]")
    elif isinstance(part, (tuple, list)):
        for i, value in enumerate(part):
            yield from tensors(value, f"{name}[{i}]")


def first_tensor(part: Any) -> Tensor:
    """The first tensor in targets that may be nested; one with a dimension, if there is any.

    Raises:
        ValueError: there is none.
    """
    all_tensors = [tensor for _, tensor in tensors(part)]
    if not all_tensors:
        raise ValueError(f"the targets hold no tensor, got {type(part).__name__}.")
    return next((t for t in all_tensors if t.dim()), all_tensors[0])


def mapped(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested data of the same kind with every tensor changed."""
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, Mapping):
        changed = {k: mapped(v, change) for k, v in part.items()}
        if type(part) is dict:
            return changed
        clone: Any = copy.copy(part)  # such as the outputs of a language model, which have attributes as well
        for key, value in changed.items():
            clone[key] = value
        return clone
    if isinstance(part, tuple) and hasattr(part, "_make"):
        return part._make(mapped(v, change) for v in part)
    return type(part)(mapped(v, change) for v in part) if isinstance(part, (tuple, list)) else part


def axis_of(tensor: Tensor, count: int, axes: Sequence[int] = (0, 1)) -> int | None:
    """The first of these dimensions that runs over `count` examples; None if there is none."""
    return next((d for d in axes if d < tensor.dim() and tensor.shape[d] == count), None)


def cut(part: Any, rows: slice | Tensor, count: int, axes: Sequence[int] = (0, 1)) -> Any:
    """Some of `count` examples: views for a slice, copies for indices. Tensors without such a dimension stay."""

    def of_tensor(tensor: Tensor) -> Tensor:
        axis = axis_of(tensor, count, axes)
        if axis is None:
            return tensor
        if isinstance(rows, slice):
            return tensor.narrow(axis, rows.start, rows.stop - rows.start)
        return tensor.index_select(axis, rows.to(tensor.device))

    return mapped(part, of_tensor)


def joined(parts: Sequence[tuple[Pair, int]], axes: Axes) -> Pair | None:
    """Examples of several batches, with their numbers, as one batch; None if they do not fit together."""
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
