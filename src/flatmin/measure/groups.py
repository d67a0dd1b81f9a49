"""A problem cut into problems of m examples each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from flatmin.measure.problem import Batch, Problem, count_terms, first_tensor


def split(problem: Problem, m: int) -> tuple[list[Problem], int]:
    """Problems over m consecutive examples each, on the same weights and on views of the same data.

    A group that reaches over the end of a batch keeps the two pieces apart, so that in train mode the whole data in one
    group is the problem itself. Tensors whose first dimension is the number of examples are cut, others are passed on
    as they are. Of a process group each rank cuts its own part.

    Args:
        problem: the function.
        m: examples in a group, >= 1.

    Returns:
        The groups, and how many examples are left over: less than m at the end, and groups of which every term of the
        loss is ignored.

    Raises:
        ValueError: m below 1.
    """
    if m < 1:
        raise ValueError(f"a group holds at least one example, got m={m!r}.")
    groups: list[Problem] = []
    pieces: list[tuple[Any, Any]] = []
    held = seen = 0
    for batch in problem.batches:
        count, start = _count(batch.targets), 0
        seen += count
        while start < count:
            stop = min(count, start + m - held)
            pieces.append((_cut(batch.inputs, start, stop, count), _cut(batch.targets, start, stop, count)))
            held, start = held + stop - start, stop
            if held == m:
                groups += _problem(problem, pieces, m)
                pieces, held = [], 0
    return groups, seen - m * len(groups)


def _problem(problem: Problem, pieces: list[tuple[Any, Any]], m: int) -> list[Problem]:
    """The problem of these pieces; none if no term of theirs counts."""
    terms = [count_terms(problem.loss, targets) for _, targets in pieces]
    total = sum(terms)
    if not total:
        return []
    summed = getattr(problem.loss, "reduction", "mean") == "sum"
    twin = copy.copy(problem)
    twin.batches = [
        Batch(inputs, targets, (1.0 if summed else t) / total)
        for (inputs, targets), t in zip(pieces, terms, strict=True)
        if t
    ]
    twin.group = None
    largest = max(_count(targets) for _, targets in pieces)
    twin.conventions = replace(problem.conventions, examples=m, terms=total, batch=largest)
    return [twin]


def _count(targets: Any) -> int:
    return len(first_tensor(targets))


def _cut(part: Any, start: int, stop: int, count: int) -> Any:
    if isinstance(part, Tensor):
        return part[start:stop] if part.dim() and len(part) == count else part
    if isinstance(part, Mapping):
        return {k: _cut(v, start, stop, count) for k, v in part.items()}
    if isinstance(part, (tuple, list)):
        return tuple(_cut(v, start, stop, count) for v in part)
    return part
