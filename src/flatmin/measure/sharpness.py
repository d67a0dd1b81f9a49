"""How far the loss rises near the weights: in the worst direction, and over few examples at a time."""

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
    r"""What an ascent found of max L(w + delta) - L(w) in a ball: a lower bound, and how it was found.

    Args:
        value: the gap at the best point visited, w itself among them, so never negative and never below `one_step`.
        one_step: the gap of the closed-form first step, which is the SAM (adaptive: ASAM) gap; may be negative. 0 where
            the gradient is zero, as SAM does not move there.
        loss: L(w).
        left: \max_v <g, v - u> over the ball at the best point, in units of the loss: what a further step could add to
            first order. 0 at a stationary point; no bound of what the ascent missed.
        converged: left <= tol * value.
        rho, norm, adaptive, eta: the ball.
        steps, restarts: as asked.
        gradients: evaluations of the loss and its gradient.
        history: the best gap after each step of the ascent from w.
        displacement: delta of the best point, shape (size,).
        error_gap: the error rate at w + delta less that at w, if it was asked for.
        conventions: of the problem, with the seed where something was drawn.
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
    r"""Worst-case sharpness by projected ascent; with steps=1 the SAM gap.

    .. math::
        \max_{\|u\|_p \le \rho} L(w + s \odot u) - L(w),\quad s = 1 \text{ or } |w| + \eta

    The first step is the closed form of SAM or ASAM, rho times the dual direction of the gradient. Each further one
    goes to the point of the ball that is farthest along the new gradient, with some momentum, which is monotone
    where L is convex along the way; where it overshoots, or the last step met negative curvature, it is a projected
    gradient step of the length at which a parabola through what was seen has its top. A step that does not rise is
    taken back, so the best gap never falls. Where an ascent reaches a stationary point, which may be a saddle, before
    its steps are used up, the others start from a random point.

    Args:
        problem: the function. Its weight decay, if any, is part of L.
        rho: radius, > 0, in the norm of u.
        norm: "l2" (default) or "linf".
        adaptive: whether u is in multiples of |w|; invariant then to a change of scale between layers that leaves the
            net's function as it is, if eta is 0. Default False.
        eta: added to |w|, >= 0. Default 0, where weights that are zero do not move.
        steps: gradient steps, >= 1, those taken back among them. Default 20, of Andriushchenko et al. 2023.
        restarts: further ascents of as many steps, from random points of the ball, >= 0. Default 0.
        tol: a point is stationary where `left` is at most this share of its gap; >= 0. Default 1e-5.
        errors: also the gap of the error rate at the point found. Default False.
        seed: of the random points.

    Raises:
        ValueError: a bad number or norm, weights that are all zero (adaptive) or in half precision.
        ArithmeticError: a loss or gradient that is not finite at a displaced point.

    Sources: Foret et al., ICLR 2021 (first step); Kwon et al., ICML 2021 (adaptive); Andriushchenko et
    al., ICML 2023 (the gap; their ascent is another). Steps to the far end: Journee, Nesterov, Richtarik & Sepulchre,
    JMLR 11, 2010.
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
    """A point in u, the rise of the loss there, and its gradient in u."""

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
        """The best point, the best gap after each step, and the gap of the first step; `other` is seen after it."""
        here = best = start
        history: list[float] = []
        last: Tensor | None = None
        first = 0.0
        size = math.inf  # of a step; infinite is to the far end of the ball
        for step in range(steps):
            slope = length(here.g)
            if not slope or size < 1e-9 * self.ball.reach or self.done(here):
                # A maximum or a saddle: the steps that are left are better spent elsewhere.
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
                    last = None  # it may have been the momentum
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
    """Worst cases in balls that grow; what was found in one is a start in the next, so the values rise."""
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
    """The mean over groups of m examples of the worst case of each group's own loss.

    Args:
        value: mean of the gaps.
        error: its standard error over the groups; NaN for a single group.
        one_step: mean of the gaps of the first steps: the m-sharpness that SAM with per-group ascents sees.
        m: examples in a group.
        groups: number of them, over all processes.
        left_out: examples left over, over all processes.
        gaps: of the groups of this process, in the order of the data.
        converged: share of the groups whose ascent converged.
        rho, norm, adaptive, eta, steps, restarts: see `Sharpness`.
        gradients: evaluations of a group's loss and gradient, in this process.
        error_gap: mean rise of the error rate at the points found, if it was asked for.
        conventions: of the problem, with the examples that were used; the batch is m.
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
    r"""m-sharpness: the worst case of the loss over m examples, averaged over the groups of m consecutive examples.

    .. math::
        \frac{1}{|G|} \sum_{g \in G} \max_{\|u\|_p \le \rho} L_g(w + s \odot u) - L_g(w),\quad |g| = m

    With m the number of examples it is `worst_case`; the smaller m, the larger it is. Groups are taken in the order of
    the data, and what is left over at the end is left out.

    Args:
        problem: the function.
        m: examples in a group, >= 1.
        rho: radius, > 0; this and the others as in `worst_case`.
        norm: "l2" (default) or "linf".
        adaptive: whether u is in multiples of |w|. Default False.
        eta: added to |w|. Default 0.
        steps: gradient steps for each group. Default 20.
        restarts: further ascents for each group. Default 0.
        tol: where an ascent stops. Default 1e-5.
        errors: also the gaps of the error rate. Default False.
        seed: of the random points, which differ between groups.

    Raises:
        ValueError: m below 1 or above the number of examples; see `worst_case`.
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
        # As many vectors as groups would not fit.
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
            f"there is no group of m={m} examples in the {problem.conventions.examples} of the data; use a smaller m."
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
    """Sharpness over radii.

    Args:
        rhos: the radii, rising.
        values: of the measure; of worst cases without error they never fall.
        errors: standard errors; NaN where there are none.
        results: what each radius gave.
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
    """A measure over rising radii, in one go.

    Worst cases start from what was found at the radius before as well, so that they rise with it as the true maxima do;
    average cases use the same draws at every radius.

    Args:
        problem: the function.
        rhos: radii, > 0, rising.
        measure: "worst" (default), "average" or "groups" (m-sharpness).
        m: examples in a group, for "groups".
        **options: of `worst_case`, `average_case` or `m_sharpness`.

    Raises:
        ValueError: no radius, radii that do not rise, m missing or without use; and those of the measure.
        ArithmeticError: see the measure.
    """
    radii = [float(rho) for rho in rhos]
    if not radii or any(b <= a for a, b in itertools.pairwise(radii)):
        raise ValueError(f"rhos must hold rising radii, got {list(rhos)!r}.")
    if measure not in ("worst", "average", "groups"):
        raise ValueError(f"measure must be 'worst', 'average' or 'groups', got {measure!r}.")
    if (measure == "groups") != (m is not None):
        raise ValueError(f"m is the size of the groups of measure='groups'; got measure={measure!r} and m={m!r}.")
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
