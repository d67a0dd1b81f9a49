"""Average-case sharpness: how much the loss rises on average under random displacements of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flatmin.measure.ball import ball
from flatmin.measure.losses import error_rate
from flatmin.measure.problem import Conventions, Problem
from flatmin.stats import t_quantile

Of = Literal["loss", "error"]
Per = Literal["vector", "entry"]


@dataclass(frozen=True, kw_only=True)
class Average:
    """Result of `average_case`: the mean rise of the loss under random displacements.

    Args:
        value: the mean rise.
        error: its standard error over the draws; NaN with fewer than two draws.
        draws: number of independent draws. With `antithetic`, each draw is the mean over a pair u and -u.
        evaluations: number of evaluations of the loss.
        rho: see `average_case`.
        per: see `average_case`.
        adaptive: see `average_case`.
        eta: see `average_case`.
        antithetic: see `average_case`.
        of: see `average_case`.
        conventions: conventions of the problem, with the seed.
    """

    value: float
    error: float
    draws: int
    evaluations: int
    rho: float
    per: Per
    adaptive: bool
    eta: float
    antithetic: bool
    of: Of
    conventions: Conventions

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the value, by Student's t distribution."""
        half = t_quantile((1 + confidence) / 2, self.draws - 1) * self.error if self.draws > 1 else math.inf
        return self.value - half, self.value + half


def average_case(
    problem: Problem,
    rho: float,
    *,
    per: Per = "vector",
    adaptive: bool = False,
    eta: float = 0.0,
    draws: int = 50,
    antithetic: bool = True,
    of: Of = "loss",
    seed: int = 0,
) -> Average:
    """Measure average-case sharpness under normally distributed displacements, with its standard error.

        E[L(w + s * u)] - L(w),   u_i ~ N(0, rho^2 / n) or N(0, rho^2),   s = 1 or |w| + eta

    Here n is the number of weights that move (s > 0). For small rho this is about rho^2 tr(S H S) / 2n, or
    rho^2 tr(S H S) / 2 with per="entry", where S = diag(s) and H is the Hessian.

    Args:
        problem: the function.
        rho: size of the displacements, > 0.
        per: "vector": E||u||^2 = rho^2, the same scale as the worst case in a ball of radius rho. "entry": each entry
            of u has standard deviation rho, the convention of Andriushchenko et al. 2023. Default "vector".
        adaptive: scale u by |w| + eta. Default False.
        eta: added to |w|, >= 0. Default 0: weights that are zero do not move.
        draws: number of independent draws, >= 1. Default 50.
        antithetic: average each draw over u and -u. This costs twice as much and removes the noise of the odd part of
            L, above all of its gradient. Default True.
        of: "loss", or "error" for the error rate. Default "loss".
        seed: seed of the draws. They are the same for every rho, so curves over rho are smooth. Default 0.

    Returns:
        The mean rise with its standard error.

    Raises:
        ValueError: a number or option is invalid; see `worst_case`.
        ArithmeticError: the loss is not finite at the weights or at a displaced point.

    Source: Andriushchenko, Croce, Mueller, Hein & Flammarion, ICML 2023.
    """
    if per not in ("vector", "entry"):
        raise ValueError(f"per must be 'vector' or 'entry', got {per!r}.")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws!r}.")
    statistic = statistic_of(problem, of)
    within = ball(problem, rho, "l2", adaptive, eta)
    deviation = rho / math.sqrt(within.moving) if per == "vector" else rho
    before = at_weights(statistic, of)
    rises = []
    for u in noise(problem, draws, seed):
        step = within.displacement(u * deviation)
        after = [statistic(problem.moved(sign * step)) for sign in ((1.0, -1.0) if antithetic else (1.0,))]
        if not all(math.isfinite(value) for value in after):
            raise ArithmeticError(
                f"the {of} is not finite under displacements of size rho={rho:g}; use a smaller rho, or "
                "dtype=torch.float64 in the Problem."
            )
        rises.append(math.fsum(after) / len(after) - before)
    value, error = mean_and_error(rises)
    return Average(
        value=value,
        error=error,
        draws=draws,
        evaluations=1 + draws * (1 + antithetic),
        rho=rho,
        per=per,
        adaptive=adaptive,
        eta=eta,
        antithetic=antithetic,
        of=of,
        conventions=problem.conventions.with_seed(seed),
    )


def statistic_of(problem: Problem, of: Of) -> Callable[[Sequence[Tensor] | None], float]:
    """Return the loss or the error rate as a function of the weights (None: the model's own).

    Raises:
        ValueError: `of` is neither "loss" nor "error".
    """
    if of not in ("loss", "error"):
        raise ValueError(f"of must be 'loss' or 'error', got {of!r}.")
    return problem.value if of == "loss" else lambda weights: error_rate(problem, weights)


def at_weights(statistic: Callable[[Sequence[Tensor] | None], float], of: Of) -> float:
    """Evaluate the statistic at the model's own weights.

    Raises:
        ArithmeticError: the value is not finite.
    """
    value = statistic(None)
    if not math.isfinite(value):
        raise ArithmeticError(f"the {of} at the weights is not finite ({value}), so its rise cannot be measured.")
    return value


def noise(problem: Problem, draws: int, seed: int) -> Iterator[Tensor]:
    """Yield standard normal vectors of shape (size,), drawn on the CPU and so the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        u = torch.randn(problem.size, generator=generator, dtype=torch.float64)
        yield u.to(problem.device, problem.dtype)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error (NaN for a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) * (v - mean) for v in values) / (len(values) - 1) / len(values))
