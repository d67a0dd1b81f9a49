"""Sums of losses and correct answers over the updates of an epoch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flatmin.train.processes import World
from flatmin.train.trainer import Step

_NUMBERS = ("samples", "images", "skipped", "seconds")


class Meter:
    """Losses and numbers of correct answers in an epoch; they stay on the device until they are read.

    The means leave out losses that are not finite, which are those of skipped updates.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.perturbed: list[Tensor] = []
        self.right: list[Tensor] = []
        self.samples = self.images = self.skipped = 0
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self.losses)

    def add(self, step: Step, images: int) -> None:
        """Add an update on `images` images; more than its samples, if the ascent uses another batch."""
        self.images += images
        self.losses.append(step.loss)
        self.right.append(step.right)
        self.samples += step.samples
        if step.perturbed is not None:
            self.perturbed.append(step.perturbed)

    def means(self, world: World) -> tuple[float, float | None, float]:
        """Mean loss, mean perturbed loss or None, and accuracy in percent, over all processes."""
        device = self.losses[0].device
        rows = [_sum_and_count(kind, device) for kind in (self.losses, self.perturbed)]
        hits = torch.stack(self.right).double().sum().to(device)
        parts = [*rows, torch.stack([hits, torch.tensor(float(self.samples), device=device)]).double()]
        sums = world.sum_(torch.stack(parts)).tolist()
        loss, perturbed, right = ((a / b if b else math.nan) for a, b in sums)
        return loss, perturbed if self.perturbed else None, 100 * right

    def mean_since(self, update: int, world: World) -> float:
        """Mean loss of the updates after the first `update` ones, over all processes; nan if none was finite."""
        total, count = world.sum_(_sum_and_count(self.losses[update:], self.losses[0].device)).tolist()
        return total / count if count else math.nan

    def state_dict(self) -> dict[str, Any]:
        """The whole state, on the CPU."""
        stacks = {name: _stack(getattr(self, name)) for name in ("losses", "perturbed", "right")}
        return {**stacks, **{name: getattr(self, name) for name in _NUMBERS}}

    def load_state_dict(self, state: dict[str, Any], device: str) -> None:
        """Restore the state that `state_dict` returned."""
        for name in ("losses", "perturbed", "right"):
            setattr(self, name, list(state[name].to(device).unbind()))
        for name in _NUMBERS:
            setattr(self, name, state[name])


def _stack(values: list[Tensor]) -> Tensor:
    return torch.stack(values).cpu() if values else torch.empty(0)


def _sum_and_count(values: list[Tensor], device: torch.device) -> Tensor:
    if not values:
        return torch.zeros(2, dtype=torch.float64, device=device)
    stacked = torch.stack(values).double()
    good = stacked.isfinite()
    return torch.stack([stacked.where(good, 0.0).sum(), good.sum().double()])
