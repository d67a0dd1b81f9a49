"""What the four trackers share: the order of calls, and what a failing tracker means for the run."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from flatmin.train.events import Began, Ended, Event, Ticked, Warned
from flatmin.train.files import write_json
from flatmin.train.trackers.content import scalars
from flatmin.words import read_text

# "stopped": closed before the end, as by Ctrl-C. "broken": the tracker itself raised an exception.
Status = Literal["stopped", "finished", "failed", "broken"]

_IDENTITIES = "trackers.json"


class Tracker(Protocol):
    """Receives the events of one run, and is closed once in any case."""

    def __call__(self, event: Event) -> None:
        """Record an event."""

    def close(self) -> None:
        """Write what is left and the final status of the run."""


class Safely:
    """Wraps a tracker so that its errors do not stop the training.

    The first exception of the tracker calls `warn` once, with one sentence, and disables the tracker. Only `Exception`
    is caught: Ctrl-C passes through.

    Args:
        tracker: any.
        warn: called with the sentence.
    """

    def __init__(self, tracker: Tracker, warn: Callable[[str], None]) -> None:
        self._tracker, self._warn = tracker, warn
        self._failed = False

    def __call__(self, event: Event) -> None:
        if self._failed:
            return
        try:
            self._tracker(event)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            self._tracker.close()
        except Exception as error:
            if not self._failed:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        name = getattr(self._tracker, "name", type(self._tracker).__name__)
        said = " ".join(str(error).split()).rstrip(".")
        why = f"{type(error).__name__}: {said}" if said else type(error).__name__
        self._warn(
            f"the tracker {name} failed ({why}) and is disabled for this run; training continues, and "
            "metrics.jsonl and steps.jsonl have everything."
        )


class Sink(ABC):
    """A tracker whose package takes a table at the beginning, numbers against steps, and a status at the end.

    Args:
        folder: of the run, absolute.
        run: its name.
        project: name under which the package groups runs.
        resume: whether to continue what is in the folder.
    """

    name: ClassVar[str]

    def __init__(self, *, folder: Path, run: str, project: str, resume: bool) -> None:
        self.folder, self.run, self.project, self.resume = folder, run, project, resume
        self._step = 0
        self._begun = False
        self._status: Status = "stopped"

    @abstractmethod
    def begin(self, event: Began) -> None:
        """Open the run."""

    @abstractmethod
    def log(self, values: dict[str, float], step: int) -> None:
        """Record numbers of one step."""

    @abstractmethod
    def end(self, values: dict[str, float], step: int, failure: str | None) -> None:
        """Record the summary, and why the run failed, if it did."""

    @abstractmethod
    def finish(self, status: Status) -> None:
        """Close the run; called if `begin` was."""

    def __call__(self, event: Event) -> None:
        try:
            self._take(event)
        except Exception:
            self._status = "broken"
            raise

    def close(self) -> None:
        if self._begun:
            self._begun = False
            self.finish(self._status)

    def _take(self, event: Event) -> None:
        if isinstance(event, Began):
            self._begun, self._step = True, event.step
            self.folder.mkdir(parents=True, exist_ok=True)
            self.begin(event)
        elif isinstance(event, Ended):
            failure = event.result.failure
            self.end(scalars(event), self._step, failure)
            self._status = "finished" if failure is None else "failed"
        elif not isinstance(event, (Ticked, Warned)):
            self._step = event.step
            self.log(scalars(event), event.step)

    @property
    def identity(self) -> str | None:
        """The name by which the package knows a resumed run; None for a new one."""
        return self._identities().get(self.name) if self.resume else None

    def keep_identity(self, identity: str) -> None:
        """Write the name into the run folder, so that a resumed run finds it."""
        write_json(self.folder / _IDENTITIES, {**self._identities(), self.name: identity})

    def _identities(self) -> dict[str, str]:
        path = self.folder / _IDENTITIES
        identities: dict[str, str] = json.loads(read_text(path)) if path.is_file() else {}
        return identities
