"""Convergence of sums over the updates: symbolic for rules of known growth, numeric evidence otherwise."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flatmin.theory.rules import Asymptotics, Horizon, Product, Rule

Proof = Literal["symbolic", "numeric"]
EVIDENCE = 10**6
"""The number of values of a rule of unknown growth that are evaluated."""
CAUTION = "numeric evidence up to n = 1e6, not a proof"
DECADES = ((10**2, 10**3), (10**3, 10**4), (10**4, 10**5), (10**5, EVIDENCE))
"""The ranges of n from each of which to the next a rule must fall to count as tending to 0."""


@dataclass(frozen=True)
class Judgement:
    """A judgement about a rule: True, False or None (undecided), the reason, and the kind of argument."""

    holds: bool | None
    reason: str
    proof: Proof = "symbolic"

    def negated(self) -> Judgement:
        """The opposite statement, for the same reason."""
        return Judgement(None if self.holds is None else not self.holds, self.reason, self.proof)


@dataclass(frozen=True)
class Limsup:
    """The limsup of a rule; its value is None if a rule of unknown growth was still rising."""

    value: float | None
    reason: str
    proof: Proof = "symbolic"


def sum_is_finite(rule: Rule, power: int = 1) -> Judgement:
    """Whether sum_n t_n^power converges.

    sum n^-p (log n)^-q converges if p > 1, or p = 1 and q > 1 (comparison with the integral), and diverges otherwise.
    A rule of unknown growth is summed up to n = 1e6: with S_j the sum over 10^j < n <= 10^(j+1), the exponent
    p = 1 - log10(S_5 / S_4) is read off; at most 1.001 is evidence of divergence, at least 1.15 of convergence, and
    values in between are undecided, because there 1 / (n log n) and 1 / (n (log n)^2) cannot be distinguished.

    Args:
        rule: t.
        power: > 0. Default 1.
    """
    growth = rule.asymptotics
    if isinstance(growth, Horizon):
        return Judgement(True, f"the rule is {growth}, so there are finitely many terms")
    if growth is None:
        return _fitted(rule, power)
    if growth.c == 0:
        return Judgement(True, "every term is 0")
    return Judgement(converges(Asymptotics(1.0, power * growth.p, power * growth.q)), _words(growth, power))


def converges(terms: Asymptotics) -> bool:
    """Whether a series with terms of this growth converges."""
    return terms.c == 0 or terms.p > 1 or (terms.p == 1 and terms.q > 1)


def tail(terms: Asymptotics) -> Asymptotics:
    """The growth of the tail sums R_k = sum_{n >= k} of a convergent series.

    It is c / (p - 1) k^(1-p) (log k)^-q for p > 1, and c / (q - 1) (log k)^(1-q) for p = 1, q > 1.

    Raises:
        ValueError: the series diverges.
    """
    if not converges(terms):
        raise ValueError(f"the series of {terms} diverges and has no tails.")
    if terms.c == 0:
        return terms
    if terms.p > 1:
        return Asymptotics(terms.c / (terms.p - 1), terms.p - 1, terms.q)
    return Asymptotics(terms.c / (terms.q - 1), 0.0, terms.q - 1)


def tends_to_zero(rule: Rule) -> Judgement:
    """Whether t_n -> 0.

    For a rule of unknown growth, the largest values over 10^j < n <= 10^(j+1), j = 2, ..., 5, must fall by 2 % or more
    each time. A single 0 or a single drop is not enough.
    """
    growth = rule.asymptotics
    if growth is None:
        tops = [float(values(rule)[low:high].max()) for low, high in DECADES]
        falls = all(after < 0.98 * before or after == 0 for before, after in itertools.pairwise(tops))
        stays = tops[-1] >= (1 - 1e-3) * tops[-2] > 0
        holds = True if falls else False if stays else None
        words = ", ".join(f"{top:.3g}" for top in tops)
        return Judgement(holds, f"largest t_n over the decades from n = 100 on: {words}: {CAUTION}", "numeric")
    return Judgement(rule.limit == 0, f"t_n ~ {growth}" if isinstance(growth, Asymptotics) else f"t_n is {growth}")


def is_decreasing(rule: Rule) -> Judgement:
    """Whether t_1 >= t_2 >= ..."""
    if rule.decreasing is not None:
        return Judgement(rule.decreasing, "by its formula")
    seen = values(rule)
    rises = np.flatnonzero(np.diff(seen) > 1e-15 * seen[:-1])
    if len(rises):
        n = int(rises[0]) + 1
        return Judgement(False, f"it rises from n = {n} to {n + 1}", "numeric")
    return Judgement(True, f"no rise: {CAUTION}", "numeric")


def limsup(rule: Rule) -> Limsup:
    """The limsup of t_n with its reason.

    For a rule of unknown growth it is the largest value over 1e5 < n <= 1e6, unless that exceeds the largest over
    1e4 < n <= 1e5 by more than rounding; such a rule counts as still rising.
    """
    limit = rule.limit
    if limit is not None:
        return Limsup(limit, f"the limit of {rule} is {limit:g}")
    seen = values(rule)
    before, largest = float(seen[10**4 : 10**5].max()), float(seen[10**5 :].max())
    if largest > before * (1 + 1e-12):
        return Limsup(None, f"still rising: {before:.4g} up to n = 1e5, {largest:.4g} up to 1e6", "numeric")
    return Limsup(largest, f"at most {largest:.4g} for 1e5 < n <= 1e6: {CAUTION}", "numeric")


def last_above(rule: Rule, bound: float) -> int:
    """The last n <= 1e6 with t_n > bound; 0 if there is none."""
    if rule.decreasing:
        low, high = 0, EVIDENCE + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if rule.at(middle) > bound else (low, middle)
        return low
    above = np.flatnonzero(values(rule) > bound)
    return int(above[-1]) + 1 if len(above) else 0


def fitted_exponent(rule: Rule, power: int = 1) -> float:
    """The p with sum_{1e5 < n <= 1e6} t_n^power / sum_{1e4 < n <= 1e5} t_n^power = 10^(1-p); inf for a sum of 0."""
    seen = values(rule) ** power
    before, last = float(seen[10**4 : 10**5].sum()), float(seen[10**5 :].sum())
    if before == 0 or last == 0:
        return math.inf
    return 1.0 - math.log10(last / before)


@functools.lru_cache(maxsize=16)
def values(rule: Rule) -> np.ndarray:
    """t_1, ..., t_1000000, shape (1000000,)."""
    if isinstance(rule, Product):
        product = np.ones(EVIDENCE)
        for factor in rule.factors:
            product = product * values(factor)
        return product
    return np.fromiter((rule.at(n) for n in range(1, EVIDENCE + 1)), dtype=np.float64, count=EVIDENCE)


def _fitted(rule: Rule, power: int) -> Judgement:
    p = fitted_exponent(rule, power)
    total = float((values(rule) ** power).sum())
    finite = False if p <= 1.001 else True if p >= 1.15 else None
    says = {False: "diverging", True: "converging", None: "undecided"}[finite]
    reason = f"sum up to 1e6 = {total:.4g}, terms like n^-{p:.3f}, {says}: {CAUTION}"
    return Judgement(finite, reason, "numeric")


def _words(growth: Asymptotics, power: int) -> str:
    scaled = Asymptotics(growth.c**power, power * growth.p, power * growth.q)
    p, q, terms = scaled.p, scaled.q, str(scaled)
    if p == 1 and q != 0:
        return f"terms ~ {terms} with n^1, and the exponent {q:g} of log n {'exceeds' if q > 1 else 'is at most'} 1"
    return f"terms ~ {terms}, and the exponent {p:g} of n {'exceeds' if p > 1 else 'is at most'} 1"
