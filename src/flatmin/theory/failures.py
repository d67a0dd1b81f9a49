"""Counterexamples to convergence, all of them quadratics."""

from __future__ import annotations

from flatmin.theory.classes import FunctionClass
from flatmin.theory.closed import factor, limit_distance
from flatmin.theory.families import Family
from flatmin.theory.rules import Asymptotics, Rule
from flatmin.theory.sums import last_above, sum_is_finite

Failures = dict[int, str]
ALL = (1, 2, 3, 4, 5)
DIVERGES = (1, 3, 4, 5)
"""The properties that fail if the iterates diverge. Property (2) holds trivially without an accumulation point."""
ARRIVES = (3, 4, 5)
LONGEST = 10**5
"""The largest n up to which steps that remove a component at once are searched."""


def failures(step: Rule, radius: Rule, f: FunctionClass, method: Family) -> Failures:
    """Numbers of the properties that fail for a quadratic of the class from a generic start, with the reason.

    Only rules of known growth are checked. A class that is a single quadratic (`f.spectrum`) is checked by its
    eigenvalues, any other class by f = lambda x^2 / 2 with a suitable lambda <= L, if the class admits it (`admits`).

    - sum t < inf: x^k converges after a finite path. It cannot reach the minimiser from starts far enough away, as
      |x+| >= |1 - t lambda| |x| - t rho lambda and the product of the factors is not 0. For one quadratic that needs
      an eigenvalue without a factor 0, and a step with t lambda = 1 has one.
    - normalised, t and rho bounded away from 0: t (grad f(x + eps)) -> 0 would need ||x - x*|| = ||eps||, so
      grad f(x^k) -> 0 is impossible. For SAM the cycle of `limit_distance` refutes (1) and (2) too; on a single
      quadratic with t lambda >= 2 it diverges. Methods whose eps may be 0 (`Family.rests`) are not checked.
    - gradient, unnormalised, extragradient: a factor of modulus >= 1, see `closed.factor`.
    - igd, an error that does not vanish: against the gradient, every x with ||grad f|| = eps is a fixed point; along
      it, a line has the cycle t eps / (2 - t lambda). Random errors are not checked.
    - igdr: the factor 1 - t lambda (1 - nu) against the gradient, 1 - t lambda (1 + nu) along it.
    """
    t, rho = step.limit, radius.limit
    if method.kind == "other" or t is None or rho is None or not admits(f):
        return {}
    if sum_is_finite(step).holds:
        reason = "sum t is finite, so on a quadratic, iterates from a distant start do not reach the minimiser"
        return dict.fromkeys(ALL, reason) if _short(step, radius, f, method) else {}
    if method.kind == "normalised":
        return _normalised(t, rho, f, method)
    if method.kind == "absolute":
        return _absolute(t, rho, f, method)
    return _multiplied(step, radius, f, method)


def admits(f: FunctionClass) -> bool:
    """Whether the class contains lambda x^2 / 2 for every small lambda, or is a single convex quadratic.

    This is not the case if there is no minimiser, f is not bounded below, or the KL exponent is q > 1/2, which
    lambda x^2 / 2 does not have. (An L-smooth f has q > 1/2 only where it is constant, as
    ||grad f||^2 <= 2 L (f - inf f) near a minimiser.)
    """
    if f.spectrum:
        return min(f.spectrum) >= 0
    return f.bounded_below and f.minimisers != "none" and (f.kl is None or f.kl <= 0.5)


def stays_away(step: Rule, radius: Rule, f: FunctionClass, method: Family) -> float | None:
    """The final distance of a quadratic's iterates from the minimiser if a closed form gives it; else None."""
    t, rho = step.limit, radius.limit
    if not f.spectrum or min(f.spectrum) <= 0 or not t or not rho:
        return None
    if method.kind == "normalised" and method.climbs and t * max(f.spectrum) < 2:
        return limit_distance(t, rho, f.spectrum)
    return None


def _short(step: Rule, radius: Rule, f: FunctionClass, method: Family) -> bool:
    """Whether some component of the quadratic is never removed by a single update."""
    return not f.spectrum or any(not _removes(step, radius, s, method) for s in _eigenvalues(f))


def _removes(step: Rule, radius: Rule, eigenvalue: float, method: Family) -> bool:
    """Whether some factor is or may be 0."""
    most = 1 + (radius.at(1) * max(1.0, eigenvalue) if method.kind not in ("gradient", "normalised", "absolute") else 0)
    if not (step.decreasing and radius.decreasing):
        return True
    last = last_above(step, (1 - 1e-9) / (eigenvalue * most))
    if last > LONGEST:
        return True
    return any(abs(_factor(step.at(n), radius.at(n), eigenvalue, method)) <= 1e-9 for n in range(1, last + 1))


def _factor(t: float, rho: float, eigenvalue: float, method: Family) -> float:
    """The factor by which a component is multiplied, apart from bounded additions."""
    if method.kind in ("unnormalised", "extragradient"):
        return factor(method.kind, t, rho, eigenvalue)
    sign = {"along": 1.0, "against": -1.0, "random": 0.0}[method.error] if method.kind == "relative" else 0.0
    return 1 - t * eigenvalue * (1 + sign * rho)


def _normalised(t: float, rho: float, f: FunctionClass, method: Family) -> Failures:
    if not (t > 0 and rho > 0) or method.rests:
        return {}
    failures = dict.fromkeys(
        ARRIVES, "t and rho are bounded away from 0, so near a quadratic's minimiser the updates do not vanish"
    )
    if not method.climbs:
        return failures
    top = max(f.spectrum, default=0.0)
    if t * top >= 2:
        return dict.fromkeys(DIVERGES, f"t lambda = {t * top:g} >= 2, so the iterates diverge")
    orbit = "on a quadratic, SAM ends on a cycle of period 2"
    if f.spectrum and min(f.spectrum) > 0:
        orbit += f", at distance {limit_distance(t, rho, f.spectrum):.6g} from the minimiser"
    return dict.fromkeys(ALL, orbit)


def _absolute(t: float, rho: float, f: FunctionClass, method: Family) -> Failures:
    if rho == 0 or method.error == "random":
        return {}
    settles = t * max(f.spectrum, default=0.0) < 2
    if method.error == "against":
        reason = f"an error against the gradient keeps the iterates at ||grad f|| = {rho:g}"
        away = "an error against the gradient drives the iterates away from the minimiser"
        return dict.fromkeys(ALL, reason) if settles else dict.fromkeys(ARRIVES, away)
    if t == 0:
        return {}
    line = settles and len(f.spectrum) <= 1
    reason = "with an error along the gradient, the iterates overshoot the minimiser of a quadratic at every update"
    return dict.fromkeys(ALL if line else ARRIVES, reason)


def _multiplied(step: Rule, radius: Rule, f: FunctionClass, method: Family) -> Failures:
    """Failures of methods that multiply each component, by the largest factor in modulus in the limit."""
    t, rho = step.limit or 0.0, radius.limit or 0.0
    against = method.kind == "relative" and method.error == "against"
    if method.kind == "relative" and method.error == "random" and rho > 0:
        return {}
    if against and rho >= 1 and _steady(radius):
        reason = "an error against the gradient cancels it" if rho == 1 else "an error against the gradient exceeds it"
        return dict.fromkeys(ALL if rho == 1 else DIVERGES, reason)
    if t == 0:
        if method.kind == "extragradient" and any(rho * s >= 1 for s in _eigenvalues(f)) and _steady(radius):
            largest = max(rho * s for s in _eigenvalues(f))
            number = ALL if largest == 1 or not f.spectrum else DIVERGES
            return dict.fromkeys(number, f"rho lambda = {largest:g} >= 1, so the step does not descend")
        return {}
    steady = _steady(step) and _steady(radius)
    worst = max(_eigenvalues(f), key=lambda s: abs(_factor(t, rho, s, method)), default=None)
    if worst is None:
        return {}
    by = _factor(t, rho, worst, method)
    if abs(by) < 1 or (abs(by) == 1 and not steady):
        return {}
    if abs(by) > 1 and f.spectrum:
        return dict.fromkeys(DIVERGES, f"the component of lambda = {worst:g} is multiplied by {by:.4g} and diverges")
    # Another member of the class has the factor 1 or -1, so that the iterates neither diverge nor converge.
    reason = f"on the quadratic with lambda = {worst:g} each update multiplies x by {by:.4g}"
    return dict.fromkeys(ALL if steady else DIVERGES, reason)


def _steady(rule: Rule) -> bool:
    """Whether the rule is eventually constant."""
    growth = rule.asymptotics
    return isinstance(growth, Asymptotics) and (growth.c == 0 or growth.p == growth.q == 0)


def _eigenvalues(f: FunctionClass) -> tuple[float, ...]:
    if f.spectrum:
        return tuple(s for s in f.spectrum if s > 0)
    return () if f.L is None else (f.L,)
