"""Closed forms on quadratics: the limit cycle for a constant step size and radius, and the factors of an update."""

from __future__ import annotations

import math
from collections.abc import Sequence


def limit_distance(t: float, rho: float, spectrum: Sequence[float]) -> float:
    """Distance from the minimiser of the cycle on which SAM with constant t and rho ends, from a generic start.

    Along an eigenvector of lambda, x+ = (1 - t lambda) x - t rho lambda sign(x); |x| = t rho lambda / (2 - t lambda)
    is a cycle of period 2, and it attracts there if t lambda < 2. Of the cycles of a quadratic the one along the
    largest eigenvalue attracts: near it, the component of another mu is multiplied by
    1 - t mu - (2 - t lambda) (mu / lambda)^2 in modulus below 1. That it attracts nearby starts is derived; that
    generic starts end there is measured. For f(x) = x^2, lambda = 2: t rho / (1 - t).

        >>> round(limit_distance(0.1, 0.1, [1.0, 4.0]), 12), round(limit_distance(0.3, 0.5, [2.0]), 7)
        (0.025, 0.2142857)

    Args:
        t: > 0.
        rho: >= 0.
        spectrum: eigenvalues, all positive.

    Raises:
        ValueError: t lambda >= 2, where the iterates are not bounded, or an argument out of range.

    Source: Khanh et al., NeurIPS 2024, Example 3.1; the formula is derived here.
    """
    largest = max(spectrum, default=math.nan)
    if not (t > 0 and rho >= 0 and min(spectrum, default=0.0) > 0):
        raise ValueError(
            f"limit_distance needs t > 0, rho >= 0 and positive eigenvalues, got t = {t!r}, rho = {rho!r}, "
            f"spectrum = {list(spectrum)!r}."
        )
    if t * largest >= 2:
        raise ValueError(f"t lambda must be below 2, got {t!r} * {largest!r} = {t * largest:g}: there is no cycle.")
    return t * rho * largest / (2 - t * largest)


def orbit_square(t: float, rho: float) -> float:
    """|x| of the cycle of period 2 of SAM on f(x) = x^2: t rho / (1 - t), for t < 1."""
    return limit_distance(t, rho, [2.0])


def factor(kind: str, t: float, rho: float, eigenvalue: float) -> float:
    """The factor by which an update on a quadratic multiplies the component along an eigenvector.

    gradient: 1 - t lambda; unnormalised: 1 - t lambda (1 + rho lambda); extragradient: 1 - t lambda (1 - rho lambda).

    Args:
        kind: one of these three.
        t: step size.
        rho: radius.
        eigenvalue: lambda.
    """
    sign = {"gradient": 0.0, "unnormalised": 1.0, "extragradient": -1.0}[kind]
    return 1 - t * eigenvalue * (1 + sign * rho * eigenvalue)


def largest_step(L: float, nu: float = 0.0) -> float:
    """The bound 2 (1 - nu) / (L (1 + nu)^2) on step sizes, below which f falls at every update.

    By the descent lemma, f(x+) <= f - (t (1 - nu) - L t^2 (1 + nu)^2 / 2) ||grad f||^2 with relative error nu.

    Args:
        L: > 0.
        nu: the relative error, in [0, 1); L rho for USAM. Default: 0.0, for gradient descent, with the bound 2 / L.

    Raises:
        ValueError: an argument out of range.
    """
    if not (L > 0 and 0 <= nu < 1):
        raise ValueError(f"the largest step needs L > 0 and nu in [0, 1), got L = {L!r}, nu = {nu!r}.")
    return 2 * (1 - nu) / (L * (1 + nu) ** 2)
