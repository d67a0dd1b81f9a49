"""Upper bounds on the gradient norm that follow from the rules alone, to compare with runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from flatmin.methods import Recipe
from flatmin.theory.families import Family, family
from flatmin.theory.functions import Function
from flatmin.theory.methods import RadiusLike, StepLike, positive
from flatmin.theory.parse import as_radius, as_step
from flatmin.theory.rules import Product


@dataclass(frozen=True)
class Bound:
    """Bounds on a run, for k = 0, ..., updates.

    Attributes:
        best: bound on min_{j <= k} ||grad f(x^j)||, shape (updates + 1,); None if inf f is not known.
        last: bound on ||grad f(x^k)||, shape (updates + 1,); None if f is not a convex quadratic.
    """

    best: np.ndarray | None
    last: np.ndarray | None


def gradient_bound(
    problem: Function,
    step: StepLike,
    radius: RadiusLike,
    updates: int,
    method: str | Recipe | Family = "sam",
    **how: Any,
) -> Bound:
    r"""Upper bounds on the gradient norm of a run from the problem's start.

    Best iterate, for any L-smooth f with ||g - grad f|| <= eps (eps_k = L rho_k for normalised methods). From the
    identity -t <grad f, g> + (t/2) ||g||^2 = (t/2) (||g - grad f||^2 - ||grad f||^2) and the descent lemma,
    f(x+) <= f - (t/2) ||grad f||^2 + (t/2) eps^2 - (t/2) (1 - L t) ||g||^2; where L t > 1,
    ||g||^2 <= 2 ||grad f||^2 + 2 eps^2. So with a = max(L t - 1, 0), c = t (1/2 - a) and d = t (1/2 + a) eps^2:

        min_{j < k} ||grad f(x^j)||^2 <= (f(x^0) - inf f + sum_j d_j) / sum_j c_j.

    For a relative error nu, c = t (1 - nu) - L t^2 (1 + nu)^2 / 2 and d = 0.

    Last iterate, for a convex quadratic f with eigenvalues mu <= lambda <= L besides 0, and g = grad f(x^k), which
    stays in their span. SAM: g+ = (1 - t A - t rho A^2 / ||g||) g, so ||g+|| <= max_lambda |(1 - t lambda) ||g|| -
    t rho lambda^2|, and therefore

        B+ = max((1 - t mu) B, max(t L - 1, 0) B + t rho L^2),

    which for t L <= 1 is at most max(exp(-mu sum t) B_0, max_j t_j rho_j L^2 exp(-mu sum_{i > j} t_i)): the influence
    of the start decays with sum t, and t_k rho_k L^2 remains. Other normalised directions and igd:
    B+ = max(|1 - t mu|, |1 - t L|) B + t L eps. The gradient, USAM and the extragradient multiply by the largest factor
    |1 - t lambda (1 +- rho lambda)|; igdr adds t L nu B.

    Args:
        problem: f; L is its `function_class.L`.
        step: as in `flatmin.theory.methods.run`.
        radius: as in `flatmin.theory.methods.run`.
        updates: number of updates, >= 1.
        method: as in `flatmin.theory.checker.check`.
        how: parameters of the recipe's parts.

    Raises:
        ValueError: L is not known or does not hold everywhere, a radius has nu >= 1, a step is too long for a bound
            (t L >= 3/2, or beyond `largest_step`), or no theorem covers the method.
    """
    chosen = family(method, **how)
    f = problem.function_class
    if chosen.kind == "other":
        raise ValueError(f"no bound: {chosen.reason}.")
    if f.L is None:
        raise ValueError(f"no bound: L of {problem.name} is not known.")
    if f.where != "everywhere":
        raise ValueError(f"no bound: L of {problem.name} holds only {f.where}, and a run may leave that region.")
    t_rule = as_step(step)
    rho_rule = as_radius(radius, t_rule)
    if chosen.factor is not None:
        rho_rule = Product((rho_rule, chosen.factor))
    t = np.array([positive(t_rule, n) for n in range(1, updates + 1)])
    rho = np.array([rho_rule.at(n) for n in range(1, updates + 1)])
    if chosen.kind == "gradient":
        rho = np.zeros(updates)
    x = problem.start()
    start = float(problem.gradient(x).norm())
    best = None
    if problem.f_star is not None and f.bounded_below:
        best = _best(float(problem.value(x)) - problem.f_star, start, t, rho, f.L, chosen)
    spectrum = np.array([s for s in f.spectrum if s != 0])
    last = _last(start, t, rho, spectrum, chosen) if len(spectrum) and spectrum.min() > 0 else None
    return Bound(best, last)


def sam_floor(t: float, rho: float, L: float) -> float:
    """The gradient norm t rho L^2 / (2 - t L) on SAM's cycle on a quadratic.

    Args:
        t: step size of this update.
        rho: radius of this update.
        L: the largest eigenvalue, t L < 2.
    """
    return t * rho * L**2 / (2 - t * L) if t * L < 2 else math.inf


def _best(gap: float, start: float, t: np.ndarray, rho: np.ndarray, L: float, method: Family) -> np.ndarray:
    if method.kind in ("normalised", "absolute"):
        eps = rho if method.kind == "absolute" else L * rho
        excess = np.maximum(L * t - 1, 0)
        fall, rise = t * (0.5 - excess), t * (0.5 + excess) * eps**2
    else:
        nu = rho if method.kind == "relative" else L * rho
        if bool((nu >= 1).any()):
            n = int(np.flatnonzero(nu >= 1)[0]) + 1
            what = "nu" if method.kind == "relative" else "rho L"
            raise ValueError(
                f"no bound: the radius {rho[n - 1]:g} of update {n} is too wide, {what} = {nu[n - 1]:g} >= 1."
            )
        fall, rise = t * (1 - nu) - L * t**2 * (1 + nu) ** 2 / 2, np.zeros_like(t)
    if not bool((fall > 0).all()):
        n = int(np.flatnonzero(fall <= 0)[0]) + 1
        raise ValueError(f"no bound: the step t = {t[n - 1]:g} of update {n} is too long for L = {L:g}.")
    bound = np.sqrt((gap + np.cumsum(rise)) / np.cumsum(fall))
    return np.concatenate([[start], np.minimum(bound, start)])


def _last(start: float, t: np.ndarray, rho: np.ndarray, spectrum: np.ndarray, method: Family) -> np.ndarray:
    mu, L = float(spectrum.min()), float(spectrum.max())
    if method.kind == "normalised" and method.climbs:
        keep, over, add = 1 - t * mu, np.maximum(t * L - 1, 0), t * rho * L**2
        sequence = [start]
        for a, b, c in zip(keep, over, add, strict=True):
            sequence.append(max(a * sequence[-1], b * sequence[-1] + c))
        return np.array(sequence)
    sign = {"unnormalised": 1.0, "extragradient": -1.0}.get(method.kind, 0.0)
    by = np.zeros_like(t)
    for eigenvalue in spectrum:
        by = np.maximum(by, np.abs(1 - t * eigenvalue * (1 + sign * rho * eigenvalue)))
    add = np.zeros_like(t)
    if method.kind == "relative":
        by = by + t * L * rho
    elif method.kind in ("normalised", "absolute"):
        add = t * L * rho * (L if method.kind == "normalised" else 1.0)
    sequence = [start]
    for a, c in zip(by, add, strict=True):
        sequence.append(a * sequence[-1] + c)
    return np.array(sequence)
