"""Progress of a study: a bar on a terminal, otherwise one line per run."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from flatmin.cli.console import make_bar
from flatmin.words import elapsed

if TYPE_CHECKING:
    from rich.console import Console

    from flatmin.study.events import EpochDone, Event, RunBroke, RunDone

STAGES = {"tune": "Choosing settings on validation", "compare": "Training", "study": "Training", "search": "Searching"}
_VALIDATING = ("tune", "search")  # stages that show validation accuracy, because values are chosen by it
_KINDS = {"val": "validation", "test": "test"}


class Progress:
    """A context manager that shows the events of a study.

    Args:
        console: console to print to. A terminal shows a bar; other outputs get plain lines.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._finished = self._total = 0
        self._stage, self._validates = "", False
        self._labels: Mapping[str, str] = {}
        self._bar = make_bar(console)
        self._task = self._bar.add_task("", total=None, last="", visible=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        from flatmin.study import events

        match event:
            case events.Planned():
                self._stage, self._labels = STAGES.get(event.stage, event.stage), event.labels
                self._validates = event.stage in _VALIDATING
                self._finished, self._total = 0, event.runs - event.reused
                self._say(f"{self._stage}: {event.sentence}.")
                self._bar.reset(self._task, total=max(event.epochs + event.nets, 1), visible=self._total > 0, last="")
                self._describe()
            case events.EpochDone():
                self._epoch(event)
            case events.RunDone():
                self._done(event)
            case events.RunBroke():
                self._broke(event)
            case events.Tuned():
                chosen = ", ".join(f"{key}={value}" for key, value in event.chosen.items())
                self._say(f"{event.label}: chosen on validation: {chosen}.")
            case events.Timing():
                self._say(f"Measuring the time per step of {event.methods} methods.")
                self._bar.update(self._task, visible=False)
            case events.ReportDone():
                self._bar.update(self._task, advance=1, last=self._name(event.run))
            case events.Warned():
                self._say(f"Note: {event.text}")

    def _describe(self) -> None:
        self._bar.update(self._task, description=f"{self._stage} {self._finished}/{self._total} runs")

    def _epoch(self, event: EpochDone) -> None:
        last = f"{self._name(event.run)} {event.line.val_acc:.0f} %"
        self._bar.update(self._task, advance=1, last=last)

    def _done(self, event: RunDone) -> None:
        self._finished += 1
        self._describe()
        result = event.result
        if result.failure is not None:
            self._say(f"{self._count()} {self._name(event.run)}: stopped, {result.failure}")
        elif not self._console.is_terminal and result.last is not None:
            kind, point = ("val", result.chosen or result.last) if self._validates else ("test", result.last)
            value = point[f"{kind}_acc"]
            if value is None and result.chosen is not None:
                value = result.chosen[f"{kind}_acc"]
            accuracy = f"{_KINDS[kind]} {value:.1f} %"
            self._say(f"{self._count()} {self._name(event.run)}: {accuracy}, {elapsed(result.seconds)}")

    def _broke(self, event: RunBroke) -> None:
        self._finished += 1
        self._describe()
        self._say(f"{self._count()} {self._name(event.run)}: no result, {event.error}")

    def _name(self, run: str) -> str:
        return self._labels.get(run) or _short(run)

    def _count(self) -> str:
        return f"[{self._finished:>{len(str(self._total))}}/{self._total}]"

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _short(run: str) -> str:
    """The name of a run without the digest at its end."""
    return run.rpartition("-")[0] or run
