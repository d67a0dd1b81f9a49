"""The trainer: model, optimizer and data, one update at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

from flatmin.data.dataset import Data
from flatmin.methods import Need, Recipe, compose, method_table
from flatmin.methods.losses import smoothed_cross_entropy
from flatmin.optim import SAM, Criterion
from flatmin.optim.average import WeightAverage
from flatmin.optim.support import check_divided
from flatmin.train.config import RunConfig, derive_seed
from flatmin.train.feed import Batch, Feed, steps_of
from flatmin.train.graph import Graphed, tensor_rate
from flatmin.train.locate import find_module
from flatmin.train.numerics import autocast
from flatmin.train.processes import ALONE, World, load_whole_state, spread, whole_state
from flatmin.train.schedule import LearningRateSchedule
from flatmin.train.sources import build_model, check_fit, load_data

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Step:
    """Losses and correct answers of an update, as tensors on the device, so that reading them can wait.

    Args:
        loss: loss that the step returned; at w unless the method skips pass 1 or starts it elsewhere.
        perturbed: loss of the second pass if there are exactly two, else None.
        right: number of samples that the first pass classified correctly.
        samples: number of samples in the first pass.
    """

    loss: Tensor
    perturbed: Tensor | None
    right: Tensor
    samples: int

    def copied(self) -> Step:
        """A copy in separate memory."""
        perturbed = None if self.perturbed is None else self.perturbed.clone()
        return Step(self.loss.clone(), perturbed, self.right.clone(), self.samples)


class Trainer:
    """Trains step by step.

    A step is what a user's own loop would do: it passes the optimizer a closure that zeroes the gradients, computes the
    loss and calls backward; for methods on micro-batches, a list of closures, one for each part of the batch. Initial
    weights, label noise, batch order and augmentation depend on the seed alone, so runs of two methods with the same
    seed are paired.

    Args:
        config: configuration of the run.
        data: the data, if they are already loaded. Default: load the data that the configuration names.
        world: the processes.
        diagnostics: whether the optimizer records diagnostics.

    Raises:
        ValueError: a name is unknown, or this loop or this model does not support the method.
    """

    def __init__(
        self, config: RunConfig, *, data: Data | None = None, world: World = ALONE, diagnostics: bool = False
    ) -> None:
        self.config, self.world = config, world
        self.data = load_data(config) if data is None else data
        self.feed = Feed(self.data, config, world)
        self.model: nn.Module = build_model(config, self.data)
        check_fit(self.model, self.data, channels_last=config.channels_last)
        self.recipe = build_recipe(config).for_length(
            updates(config, len(self.data.train), world.size), len(self.data.train)
        )
        self._check()
        self.schedule = build_schedule(config, self.feed.steps)
        sharded = world.size > 1 and config.parallel == "fsdp"
        if config.channels_last and not sharded:  # FSDP2 can only shard contiguous weights
            self.model = cast(nn.Module, self.model.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        self.net = self.model
        if world.size > 1:
            self.net = spread(self.model, config.parallel, world, sync_batchnorm=config.sync_batchnorm)
        self._forward: Callable[[Tensor], Tensor] = torch.compile(self.net) if config.compile else self.net
        self.criterion = Criterion(*build_loss(config))
        self.scaler = torch.amp.GradScaler(config.device) if config.precision == "fp16" else None
        self.optimizer = SAM(
            build_base(config, self.model, sharded=sharded),
            rho=config.rho,
            recipe=self.recipe,
            model=self.net,
            criterion=self.criterion,
            freeze_batchnorm=config.freeze_batchnorm,
            replay_rng=not config.graph,  # graphs exclude models with random draws; captures cannot read random states
            seed=derive_seed(config.seed, "engine"),
            diagnostics=diagnostics,
            scaler=self.scaler,
            clip_norm=config.clip_norm,
            ascent_sync=config.ascent_sync,  # type: ignore[arg-type]
            flat=config.flat,
        )
        for group in self.optimizer.param_groups:
            group["initial_lr"] = config.lr  # set by torch's schedulers too; a radius may follow the learning rate
        self._graphed = Graphed(self) if config.graph else None
        self.average = None if config.ema is None else WeightAverage(self.model, config.ema)
        self.steps = self.gradients = 0
        self._previous: Batch | None = None
        self._seen: list[tuple[int, Tensor]] = []
        self._right: dict[int, Tensor] = {}

    @property
    def gradient_evaluations(self) -> float:
        """Gradient evaluations per step: the recipe's average, or the measured one if the method decides by value."""
        if Need.DECIDES_BY_VALUE not in self.recipe.needs or not self.steps:
            return self.recipe.gradient_evaluations
        return round(self.gradients / self.steps, 2)

    @property
    def rho(self) -> float | None:
        """Radius of the first param group; None for a method without a radius."""
        return float(self.optimizer.param_groups[0]["rho"]) if self.recipe.ascends else None

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batches of the next epoch, from number `start` on, in the order that the seed defines."""
        return self.feed.epoch(start)

    def step(self, batch: Batch) -> Step:
        """Do one update, at the learning rate of the schedule."""
        lr = self.schedule.at(self.steps)
        for group in self.optimizer.param_groups:
            if self._graphed is None:
                group["lr"] = lr
            else:
                group["lr"].fill_(lr)
        step = self._one(batch) if self._graphed is None else self._graphed.step(batch, self._one)
        self.steps += 1
        if self.average is not None:
            self.average.update()
        return step

    def _one(self, batch: Batch) -> Step:
        """Do all passes and the step of the base optimizer."""
        self._seen, self._right = [], {}
        if Need.MICRO_BATCHES in self.recipe.needs:
            parts = self.parts(batch)
            loss = self._update([partial(self._closure, k, [part]) for k, part in enumerate(parts)])
        else:
            parts = batch.split(self.config.accumulate) if self.config.accumulate > 1 else [batch]
            loss = self._update(partial(self._closure, 0, parts))
        if self.recipe.inner_loop.two_batches:
            self._previous = batch
        two = len(self._seen) == 2 and self.recipe.two_pass
        right = list(self._right.values())
        return Step(loss, self._seen[1][1] if two else None, sum(right[1:], right[0]), sum(map(len, parts)))

    def parts(self, batch: Batch) -> list[Batch]:
        """The micro-batches of a batch; for methods with an ascent on another batch, the previous and this one."""
        if self.recipe.inner_loop.two_batches:
            return [batch if self._previous is None else self._previous, batch]
        return batch.split(self.config.micro_batches)

    @property
    def previous(self) -> list[Tensor] | None:
        """The previous batch, on the CPU, for methods that use it for the ascent; each process has its own."""
        saved = self._previous
        return None if saved is None else [saved.x.cpu(), saved.y.cpu(), saved.index]

    @previous.setter
    def previous(self, saved: list[Tensor] | None) -> None:
        device = self.config.device
        self._previous = None if saved is None else Batch(saved[0].to(device), saved[1].to(device), saved[2])

    def state_dict(self, *, inside: bool) -> dict[str, Any]:
        """The state that the next steps depend on, on the CPU, without the global random state and `previous`.

        All processes must call this. The state that they share is complete in rank 0 only.

        Args:
            inside: whether the current epoch is unfinished.
        """
        model, optimizer = whole_state(self.model, self.optimizer, self.config.parallel, self.world)
        return {
            "model": model,
            "optimizer": optimizer,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "feed": self.feed.state_dict(inside=inside),
            "steps": self.steps,
            "gradients": self.gradients,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        both = state["model"], state["optimizer"]
        load_whole_state(self.model, self.optimizer, self.config.parallel, self.world, both)
        if self._graphed is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = tensor_rate(self.config.lr, self.config.device)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.feed.load_state_dict(state["feed"])
        self.steps, self.gradients = state["steps"], state["gradients"]

    def _update(self, closure: Any) -> Tensor:
        if self.scaler is None:
            return self.optimizer.step(closure)  # type: ignore[no-any-return]
        loss: Tensor = self.scaler.step(self.optimizer, closure)  # type: ignore[assignment]
        self.scaler.update()
        return loss

    def _closure(self, key: int, parts: list[Batch]) -> Tensor:
        self.gradients += 1
        self.optimizer.zero_grad()
        total = torch.zeros(())
        right = torch.zeros(())
        samples = sum(map(len, parts))
        for number, part in enumerate(parts, start=1):
            with self._quiet(last=number == len(parts)):
                chosen = self.optimizer.select_samples(partial(self._loss, part, slice(None)))
                output, loss = self._loss(part, chosen)
                if len(parts) > 1:
                    loss = loss * (len(part) / samples)
                self.optimizer.backward(loss if self.scaler is None else self.scaler.scale(loss))
            total = loss.detach() if number == 1 else total + loss.detach()
            if key not in self._right:
                hits = (output.detach().argmax(1) == part.y).sum()
                right = hits if number == 1 else right + hits
        self._right.setdefault(key, right)
        self._seen.append((key, total))
        return total

    def _loss(self, part: Batch, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        # The same tensors in all passes, which the engine compares by identity, unless some samples were chosen.
        x, y = (part.x, part.y) if isinstance(chosen, slice) else (part.x[chosen], part.y[chosen])
        with autocast(self.config):
            output = self._forward(x)
            # Full precision for the loss, and for surrogates that autocast has no rule for.
            return output, self.criterion(output.float(), y)

    def _quiet(self, *, last: bool) -> AbstractContextManager[Any]:
        """Suppress the gradient synchronisation between processes, except for the last part."""
        if last or not isinstance(self.net, DistributedDataParallel):
            return nullcontext()
        return cast(AbstractContextManager[Any], self.net.no_sync())

    def _check(self) -> None:
        config = self.config
        check_divided(self.recipe)
        if config.accumulate > 1 and Need.MICRO_BATCHES in self.recipe.needs:
            other = self.recipe.inner_loop.two_batches
            itself = f"already splits each batch (micro_batches={config.micro_batches})"
            does = "uses another batch for the ascent" if other else itself
            raise ValueError(f"{config.method} {does}; leave out accumulate.")
        if config.flat and self.world.size > 1 and config.parallel == "fsdp":
            raise ValueError("flat=true needs whole weights; with several processes set parallel=ddp.")
        if config.ema is not None and self.world.size > 1 and config.parallel == "fsdp":
            raise ValueError("ema needs whole weights; with several processes set parallel=ddp.")
        if any(isinstance(m, nn.BatchNorm1d) for m in self.model.modules()):
            self._check_batches()
        if self.world.size == 1 and config.ascent_sync != "all":
            raise ValueError(
                "ascent_sync=none is for several processes, but there is only one; start several with torchrun, or "
                "leave out ascent_sync."
            )

    def _check_batches(self) -> None:
        """Raise ValueError if some forward gets a single sample."""
        config, parts = self.config, self.config.accumulate
        if Need.MICRO_BATCHES in self.recipe.needs and not self.recipe.inner_loop.two_batches:
            parts = config.micro_batches
        sizes = {"each batch": config.batch_size}
        if not config.drop_last:
            sizes["the last batch of an epoch"] = len(self.data.train) % config.batch_size
        for which, size in sizes.items():
            mine = size // self.world.size
            part = mine // min(parts, mine) if mine else 0
            if part and self.recipe.samples.count(part) == 1:
                cuts = [
                    *(["in a process"] if self.world.size > 1 else []),
                    *(["in a part"] if parts > 1 else []),
                    *([f"chosen by {config.method}"] if part > 1 else []),
                ]
                raise ValueError(
                    f"{' '.join([which, 'has one sample', *cuts])}, and BatchNorm1d needs at least two; set "
                    f"{'a larger' if which == 'each batch' else 'drop_last=true, or another'} batch_size."
                )


def updates(config: RunConfig, samples: int, processes: int = 1) -> int:
    """Number of updates of the whole training."""
    return config.epochs * steps_of(config, samples, processes)


def build_recipe(config: RunConfig) -> Recipe:
    """Build the recipe of a configuration, including plugins.

    Raises:
        ValueError: a method, plugin or parameter is unknown, or the names do not compose.
    """
    for plugin in config.plugins:
        find_module(plugin, option="plugin")
    return compose(config.method, method_table(config.plugins), **config.params)


def build_schedule(config: RunConfig, steps_per_epoch: int) -> LearningRateSchedule:
    """Build the learning rate schedule of a configuration.

    Raises:
        ValueError: options contradict each other.
    """
    return LearningRateSchedule(
        kind=config.schedule,
        lr=config.lr,
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        unit=config.schedule_unit,
        warmup=config.warmup,
        warmup_lr=config.warmup_lr,
        lr_min=config.lr_min,
        milestones=config.milestones,
        gamma=config.gamma,
        as_coded=config.as_coded,
    )


def build_base(config: RunConfig, model: nn.Module, *, sharded: bool = False) -> Optimizer:
    """Build the base optimizer; on a GPU it is fused, so that skipping a step needs no synchronisation.

    Args:
        config: configuration of the run.
        model: model whose weights are trained.
        sharded: whether the weights are sharded; torch has no fused SGD for sharded weights.
    """
    fused = True if config.device == "cuda" and not (sharded and config.optimizer == "sgd") else None
    lr = tensor_rate(config.lr, config.device) if config.graph else config.lr
    weights = list(model.parameters())
    if config.optimizer == "sgd":
        return SGD(
            weights,
            lr=lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    kind = Adam if config.optimizer == "adam" else AdamW
    betas = (config.betas[0], config.betas[1])
    decay = config.weight_decay
    return kind(weights, lr=lr, betas=betas, weight_decay=decay, fused=fused, capturable=config.graph)


def build_loss(
    config: RunConfig,
) -> tuple[Loss, Loss | None]:
    """Build the training loss, and a form with one loss per sample if torch's own module cannot provide it."""
    if config.label_smoothing and config.smoothing == "others":
        smoothed = partial(smoothed_cross_entropy, smoothing=config.label_smoothing, form="others")
        return smoothed, partial(smoothed, reduction="none")
    return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing), None
