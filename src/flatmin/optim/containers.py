"""Finds tensors in batches of any form and in the results of closures."""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_MOST = 256  # largest number of items that are searched


def leaves(value: Any) -> Iterator[Any]:
    """The tensors and arrays in a value; searches mappings, sequences, dataclasses and plain objects."""
    return _walk(value, 4, itertools.count())


def _walk(value: Any, depth: int, seen: Iterator[int]) -> Iterator[Any]:
    if next(seen) > _MOST:
        return
    if isinstance(value, (Tensor, *_arrays())):
        yield value
        return
    if depth == 0 or value is None or isinstance(value, (str, bytes, int, float, nn.Module)):
        return
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = value
    elif hasattr(value, "__dict__"):
        inner = list(vars(value).values())
    elif dataclasses.is_dataclass(value):
        inner = [getattr(value, f.name) for f in dataclasses.fields(value)]  # with __slots__
    for item in itertools.islice(inner, _MOST):
        yield from _walk(item, depth - 1, seen)


def _arrays() -> tuple[type, ...]:
    numpy = sys.modules.get("numpy")
    return () if numpy is None else (numpy.ndarray,)


def loss_in(result: Any) -> Any:
    """The loss in a closure's result: the entry or attribute "loss", the first item of a sequence, or the result."""
    if isinstance(result, Mapping):
        return result.get("loss")
    if isinstance(result, (list, tuple)):
        return result[0] if result else None
    return getattr(result, "loss", result)


def detached(result: Any) -> Any:
    """A closure's result with all tensors detached from their graphs."""
    if isinstance(result, Tensor):
        return result.detach()
    if isinstance(result, Mapping):
        kept = {k: detached(v) for k, v in result.items()}
        return type(result)(**kept) if dataclasses.is_dataclass(result) else _like(result, kept)
    if isinstance(result, (list, tuple)):
        items = [detached(v) for v in result]
        return type(result)(*items) if hasattr(result, "_fields") else _like(result, items)
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return dataclasses.replace(
            result, **{f.name: detached(getattr(result, f.name)) for f in dataclasses.fields(result) if f.init}
        )
    if isinstance(result, (set, frozenset, collections.deque)):
        return _like(result, [detached(v) for v in result])
    if hasattr(result, "__dict__") and any(isinstance(x, Tensor) and x.requires_grad for x in leaves(result)):
        result = copy.copy(result)
        vars(result).update({k: detached(v) for k, v in vars(result).items()})
    return result


def _like(result: Any, items: Any) -> Any:
    try:
        return type(result)(items)
    except TypeError:
        return items
