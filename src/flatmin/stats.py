"""Means with Student's t intervals, paired differences, and intervals of shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist


@dataclass(frozen=True, kw_only=True)
class Stat:
    """A mean over seeds.

    Args:
        mean: of the values; NaN if there are none.
        half: half width of the 95 % t interval of the mean; NaN for fewer than two values.
        n: number of values.
        values: one per seed, in the order of the seeds.
    """

    mean: float
    half: float
    n: int
    values: tuple[float, ...]

    @property
    def covers_zero(self) -> bool:
        """Whether 0 lies in the interval, or the interval is unknown."""
        return not abs(self.mean) > self.half


def summarise(values: Sequence[float], confidence: float = 0.95) -> Stat:
    """Mean and t interval: mean +- t_{n-1} s / sqrt(n), with s the sample standard deviation.

    Example:
        >>> stat = summarise([1.0, 2.0, 3.0])
        >>> stat.mean, round(stat.half, 3)
        (2.0, 2.484)
    """
    n = len(values)
    if n == 0:
        return Stat(mean=math.nan, half=math.nan, n=0, values=())
    mean = math.fsum(values) / n
    half = math.nan
    if n > 1:
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
        half = t_quantile((1 + confidence) / 2, n - 1) * math.sqrt(variance / n)
    return Stat(mean=mean, half=half, n=n, values=tuple(values))


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Stat | None:
    """Difference to the base over the seeds that both have; None if they share none."""
    shared = [seed for seed in values if seed in base]
    return summarise([values[seed] - base[seed] for seed in shared]) if shared else None


def paired_p(diff: Stat) -> float:
    """The two-sided p value of the t test that a mean difference is 0: P(|T_{n-1}| > |mean| sqrt(n) / s).

    1 if all differences are 0, 0 if all are the same other number.

    Args:
        diff: of `paired`, over at least two seeds.
    """
    if diff.n < 2:
        raise ValueError(f"a t test needs two differences, got {diff.n}.")
    if diff.half == 0:
        return float(diff.mean == 0)
    t = abs(diff.mean) / diff.half * t_quantile(0.975, diff.n - 1)
    return _two_sided(t, diff.n - 1)


def holm(p: Sequence[float]) -> list[float]:
    """P values corrected for as many tests as there are: Holm, Scandinavian Journal of Statistics 6, 1979.

    The k-th smallest of m is multiplied by m - k + 1, made no smaller than the ones before it, and capped at 1.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    found = [0.0] * len(p)
    most = 0.0
    for k, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        most = max(most, min(1.0, (len(p) - k) * p[i]))
        found[i] = most
    return found


def share_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share: of the p with |hits / n - p| <= z sqrt(p (1 - p) / n).

    Args:
        hits: from 0 to n.
        n: at least 1.
        confidence: in (0, 1).

    Example:
        >>> [round(end, 4) for end in share_interval(95, 100)]
        [0.8882, 0.9785]
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, more = hits / n, z * z / n
    middle = (share + more / 2) / (1 + more)
    half = z * math.sqrt(share * (1 - share) / n + more / (4 * n)) / (1 + more)
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == n else middle + half)


@lru_cache
def t_quantile(p: float, df: float) -> float:
    """The p quantile of Student's t distribution with df degrees of freedom, to about 1e-10 relative.

    Bisection on the distribution function, which is the regularised incomplete beta function
    P(T <= t) = 1 - I_{df/(df + t^2)}(df/2, 1/2) / 2 for t >= 0.

    Args:
        p: in (0, 1).
        df: positive.

    Raises:
        ValueError: outside these ranges.
    """
    if not 0 < p < 1 or not df > 0:
        raise ValueError(f"t_quantile needs 0 < p < 1 and df > 0, got p={p!r} and df={df!r}.")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    if p == 0.5:
        return 0.0
    tail = 2 * (1 - p)
    low, high = 0.0, 1.0
    while _two_sided(high, df) > tail:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _two_sided(middle, df) > tail else (low, middle)
    return (low + high) / 2


def _two_sided(t: float, df: float) -> float:
    """P(|T| > t)."""
    return incomplete_beta(df / 2, 0.5, df / (df + t * t))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Abramowitz & Stegun 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    # Lentz's method for 1 / (1 + d_1 / (1 + d_2 / (1 + ...))).
    tiny = 1e-300
    value, c, d = 1.0, 1.0, 0.0
    for k in range(500):
        m = k // 2
        if k == 0:
            term = 1.0
        elif k % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d or tiny)
        c = 1 + term / c or tiny
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * (value - 1) / a
