"""Ctrl-C and SIGTERM: finish the current update first, so that a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """A run was interrupted by a signal. The message says what was saved and how to continue."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(
            f"Interrupted after {done} of {total} updates. A checkpoint was saved; to continue, run the same command "
            "with --resume."
        )


class Interruption:
    """A context manager in which the first SIGINT or SIGTERM only sets `wanted`; a second one has its usual effect.

    Only the main thread can handle signals; in other threads the context manager has no effect.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._note) for one in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
