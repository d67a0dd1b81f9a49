"""The training loop of a run: epochs, evaluation, the best weights so far, checkpoints and files."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import nullcontext
from typing import Any, NoReturn

import torch

from flatmin.data.dataset import Split
from flatmin.train import checkpoint, evaluate
from flatmin.train.config import identity
from flatmin.train.events import Began, Ended, EpochEnded, Event, Measured, OnEvent, Stepped, Ticked, Warned
from flatmin.train.fingerprint import Content, environment
from flatmin.train.folder import RunFolder
from flatmin.train.inputs import Inputs
from flatmin.train.interrupt import Interruption, TrainingInterrupted
from flatmin.train.measuring import measured
from flatmin.train.meter import Meter
from flatmin.train.nonfinite import NonFiniteMonitor, NonFiniteUpdate
from flatmin.train.options import Options
from flatmin.train.processes import load_whole_weights, on_cpu, whole_weights
from flatmin.train.result import Epoch, Result
from flatmin.train.state import fixed_length, restore, state_of
from flatmin.train.trainer import Trainer


class TrainingRun:
    """A run in progress: its epochs, records and checkpoints.

    Args:
        trainer: trainer of the run.
        folder: folder of the run; None: nothing is written.
        options: logging, measuring and checkpoints.
        listeners: called with every event.
        content: content of the data, for checkpoints.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: RunFolder | None,
        options: Options,
        listeners: list[OnEvent],
        content: Content | None = None,
    ) -> None:
        self.trainer, self.config, self.world = trainer, trainer.config, trainer.world
        self.folder, self.options, self.listeners, self.content = folder, options, listeners, content
        self.prolongable = options.prolong and fixed_length(self.config) is None
        self.epoch = self.position = 0
        self.lines: list[Epoch] = []
        self.meter = Meter()
        self.best: Epoch | None = None
        self.best_state: dict[str, Any] | None = None
        self.monitor = NonFiniteMonitor(trainer)
        self.logged = (0, 0.0, 0)
        self._ticked = 0.0
        self._saved = time.monotonic()

    # -- beginning -----------------------------------------------------------------------------------------------

    def begin(self, resume: bool, labels: dict[str, str]) -> None:
        """Create the folder, or continue from its last good checkpoint."""
        env = environment(self.config.device, torch.get_num_threads(), self.world.size)
        state = None
        if self.folder is not None:
            if resume:
                found_here = checkpoint.newest(self.folder.checkpoints, self._warn) if self.world.first else None
                state = self.world.broadcast(found_here)
            if state is not None:
                restore(self, state)
            if self.world.first and state is not None:
                self.folder.rewind(self.lines, self.trainer.steps)
                self.folder.add_environment(env)
                if state["config"] != identity(self.config):
                    self.folder.set_config(self.config, **labels)
                (self.folder.path / "result.json").unlink(missing_ok=True)
            elif self.world.first:
                self.folder.begin(self.config, env, Inputs.of(self.trainer.data), **labels)
        weights = [p for p in self.trainer.model.parameters() if p.requires_grad]
        self._tell(
            Began(
                name=self.folder.path.name if self.folder is not None else self.config.method,
                config=self.config,
                environment=env,
                parameters=sum(p.numel() for p in weights),
                samples=len(self.trainer.data.train),
                steps=self.trainer.feed.steps,
                gradient_evaluations=self.trainer.recipe.gradient_evaluations,
                epoch=self.epoch,
                step=self.trainer.steps,
            )
        )
        for note in self.trainer.data.notes:
            self._warn(note)

    def go(self, interruption: Interruption | None, labels: dict[str, str]) -> Result:
        """Train the remaining epochs and return the result."""
        failure = None
        while self.epoch < self.config.epochs and failure is None:
            failure = self._steps(interruption) or self._end_epoch()
            wanted = interruption is not None and interruption.wanted
            if failure is None and wanted and self.epoch < self.config.epochs:
                self._stop(inside=False)
        result = self._result(failure)
        if self.folder is not None:
            weights = None
            if self.options.weights and result.failure is None:
                weights = self._weights() if self.best_state is None else self.best_state
            if self.world.first:
                if weights is not None:
                    self.folder.keep(weights)
                self.folder.finish(result, prolong=self.prolongable, **labels)
        self._tell(Ended(result=result))
        return result

    # -- an epoch ------------------------------------------------------------------------------------------------

    def _steps(self, interruption: Interruption | None) -> str | None:
        """Do the remaining updates of the epoch; returns why the run must stop, or None."""
        trainer, meter = self.trainer, self.meter
        trainer.net.train()
        before, begun = meter.seconds, time.perf_counter()
        self._ticked = before
        for batch in trainer.batches(self.position):
            self.monitor.before()
            meter.add(trainer.step(batch), len(batch))
            self.position += 1
            meter.seconds = before + time.perf_counter() - begun
            every = self.options.checkpoint_steps
            due = every > 0 and trainer.steps % every == 0 and self.position < trainer.feed.steps
            asked = interruption is not None and interruption.wanted
            event = self.monitor.after(batch, meter, epoch=self.epoch + 1, now=due or asked)
            if event is not None:
                self._save(inside=True)
                return self._stop_nonfinite(event)
            self._log()
            if due:
                self._save(inside=True)
            if asked:
                self._stop(inside=True)
        if self.config.device != "cpu":
            torch.cuda.synchronize()
        meter.seconds = before + time.perf_counter() - begun
        return None

    def _stop(self, *, inside: bool) -> NoReturn:
        """Write a checkpoint and stop, after a signal."""
        self._save(inside=inside, asked_for=True)
        raise TrainingInterrupted(self.trainer.steps, self.config.epochs * self.trainer.feed.steps)

    def _stop_nonfinite(self, event: NonFiniteUpdate) -> str:
        """Write nonfinite.json and return the message."""
        if self.folder is None:
            return event.sentence()
        if self.world.first:
            self.folder.record_nonfinite(event.content)
        return event.sentence(" (nonfinite.json lists its samples)")

    def _log(self) -> None:
        meter = self.meter
        if meter.seconds - self._ticked >= 1:
            self._ticked = meter.seconds
            self._tell(Ticked(step=self.trainer.steps, epoch=self.epoch + 1))
        every = self.options.log_every
        if not every or self.trainer.steps % every:
            return
        steps, seconds, images = self.logged
        loss = meter.mean_since(steps, self.world)  # all processes must take part; only rank 0 reports
        self.logged = (len(meter), meter.seconds, meter.images)
        if not self.world.first or not (self.listeners or self.folder is not None):
            return
        event = Stepped(
            step=self.trainer.steps,
            epoch=self.epoch + 1,
            lr=self.trainer.schedule.at(self.trainer.steps - 1),
            rho=self.trainer.rho,
            loss=loss,
            seconds=meter.seconds - seconds,
            images=(meter.images - images) * self.world.size,
            diagnostics=self.trainer.optimizer.diagnostics() if self.options.diagnostics else {},
        )
        if self.folder is not None:
            line = dataclasses.asdict(event)
            for name, value in line.pop("diagnostics").items():
                line[f"last_{name}" if name in line else name] = value
            # JSON has no nan.
            self.folder.add_step({k: None if v is None or not math.isfinite(v) else v for k, v in line.items()})
        self._tell(event)

    def _end_epoch(self) -> str | None:
        """Evaluate, select weights, record, and write a checkpoint; returns why the run must stop, or None."""
        trainer, config, meter = self.trainer, self.config, self.meter
        number = self.epoch + 1
        loss, perturbed, right = meter.means(self.world)
        if math.isnan(loss):
            return f"no update of epoch {number} had a finite loss; try a smaller lr or rho"
        test_now = config.selection == "max-test" or (config.test_every and number % config.test_every == 0)
        with nullcontext() if trainer.average is None else trainer.average.applied():
            self.world.share_buffers(trainer.model)
            val = self._score(trainer.data.val)
            same = trainer.data.test is trainer.data.val
            test = None
            if test_now:
                test = val if same else self._score(trainer.data.test)
            memory = evaluate.memorised(trainer.model, trainer.data, config, self.world)
            if not math.isfinite(val.loss):
                return f"the validation loss was not finite after epoch {number}; try a smaller lr or rho"
            line = Epoch(
                epoch=number,
                lr=trainer.schedule.at(trainer.steps - len(meter)),
                rho=trainer.rho,
                train_loss=loss,
                perturbed_loss=perturbed,
                train_acc=right,
                val_acc=val.acc,
                val_top5=val.top5,
                val_loss=val.loss,
                test_acc=None if test is None else test.acc,
                test_top5=None if test is None else test.top5,
                memorised=memory,
                seconds=meter.seconds,
                images_per_second=meter.images * self.world.size / max(meter.seconds, 1e-9),
                peak_memory=torch.cuda.max_memory_allocated() if config.device == "cuda" else None,
                skipped=meter.skipped,
            )
            self._choose(line)
            self.lines.append(line)
            if self.folder is not None and self.world.first:
                self.folder.add_line(line)
            self._tell(EpochEnded(line=line, step=trainer.steps))
            every = self.options.measure_every
            if every and number % every == 0:
                values = measured(trainer, self.options, self._warn)
                if self.folder is not None and self.world.first:
                    self.folder.add_measures({"epoch": number, "step": trainer.steps, **values})
                self._tell(Measured(epoch=number, step=trainer.steps, values=values))
        self.epoch, self.position, self.meter, self.logged = number, 0, Meter(), (0, 0.0, 0)
        self.monitor.begin(0)
        if self._due():
            self._save(inside=False)
        return None

    def _choose(self, line: Epoch) -> None:
        """Keep the weights if this epoch is the best so far by the run's `selection`."""
        if self.config.selection == "max-test":
            better = self.best is None or (line.test_acc or 0) > (self.best.test_acc or 0)
        else:
            better = self.best is None or _merit(line) > _merit(self.best)
        if better:
            self.best = line
            if self.config.selection != "last":
                self.best_state = self._weights()

    def _weights(self) -> dict[str, Any]:
        if self.world.size > 1 and self.config.parallel == "fsdp":
            return whole_weights(self.trainer.model)
        return dict(on_cpu(self.trainer.model.state_dict()))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self, *, inside: bool, asked_for: bool = False) -> None:
        """Write a checkpoint; all processes must call this.

        Args:
            inside: whether the current epoch is unfinished.
            asked_for: write it even if the options ask for no checkpoints.
        """
        if self.folder is None:
            return
        if not (asked_for or self.options.checkpoint_every or self.options.checkpoint_steps):
            return
        state = state_of(self, inside=inside)
        if self.world.first:
            checkpoint.save(self.folder.checkpoints, self.trainer.steps, state, keep=self.options.keep_checkpoints)
        self._saved = time.monotonic()

    def _due(self) -> bool:
        """Whether to write a checkpoint after the epoch that has just ended; all processes must call this."""
        every, seconds = self.options.checkpoint_every, self.options.checkpoint_seconds
        if self.epoch >= self.config.epochs:
            return every > 0 and self.prolongable
        if not every or self.epoch % every:
            return False
        return not seconds or bool(self.world.broadcast(time.monotonic() - self._saved >= seconds))

    # -- the end -------------------------------------------------------------------------------------------------

    def _result(self, failure: str | None) -> Result:
        config, trainer = self.config, self.trainer
        common: dict[str, Any] = {
            "method": config.method,
            "rho": config.rho if trainer.recipe.ascends else None,
            "gradient_evaluations": trainer.gradient_evaluations,
            "seed": config.seed,
            "epochs": config.epochs,
            "noise": config.noise,
            "seconds": sum(line.seconds for line in self.lines),
        }
        train_scores, chosen, curvature = None, None, None
        if failure is None:
            self._load_chosen()
            train_scores = self._score(trainer.data.train)
            if not math.isfinite(train_scores.loss):
                failure = "the training loss of the selected weights is not finite; try a smaller lr or rho"
        if failure is not None or train_scores is None:
            nothing: dict[str, Any] = dict.fromkeys(("last", "best", "train_ce", "lambda_max"))
            return Result(**common, **nothing, trained=False, failure=failure)
        chosen = self._tested()
        last, best = (
            dataclasses.replace(line, test_acc=chosen["test_acc"]) if line.epoch == chosen["epoch"] else line
            for line in (self.lines[-1], self.best or self.lines[-1])
        )
        if config.measure:
            curvature = evaluate.sharpness(trainer.model, trainer.data)
        chance = evaluate.Chance.of(trainer.data, config)
        return Result(
            **common,
            trained=chance.beaten(train_scores),
            chance=chance.loss,
            last={key: getattr(last, key) for key in ("epoch", "test_acc", "val_acc", "memorised", "train_loss")},
            best={key: getattr(best, key) for key in ("epoch", "test_acc", "val_acc")},
            chosen=chosen,
            train_ce=train_scores.loss,
            lambda_max=curvature,
        )

    def _load_chosen(self) -> None:
        """Load the selected weights into the model; with an average and selection=last, the average."""
        if self.best_state is None and self.trainer.average is not None:
            with self.trainer.average.applied():
                self.best_state = self._weights()
        if self.best_state is None:
            return
        if self.world.size > 1 and self.config.parallel == "fsdp":
            load_whole_weights(self.trainer.model, self.world.broadcast(self.best_state))
        else:
            self.trainer.model.load_state_dict(self.best_state)
            self.world.share_buffers(self.trainer.model)

    def _tested(self) -> dict[str, Any]:
        """Evaluate the selected weights on the test part."""
        config = self.config
        line = self.lines[-1] if config.selection == "last" else self.best or self.lines[-1]
        test = self._score(self.trainer.data.test)
        return {
            "selection": config.selection,
            "epoch": line.epoch,
            "val_acc": line.val_acc,
            "test_acc": test.acc,
            "test_top5": test.top5,
            "test_loss": test.loss,
        }

    def _score(self, part: Split) -> evaluate.Scores:
        trainer = self.trainer
        return evaluate.score(trainer.model, trainer.data, part, self.config, self.world)

    def _tell(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)

    def _warn(self, text: str) -> None:
        self._tell(Warned(text=text))


def _merit(line: Epoch) -> tuple[float, float, int]:
    """Order of epochs: by validation accuracy, then lower validation loss, then earlier epoch."""
    return line.val_acc, -line.val_loss, -line.epoch
