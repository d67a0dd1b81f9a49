"""Split a problem into problems of m examples each."""

from __future__ import annotations

from typing import Any

from flatmin.measure.nested import cut, first_tensor
from flatmin.measure.problem import Problem, over


def split(problem: Problem, m: int) -> tuple[list[Problem], int]:
    """Split a problem into groups of m consecutive examples, with the same weights and views of the same data.

    A group that extends over the end of a batch keeps the two pieces as separate batches, so in train mode a single
    group with all data is the problem itself. Tensors whose first or second dimension is the number of examples are
    split; other tensors are passed unchanged. In a process group, each rank splits its own data.

    Args:
        problem: the function.
        m: number of examples per group, >= 1.

    Returns:
        The groups, and the number of examples that are in none of them: fewer than m at the end, and those of groups in
        which the loss ignores every term.

    Raises:
        ValueError: m is below 1.
    """
    if m < 1:
        raise ValueError(f"m must be at least 1, got {m!r}.")
    groups: list[Problem] = []
    pieces: list[tuple[Any, Any]] = []
    held = seen = 0
    for batch in problem.batches:
        count, start = len(first_tensor(batch.targets)), 0
        seen += count
        while start < count:
            stop = min(count, start + m - held)
            inputs, targets = cut((batch.inputs, batch.targets), slice(start, stop), count)
            pieces.append((inputs, targets))
            held, start = held + stop - start, stop
            if held == m:
                groups += [over(problem, pieces)] if any(problem.rule.total(piece) for piece in pieces) else []
                pieces, held = [], 0
    return groups, seen - m * len(groups)
