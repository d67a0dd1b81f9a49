"""Worst-case sharpness: how much the loss rises near the weights, over all data or over groups of m examples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flatmin.measure.average import Average, average_case
from flatmin.measure.ball import Ball, Norm, ball, dot, length
from flatmin.measure.groups import split
from flatmin.measure.losses import error_rate
from flatmin.measure.problem import Conventions, Problem

_MOMENTUM = 0.3


@dataclass(frozen=True, kw_only=True, eq=False)
class Sharpness:
    """Result of `worst_case`: a lower bound of max L(w + delta) - L(w) in a ball, found by gradient ascent.

    The gap of a point is L(w + delta) - L(w).

    Args:
        value: the largest gap of all visited points. These include w, so it is never negative and never below
            `one_step`.
        one_step: the gap of the closed-form first step, which is that of SAM (adaptive: of ASAM). It can be negative,
            and is 0 if the gradient is zero, because SAM does not move then.
        loss: L(w).
        left: max_v <g, v - u> over the ball at the best point, in units of the loss: how much a further step could add
            to first order. It is 0 at a stationary point. It is not a bound on the distance to the true maximum.
        converged: whether left <= tol * value.
        rho: see `worst_case`.
        norm: see `worst_case`.
        adaptive: see `worst_case`.
        eta: see `worst_case`.
        steps: see `worst_case`.
        restarts: see `worst_case`.
        gradients: number of evaluations of the loss and its gradient.
        history: the largest gap after each step of the ascent that starts at w.
        displacement: delta of the best point, shape (size,).
        error_gap: the error rate at w + delta minus that at w; None if not requested.
        conventions: conventions of the problem, with the seed if random points were used.
    """

    value: float
    one_step: float
    loss: float
    left: float
    converged: bool
    rho: float
    norm: Norm
    adaptive: bool
    eta: float
    steps: int
    restarts: int
    gradients: int
    history: tuple[float, ...]
    displacement: Tensor
    error_gap: float | None
    conventions: Conventions


def worst_case(
    problem: Problem,
    rho: float,
    *,
    norm: Norm = "l2",
    adaptive: bool = False,
    eta: float = 0.0,
    steps: int = 20,
    restarts: int = 0,
    tol: float = 1e-5,
    errors: bool = False,
    seed: int = 0,
) -> Sharpness:
    """Measure worst-case sharpness by projected gradient ascent. With steps=1 it is the gap of SAM's step.

        max over ||u||_p <= rho of L(w + s * u) - L(w),   s = 1 or |w| + eta

    The first step is the closed form of SAM or ASAM: rho times the dual direction of the gradient. Each further step
    goes to the point of the ball that is farthest along the new gradient, with some momentum; such steps are monotone
    where L is convex along the way. If a step overshoots, or the previous step found negative curvature, the next step
    is a projected gradient step. Its length is that at which a parabola fitted to the observed values has its maximum.
    A step that does not increase the loss is undone, so the best gap never decreases. If an ascent reaches a stationary
    point (possibly a saddle) before all steps are used, the remaining steps start from a random point.

    Args:
        problem: the function. Its weight decay, if any, is part of L.
        rho: radius, > 0, in the norm of u.
        norm: "l2" or "linf". Default "l2".
        adaptive: scale u by |w| + eta. With eta = 0, the result is invariant to rescaling between layers that leaves
            the function of the network unchanged. Default False.
        eta: added to |w|, >= 0. Default 0: weights that are zero do not move.
        steps: number of gradient steps, >= 1, including undone steps. Default 20, as in Andriushchenko et al. 2023.
        restarts: number of further ascents with as many steps, from random points of the ball, >= 0. Default 0.
        tol: a point counts as stationary if `left` is at most this share of its gap; >= 0. Default 1e-5.
        errors: also measure the gap of the error rate at the best point. Default False.
        seed: seed of the random points. Default 0.

    Returns:
        The largest gap found, the gap of the first step, and how the ascent ended.

    Raises:
        ValueError: a number or the norm is invalid; all weights are zero (adaptive); or the weights are in half
            precision.
        ArithmeticError: the loss or its gradient is not finite at a displaced point.

    Sources: Foret et al., ICLR 2021 (first step); Kwon et al., ICML 2021 (adaptive); Andriushchenko et
    al., ICML 2023 (the gap; they use a different ascent). Steps to the farthest point: Journee, Nesterov, Richtarik &
    Sepulchre, JMLR 11, 2010.
    """
    options = _Options(norm, adaptive, eta, steps, restarts, tol, errors, seed)
    return _rising(problem, [rho], options)[0]


@dataclass(frozen=True, slots=True)
class _Options:
    norm: Norm = "l2"
    adaptive: bool = False
    eta: float = 0.0
    steps: int = 20
    restarts: int = 0
    tol: float = 1e-5
    errors: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 0:
            raise ValueError(f"steps must be >= 1 and restarts >= 0, got {self.steps!r} and {self.restarts!r}.")
        if not self.tol >= 0:
            raise ValueError(f"tol must be >= 0, got {self.tol!r}.")


@dataclass(frozen=True, eq=False, slots=True)
class _Point:
    """A point u, the gap there, and its gradient in u."""

    u: Tensor
    gap: float
    g: Tensor


def _gap(point: _Point) -> float:
    return point.gap


class _Ascent:
    """Ascents in one ball."""

    def __init__(self, problem: Problem, within: Ball, options: _Options, loss: float, gradient: Tensor) -> None:
        self.problem, self.ball, self.options, self.loss = problem, within, options, loss
        self.generator = torch.Generator().manual_seed(options.seed)
        self.gradients, self.drawn = 0, False
        self.origin = _Point(torch.zeros_like(gradient), 0.0, within.displacement(gradient))

    def at(self, u: Tensor) -> _Point:
        loss, gradient = self.problem.gradient(self.problem.moved(self.ball.displacement(u)))
        self.gradients += 1
        if not math.isfinite(loss) or not torch.isfinite(gradient).all():
            raise ArithmeticError(
                f"at a displacement within rho={self.ball.rho:g} the loss is {loss}, or its gradient is not finite; "
                "use a smaller rho, or dtype=torch.float64 in the Problem."
            )
        return _Point(u, loss - self.loss, self.ball.displacement(gradient))

    def random(self) -> _Point:
        self.drawn = True
        return self.at(self.ball.draw(self.generator, self.origin.u))

    def left(self, point: _Point) -> float:
        return max(0.0, self.ball.support(point.g) - dot(point.g, point.u))

    def done(self, point: _Point) -> bool:
        return point.gap > 0 and self.left(point) <= self.options.tol * point.gap

    def climb(self, start: _Point, steps: int, other: _Point | None = None) -> tuple[_Point, list[float], float]:
        """The best point, the best gap after each step, and the gap of the first step.

        `other` is a further start, used after the first step if its gap is larger.
        """
        here = best = start
        history: list[float] = []
        last: Tensor | None = None
        first = 0.0
        size = math.inf  # length of a step; infinite: go to the farthest point of the ball
        for step in range(steps):
            slope = length(here.g)
            if not slope or size < 1e-9 * self.ball.reach or self.done(here):
                # A maximum or a saddle point: use the remaining steps from a random point.
                if step:
                    here, last, size = self.random(), None, math.inf
            else:
                trial = self.at(self._target(here, size, slope, last))
                change = trial.u - here.u
                first = trial.gap if step == 0 else first
                if trial.gap > here.gap:
                    bend = dot(trial.g - here.g, change) / dot(change, change)
                    size = length(trial.g) / -bend if bend < 0 else math.inf
                    size = math.inf if size > 10 * self.ball.reach else size
                    here, last = trial, change
                elif last is not None:
                    last = None  # The momentum may be the cause: try without it.
                else:
                    expected = dot(here.g, change)
                    missed = expected - (trial.gap - here.gap)
                    share = 0.5 * expected / missed if missed > 0 else 0.5
                    size = min(max(share, 0.05), 0.5) * length(change)
            if step == 0 and other is not None and other.gap > here.gap:
                here, last, size = other, None, math.inf
            best = max(best, here, key=_gap)
            history.append(best.gap)
        return best, history, first

    def _target(self, best: _Point, size: float, slope: float, last: Tensor | None) -> Tensor:
        if math.isinf(size):
            far = self.ball.farthest(best.g)
            return far if last is None else self.ball.farthest(far + _MOMENTUM * last)
        step = best.g * (size / slope)
        return self.ball.project(best.u + step + (0.0 if last is None else _MOMENTUM * last))


def _rising(problem: Problem, rhos: Sequence[float], options: _Options) -> list[Sharpness]:
    """Worst cases in growing balls. The best point of one ball is a start in the next, so the values never fall."""
    balls = [ball(problem, rho, options.norm, options.adaptive, options.eta) for rho in rhos]
    loss, gradient = problem.gradient()
    if not math.isfinite(loss) or not torch.isfinite(gradient).all():
        raise ArithmeticError(f"the loss at the weights is {loss}, or its gradient is not finite.")
    before = error_rate(problem) if options.errors else 0.0
    results: list[Sharpness] = []
    carried: _Point | None = None
    for within in balls:
        ascent = _Ascent(problem, within, options, loss, gradient)
        best, history, one_step = ascent.climb(ascent.origin, options.steps, carried)
        again = [ascent.climb(ascent.random(), options.steps - 1)[0] for _ in range(options.restarts)]
        carried = best = max([best, *again], key=_gap)
        left = ascent.left(best)
        displacement = within.displacement(best.u)
        results.append(
            Sharpness(
                value=best.gap,
                one_step=one_step,
                loss=loss,
                left=left,
                converged=left <= options.tol * best.gap,
                rho=within.rho,
                norm=within.norm,
                adaptive=options.adaptive,
                eta=options.eta,
                steps=options.steps,
                restarts=options.restarts,
                gradients=ascent.gradients + (not results),
                history=tuple(history),
                displacement=displacement,
                error_gap=error_rate(problem, problem.moved(displacement)) - before if options.errors else None,
                conventions=problem.conventions.with_seed(options.seed) if ascent.drawn else problem.conventions,
            )
        )
    return results


@dataclass(frozen=True, kw_only=True, eq=False)
class Grouped:
    """Result of `m_sharpness`: the worst case of the loss of each group of m examples, averaged over the groups.

    Args:
        value: mean of the gaps.
        error: its standard error over the groups; NaN for a single group.
        one_step: mean of the gaps of the first steps: the m-sharpness at the ascent steps of SAM, one per group.
        m: number of examples per group.
        groups: number of groups, over all processes.
        left_out: number of examples in no group, over all processes.
        gaps: gap of each group of this process, in the order of the data.
        converged: share of the groups whose ascent converged.
        rho: see `worst_case`.
        norm: see `worst_case`.
        adaptive: see `worst_case`.
        eta: see `worst_case`.
        steps: see `worst_case`.
        restarts: see `worst_case`.
        gradients: number of evaluations of a group's loss and gradient, in this process.
        error_gap: mean rise of the error rate at the best points; None if not requested.
        conventions: conventions of the problem, with the number of examples used; the batch is m.
    """

    value: float
    error: float
    one_step: float
    m: int
    groups: int
    left_out: int
    gaps: tuple[float, ...]
    converged: float
    rho: float
    norm: Norm
    adaptive: bool
    eta: float
    steps: int
    restarts: int
    gradients: int
    error_gap: float | None
    conventions: Conventions


def m_sharpness(
    problem: Problem,
    m: int,
    rho: float,
    *,
    norm: Norm = "l2",
    adaptive: bool = False,
    eta: float = 0.0,
    steps: int = 20,
    restarts: int = 0,
    tol: float = 1e-5,
    errors: bool = False,
    seed: int = 0,
) -> Grouped:
    """Measure m-sharpness: the worst case of the loss over m examples, averaged over groups of m examples.

        mean over groups g of max over ||u||_p <= rho of L_g(w + s * u) - L_g(w),   |g| = m

    If m is the number of examples, this is `worst_case`. Smaller m gives larger values. A group consists of m
    consecutive examples. Examples left over at the end are not used.

    Args:
        problem: the function.
        m: number of examples per group, >= 1.
        rho: radius, > 0; see `worst_case`.
        norm: "l2" or "linf". Default "l2".
        adaptive: scale u by |w| + eta. Default False.
        eta: added to |w|, >= 0. Default 0.
        steps: number of gradient steps for each group. Default 20.
        restarts: number of further ascents for each group. Default 0.
        tol: tolerance of a stationary point; see `worst_case`. Default 1e-5.
        errors: also measure the gap of the error rate. Default False.
        seed: seed of the random points, which differ between groups. Default 0.

    Returns:
        The mean over the groups with its standard error.

    Raises:
        ValueError: m is below 1 or above the number of examples; see also `worst_case`.
        ArithmeticError: see `worst_case`.

    Sources: Foret et al., ICLR 2021; Andriushchenko & Flammarion, ICML 2022.
    """
    options = _Options(norm, adaptive, eta, steps, restarts, tol, errors, seed)
    return _grouped(problem, m, [rho], options)[0]


def _grouped(problem: Problem, m: int, rhos: Sequence[float], options: _Options) -> list[Grouped]:
    groups, left = split(problem, m)
    by_group = []
    for i, group in enumerate(groups):
        results = _rising(group, rhos, replace(options, seed=options.seed * 1_000_003 + i))
        # Drop the displacements: one vector per group would take too much memory.
        by_group.append([replace(r, displacement=r.displacement[:0].clone()) for r in results])
    return [
        _mean(problem, m, left, groups, [results[i] for results in by_group], rho, options)
        for i, rho in enumerate(rhos)
    ]


def _mean(
    problem: Problem,
    m: int,
    left: int,
    groups: Sequence[Problem],
    results: Sequence[Sharpness],
    rho: float,
    options: _Options,
) -> Grouped:
    gaps = [f.value for f in results]
    local = [
        float(len(results)),
        float(left),
        math.fsum(gaps),
        math.fsum(f.one_step for f in results),
        float(sum(f.converged for f in results)),
        math.fsum(f.error_gap or 0.0 for f in results),
        math.fsum(group.conventions.terms for group in groups),
    ]
    n, left_out, total, first, converged, errors, terms = _reduced(problem, local)
    if not n:
        raise ValueError(
            f"the data have {problem.conventions.examples} examples, which make no group of m={m}; use a smaller m."
        )
    mean = total / n
    spread = _reduced(problem, [math.fsum((gap - mean) ** 2 for gap in gaps)])[0]
    used = replace(problem.conventions, examples=int(n) * m, terms=terms, batch=m)
    return Grouped(
        value=mean,
        error=math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan,
        one_step=first / n,
        m=m,
        groups=int(n),
        left_out=int(left_out),
        gaps=tuple(gaps),
        converged=converged / n,
        rho=rho,
        norm=options.norm,
        adaptive=options.adaptive,
        eta=options.eta,
        steps=options.steps,
        restarts=options.restarts,
        gradients=sum(f.gradients for f in results),
        error_gap=errors / n if options.errors else None,
        conventions=used.with_seed(options.seed) if any(f.conventions.seed is not None for f in results) else used,
    )


def _reduced(problem: Problem, values: Sequence[float]) -> list[float]:
    """The sums over the processes of the problem."""
    summed: list[float] = problem.reduced(torch.tensor(values, dtype=torch.float64).to(problem.device)).tolist()
    return summed


@dataclass(frozen=True, kw_only=True, eq=False)
class SharpnessCurve:
    """Result of `curve`: sharpness as a function of the radius.

    Args:
        rhos: the radii, ascending.
        values: value at each radius. Worst cases never decrease.
        errors: standard error at each radius; NaN if the measure has none.
        results: full result at each radius.
    """

    rhos: tuple[float, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...]
    results: tuple[Sharpness, ...] | tuple[Average, ...] | tuple[Grouped, ...]


def curve(
    problem: Problem,
    rhos: Sequence[float],
    *,
    measure: Literal["worst", "average", "groups"] = "worst",
    m: int | None = None,
    **options: Any,
) -> SharpnessCurve:
    """Measure sharpness at several radii.

    Worst cases also start from the best point of the previous radius, so they never decrease, like the true maxima.
    Average cases use the same draws at every radius.

    Args:
        problem: the function.
        rhos: radii, > 0, ascending.
        measure: "worst" (`worst_case`), "average" (`average_case`) or "groups" (`m_sharpness`). Default "worst".
        m: number of examples per group, for "groups" only.
        **options: further arguments of `worst_case`, `average_case` or `m_sharpness`.

    Raises:
        ValueError: `rhos` is empty or not ascending, `m` is missing for "groups" or given for another measure, or as
            in the measure.
        ArithmeticError: see the measure.
    """
    radii = [float(rho) for rho in rhos]
    if not radii or any(b <= a for a, b in itertools.pairwise(radii)):
        raise ValueError(f"rhos must be a non-empty list of ascending radii, got {list(rhos)!r}.")
    if measure not in ("worst", "average", "groups"):
        raise ValueError(f"measure must be 'worst', 'average' or 'groups', got {measure!r}.")
    if (measure == "groups") != (m is not None):
        raise ValueError(
            f"m is required for measure='groups' and only used there; got measure={measure!r} and m={m!r}."
        )
    results: Any
    if measure == "average":
        results = [average_case(problem, rho, **options) for rho in radii]
    elif m is not None:
        results = _grouped(problem, m, radii, _Options(**options))
    else:
        results = _rising(problem, radii, _Options(**options))
    return SharpnessCurve(
        rhos=tuple(radii),
        values=tuple(r.value for r in results),
        errors=tuple(getattr(r, "error", math.nan) for r in results),
        results=tuple(results),
    )
