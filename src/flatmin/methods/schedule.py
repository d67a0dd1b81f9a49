"""On which steps?"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from flatmin.methods.part import Context, Need, NewState, State, Tensors, When, check_count, check_range


@dataclass(frozen=True, kw_only=True)
class Always(When):
    """Ascend on every step."""


@dataclass(frozen=True, kw_only=True)
class Never(When):
    """Never ascend: the base optimizer itself, one gradient a step.

    Cost of sgd: 1 gradient evaluation a step, 0 extra copies of the moved weights.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("sgd").when)
        Never()
    """

    withholds: ClassVar = {Need.ASCENT: "it never ascends", Need.RULE: "it is the base alone"}

    @property
    def duty(self) -> float:
        return 0.0

    def before(self, state: State, c: Context) -> bool | None:
        return False


@dataclass(frozen=True, kw_only=True)
class EveryK(When):
    """Ascend on steps phase, phase + k, phase + 2k, ...; the others are the base's, at the cost of one gradient.

    Directions that remember (VaSSO, F-SAM) learn on the steps that ascend only. LookSAM's steps before the first ascent
    are the base's.

    Args:
        k: period in updates, >= 1. Default 5 (a choice of this library; 2 to 10 are in use); 1 is always.
        phase: first step that ascends, counted from 0, in [0, k - 1]. Default 0. k - 1 ascends on the last step of each
            period, as composer's SAM with interval = k.

    Raises:
        ValueError: k < 1, or a phase outside [0, k - 1]; from `Recipe`, a fellow part that works on steps 0, interval,
            2 interval, ... (ssam-f, ssam-d) of which none would ascend.

    Cost of every-k: 1.2 gradient evaluations a step, 1 extra copy of the moved weights.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("every-k", k=2).when)
        EveryK(k=2, phase=0)
    """

    counts: ClassVar = True
    k: int = 5
    phase: int = 0

    def __post_init__(self) -> None:
        check_count(self, "k", 1)
        check_count(self, "phase", 0)
        if self.phase >= self.k:
            raise ValueError(f"EveryK: phase must be below k = {self.k}, got {self.phase}; steps are counted from 0.")

    @property
    def duty(self) -> float:
        return 1.0 / self.k

    def meets(self, interval: int) -> bool:
        return self.phase % math.gcd(self.k, interval) == 0

    def before(self, state: State, c: Context) -> bool | None:
        return c.step % self.k == self.phase


@dataclass(frozen=True, kw_only=True)
class Bernoulli(When):
    """SS-SAM: ascend with probability p, drawn from the engine's generator, so that replicas agree.

    Args:
        p: in [0, 1]. Default 0.5; 1 is always.

    Raises:
        ValueError: p outside [0, 1].

    Source: Zhao, Zhang & Hu, SS-SAM: Stochastic Scheduled Sharpness-Aware Minimization, 2022.

    Cost of bernoulli: 1.5 gradient evaluations a step, 1 extra copy of the moved weights.
    Needs: random draws.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("bernoulli", p=0.25).when)
        Bernoulli(p=0.25)
    """

    needs: ClassVar = frozenset({Need.RANDOM})
    p: float = 0.5

    def __post_init__(self) -> None:
        check_range(self, "p", 0.0, 1.0)

    @property
    def duty(self) -> float:
        return self.p

    def before(self, state: State, c: Context) -> bool | None:
        return c.draws(1)[0] < self.p


@dataclass(frozen=True, kw_only=True)
class Late(When):
    """Ascend in the last part of training only: from step start = round((1 - fraction) total) on.

    Args:
        total: number of updates of the whole training, >= 1. Required.
        fraction: share of them that ascends, in [0, 1]. Default 0.1; 1 is always.

    Raises:
        ValueError: no total, or a fraction outside [0, 1].

    Source: Zhou et al., Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training, ICLR 2025.

    Cost of late: 1.1 gradient evaluations a step, 1 extra copy of the moved weights.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("late", total=1000).when)
        Late(total=1000, fraction=0.1)
    """

    counts: ClassVar = True
    total: int = 0
    fraction: float = 0.1

    def __post_init__(self) -> None:
        check_count(self, "total", 0)
        check_range(self, "fraction", 0.0, 1.0)

    def examine(self) -> None:
        if not self.total:
            raise ValueError(
                "late needs the number of updates of the whole training: total=epochs * len(loader) beside the name, "
                "or the recipe flatmin.compose(...).for_length(epochs * len(loader))."
            )

    @property
    def duty(self) -> float:
        return self.fraction

    def before(self, state: State, c: Context) -> bool | None:
        return c.step >= round((1.0 - self.fraction) * self.total)


@dataclass(frozen=True, kw_only=True)
class WarmUp(When):
    """Plain steps of the base first, then ascend on every step.

    Args:
        steps: updates without ascent, >= 0. Default 0, which is always.

    Raises:
        ValueError: steps < 0.

    Cost of warm-up: 2 gradient evaluations a step, 1 extra copy of the moved weights.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("warm-up", steps=50).when)
        WarmUp(steps=50)
    """

    counts: ClassVar = True
    steps: int = 0

    def __post_init__(self) -> None:
        check_count(self, "steps", 0)

    def before(self, state: State, c: Context) -> bool | None:
        return c.step >= self.steps


@dataclass(frozen=True, kw_only=True)
class Trigger(When):
    """AE-SAM: ascend if ||g||^2 >= mu + c sigma, with running mean mu and variance sigma^2 of ||g||^2.

        mu <- delta mu + (1 - delta) ||g||^2,   sigma^2 <- delta sigma^2 + (1 - delta) (||g||^2 - mu)^2

    updated before the comparison, over the tensors that can move, with c moving linearly from `start` to `end` over
    `total` updates. It reads ||g|| on the host: one synchronisation a step, and no CUDA graph of the whole step.

    Args:
        delta: memory of mean and variance, in [0, 1). Default 0.9.
        start: c at the first update. Default 1.0: rarely.
        end: c at the last. Default -1.0: nearly always. The method's idea is to ascend more often late; both ends are
            choices of this library, no official code is known.
        total: updates of the training over which c moves; 0 keeps c = start. Default 0.

    Raises:
        ValueError: delta outside [0, 1), total < 0.

    Source: Jiang, Yang, Zhang & Kwok, An Adaptive Policy to Employ Sharpness-Aware Minimization, ICLR 2023. The first
    update's mean is its own ||g||^2, its variance 0, so it ascends.

    Cost of ae-sam: 1.16 gradient evaluations a step, 1 extra copy of the moved weights.
    Needs: a decision by value (one synchronisation a step, no CUDA graph).

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("ae-sam", delta=0.95).when)
        Trigger(delta=0.95, start=1.0, end=-1.0, total=0)
    """

    counts: ClassVar = True
    needs: ClassVar = frozenset({Need.GRADIENT_AT_W, Need.WHOLE_BATCH, Need.DECIDES_BY_VALUE})
    slots: ClassVar = {"mean": "scalar", "variance": "scalar"}
    delta: float = 0.9
    start: float = 1.0
    end: float = -1.0
    total: int = 0

    def __post_init__(self) -> None:
        check_range(self, "delta", 0.0, 1.0)
        if self.delta == 1.0:
            raise ValueError("Trigger: delta must be below 1, or the mean never moves from the first gradient.")
        check_range(self, "start", -1e6, 1e6)
        check_range(self, "end", -1e6, 1e6)
        check_count(self, "total", 0)

    @property
    def duty(self) -> float:
        """What a normally distributed ||g||^2 would give; the run decides."""
        middle = self.start if not self.total else (self.start + self.end) / 2.0
        return 0.5 * math.erfc(middle / math.sqrt(2.0))

    def before(self, state: State, c: Context) -> bool | None:
        return None

    def after(self, g: Tensors, state: State, c: Context) -> tuple[bool, NewState]:
        size = c.norm(g).square()
        if state["mean"] is None:
            mean, variance = size, torch.zeros_like(size)
        else:
            mean = state["mean"].to(size).lerp(size, 1.0 - self.delta)
            variance = state["variance"].to(size).lerp((size - mean).square(), 1.0 - self.delta)
        done = min(c.step / self.total, 1.0) if self.total else 0.0
        level = mean + (self.start + (self.end - self.start) * done) * variance.sqrt()
        return bool(size >= level), {"mean": mean, "variance": variance}
