"""A model, its optimizer and its data: one update at a time."""

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
    """What an update saw, on the device and without waiting for it.

    Args:
        loss: that the step returned, at w unless the method skips or moves pass 1.
        perturbed: loss of the last of exactly two passes, else None.
        right: samples that the first pass got right, of `samples`.
    """

    loss: Tensor
    perturbed: Tensor | None
    right: Tensor
    samples: int

    def copied(self) -> Step:
        """The same numbers in memory of their own."""
        perturbed = None if self.perturbed is None else self.perturbed.clone()
        return Step(self.loss.clone(), perturbed, self.right.clone(), self.samples)


class Trainer:
    """One training step after the other.

    The step is the loop a user would write: a closure that zeroes, computes and calls backward, handed to the
    optimizer; for methods on micro-batches a list of closures, one for each part of the batch. Initialisation, noise,
    batch order and augmentation depend on the seed alone, so two methods with one seed are paired.

    Args:
        config: the run.
        data: already loaded data. Default: what the configuration names.
        world: the processes.
        diagnostics: whether the optimizer records them.

    Raises:
        ValueError: an unknown name, or a method that this loop or this model cannot serve.
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
        if config.channels_last and not sharded:  # FSDP2 shards contiguous weights only
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
            replay_rng=not config.graph,  # a graph serves no model that draws, and states cannot be read in a capture
            seed=derive_seed(config.seed, "engine"),
            diagnostics=diagnostics,
            scaler=self.scaler,
            clip_norm=config.clip_norm,
            ascent_sync=config.ascent_sync,  # type: ignore[arg-type]
        )
        for group in self.optimizer.param_groups:
            group["initial_lr"] = config.lr  # as torch's schedulers write it, for a radius that follows the rate
        self._graphed = Graphed(self) if config.graph else None
        self.average = None if config.ema is None else WeightAverage(self.model, config.ema)
        self.steps = self.gradients = 0
        self._previous: Batch | None = None
        self._seen: list[tuple[int, Tensor]] = []
        self._right: dict[int, Tensor] = {}

    @property
    def gradient_evaluations(self) -> float:
        """Gradients of one batch per step: the recipe's mean, or what was taken if the rule decides by value."""
        if Need.DECIDES_BY_VALUE not in self.recipe.needs or not self.steps:
            return self.recipe.gradient_evaluations
        return round(self.gradients / self.steps, 2)

    @property
    def rho(self) -> float | None:
        """Radius of the first param group; None for a method that has none."""
        return float(self.optimizer.param_groups[0]["rho"]) if self.recipe.ascends else None

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The next epoch's batches from number `start` on; every sample once, in the seed's order."""
        return self.feed.epoch(start)

    def step(self, batch: Batch) -> Step:
        """One update at the schedule's learning rate."""
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
        """All passes and the base's step."""
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
        """The micro-batches of a batch; for the different-batch probe the batch before it, and the batch itself."""
        if self.recipe.inner_loop.two_batches:
            return [batch if self._previous is None else self._previous, batch]
        return batch.split(self.config.micro_batches)

    @property
    def previous(self) -> list[Tensor] | None:
        """The batch before, on the CPU, for methods that climb on it; each process has its own."""
        saved = self._previous
        return None if saved is None else [saved.x.cpu(), saved.y.cpu(), saved.index]

    @previous.setter
    def previous(self, saved: list[Tensor] | None) -> None:
        device = self.config.device
        self._previous = None if saved is None else Batch(saved[0].to(device), saved[1].to(device), saved[2])

    def state_dict(self, *, inside: bool) -> dict[str, Any]:
        """Everything that the next steps depend on but the global random state and `previous`, on the CPU.

        All processes must call it. What they share is whole in rank 0 only.

        Args:
            inside: whether the present epoch is unfinished.
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
        """Continue from what `state_dict` gave."""
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
                with autocast(self.config):
                    output = self._forward(part.x)
                    # The loss, and surrogates that have no rule of their own under autocast, see full precision.
                    loss: Tensor = self.criterion(output.float(), part.y)
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

    def _quiet(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients of all but the last part stay in their process."""
        if last or not isinstance(self.net, DistributedDataParallel):
            return nullcontext()
        return cast(AbstractContextManager[Any], self.net.no_sync())

    def _check(self) -> None:
        config = self.config
        check_divided(self.recipe)
        if config.accumulate > 1 and Need.MICRO_BATCHES in self.recipe.needs:
            other = self.recipe.inner_loop.two_batches
            itself = f"divides each batch by itself (micro_batches={config.micro_batches})"
            does = "climbs on another batch" if other else itself
            raise ValueError(f"{config.method} {does}; leave out accumulate.")
        if config.ema is not None and self.world.size > 1 and config.parallel == "fsdp":
            raise ValueError("ema needs whole weights; with several processes set parallel=ddp.")
        rest = len(self.data.train) % config.batch_size // self.world.size
        if rest == 1 and not config.drop_last and any(isinstance(m, nn.BatchNorm1d) for m in self.model.modules()):
            raise ValueError(
                "the last batch of an epoch has one sample in a process, of which BatchNorm1d takes no variance; set "
                "drop_last=true, or another batch_size."
            )
        if self.world.size == 1 and config.ascent_sync != "all":
            raise ValueError("ascent_sync=none is about several processes, and this is one; start them with torchrun.")


def updates(config: RunConfig, samples: int, processes: int = 1) -> int:
    """Updates of the whole training."""
    return config.epochs * steps_of(config, samples, processes)


def build_recipe(config: RunConfig) -> Recipe:
    """The recipe that a configuration names, plugins included.

    Raises:
        ValueError: an unknown method, plugin or parameter, or names that clash.
    """
    for plugin in config.plugins:
        find_module(plugin, option="plugin")
    return compose(config.method, method_table(config.plugins), **config.params)


def build_schedule(config: RunConfig, steps_per_epoch: int) -> LearningRateSchedule:
    """The learning rates that a configuration names.

    Raises:
        ValueError: options that do not go together.
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
    """The base optimizer; fused on a GPU, where skipping a step then needs no synchronisation.

    Args:
        config: names it.
        model: whose weights it changes.
        sharded: whether these are sharded; torch has no fused SGD for them.
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
    """The training loss, and its form with one loss per sample where torch's own module does not give it."""
    if config.label_smoothing and config.smoothing == "others":
        smoothed = partial(smoothed_cross_entropy, smoothing=config.label_smoothing, form="others")
        return smoothed, partial(smoothed, reduction="none")
    return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing), None
