"""A problem cut into problems of m examples each."""

from __future__ import annotations

from typing import Any

from flatmin.measure.nested import cut, first_tensor
from flatmin.measure.problem import Problem, over


def split(problem: Problem, m: int) -> tuple[list[Problem], int]:
    """Problems over m consecutive examples each, on the same weights and on views of the same data.

    A group that reaches over the end of a batch keeps the two pieces apart, so that in train mode the whole data in one
    group is the problem itself. Tensors of which the first or the second dimension is the number of examples are cut,
    others are passed on as they are. Of a process group each rank cuts its own part.

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
