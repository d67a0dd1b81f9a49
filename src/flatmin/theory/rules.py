"""Step sizes and radii as functions of the update's number, with their asymptotic growth."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Asymptotics:
    """The growth of a rule: t_n / (c n^-p (log n)^-q) -> 1 as n -> inf; c = 0 for the rule that is 0.

    Args:
        c: factor, >= 0.
        p: exponent of n.
        q: exponent of log n. Default 0.
    """

    c: float
    p: float
    q: float = 0.0

    def __post_init__(self) -> None:
        # Rounded, so that sums of decimal exponents can be compared with 1 exactly.
        object.__setattr__(self, "p", round(self.p, 12))
        object.__setattr__(self, "q", round(self.q, 12))

    def __mul__(self, other: Asymptotics) -> Asymptotics:
        return Asymptotics(self.c * other.c, self.p + other.p, self.q + other.q)

    @property
    def limit(self) -> float:
        """The limit of t_n: 0, c or inf."""
        if self.c == 0 or self.p > 0 or (self.p == 0 and self.q > 0):
            return 0.0
        return self.c if self.p == 0 and self.q == 0 else math.inf

    def __str__(self) -> str:
        if self.c == 0:
            return "0"
        n = "" if self.p == 0 else "n" if self.p == 1 else f"n^{self.p:g}"
        log = "" if self.q == 0 else "log n" if self.q == 1 else f"(log n)^{self.q:g}"
        below = " ".join(word for word in (n, log) if word)
        return f"{self.c:g}" if not below else f"{self.c:g} / ({below})" if " " in below else f"{self.c:g} / {below}"


@dataclass(frozen=True)
class Horizon:
    """A rule that is 0 after update T."""

    T: int

    def __str__(self) -> str:
        return f"0 after n = {self.T}"


Growth = Asymptotics | Horizon | None
"""The growth of a rule for large n; None if nothing is known."""


class Rule(ABC):
    """A sequence of numbers >= 0 over the updates n = 1, 2, ...: a step size t_n or a radius rho_n.

    Rules multiply with each other and with numbers. `str(rule)` is what `flatmin.theory.parse.read_rule` reads.
    """

    def at(self, n: int) -> float:
        """The value for update n.

        Args:
            n: number of the update, >= 1.

        Raises:
            ValueError: n is below 1.
        """
        if n < 1:
            raise ValueError(f"updates are numbered from 1, got n = {n!r}.")
        return self._at(n)

    @abstractmethod
    def _at(self, n: int) -> float: ...

    @property
    @abstractmethod
    def asymptotics(self) -> Growth:
        """The growth for large n; None if it is not known."""

    @property
    def decreasing(self) -> bool | None:
        """Whether t_1 >= t_2 >= ...; None if it is not known."""
        return True

    @property
    def limit(self) -> float | None:
        """The limit of t_n; None if it is not known."""
        growth = self.asymptotics
        return None if growth is None else 0.0 if isinstance(growth, Horizon) else growth.limit

    def __mul__(self, other: Rule | float) -> Rule:
        return Product((self, as_rule(other)))

    __rmul__ = __mul__


@dataclass(frozen=True)
class ConstantRule(Rule):
    """t_n = c.

    Args:
        c: >= 0.

    Raises:
        ValueError: c is negative or not finite.
    """

    c: float

    def __post_init__(self) -> None:
        at_least_zero("constant", c=self.c)

    def _at(self, n: int) -> float:
        return self.c

    @property
    def asymptotics(self) -> Asymptotics:
        return Asymptotics(self.c, 0.0)

    def __str__(self) -> str:
        return f"constant:{self.c!r}"


@dataclass(frozen=True)
class PowerRule(Rule):
    """t_n = c / ((n + shift)^p (log (n + shift))^q).

    1/n is p = 1; the almost constant radius of Remark 3.6 is a tiny p; 1 / (n log n) is p = q = 1 with shift = 1,
    because log 1 = 0.

    Args:
        c: factor, >= 0. Default 1.0.
        p: >= 0. Default 1.0.
        q: >= 0. Default 0.0.
        shift: >= 0, and at least 1 where q > 0. Default 0.0.

    Raises:
        ValueError: a number out of range.

    Source: Khanh, Luong, Mordukhovich & Tran, Fundamental Convergence Analysis of Sharpness-Aware Minimization,
    NeurIPS 2024, Remark 3.6 and the experiments.
    """

    c: float = 1.0
    p: float = 1.0
    q: float = 0.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        at_least_zero("power", c=self.c, p=self.p, q=self.q, shift=self.shift)
        if self.q > 0 and self.shift < 1:
            raise ValueError(f"power: with q > 0 shift must be at least 1, as log 1 = 0, got shift = {self.shift!r}.")

    def _at(self, n: int) -> float:
        m = n + self.shift
        value = self.c / math.pow(m, self.p)
        return value / math.pow(math.log(m), self.q) if self.q else value

    @property
    def asymptotics(self) -> Asymptotics:
        return Asymptotics(self.c, self.p, self.q)

    def __str__(self) -> str:
        optional = "".join(f",{k}={v!r}" for k, v in (("q", self.q), ("shift", self.shift)) if v)
        return f"power:c={self.c!r},p={self.p!r}{optional}"


@dataclass(frozen=True)
class Custom(Rule):
    """t_n = function(n) for any function of n = 1, 2, ...; its growth is unknown, so evidence is numeric.

    Args:
        function: returns a number >= 0 for n.
        name: name in tables. Default: "custom".

    Raises:
        TypeError: `function` is not callable.
        ValueError: when used, if a value is negative or not finite.
    """

    function: Callable[[int], float]
    name: str = "custom"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"{self.name} must be a function of the update's number, got {self.function!r}.")

    def _at(self, n: int) -> float:
        value = float(self.function(n))
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{self.name} must give finite numbers >= 0, got {value!r} at n = {n}.")
        return value

    @property
    def asymptotics(self) -> None:
        return None

    @property
    def decreasing(self) -> None:
        return None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Tied:
    """A radius tied to the step size: rho_n = factor t_n. The method `of` makes it a rule.

    Args:
        factor: > 0.

    Raises:
        ValueError: factor is not positive and finite.
    """

    factor: float

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ValueError(f"tied: the factor must be positive and finite, got {self.factor!r}.")

    def of(self, step: Rule) -> Rule:
        """The radius as a rule."""
        return Product((step, ConstantRule(self.factor)))

    def __str__(self) -> str:
        return f"tied:{self.factor!r}"


@dataclass(frozen=True)
class Product(Rule):
    """The product of rules; its growth is known if that of every factor is."""

    factors: tuple[Rule, ...]

    def _at(self, n: int) -> float:
        return math.prod(rule.at(n) for rule in self.factors)

    @property
    def asymptotics(self) -> Growth:
        grown = [rule.asymptotics for rule in self.factors]
        ends = [g.T for g in grown if isinstance(g, Horizon)]
        if ends:
            return Horizon(min(ends))
        product = Asymptotics(1.0, 0.0)
        for g in grown:
            if not isinstance(g, Asymptotics):
                return None
            product = product * g
        return product

    @property
    def decreasing(self) -> bool | None:
        return True if all(rule.decreasing for rule in self.factors) else None

    def __str__(self) -> str:
        return "*".join(str(rule) for rule in self.factors)


def as_rule(value: Rule | float | Callable[[int], float]) -> Rule:
    """A rule from a rule, a number (constant) or a function of n = 1, 2, ...

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, Rule):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return ConstantRule(float(value))
    if callable(value):
        name = getattr(value, "__name__", "custom")
        return Custom(value, "custom" if name == "<lambda>" else name)
    raise TypeError(f"a rule must be a number, text such as 'power:c=0.5,p=0.6', or a function of n, got {value!r}.")


def at_least_zero(name: str, **numbers: float) -> None:
    """Check that numbers are finite and not negative.

    Raises:
        ValueError: the name of the first number that is not.
    """
    for key, value in numbers.items():
        if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise ValueError(f"{name}: {key} must be a finite number >= 0, got {value!r}.")
