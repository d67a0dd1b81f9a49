"""The learning-rate schedules of training as rules of the theory, continued for all n."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from flatmin.theory.rules import Asymptotics, Growth, Horizon, Rule, at_least_zero
from flatmin.train.schedule import LearningRateSchedule


@dataclass(frozen=True)
class Diminish(Rule):
    """The diminishing step sizes of the paper's experiments, constant within an epoch of `epoch` updates.

    With e = floor((n - 1) / epoch): 1: lr / (e + 1); 2: lr / (e + 1)^0.5001; 3: lr / (b ln b), b = 2 + floor(e / 5).
    So t_n ~ lr epoch / n, lr epoch^0.5001 / n^0.5001, and 5 lr epoch / (n log n). The values are those of
    `flatmin.train.schedule.LearningRateSchedule`.

    Args:
        kind: 1, 2 or 3.
        lr: initial step size, >= 0. Default: 0.1.
        epoch: updates per epoch, >= 1. Default: 1.

    Raises:
        ValueError: an unknown kind, or a number out of range.

    Source: Khanh et al., NeurIPS 2024, and their code fundamental-sam.
    """

    kind: int
    lr: float = 0.1
    epoch: int = 1

    def __post_init__(self) -> None:
        if self.kind not in (1, 2, 3):
            raise ValueError(f"the kind of diminish must be 1, 2 or 3, got {self.kind!r}.")
        at_least_zero(f"diminish{self.kind}", lr=self.lr)
        _count(f"diminish{self.kind}", epoch=self.epoch)

    def _at(self, n: int) -> float:
        return _schedule(f"diminish{self.kind}", self.lr, 10**15, self.epoch, 0.0).at(n - 1)

    @property
    def asymptotics(self) -> Asymptotics:
        if self.kind == 3:
            return Asymptotics(5 * self.lr * self.epoch, 1.0, 1.0)
        p = 1.0 if self.kind == 1 else 0.5001
        return Asymptotics(self.lr * self.epoch**p, p)

    def __str__(self) -> str:
        return f"diminish{self.kind}:lr={self.lr!r},epoch={self.epoch}"


@dataclass(frozen=True)
class Cosine(Rule):
    """t_n = floor + (lr - floor) (1 + cos(pi (n - 1) / T)) / 2 for n <= T, and floor afterwards.

    Args:
        T: length in updates, >= 1.
        lr: t_1, >= floor. Default 0.1.
        floor: final step size, >= 0. Default: 0.0, so that there are only T updates.

    Raises:
        ValueError: a number out of range.

    Source: Loshchilov & Hutter, SGDR, ICLR 2017, without restarts; `flatmin.train.schedule.LearningRateSchedule`.
    """

    T: int
    lr: float = 0.1
    floor: float = 0.0

    def __post_init__(self) -> None:
        _count("cosine", T=self.T)
        at_least_zero("cosine", lr=self.lr, floor=self.floor)
        if self.floor > self.lr:
            raise ValueError(f"cosine: floor must be at most lr = {self.lr!r}, got {self.floor!r}.")

    def _at(self, n: int) -> float:
        return _schedule("cosine", self.lr, self.T, 1, self.floor).at(n - 1) if n <= self.T else self.floor

    @property
    def asymptotics(self) -> Growth:
        return Asymptotics(self.floor, 0.0) if self.floor else Horizon(self.T)

    def __str__(self) -> str:
        return f"cosine:T={self.T},lr={self.lr!r},floor={self.floor!r}"


@functools.lru_cache(maxsize=64)
def _schedule(kind: str, lr: float, epochs: int, steps_per_epoch: int, lr_min: float) -> LearningRateSchedule:
    return LearningRateSchedule(kind=kind, lr=lr, epochs=epochs, steps_per_epoch=steps_per_epoch, lr_min=lr_min)


def _count(name: str, **numbers: int) -> None:
    for key, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {key} must be a whole number >= 1, got {value!r}.")
