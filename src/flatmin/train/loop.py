"""One training run."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from flatmin.data.base import Data
from flatmin.engine import SAM, Criterion
from flatmin.parts import Need, OtherBatch
from flatmin.recipes import Recipe, compose, method_table
from flatmin.train import metrics
from flatmin.train.config import RunConfig, stream
from flatmin.train.locate import find_module
from flatmin.train.sources import build_model, load_data


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of metrics.jsonl. Accuracies and `memorised` in percent, losses in nats, seconds of training only.

    `train_loss` is the mean over the epoch's steps of the loss that the step returned: at w before the step, or at
    w + eps for methods that skip or move pass 1.
    """

    epoch: int
    lr: float
    rho: float | None
    train_loss: float
    val_acc: float
    val_loss: float
    test_acc: float
    memorised: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run ended with: the content of result.json.

    Args:
        gradient_evaluations: per step; what the recipe costs on average, or what the run took if its rule decides by
            value.
        trained: False if the final train cross-entropy is at least 95 % of log K.
        last, best: the last epoch and the one with the best validation accuracy (ties: lower validation loss, then
            earlier); None if the run failed.
        train_ce: mean cross-entropy of the un-augmented training part with its noisy labels, eval mode.
        lambda_max: value, relative residual, products and convergence; None if not measured.
        seconds: training only.
        failure: why the run stopped early, or None.
    """

    method: str
    rho: float | None
    gradient_evaluations: float
    seed: int
    epochs: int
    noise: float
    trained: bool
    last: dict[str, Any] | None
    best: dict[str, Any] | None
    train_ce: float | None
    lambda_max: dict[str, Any] | None
    seconds: float
    failure: str | None = None


class Trainer:
    """A model, its optimizer and its data, one training step at a time.

    The step is the loop a user would write: a closure that zeroes, computes and calls backward, handed to the
    optimizer; for methods on micro-batches a list of closures, one for each part of the batch. Initialisation, noise
    and batch order depend on the seed alone, so two methods with one seed are paired.

    Args:
        config: the run.
        data: already loaded data. Default: what the configuration names.

    Raises:
        ValueError: an unknown name, or a method that this loop or this model cannot serve.
    """

    def __init__(self, config: RunConfig, *, data: Data | None = None) -> None:
        self.config = config
        self.data = load_data(config) if data is None else data
        self.model: nn.Module = build_model(config, self.data)
        self.criterion = Criterion(nn.CrossEntropyLoss())
        base = torch.optim.SGD(
            self.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.recipe = build_recipe(config).for_length(updates(config, len(self.data.train)))
        self.optimizer = SAM(
            base,
            rho=config.rho,
            recipe=self.recipe,
            model=self.model,
            criterion=self.criterion,
            seed=stream(config.seed, "engine"),
        )
        self._order = torch.Generator().manual_seed(stream(config.seed, "order"))
        self._previous: Tensor | None = None
        self._steps = self._gradients = 0

    @property
    def gradient_evaluations(self) -> float:
        """Gradients of one batch per step: the recipe's mean, or what was taken if the rule decides by value."""
        if Need.DECIDES_BY_VALUE not in self.recipe.needs or not self._steps:
            return self.recipe.gradient_evaluations
        return round(self._gradients / self._steps, 2)

    def epoch_batches(self) -> Iterator[Tensor]:
        """Indices of the next epoch's batches; every sample once, in the seed's order."""
        order = torch.randperm(len(self.data.train), generator=self._order)
        yield from order.to(self.config.device).split(self.config.batch_size)

    def step(self, index: Tensor) -> Tensor:
        """One update on the samples `index`; the loss of its first pass, detached."""
        self._steps += 1
        if Need.MICRO_BATCHES in self.recipe.needs:
            closures = [partial(self._closure, part) for part in self._parts(index)]
            loss: Tensor = self.optimizer.step(closures)
        else:
            loss = self.optimizer.step(partial(self._closure, index))
        self._previous = index
        return loss

    def _closure(self, index: Tensor) -> Tensor:
        self._gradients += 1
        self.optimizer.zero_grad()
        x, y = self.data.train.x[index], self.data.train.y[index]
        loss: Tensor = self.criterion(self.model(x), y)
        self.optimizer.backward(loss)
        return loss

    def _parts(self, index: Tensor) -> list[Tensor]:
        """The micro-batches of a batch; for the different-batch probe the batch before it, and the batch itself."""
        if isinstance(self.recipe.points, OtherBatch):
            return [index if self._previous is None else self._previous, index]
        return list(index.tensor_split(min(self.config.micro_batches, len(index))))


def updates(config: RunConfig, samples: int) -> int:
    """Updates of the whole training."""
    return config.epochs * -(-samples // config.batch_size)


def build_recipe(config: RunConfig) -> Recipe:
    """The recipe that a configuration names, plugins included.

    Raises:
        ValueError: an unknown method, plugin or parameter, or names that clash.
    """
    for plugin in config.plugins:
        find_module(plugin, option="plugin")
    return compose(config.method, method_table(config.plugins), **config.params)


def train(
    config: RunConfig,
    *,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_end: Callable[[nn.Module], None] | None = None,
) -> Result:
    """Train once.

    The same configuration gives the same numbers bit for bit on one CPU with one number of threads. The global
    random state is left as it was.

    Args:
        config: the run.
        on_epoch: called after every epoch.
        on_end: called with the trained model; not where the run failed.

    Raises:
        ValueError: a configuration that names something unknown or that does not fit together.
    """
    with torch.random.fork_rng(devices=[] if config.device == "cpu" else [torch.device(config.device)]):
        torch.manual_seed(stream(config.seed, "training"))
        trainer = Trainer(config)
        lines, failure = _epochs(trainer, on_epoch)
        result = _result(trainer, lines, failure)
        if on_end is not None and result.failure is None:
            on_end(trainer.model)
        return result


def _epochs(trainer: Trainer, on_epoch: Callable[[Epoch], None] | None) -> tuple[list[Epoch], str | None]:
    config, optimizer = trainer.config, trainer.optimizer
    scheduler = CosineAnnealingLR(optimizer, config.epochs)
    lines: list[Epoch] = []
    for number in range(1, config.epochs + 1):
        lr = float(optimizer.param_groups[0]["lr"])
        trainer.model.train()
        begun = time.perf_counter()
        losses = [trainer.step(index) for index in trainer.epoch_batches()]
        loss = torch.stack(losses).double().mean().item()
        seconds = time.perf_counter() - begun
        scheduler.step()
        if not math.isfinite(loss):
            return lines, f"the training loss was not finite in epoch {number}; try a smaller lr or rho"
        scores = metrics.score(trainer.model, trainer.data)
        if not math.isfinite(scores.val_loss):
            return lines, f"the validation loss was not finite after epoch {number}; try a smaller lr or rho"
        line = Epoch(
            epoch=number, lr=lr, rho=config.rho, train_loss=loss, seconds=seconds, **dataclasses.asdict(scores)
        )
        lines.append(line)
        if on_epoch is not None:
            on_epoch(line)
    return lines, None


def _result(trainer: Trainer, lines: list[Epoch], failure: str | None) -> Result:
    config, recipe = trainer.config, trainer.recipe
    seconds = sum(line.seconds for line in lines)
    common: dict[str, Any] = {
        "method": config.method,
        "rho": config.rho if recipe.ascends else None,
        "gradient_evaluations": trainer.gradient_evaluations,
        "seed": config.seed,
        "epochs": config.epochs,
        "noise": config.noise,
        "seconds": seconds,
    }
    if failure is None:
        cross_entropy = metrics.train_cross_entropy(trainer.model, trainer.data.train)
        if not math.isfinite(cross_entropy):
            failure = "the weights gave a train loss that is not finite after the last epoch; try a smaller lr or rho"
    if failure is not None:
        return Result(**common, last=None, best=None, train_ce=None, lambda_max=None, trained=False, failure=failure)
    last = lines[-1]
    best = max(lines, key=lambda line: (line.val_acc, -line.val_loss, -line.epoch))
    curvature = None
    if config.measure:
        curvature = metrics.sharpness(trainer.model, trainer.data.train)
    return Result(
        **common,
        trained=metrics.has_trained(cross_entropy, trainer.data.num_classes),
        last={key: getattr(last, key) for key in ("epoch", "test_acc", "val_acc", "memorised", "train_loss")},
        best={key: getattr(best, key) for key in ("epoch", "test_acc", "val_acc")},
        train_ce=cross_entropy,
        lambda_max=curvature,
    )
