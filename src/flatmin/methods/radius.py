"""Radius rules: how far are the weights perturbed? Factors on each param group's rho."""

import numbers
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flatmin.methods.context import StepContext
from flatmin.methods.part import Need, Part, check_count, check_range, learning_rate

__all__ = ["ConstantRadius", "LRProportionalRadius", "LambdaRadius", "LinearRadius", "PowerRadius", "Radius"]


@dataclass(frozen=True, kw_only=True)
class Radius(Part):
    """Base class of radius rules: how far are the weights perturbed? A factor on each param group's rho.

    Attributes:
        marks: entries that the rule stores in each param group, key -> initial value. Keys begin with
            "flatmin.radius.". They are saved in checkpoints like `lr`. Default {}.
        scales: whether the factor can differ from 1. True if `__call__` is defined.
        remembers: whether the entries in `marks` change. True if `remember` is defined.
    """

    kind: ClassVar[str] = "radius"
    question: ClassVar[str] = "how far?"
    declared_by: ClassVar = {"scales": "__call__", "remembers": "remember"}
    marks: ClassVar[Mapping[str, float]] = {}
    scales: ClassVar[bool] = False
    remembers: ClassVar[bool] = False

    def __call__(self, c: StepContext) -> float | Tensor | list[float]:
        """One factor for all tensors, or a list with one factor for each tensor."""
        return 1.0

    def remember(self, group: Mapping[str, Any]) -> Mapping[str, float]:
        """The new values of `marks` for a group, at the end of each update (with or without ascent)."""
        return {}


PEAK, GREW = "flatmin.radius.peak", "flatmin.radius.grew"


@dataclass(frozen=True, kw_only=True)
class ConstantRadius(Radius):
    """The radius is each param group's rho. A training loop may change group["rho"] like group["lr"]."""

    entrywise: ClassVar = True
    former_names: ClassVar = ("Constant",)


@dataclass(frozen=True, kw_only=True)
class PowerRadius(Radius):
    """A radius that falls as a power of the number of updates: rho_k = rho / (k + 1)^p at update k = 0, 1, ...

    Args:
        p: exponent, >= 0. Default 0.001, the "almost constant" radius of the convergence analysis. 0 is constant.

    Raises:
        ValueError: p < 0.

    Source: Khanh, Luong, Mordukhovich & Tran, Fundamental Convergence Analysis of Sharpness-Aware Minimization,
    NeurIPS 2024, Remark 3.6.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("rho-power", p=0.5).radius)
        PowerRadius(p=0.5)
    """

    entrywise: ClassVar = True
    former_names: ClassVar = ("Power",)
    step_dependent: ClassVar = True
    p: float = 0.001

    def __post_init__(self) -> None:
        check_range(self, "p", 0.0, 1e3)

    def __call__(self, c: StepContext) -> float:
        return float((c.step + 1) ** -self.p)


@dataclass(frozen=True, kw_only=True)
class LRProportionalRadius(Radius):
    """A radius proportional to the learning rate: rho_t = rho * max(lr_t / lr_max, floor). It is never above rho.

    lr_max is the largest of these learning rates of the group: `initial_lr` (written by every torch scheduler except
    ReduceLROnPlateau), `max_lr` (written by OneCycleLR, or by your loop), and all rates of earlier updates, which are
    saved in checkpoints. With a warm-up of the learning rate the radius starts small too.

    Some schedules do not store their largest rate (CyclicLR, rates set by hand). Then the radius is rho while the rate
    is higher than ever before, and proportional to the highest rate afterwards; a warning is given once. Pass `peak` in
    this case, and also if no update uses the base optimizer's own rate (LambdaLR with lr = 1).

    Args:
        floor: smallest factor, in [0, 1]. Default 0.0.
        peak: lr_max of all groups; with a higher rate the radius is rho. If the groups have different largest rates,
            set group["max_lr"] instead. Default 0.0: lr_max is found as described above.

    Raises:
        ValueError: floor outside [0, 1], peak < 0, or a group without a learning rate (lr=None).

    Source: the linear rule of Zhuang et al., GSAM, ICLR 2022, Alg. 1, with rho_min = lr_min = 0. The floor is a choice
    of this library.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("rho-lr", floor=0.1).radius)
        LRProportionalRadius(floor=0.1, peak=0.0)
    """

    entrywise: ClassVar = True
    former_names: ClassVar = ("WithLR",)
    needs: ClassVar = frozenset({Need.LR})
    marks: ClassVar = {PEAK: 0.0, GREW: 0.0}
    floor: float = 0.0
    peak: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "floor", 0.0, 1.0)
        check_range(self, "peak", 0.0, 1e12)

    def __call__(self, c: StepContext) -> list[float]:
        by_group: dict[int, float] = {}
        factors = []
        for group in c.options:
            if id(group) not in by_group:
                rate = learning_rate(group, self)
                peak = self.peak or max(_largest(group), rate)
                by_group[id(group)] = max(min(rate / peak, 1.0) if peak else 1.0, self.floor)
            factors.append(by_group[id(group)])
        return factors

    def remember(self, group: Mapping[str, Any]) -> Mapping[str, float]:
        rate, largest, grew = learning_rate(group, self), _largest(group), bool(group.get(GREW))
        if 0.0 < largest < rate and not (self.peak or grew):
            grew = True
            warnings.warn(
                f"rho-lr: the learning rate has risen to {rate:g}, above the largest one so far ({largest:g}). The "
                "radius is rho while the learning rate is higher than before, and proportional to the highest one "
                "afterwards. Pass the largest learning rate of the schedule as peak=, or set group['max_lr'].",
                stacklevel=2,
            )
        return {PEAK: max(largest, rate), GREW: float(grew)}


def _largest(group: Mapping[str, Any]) -> float:
    """The largest learning rate stored in a group, apart from its current one."""
    entries = (group.get(key) for key in ("initial_lr", "max_lr", PEAK))
    return max((float(rate) for rate in entries if isinstance(rate, (numbers.Real, Tensor))), default=0.0)


@dataclass(frozen=True, kw_only=True)
class LinearRadius(Radius):
    """A radius that changes linearly from `start` * rho to `end` * rho over `total` updates and then stays constant.

    Args:
        start: factor at update 0, >= 0. Default 0.0.
        end: factor from update `total` on, >= 0. Default 1.0.
        total: length of the ramp in updates, >= 1. Default 1000.

    Raises:
        ValueError: a parameter out of range.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("rho-ramp", total=500).radius)
        LinearRadius(start=0.0, end=1.0, total=500)
    """

    entrywise: ClassVar = True
    former_names: ClassVar = ("Ramp",)
    step_dependent: ClassVar = True
    start: float = 0.0
    end: float = 1.0
    total: int = 1000

    def __post_init__(self) -> None:
        check_range(self, "start", 0.0, 1e6)
        check_range(self, "end", 0.0, 1e6)
        check_count(self, "total", 1)

    def __call__(self, c: StepContext) -> float:
        return self.start + (self.end - self.start) * min(c.step / self.total, 1.0)


@dataclass(frozen=True, kw_only=True)
class LambdaRadius(Radius):
    """A radius by any function of the number of updates: rho_k = rho * rule(k) at update k = 0, 1, ...

    Args:
        rule: function k -> factor >= 0. Required. Use a named function if the optimizer is to be pickled.

    Raises:
        TypeError: rule is not callable.
        ValueError: at the step, if the factor is negative or not finite.
    """

    entrywise: ClassVar = True
    former_names: ClassVar = ("Schedule",)
    step_dependent: ClassVar = True
    rule: Callable[[int], float]

    def __post_init__(self) -> None:
        if not callable(self.rule):
            raise TypeError(f"LambdaRadius: rule must be a function of the number of updates, got {self.rule!r}.")

    def __call__(self, c: StepContext) -> float:
        factor = float(self.rule(c.step))
        if not 0.0 <= factor < float("inf"):
            raise ValueError(f"LambdaRadius: rule must return a finite factor >= 0, got {factor} at update {c.step}.")
        return factor
