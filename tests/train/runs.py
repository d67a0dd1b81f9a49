"""What the tests of whole runs share: small data and nets, runs that are stopped and continue, what a run has left."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatmin.data.augment import Augment
from flatmin.data.dataset import Data, Split
from flatmin.data.images import Statistics
from flatmin.train import events
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.loop import train
from flatmin.train.options import Options

HERE = "tests.train.runs"
MARKED = 7
TIMES = ("seconds", "images_per_second", "peak_memory")
KINDS = {"begin": events.Began, "step": events.Stepped, "epoch": events.EpochEnded, "measured": events.Measured}


# -- data and nets -----------------------------------------------------------------------------------------------


def images():
    """Bytes of 3 x 8 x 8 with an augmentation: 50 to train, so that batches of 16 leave one of two."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randint(60, 200, (3, 3, 8, 8), generator=g)
    parts = []
    for n in (50, 20, 30):
        y = torch.arange(n) % 3
        noise = torch.randint(-50, 51, (n, 3, 8, 8), generator=g)
        parts.append(Split((centres[y] + noise).to(torch.uint8), y))
    augment = Augment(crop=1, flip=True, cutout=3, cutout_p=0.5)
    return Data(*parts, num_classes=3, name="images", statistics=Statistics.of(parts[0].x), augment=augment)


def image_net():
    """With statistics and with masks to remember."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(36, 3)
    )


def plain_net():
    """Without either, so that it is the same however a batch is divided."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))


class Loud(nn.Sequential):
    """Whose gradients overflow in half precision, so that a scaler halves its scale."""

    def forward(self, x):
        return 30 * super().forward(x)


def loud_net():
    return Loud(*image_net())


def points():
    """Three clouds, of which one training sample is marked for `Poisoned` and `PoisonedGradient`."""
    g = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(3, 6, generator=g)
    parts = []
    for n in (48, 20, 30):
        y = torch.arange(n) % 3
        parts.append(Split(centres[y] + torch.randn(n, 6, generator=g), y))
    parts[0].x[MARKED, 0] = 99.0
    return Data(*parts, num_classes=3, name="points")


class Poisoned(nn.Module):
    """Makes a marked sample nan while training, and an ordinary one otherwise."""

    def forward(self, x):
        bad = x[:, :1] > 50
        return torch.where(bad, torch.nan if self.training else 0.0, x)


class _Nan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bad):
        ctx.save_for_backward(bad)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.where(ctx.saved_tensors[0], torch.nan, gradient), None


class PoisonedGradient(nn.Module):
    """A linear layer after which the gradient of a marked sample is nan, and nothing else."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 16)

    def forward(self, x):
        bad = x[:, :1] > 50
        out = self.layer(torch.where(bad, 0.0, x))
        return _Nan.apply(out, bad) if self.training else out


def poisoned_net():
    return nn.Sequential(Poisoned(), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def poisoned_gradient_net():
    return nn.Sequential(PoisonedGradient(), nn.ReLU(), nn.Linear(16, 3))


# -- runs --------------------------------------------------------------------------------------------------------


def config(**changes) -> RunConfig:
    """Three epochs of four updates."""
    usual = {
        "method": "vasso",
        "rho": 0.05,
        "epochs": 3,
        "batch_size": 16,
        "data": f"{HERE}:images",
        "model": f"{HERE}:image_net",
        "test_every": 1,
    }
    return RunConfig(**{**usual, **changes})


def options(**changes) -> Options:
    """Every update is recorded."""
    return Options(**{"log_every": 1, "checkpoint_steps": 3, **changes})


class Stop(Exception):
    """The end of a run from outside."""


class At:
    """A listener that stops the run at one place: "begin", "step 5", "epoch 2", "measured 2".

    how: "raise", or the name of a signal that the process sends itself.
    """

    def __init__(self, place: str, how: str = "raise") -> None:
        kind, _, number = place.partition(" ")
        self._kind, self._number, self._how = KINDS[kind], int(number or 0), how
        self.told: list[Any] = []

    def __call__(self, event: Any) -> None:
        self.told.append(event)
        if not isinstance(event, self._kind) or self._number != self._where(event):
            return
        if self._how == "raise":
            raise Stop
        signal.raise_signal(getattr(signal, self._how))

    def _where(self, event: Any) -> int:
        if isinstance(event, events.Began):
            return 0
        if isinstance(event, events.Stepped):
            return event.step
        return event.line.epoch if isinstance(event, events.EpochEnded) else event.epoch


def go(path: Path, settings: RunConfig, how: Options | None = None, on_event: Any = None, **rest: Any) -> list[Any]:
    """Continue a run, or begin it; the events."""
    told: list[Any] = []
    train(
        settings,
        folder=RunFolder(path),
        resume=True,
        options=options() if how is None else how,
        on_event=told.append if on_event is None else on_event,
        **rest,
    )
    return told


def go_in_pieces(path: Path, settings: RunConfig, places: Sequence[str], how: Options | None = None) -> list[Any]:
    """A run that is stopped at each of the places and continues after it; the events of the last piece."""
    for place in places:
        stopped = False
        try:
            go(path, settings, how, At(place))
        except Stop:
            stopped = True
        assert stopped, f"the run never came to {place}"
    return go(path, settings, how)


# -- what they leave ---------------------------------------------------------------------------------------------


def outcome(path: Path) -> dict[str, Any]:
    """All that a finished run has on disk, but what was the time."""
    folder = RunFolder(path)
    result = json.loads((path / "result.json").read_text())
    return {
        "weights": torch.load(folder.weights, weights_only=True) if folder.weights.exists() else None,
        "lines": [_timeless(vars(line)) for line in folder.lines()],
        "steps": [_timeless(step) for step in folder.steps()],
        "measures": folder.measures(),
        "result": _timeless(result),
        # The name of a checkpoint holds a digest of its content, times included.
        "files": sorted(re.sub(r"-[0-9a-f]{16}\.pt", "", p.relative_to(path).as_posix()) for p in path.rglob("*")),
    }


_known: dict[str, dict[str, Any]] = {}


def left_alone(folder: Path, settings: RunConfig, how: Options | None = None) -> dict[str, Any]:
    """The outcome of a run that nothing interrupts, which is trained below this folder unless it has been elsewhere."""
    key = repr((settings, how))
    if key not in _known:
        go(folder / "alone", settings, how)
        _known[key] = outcome(folder / "alone")
    return _known[key]


def content(path: Path) -> dict[str, tuple[bytes, int]]:
    """Every file of a folder with its bytes and its time, to see that nothing was touched."""
    return {
        p.relative_to(path).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in path.rglob("*") if p.is_file()
    }


def saved_steps(path: Path) -> list[int]:
    """The updates at which there is a checkpoint, the last one first."""
    return sorted((int(p.name[5:14]) for p in (path / "checkpoints").glob("step-*.pt")), reverse=True)


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMES}
