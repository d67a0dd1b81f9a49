"""How far? Factors on each group's rho."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from flatmin.parts.base import Context, Need, Radius, check_count, check_range


@dataclass(frozen=True, kw_only=True)
class Constant(Radius):
    """The radius is each group's rho. A loop may set group["rho"] as it sets group["lr"]."""


@dataclass(frozen=True, kw_only=True)
class Power(Radius):
    """rho_k = rho / (k + 1)^p at update k = 0, 1, ...

    Args:
        p: exponent, >= 0. Default 0.001, the "almost constant" radius of the convergence analysis; 0 is constant.

    Raises:
        ValueError: p < 0.

    Source: Khanh, Luong, Mordukhovich & Tran, Fundamental Convergence Analysis of Sharpness-Aware Minimization,
    NeurIPS 2024, Remark 3.6.

    Cost of rho-power: 2 gradient evaluations a step, 1 extra copy of the moved weights.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("rho-power", p=0.5).radius)
        Power(p=0.5)
    """

    counts: ClassVar = True
    p: float = 0.001

    def __post_init__(self) -> None:
        check_range(self, "p", 0.0, 1e3)

    def __call__(self, c: Context) -> float:
        return float((c.step + 1) ** -self.p)


@dataclass(frozen=True, kw_only=True)
class WithLR(Radius):
    """rho_t = rho * max(lr_t / lr_0, floor): the radius follows each group's learning rate.

    lr_0 is the group's "initial_lr", which every torch scheduler writes; without a scheduler the radius is constant.
    A warm-up that starts from a small lr makes the radius start small as well.

    Args:
        floor: smallest factor, in [0, 1]. Default 0.0.

    Raises:
        ValueError: floor outside [0, 1].

    Source: the linear rule of Zhuang et al., GSAM, ICLR 2022, Alg. 1, with rho_min = floor rho_max and lr_min = 0.

    Cost of rho-lr: 2 gradient evaluations a step, 1 extra copy of the moved weights.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("rho-lr", floor=0.1).radius)
        WithLR(floor=0.1)
    """

    needs: ClassVar = frozenset({Need.LR})
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "floor", 0.0, 1.0)

    def __call__(self, c: Context) -> list[float]:
        known: dict[int, float] = {}
        factors = []
        for group in c.options:
            if id(group) not in known:
                first = float(group.get("initial_lr", group["lr"]))
                known[id(group)] = max(float(group["lr"]) / first if first else 1.0, self.floor)
            factors.append(known[id(group)])
        return factors


@dataclass(frozen=True, kw_only=True)
class Ramp(Radius):
    """rho_k grows (or falls) linearly from `start` rho to `end` rho over `total` updates, then stays.

    Args:
        start: factor at update 0, >= 0. Default 0.0.
        end: factor from update `total` on, >= 0. Default 1.0.
        total: length in updates, >= 1. Default 1000.

    Raises:
        ValueError: out of range.

    Cost of rho-ramp: 2 gradient evaluations a step, 1 extra copy of the moved weights.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("rho-ramp", total=500).radius)
        Ramp(start=0.0, end=1.0, total=500)
    """

    counts: ClassVar = True
    start: float = 0.0
    end: float = 1.0
    total: int = 1000

    def __post_init__(self) -> None:
        check_range(self, "start", 0.0, 1e6)
        check_range(self, "end", 0.0, 1e6)
        check_count(self, "total", 1)

    def __call__(self, c: Context) -> float:
        return self.start + (self.end - self.start) * min(c.step / self.total, 1.0)


@dataclass(frozen=True, kw_only=True)
class Schedule(Radius):
    """rho_k = rho * rule(k) for any function of the update's number k = 0, 1, ...

    Args:
        rule: k -> factor >= 0; a named function if the optimizer shall be pickled. Required.

    Raises:
        TypeError: rule is not callable.
        ValueError: at the step, for a factor that is negative or not finite.
    """

    counts: ClassVar = True
    rule: Callable[[int], float]

    def __post_init__(self) -> None:
        if not callable(self.rule):
            raise TypeError(f"Schedule: rule must be a function of the update's number, got {self.rule!r}.")

    def __call__(self, c: Context) -> float:
        factor = float(self.rule(c.step))
        if not 0.0 <= factor < float("inf"):
            raise ValueError(f"Schedule: the rule must give a finite factor >= 0, got {factor} at update {c.step}.")
        return factor
