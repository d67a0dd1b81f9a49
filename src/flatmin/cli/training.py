"""Progress of a run: one line per epoch, and a bar on a terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from flatmin.cli.console import make_bar
from flatmin.words import duration, elapsed

if TYPE_CHECKING:
    from rich.console import Console

    from flatmin.data.dataset import Data
    from flatmin.train.config import RunConfig
    from flatmin.train.events import Began, Event, Stepped
    from flatmin.train.processes import World
    from flatmin.train.result import Epoch, Result


class Training:
    """A context manager that shows the events of a run.

    Args:
        console: console to print to. A terminal also shows a bar.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = make_bar(console)
        self._task = self._bar.add_task("", total=None, last="", visible=False)
        self._epochs = self._steps = 0
        self._began = time.monotonic()
        self._from = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the bar."""
        self._bar.stop()

    def downloading(self, done: int, total: int | None) -> None:
        """Show the progress of a download."""
        last = f"{done / 1e6:.0f} MB" if total is None else f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
        self._bar.update(
            self._task,
            description="Downloading",
            completed=done,
            total=total,
            visible=True,
            last=last,
        )

    def __call__(self, event: Event) -> None:
        """Show an event."""
        from flatmin.train import events

        match event:
            case events.Began():
                self._begin(event)
            case events.Ticked():
                self._bar.update(self._task, completed=event.step, description=self._count(event.epoch))
            case events.Stepped():
                self._stepped(event)
            case events.EpochEnded():
                self._epoch(event.line, event.step)
            case events.Measured():
                values = ", ".join(f"{name} {value:.4g}" for name, value in event.values.items())
                self._say(f"  measured: {values}")
            case events.Warned():
                self._say(f"Note: {event.text}")
            case events.Ended():
                self._end(event.result)

    def _begin(self, event: Began) -> None:
        config = event.config
        self._epochs, self._steps, self._from = config.epochs, event.steps, event.step
        self._began = time.monotonic()
        rho = "" if config.rho is None else f", rho {config.rho:g}"
        self._say(
            f"{config.method}{rho}: {config.model} ({event.parameters:,} parameters) on {config.data} "
            f"({event.samples:,} samples, {event.steps} updates per epoch), {config.precision} on "
            f"{event.environment['device']}"
        )
        if event.step:
            self._say(f"Continuing after update {event.step} of {config.epochs * event.steps}.")
        total = config.epochs * event.steps
        self._bar.reset(self._task, total=total, completed=event.step, visible=True, last="")
        self._bar.update(self._task, description=self._count(event.epoch + 1))

    def _stepped(self, event: Stepped) -> None:
        speed = event.images / max(event.seconds, 1e-9)
        self._bar.update(
            self._task,
            completed=event.step,
            description=self._count(event.epoch),
            last=f"loss {event.loss:.3f}  {speed:,.0f} images/s",
        )

    def _epoch(self, line: Epoch, step: int) -> None:
        self._bar.update(self._task, completed=step, description=self._count(min(line.epoch + 1, self._epochs)))
        width = len(str(self._epochs))
        perturbed = "" if line.perturbed_loss is None else f" -> {line.perturbed_loss:.3f}"
        parts = [
            f"epoch {line.epoch:>{width}}/{self._epochs}",
            f"lr {line.lr:.3g}",
            f"loss {line.train_loss:.3f}{perturbed}",
            f"train {line.train_acc:.1f} %",
            f"val {line.val_acc:.1f} %",
        ]
        if line.test_acc is not None:
            parts.append(f"test {line.test_acc:.1f} %")
        if line.memorised is not None:
            parts.append(f"memorised {line.memorised:.0f} %")
        parts.append(f"{elapsed(line.seconds)}, {line.images_per_second:,.0f} images/s")
        if line.peak_memory is not None:
            parts.append(f"{line.peak_memory / 2**30:.1f} GiB")
        if line.skipped:
            parts.append(f"{line.skipped} updates skipped")
        done, total = step - self._from, self._epochs * self._steps - step
        if total:
            parts.append(f"left {duration(total * (time.monotonic() - self._began) / max(done, 1))}")
        self._say("  ".join(parts))

    def _count(self, epoch: int) -> str:
        return f"Epoch {epoch}/{self._epochs}"

    def _end(self, result: Result) -> None:
        self.stop()
        if result.chosen is None:
            return
        rule = {
            "val": f"weights of epoch {result.chosen['epoch']}, the best on validation",
            "last": "weights of the last epoch",
            "max-test": f"weights of epoch {result.chosen['epoch']}, the best on the test part: an overestimate",
        }[result.chosen["selection"]]
        top5 = "" if result.chosen["test_top5"] is None else f", top-5 {result.chosen['test_top5']:.2f} %"
        self._say(f"Test accuracy {result.chosen['test_acc']:.2f} %{top5} ({rule}).")
        if result.lambda_max is not None:
            self._say(f"lambda_max {result.lambda_max['value']:.4g} (training part, eval mode).")
        if result.untrained is not None:
            self._say(f"Note: the network {result.untrained}.")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_settings(config: RunConfig, data: Data, world: World, console: Console) -> None:
    """Print the resolved settings and the size of the run."""
    from flatmin.train.settings import canonical
    from flatmin.train.trainer import Trainer

    trainer = Trainer(config, data=data, world=world)
    for key, value in canonical(config).items():
        console.print(f"{key} = {value}", markup=False, highlight=False)
    gradients = trainer.recipe.gradient_evaluations
    total = config.epochs * trainer.feed.steps
    console.print(
        f"\n{total:,} updates of {gradients:g} gradient evaluations each on average; "
        f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters; "
        f"train {len(data.train):,}, validation {len(data.val):,}, test {len(data.test):,} samples.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for note in data.notes:
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)
