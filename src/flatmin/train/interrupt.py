"""Ctrl-C and SIGTERM: wait for the update in progress, so that a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """A run that was interrupted on request. The message says what is stored and how to continue."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(
            f"Interrupted after {done} of {total} updates; a checkpoint is kept, and the same command with --resume "
            "continues from there."
        )


class Interruption:
    """Inside, the first SIGINT or SIGTERM is a request to stop; a second one has its usual effect.

    Only the main thread can handle signals; in other threads nothing changes.
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
