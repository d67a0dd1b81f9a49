"""Learning rate schedules: pure functions of the number of updates, so that a resumed run needs no schedule state."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

from flatmin.train.settings import at_least
from flatmin.words import suggest

BY_LENGTH = ("cosine", "linear")  # their rates depend on the length of the training
DIMINISH = ("diminish1", "diminish2", "diminish3")
SCHEDULES = ("cosine", "multistep", "exponential", "constant", "linear", *DIMINISH)
UNITS = ("epoch", "step")
_USED_BY = {
    "lr_min": ("cosine", "linear"),
    "milestones": ("multistep",),
    "gamma": ("multistep", "exponential"),
    "as_coded": DIMINISH,
}


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """The learning rate of every update of a run.

    E is the number of epochs, w the length of the warm-up in epochs, and e the time at which an update begins. It is
    counted in epochs from 0 at the start of training: whole epochs with unit "epoch", step / steps_per_epoch with unit
    "step".

    - cosine: lr_min + (lr - lr_min) (1 + cos(pi u)) / 2 with u = (e - w) / (E - w).
    - linear: lr_min + (lr - lr_min) (1 - u).
    - multistep: lr gamma^k after k milestones; the new rate starts with the epoch (counted from 0) that is a milestone.
    - exponential: lr gamma^e.
    - constant: lr.
    - diminish1: lr / (e + 1).
    - diminish2: lr / (e + 1)^0.5001.
    - diminish3: lr / (b ln b) with b = 2 + floor(e / 5), which is lr / (2 ln 2) at the start.

    Warm-up, while e < w: warmup_lr + (lr - warmup_lr) min(t / w, 1), where t is the time at the end of the update (with
    unit "epoch", at the end of its epoch). No update uses warmup_lr itself. The last update of the warm-up uses lr, and
    so does the first update of a cosine that starts after a whole number of updates. Multistep and exponential count
    from the start of training; their reductions during the warm-up take effect when it ends.

    With unit "epoch" and no warm-up, cosine equals torch's `CosineAnnealingLR(optimizer, epochs)` stepped after every
    epoch. The value at the end of training, lr_min, is not used by any update.

    Args:
        kind: one of `SCHEDULES`. Default "cosine".
        lr: base learning rate, >= 0.
        epochs: number of training epochs, >= 1.
        steps_per_epoch: number of updates per epoch, >= 1.
        unit: "epoch": the rate changes after every epoch; "step": it changes after every update. Default "epoch".
        warmup: length of the linear warm-up in epochs, which may be fractional; below `epochs`. Default 0.0, none.
        warmup_lr: learning rate at the start of the warm-up, >= 0. Default 0.0.
        lr_min: learning rate at the end of cosine and linear, in [0, lr]. Default 0.0.
        milestones: epochs of multistep in increasing order, within 1..epochs-1.
        gamma: factor in (0, 1]: at each milestone for multistep, for each epoch for exponential. Default 0.1, which
            suits multistep; exponential needs a factor near 1.
        as_coded: compute the diminishing schedules as their published code does, which updates its counters late.
            diminish2: lr / max(e, 1)^0.5001, so epochs 0 and 1 are equal. diminish3: lr in epoch 0, then b = 3 for
            epochs 1 to 5, 4 for 6 to 10, and so on. diminish1: no difference. Default False.

    Raises:
        ValueError: a kind or unit is unknown, a value is out of range, or an option has no effect: one that the kind
            does not use, warmup_lr without a warm-up, a warm-up of at most one unit. The diminishing schedules are
            defined by epoch and start at their largest value; with them, unit "step" and a warm-up raise too.

    Source: Loshchilov & Hutter, SGDR, ICLR 2017 (cosine, without restarts); Goyal et al. 2017, arXiv 1706.02677
    (warm-up); Khanh, Luong, Mordukhovich & Tran, NeurIPS 2024, and their code fundamental-sam (diminish, lr 0.1). In
    VaSSO's code every epoch after the first uses the rate of the epoch before; this is not supported.

    Examples:
        >>> schedule = LearningRateSchedule(lr=0.1, epochs=4, steps_per_epoch=10)
        >>> [round(schedule.at(step), 4) for step in (0, 9, 10, 20, 30, 40)]
        [0.1, 0.1, 0.0854, 0.05, 0.0146, 0.0]
    """

    kind: str = "cosine"
    lr: float
    epochs: int
    steps_per_epoch: int
    unit: str = "epoch"
    warmup: float = 0.0
    warmup_lr: float = 0.0
    lr_min: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    as_coded: bool = False

    def __post_init__(self) -> None:
        for word, value, choices in (("schedule", self.kind, SCHEDULES), ("unit", self.unit, UNITS)):
            if value not in choices:
                raise ValueError(
                    f"unknown {word} {value!r}{suggest(str(value), choices)} ({word}s: {', '.join(choices)})."
                )
        at_least(self, "lr", 0)
        for name in ("epochs", "steps_per_epoch"):
            at_least(self, name, 1)
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}.")
        at_least(self, "warmup_lr", 0)
        at_least(self, "lr_min", 0)
        at_least(self, "gamma", 0, open_low=True, high=1)
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min must be at most lr = {self.lr:g}, got {self.lr_min!r}.")
        self._check_used()
        self._check_warmup()
        if self.kind == "multistep":
            self._check_milestones()
        if self.kind in DIMINISH and self.unit != "epoch":
            raise ValueError(f"{self.kind} is defined by epoch; set unit to 'epoch', got {self.unit!r}.")

    def _check_used(self) -> None:
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), _USED_BY.get(field.name, SCHEDULES)
            if self.kind not in kinds and value != field.default:
                raise ValueError(
                    f"{self.kind} does not use {field.name}, got {value!r}; leave it out, or set kind to "
                    f"{' or '.join(kinds)}."
                )

    def _check_warmup(self) -> None:
        at_least(self, "warmup", 0)
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup must be shorter than the training of {self.epochs} epochs, got {self.warmup!r}.")
        if self.warmup_lr and not self.warmup:
            raise ValueError(f"warmup_lr = {self.warmup_lr!r} has no effect without a warm-up; set warmup, in epochs.")
        if self.warmup and self.kind in DIMINISH:
            raise ValueError(f"{self.kind} starts at its largest value and cannot have a warm-up; set warmup to 0.")
        units = self.warmup * (1 if self.unit == "epoch" else self.steps_per_epoch)
        if 0 < units <= 1:
            remedy = "use a longer one, or unit 'step'" if self.unit == "epoch" else "use a longer one, or 0"
            raise ValueError(
                f"warmup = {self.warmup!r} has no effect, because it ends within the first {self.unit}; {remedy}."
            )

    def _check_milestones(self) -> None:
        edges = (0, *self.milestones, self.epochs)
        whole = all(isinstance(one, int) for one in edges)
        if not self.milestones or not whole or any(a >= b for a, b in itertools.pairwise(edges)):
            raise ValueError(
                f"multistep needs milestones: whole epochs in increasing order from 1 to {self.epochs - 1}, got "
                f"{self.milestones!r}."
            )

    def at(self, step: int) -> float:
        """Learning rate of one update.

        Args:
            step: number of updates before this one, from 0 to epochs * steps_per_epoch (the end of training).

        Raises:
            ValueError: the step is outside of the training.
        """
        total = self.epochs * self.steps_per_epoch
        if not 0 <= step <= total:
            raise ValueError(
                f"step must be from 0 to {total} ({self.epochs} epochs of {self.steps_per_epoch} updates), got "
                f"{step!r}."
            )
        by_epoch = self.unit == "epoch"
        begin = step // self.steps_per_epoch if by_epoch else step / self.steps_per_epoch
        if begin < self.warmup:
            end = begin + 1 if by_epoch else (step + 1) / self.steps_per_epoch
            return _between(self.warmup_lr, self.lr, min(end / self.warmup, 1.0))
        return self._decayed(begin)

    def _decayed(self, e: float) -> float:
        done = (e - self.warmup) / (self.epochs - self.warmup)
        if self.kind == "cosine":
            return _between(self.lr_min, self.lr, (1 + math.cos(math.pi * done)) / 2)
        if self.kind == "linear":
            return _between(self.lr_min, self.lr, 1 - done)
        if self.kind == "multistep":
            return self.lr * math.pow(self.gamma, sum(e >= one for one in self.milestones))
        if self.kind == "exponential":
            return self.lr * math.pow(self.gamma, e)
        if self.kind == "diminish1":
            return self.lr / (e + 1)
        if self.kind == "diminish2":
            return self.lr / math.pow(max(e, 1) if self.as_coded else e + 1, 0.5001)
        if self.kind == "diminish3" and not (self.as_coded and e == 0):
            b = 3 + (e - 1) // 5 if self.as_coded else 2 + e // 5
            return self.lr / (b * math.log(b))
        return self.lr


def _between(low: float, high: float, share: float) -> float:
    # This form is exact at both ends; low + (high - low) * share is not.
    return low * (1 - share) + high * share
