"""Schedules: on which steps are the weights perturbed?"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from flatmin.methods.context import NewState, State, StepContext, Tensors
from flatmin.methods.part import Need, Part, check_count, check_range

__all__ = ["AESAM", "Always", "Bernoulli", "EveryK", "LatePhase", "Never", "Schedule", "WarmUp"]


@dataclass(frozen=True, kw_only=True)
class Schedule(Part):
    """Base class of schedules: on which steps are the weights perturbed?

    Attributes:
        ascends: False if no step ascends, so that the recipe is the base optimizer alone. Default True.
        conditional: whether some steps may not ascend. True if `before` or `after` is defined.
        by_gradient: whether it decides by the gradient at w. A step without ascent then costs one gradient. True if
            `after` is defined.
    """

    kind: ClassVar[str] = "schedule"
    question: ClassVar[str] = "on which steps?"
    declared_by: ClassVar = {
        "conditional": ("before", "after"),
        "by_gradient": "after",
    }
    conditional: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = False

    def conflict(self, need: Need) -> str | None:
        if need is Need.ASCENT and not self.ascends:
            return "it never ascends"
        if need is Need.RULE and not self.ascends:
            return "it is the base optimizer alone"
        return super().conflict(need)

    @property
    def ascent_fraction(self) -> float:
        """Average share of the steps that ascend, in [0, 1]."""
        return 1.0 if self.ascends else 0.0

    def meets(self, interval: int) -> bool:
        """Whether any step 0, interval, 2 interval, ... ascends, for parts that are due on these steps."""
        return True

    def before(self, state: State, c: StepContext) -> bool | None:
        """Whether to ascend, decided before any gradient; None: `after` decides after pass 1."""
        return None if self.by_gradient else True

    def after(self, g: Tensors, state: State, c: StepContext) -> tuple[bool, NewState]:
        """Whether to ascend, given the gradient at w, and the new state."""
        return True, {}


@dataclass(frozen=True, kw_only=True)
class Always(Schedule):
    """SAM: ascend on every step."""

    entrywise: ClassVar = True


@dataclass(frozen=True, kw_only=True)
class Never(Schedule):
    """Never ascend: the base optimizer alone, one gradient a step.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("sgd").schedule)
        Never()
    """

    entrywise: ClassVar = True
    ascends: ClassVar = False

    def before(self, state: State, c: StepContext) -> bool | None:
        return False


@dataclass(frozen=True, kw_only=True)
class EveryK(Schedule):
    """Ascend on steps phase, phase + k, phase + 2k, ...; the other steps are the base optimizer's, one gradient each.

    Directions with a memory (VaSSO, F-SAM) are updated only on steps that ascend. LookSAM's steps before the first
    ascent are the base optimizer's.

    Args:
        k: period in updates, >= 1. Default 5 (a choice of this library; 2 to 10 are in use). With 1 every step ascends.
        phase: the first step that ascends, counted from 0, in [0, k - 1]. Default 0. With k - 1 the last step of each
            period ascends, as in composer's SAM with interval = k.

    Raises:
        ValueError: k < 1, or phase outside [0, k - 1]; from `Recipe`, another part that is due on steps 0, interval,
            2 interval, ... (ssam-f, ssam-d) if none of these ascends.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("every-k", k=2).schedule)
        EveryK(k=2, phase=0)
    """

    entrywise: ClassVar = True
    step_dependent: ClassVar = True
    k: int = 5
    phase: int = 0

    def __post_init__(self) -> None:
        check_count(self, "k", 1)
        check_count(self, "phase", 0)
        if self.phase >= self.k:
            raise ValueError(f"EveryK: phase must be below k = {self.k}, got {self.phase}; steps are counted from 0.")

    @property
    def ascent_fraction(self) -> float:
        return 1.0 / self.k

    def meets(self, interval: int) -> bool:
        return self.phase % math.gcd(self.k, interval) == 0

    def before(self, state: State, c: StepContext) -> bool | None:
        return c.step % self.k == self.phase


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Schedule):
    """SS-SAM: ascend with probability p. Draws come from the engine's generator and are the same on all replicas.

    Args:
        p: probability, in [0, 1]. Default 0.5. With 1 every step ascends.

    Raises:
        ValueError: p outside [0, 1].

    Source: Zhao, Zhang & Hu, SS-SAM: Stochastic Scheduled Sharpness-Aware Minimization, 2022.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("bernoulli", p=0.25).schedule)
        Bernoulli(p=0.25)
    """

    needs: ClassVar = frozenset({Need.RANDOM})
    p: float = 0.5

    def __post_init__(self) -> None:
        check_range(self, "p", 0.0, 1.0)

    @property
    def ascent_fraction(self) -> float:
        return self.p

    def before(self, state: State, c: StepContext) -> bool | None:
        return c.draws(1)[0] < self.p


@dataclass(frozen=True, kw_only=True)
class LatePhase(Schedule):
    """Ascend in the last part of the training only: from step round((1 - fraction) total) on.

    Args:
        total: number of updates of the whole training, >= 1. Required; `flatmin train` fills it in.
        fraction: share of the updates that ascend, in [0, 1]. Default 0.1. With 1 every step ascends.

    Raises:
        ValueError: fraction outside [0, 1]; when the optimizer is built, total not given.

    Source: Zhou et al., Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training, ICLR 2025.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("late", total=1000).schedule)
        LatePhase(total=1000, fraction=0.1)
    """

    entrywise: ClassVar = True
    former_names: ClassVar = ("Late",)
    step_dependent: ClassVar = True
    total: int = 0
    fraction: float = 0.1

    def __post_init__(self) -> None:
        check_count(self, "total", 0)
        check_range(self, "fraction", 0.0, 1.0)

    def validate(self) -> None:
        if not self.total:
            raise ValueError(
                "late needs the number of updates of the whole training: pass total=epochs * len(loader), or use the "
                "recipe flatmin.compose(...).for_length(epochs * len(loader))."
            )

    @property
    def ascent_fraction(self) -> float:
        return self.fraction

    def before(self, state: State, c: StepContext) -> bool | None:
        return c.step >= round((1.0 - self.fraction) * self.total)


@dataclass(frozen=True, kw_only=True)
class WarmUp(Schedule):
    """Steps of the base optimizer alone first, then ascend on every step.

    Args:
        steps: number of updates without ascent, >= 0. Default 0: every step ascends.

    Raises:
        ValueError: steps < 0.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("warm-up", steps=50).schedule)
        WarmUp(steps=50)
    """

    entrywise: ClassVar = True
    step_dependent: ClassVar = True
    steps: int = 0

    def __post_init__(self) -> None:
        check_count(self, "steps", 0)

    def before(self, state: State, c: StepContext) -> bool | None:
        return c.step >= self.steps


@dataclass(frozen=True, kw_only=True)
class AESAM(Schedule):
    """AE-SAM: ascend if ||g||^2 >= mu + c sigma, with the running mean mu and variance sigma^2 of ||g||^2.

        mu <- delta mu + (1 - delta) ||g||^2,   sigma^2 <- delta sigma^2 + (1 - delta) (||g||^2 - mu)^2

    Both are updated before the comparison. g is taken over the tensors that some step may perturb. c changes linearly
    from `start` to `end` over `total` updates. The first update starts with its own ||g||^2 as mean and variance 0, so
    it ascends. Each step reads ||g|| on the host: one synchronisation, and no CUDA graph of the whole step.

    Args:
        delta: decay of mean and variance, in [0, 1). Default 0.9.
        start: c at the first update. Default 1.0: few steps ascend.
        end: c at the last update. Default -1.0: most steps ascend. The idea of the method is to ascend more often late
            in training; both values are choices of this library, since no official code is known.
        total: number of updates over which c changes. Default 0: c = start throughout. `flatmin train` fills it in.

    Raises:
        ValueError: delta outside [0, 1), or total < 0.

    Source: Jiang, Yang, Zhang & Kwok, An Adaptive Policy to Employ Sharpness-Aware Minimization, ICLR 2023.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("ae-sam", delta=0.95).schedule)
        AESAM(delta=0.95, start=1.0, end=-1.0, total=0)
    """

    former_names: ClassVar = ("Trigger",)
    step_dependent: ClassVar = True
    needs: ClassVar = frozenset({Need.GRADIENT_AT_W, Need.WHOLE_BATCH, Need.DECIDES_BY_VALUE})
    slots: ClassVar = {"mean": "scalar", "variance": "scalar"}
    delta: float = 0.9
    start: float = 1.0
    end: float = -1.0
    total: int = 0

    def __post_init__(self) -> None:
        check_range(self, "delta", 0.0, 1.0)
        if self.delta == 1.0:
            raise ValueError("AESAM: delta must be below 1; with 1 the mean stays at the first value.")
        check_range(self, "start", -1e6, 1e6)
        check_range(self, "end", -1e6, 1e6)
        check_count(self, "total", 0)

    @property
    def ascent_fraction(self) -> float:
        """An estimate: the share for a normally distributed ||g||^2."""
        middle = self.start if not self.total else (self.start + self.end) / 2.0
        return 0.5 * math.erfc(middle / math.sqrt(2.0))

    def after(self, g: Tensors, state: State, c: StepContext) -> tuple[bool, NewState]:
        size = c.norm(g).square()
        if state["mean"] is None:
            mean, variance = size, torch.zeros_like(size)
        else:
            mean = state["mean"].to(size).lerp(size, 1.0 - self.delta)
            variance = state["variance"].to(size).lerp((size - mean).square(), 1.0 - self.delta)
        done = min(c.step / self.total, 1.0) if self.total else 0.0
        level = mean + (self.start + (self.end - self.start) * done) * variance.sqrt()
        return bool(size >= level), {"mean": mean, "variance": variance}
