"""Training as it is timed: flatmin's trainer in its settings, the same step written plainly, the papers' scripts.

An arm trains without end; what is timed is a number of its updates, the making of batches included. All arms begin
with the same weights and take the same update at the same learning rate, on images drawn from the same set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks import images
from benchmarks.peers import PlainLoop
from flatmin.data.dataset import Data
from flatmin.train.config import RunConfig
from flatmin.train.feed import Batch
from flatmin.train.numerics import numerics
from flatmin.train.sources import build_model
from flatmin.train.trainer import Trainer

METHODS = ("sgd", "sam")
LR, MOMENTUM, DECAY, RHO = 0.01, 0.9, 5e-4, 0.05
# name: (model, its parameters)
NETS: dict[str, tuple[str, dict[str, int]]] = {
    "resnet8": ("resnet8", {}),
    "resnet20": ("resnet20", {}),
    "resnet18": ("resnet18", {}),
    "resnet18-w16": ("resnet18", {"width": 16}),
    "resnet8-w4": ("resnet8", {"width": 4}),
}


def config_of(net: str, method: str, batch: int, device: str, **settings: Any) -> RunConfig:
    """A run that has no end worth speaking of, at a constant learning rate."""
    model, params = NETS[net]
    return RunConfig(
        method=method,
        rho=RHO if method == "sam" else None,
        model=model,
        model_params=params,
        data="cifar10",
        batch_size=batch,
        drop_last=True,
        epochs=1000,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        schedule="constant",
        device=device,
        **settings,
    )


class TimedTraining(Protocol):
    """A training run that can be continued for a given number of updates."""

    model: nn.Module

    def run(self, updates: int) -> None:
        """Continue."""

    def forget(self) -> None:
        """Begin with an empty momentum."""

    def update(self, x: Tensor, y: Tensor) -> None:
        """One update on a batch that is given."""


class Ours:
    """`Trainer` and `Feed`."""

    def __init__(self, config: RunConfig, data: Data) -> None:
        self.config = config
        with numerics(config):
            self.trainer = Trainer(config, data=data)
        self.trainer.net.train()
        self.model = self.trainer.model
        self._batches = self._endless()

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self.trainer.batches()

    def run(self, updates: int) -> None:
        """Continue."""
        with numerics(self.config):
            for _ in range(updates):
                self.trainer.step(next(self._batches))

    def repeat(self, batch: Batch, updates: int) -> None:
        """Continue one and the same batch, so that none has to be made."""
        with numerics(self.config):
            for _ in range(updates):
                self.trainer.step(batch)

    def forget(self) -> None:
        """Begin with an empty momentum, at the same address: a graph knows no other."""
        for state in self.trainer.optimizer.state.values():
            state["momentum_buffer"].zero_()

    def update(self, x: Tensor, y: Tensor) -> None:
        """One update on a batch that is given."""
        form = torch.channels_last if self.config.channels_last else torch.contiguous_format
        with numerics(self.config):
            self.trainer.step(Batch(x.contiguous(memory_format=form), y, torch.arange(len(y))))


class Plain:
    """The step written plainly: SAM as a loop over tensors, batches from a data loader, torch's own defaults.

    As the papers' scripts do, it keeps running statistics of BatchNorm out of the second pass by walking over the
    modules.

    Args:
        config: seed, model, batch and method.
        data: its training part is what the loader draws from.
        source: what the loader takes images from.
        workers: processes of the loader.
        finish: makes what the loader gives, moved to the device, the model's input and its labels.
        autocast: whether the forward runs in bfloat16.
        channels_last: the memory format of images and weights.
        compile: whether the forward is compiled.
        reads: read loss and right answers in every step, as the scripts do.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Data,
        source: Dataset[Any],
        *,
        workers: int,
        finish: Callable[..., tuple[Tensor, Tensor]] = lambda x, y: (x, y),
        pinned: bool = False,
        autocast: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        reads: bool = False,
    ) -> None:
        self.config, self._finish, self._pinned = config, finish, pinned
        self._autocast, self._reads = autocast, reads
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = build_model(config, data).to(memory_format=self._format)
        self.model.train()
        self._forward = torch.compile(self.model) if compile else self.model
        self.forget()
        self._batches = images.endless(source, config.batch_size, workers=workers, pinned=pinned)
        self.seen = 0.0

    def forget(self) -> None:
        """Begin with an empty momentum."""
        self.loop = PlainLoop(self.model.parameters(), rho=RHO)
        for group in self.loop.base.param_groups:
            group |= {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}

    def run(self, updates: int) -> None:
        """Continue."""
        with defaults(self.config.device):
            for _ in range(updates):
                batch = [t.to(self.config.device, non_blocking=self._pinned) for t in next(self._batches)]
                self.update(*self._finish(*batch))

    def update(self, x: Tensor, y: Tensor) -> None:
        """One update on a batch that is given."""
        sam = self.config.method == "sam"
        x = x.contiguous(memory_format=self._format)
        self._statistics(tracked=True)
        output, loss = self._pass(x, y)
        if sam:
            self.loop.first_step(zero_grad=True)
            self._statistics(tracked=False)
            self._pass(x, y)
            self.loop.second_step()
        else:
            self.loop.base.step()
        self.loop.zero_grad()
        if self._reads:
            self.seen += loss.item() + (output.argmax(1) == y).sum().item()

    def _pass(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        precision = torch.autocast(self.config.device, torch.bfloat16) if self._autocast else contextlib.nullcontext()
        with precision:
            output = self._forward(x)
            loss = nn.functional.cross_entropy(output, y)
        loss.backward()
        return output.detach(), loss.detach()

    def _statistics(self, *, tracked: bool) -> None:
        if self.config.method == "sam":
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.1 if tracked else 0.0


@contextlib.contextmanager
def defaults(device: str) -> Iterator[None]:
    """What the scripts set: algorithms of convolutions chosen by trial, and torch's TF32 for convolutions."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    try:
        cudnn.benchmark, cudnn.allow_tf32 = device == "cuda", True
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before


@dataclass(frozen=True)
class Kind:
    """One way to train.

    Args:
        name: what tables print.
        build: makes the arm of a method, for a net, a batch size and data; None where something is not installed.
        peak: the precision of `peak.rate` that its share is taken of.
        exact: whether one update must be that of float32.
        ours: whether it is flatmin.
        ahead: batches that its loader makes before they are asked for.
    """

    name: str
    build: Callable[[str, str, int, Data], TimedTraining | None]
    peak: str
    exact: bool = False
    ours: bool = False
    ahead: int = 0


def ours(device: str, peak: str, **settings: Any) -> Kind:
    """The trainer with settings of `RunConfig`."""
    words = [str(v) if k == "precision" else k for k, v in settings.items()]
    name = "flatmin, " + " + ".join(words if "precision" in settings or "tf32" in settings else ["float32", *words])

    def build(net: str, method: str, batch: int, data: Data) -> TimedTraining:
        return Ours(config_of(net, method, batch, device, **settings), data)

    return Kind(name, build, peak, exact=peak == "float32", ours=True)


def plain(device: str, workers: int, *, autocast: bool, **settings: bool) -> Kind:
    """The same step written plainly; bytes come from the loader, the rest is done on the device.

    `channels_last` and `compile` make it the fastest loop that can be written without flatmin.
    """

    def build(net: str, method: str, batch: int, data: Data) -> TimedTraining:
        config = config_of(net, method, batch, device)
        source = images.Bytes(data.train)
        pinned = device == "cuda"
        return Plain(
            config, data, source, workers=workers, finish=_finish, pinned=pinned, autocast=autocast, **settings
        )

    precision = " + ".join(["bf16" if autocast else "float32", *settings])
    peak = "bf16" if autocast else "tf32" if device == "cuda" else "float32"
    return Kind(f"plain, {precision}{_with(workers)}", build, peak, exact=not autocast, ahead=2 * workers)


def original(device: str, workers: int, *, torchvision: bool = False) -> Kind:
    """The papers' scripts: prepared images from the loader, float32, loss and right answers read in every step."""

    def build(net: str, method: str, batch: int, data: Data) -> TimedTraining | None:
        source = images.torchvision_images(data.train) if torchvision else images.Prepared(data.train)
        if source is None:
            return None
        return Plain(config_of(net, method, batch, device), data, source, workers=workers, reads=True)

    peak = "tf32" if device == "cuda" else "float32"
    which = "original, torchvision" if torchvision else "original"
    return Kind(f"{which}{_with(workers)}", build, peak, exact=True, ahead=2 * workers)


def _with(workers: int) -> str:
    return f", {workers} workers" if workers else ""


def _finish(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return images.finished(x, rows, columns), y
