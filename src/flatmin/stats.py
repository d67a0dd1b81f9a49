"""Means with Student's t intervals, paired differences, and intervals of shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

Ends = tuple[float, float]
UNBOUNDED: Ends = (-math.inf, math.inf)
PERCENT: Ends = (0.0, 100.0)
POINTS: Ends = (-100.0, 100.0)
"""Ranges of values: any number, a percentage, a difference of two percentages."""
_SINGLE = 2.0**-20  # values whose relative difference is smaller count as equal, in view of single precision


@dataclass(frozen=True, kw_only=True)
class Stat:
    """A mean over seeds.

    Args:
        mean: mean of the values; NaN if there are none.
        half: half width of the 95 % t interval of the mean, before it is cut at `ends`. NaN if it is unknown: for fewer
            than two values, or for equal values with an unknown `step` (see `summarise`).
        n: number of values.
        values: one value for each seed, in the order of the seeds.
        ends: the smallest and the largest possible value. Default: unbounded.
    """

    mean: float
    half: float
    n: int
    values: tuple[float, ...]
    ends: Ends = UNBOUNDED

    @property
    def low(self) -> float:
        """Lower end of the interval, not below `ends`; NaN if it is unknown."""
        return max(self.mean - self.half, self.ends[0])

    @property
    def high(self) -> float:
        """Upper end of the interval, not above `ends`; NaN if it is unknown."""
        return min(self.mean + self.half, self.ends[1])

    @property
    def cut(self) -> bool:
        """Whether mean +- half would leave `ends`."""
        return self.mean - self.half < self.ends[0] or self.mean + self.half > self.ends[1]

    @property
    def covers_zero(self) -> bool:
        """Whether 0 is in the interval, or the interval is unknown."""
        return not abs(self.mean) > self.half

    def text(self, form: str = ".1f", *, width: str = "", gap: str = "") -> str:
        """The mean with its interval: "95.1 ±0.4", "96.1 (91.4 to 100)" if it is cut, "95.1" if it is unknown.

        Args:
            form: format of the numbers, as in `format`. Default ".1f".
            width: format of the half width. Default "": like the mean.
            gap: text between the sign and the half width. Default "".

        Examples:
            >>> summarise([92.0, 96.0, 100.0], ends=PERCENT).text()
            '96.0 (86.1 to 100)'
        """
        mean = f"{self.mean:{form}}"
        if math.isnan(self.half):
            return mean
        if self.cut:
            sign = "+" if form.startswith("+") else ""
            low, high = (f"{end:{sign}g}" if end in self.ends else f"{end:{form}}" for end in (self.low, self.high))
            if float(low) == float(high):
                low, high = f"{self.low:{sign}.2g}", f"{self.high:{sign}.2g}"
            return f"{mean} ({low} to {high})"
        half = f"{self.half:{width or form.removeprefix('+')}}"
        # Do not print a small half width as 0.
        return f"{mean} ±{gap}{half if float(half) or not self.half else f'{self.half:.1g}'}"


def summarise(values: Sequence[float], confidence: float = 0.95, *, step: float = 0.0, ends: Ends = UNBOUNDED) -> Stat:
    """Mean and t interval: mean +- t_{n-1} s / sqrt(n), with s the sample standard deviation but at least `step`.

    Values on a grid, such as accuracies, sometimes agree by chance. Then s is 0 although the values do vary; of two
    accuracies on 100 samples every tenth pair may agree. The coarsest variation on a grid is a fair coin between two
    neighbours of the mean, +- step, whose standard deviation is `step`. Therefore s is taken to be at least `step`.
    Equal values with an unknown step have no interval. With this lower bound the level of `paired_p` is 5 % and the
    coverage is 95 % for differences of counts, from two seeds on; without it two seeds are wrong in up to half of all
    cases (tests/test_stats.py counts both). If s is at least a step, the bound has no effect.

    Args:
        values: one value for each seed.
        confidence: confidence level, in (0, 1). Default 0.95.
        step: distance between neighbouring possible values, for example 100 / n for an accuracy in percent of n
            samples. Default 0: no grid, or an unknown one.
        ends: the smallest and the largest possible value. Default: unbounded.

    Examples:
        >>> stat = summarise([1.0, 2.0, 3.0])
        >>> stat.mean, round(stat.half, 3)
        (2.0, 2.484)
        >>> summarise([91.0, 91.0]).half, round(summarise([91.0, 91.0], step=1.0).half, 3)
        (nan, 8.985)
    """
    return _summary(values, confidence, step, ends, size=max(map(abs, values), default=0.0))


def _summary(values: Sequence[float], confidence: float, step: float, ends: Ends, size: float) -> Stat:
    """See `summarise`; `size` is the magnitude of the numbers that the values were computed from."""
    n = len(values)
    if n == 0:
        return Stat(mean=math.nan, half=math.nan, n=0, values=(), ends=ends)
    mean = math.fsum(values) / n
    half = math.nan
    if n > 1:
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
        if step > 0 or spread > _SINGLE * size:
            half = t_quantile((1 + confidence) / 2, n - 1) * max(spread, step) / math.sqrt(n)
    return Stat(mean=mean, half=half, n=n, values=tuple(values), ends=ends)


def paired(
    values: Mapping[int, float],
    base: Mapping[int, float],
    confidence: float = 0.95,
    *,
    step: float = 0.0,
    ends: Ends = UNBOUNDED,
) -> Stat | None:
    """Mean difference to the base over the seeds that both have; None if there is no common seed.

    Args:
        values: seed -> value.
        base: seed -> value.
        confidence: confidence level, in (0, 1). Default 0.95.
        step: distance between neighbouring possible values, see `summarise`. Their differences are on the same grid.
            Default 0.
        ends: the smallest and the largest possible difference. Default: unbounded.
    """
    shared = [seed for seed in values if seed in base]
    if not shared:
        return None
    size = max(max(abs(values[seed]), abs(base[seed])) for seed in shared)
    return _summary([values[seed] - base[seed] for seed in shared], confidence, step, ends, size)


def paired_p(diff: Stat) -> float:
    """The two-sided p value of the t test that a mean difference is 0: P(|T_{n-1}| > |mean| sqrt(n) / s).

    s is that of `summarise`, at least `step`. The p value is NaN if the interval is unknown (equal differences with an
    unknown step), and 1 if the mean difference is 0.

    Args:
        diff: result of `paired` with the default confidence, over at least two seeds.

    Raises:
        ValueError: fewer than two differences.
    """
    if diff.n < 2:
        raise ValueError(f"a t test needs two differences, got {diff.n}.")
    if diff.mean == 0:
        return 1.0
    if math.isnan(diff.half):
        return math.nan
    return _two_sided(abs(diff.mean) / diff.half * t_quantile(0.975, diff.n - 1), diff.n - 1)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """P values corrected for the number of tests: Holm, Scandinavian Journal of Statistics 6, 1979.

    The k-th smallest of m values is multiplied by m - k + 1, raised to the largest value before it if it is smaller,
    and capped at 1. None stands for no test; it stays None and is not counted.

    Examples:
        >>> holm([0.01, None, 0.04, 0.03])
        [0.03, None, 0.06, 0.06]
    """
    corrected: list[float | None] = [None] * len(p)
    tests = sorted((value, i) for i, value in enumerate(p) if value is not None)
    most = 0.0
    for k, (value, i) in enumerate(tests):
        most = max(most, min(1.0, (len(tests) - k) * value))
        corrected[i] = most
    return corrected


def share_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's confidence interval of a share: all p with |hits / n - p| <= z sqrt(p (1 - p) / n).

    Args:
        hits: number of hits, from 0 to n.
        n: number of trials, at least 1.
        confidence: confidence level, in (0, 1). Default 0.95.

    Examples:
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
    """The p quantile of Student's t distribution with df degrees of freedom, to a relative error of about 1e-10.

    Bisection on the distribution function, which is the regularised incomplete beta function
    P(T <= t) = 1 - I_{df/(df + t^2)}(df/2, 1/2) / 2 for t >= 0.

    Args:
        p: probability, in (0, 1).
        df: degrees of freedom, > 0.

    Raises:
        ValueError: p or df out of range.
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
    """The two-sided tail probability P(|T| > t)."""
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
