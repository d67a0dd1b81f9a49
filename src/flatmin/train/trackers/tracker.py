"""The base class of the trackers, and the handling of trackers that fail."""

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
    """Receives the events of one run; `close` is called once at the end, also after an error."""

    def __call__(self, event: Event) -> None:
        """Record an event."""

    def close(self) -> None:
        """Write the remaining records and the final status of the run."""


class Safely:
    """Wraps a tracker so that its errors do not stop the training.

    After its first exception the tracker is disabled, and `warn` is called once. Only `Exception` is caught, so that
    Ctrl-C still works.

    Args:
        tracker: the tracker.
        warn: called with a sentence about the error.
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
            "metrics.jsonl and steps.jsonl are complete."
        )


class Sink(ABC):
    """A tracker whose package takes a configuration at the start, numbers by step, and a status at the end.

    Args:
        folder: absolute path of the run folder.
        run: name of the run.
        project: name under which the package groups runs.
        resume: whether to continue an earlier record in the folder.
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
        """Record the numbers of one step."""

    @abstractmethod
    def end(self, values: dict[str, float], step: int, failure: str | None) -> None:
        """Record the summary, and why the run failed, if it did."""

    @abstractmethod
    def finish(self, status: Status) -> None:
        """Close the run; called only if `begin` was called."""

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
        """The package's identifier of a resumed run; None for a new run."""
        return self._identities().get(self.name) if self.resume else None

    def keep_identity(self, identity: str) -> None:
        """Store the package's identifier in the run folder, for a later `resume`."""
        write_json(self.folder / _IDENTITIES, {**self._identities(), self.name: identity})

    def _identities(self) -> dict[str, str]:
        path = self.folder / _IDENTITIES
        identities: dict[str, str] = json.loads(read_text(path)) if path.is_file() else {}
        return identities
