"""Ctrl-C and SIGTERM: wait for the update that goes on, so that a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """A run that stopped because it was asked to. The message says what is kept and how to go on."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(
            f"Interrupted after {done} of {total} updates; a checkpoint is kept, and the same command with --resume "
            "goes on from there."
        )


class Interruption:
    """Takes the first SIGINT or SIGTERM as a wish, inside; a second one is what it always was.

    Only the main thread can take signals; elsewhere nothing changes.
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
