"""CUDA graphs: updates the Python-side counters for each replay of a captured update."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from flatmin.optim.state import STEP

if TYPE_CHECKING:
    from flatmin.optim.sam import SAM


class Captured:
    """A context around the capture of one update. Call `repeat` with every replay except the first.

    The optimizer counts the captured update during the capture; the first replay executes it.

    Args:
        optimizer: the optimizer whose update is captured.
    """

    def __init__(self, optimizer: SAM) -> None:
        self._optimizer = optimizer
        self._ascents = self._counted()

    def __enter__(self) -> Self:
        self._ascents = self._counted()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ascents = self._counted() - self._ascents
        diagnostics = self._optimizer._tools.diagnostics
        # Ordinary updates between replays have their own numbers; those of the graph stay in the same memory.
        self._numbers = None if diagnostics is None else diagnostics.latest

    def repeat(self) -> None:
        """Count a replayed update, as in `counts()` and checkpoints, and let `diagnostics()` show its numbers."""
        tools = self._optimizer._tools
        first = tools.base.optimizer.param_groups[0]
        first[STEP] = int(first[STEP]) + 1
        tools.counts.updates += 1
        if tools.flags is not None:
            tools.flags.ascents += self._ascents
        if tools.diagnostics is not None and self._numbers is not None:
            tools.diagnostics.latest = self._numbers

    def _counted(self) -> int:
        flags = self._optimizer._tools.flags
        return 0 if flags is None else flags.ascents
