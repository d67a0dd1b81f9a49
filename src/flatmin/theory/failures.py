"""Where convergence is known to fail: the counter-examples, all of them quadratics."""

from __future__ import annotations

from flatmin.theory.classes import FunctionClass
from flatmin.theory.closed import factor, limit_distance
from flatmin.theory.families import Family
from flatmin.theory.rules import Rule
from flatmin.theory.sums import sum_is_finite

Failures = dict[int, str]
ALL = (1, 2, 3, 4, 5)


def failures(step: Rule, radius: Rule, f: FunctionClass, method: Family) -> Failures:
    """Number of a property -> the member of the class, a quadratic, for which it fails from a generic start.

    Only rules of known growth are judged. A class that is one quadratic (`f.spectrum`) is judged by its eigenvalues;
    others by f = lambda x^2 / 2, lambda <= L, which belongs to each of them.

    - sum t < inf: x^k converges after a finite way. For lambda small enough the product of the factors is not 0.
    - normalised, t and rho bounded away from 0: t (grad f(x + eps)) -> 0 would need ||x - x*|| = ||eps||, so
      grad f(x^k) -> 0 is impossible. For SAM the orbit of `limit_distance` refutes (1) and (2) too.
    - gradient, unnormalised, extragradient: a factor of modulus >= 1, see `closed.factor`.
    - absolute error that does not vanish: against the gradient, every x with ||grad f|| = eps is a fixed point.
    - relative error: no update gets closer against the gradient if nu >= 1, nor along it if
      t lambda (1 + nu) >= 2.
    """
    t, rho = step.limit, radius.limit
    if method.kind == "other" or t is None or rho is None or (f.spectrum and min(f.spectrum) < 0):
        return {}
    if sum_is_finite(step).holds:
        return dict.fromkeys(ALL, "sum t is finite, so a quadratic's iterates stop short of its minimiser")
    if method.kind == "normalised":
        return _normalised(t, rho, f, method)
    if method.kind == "absolute":
        if rho == 0:
            return {}
        return dict.fromkeys(ALL, f"an error against the gradient holds the iterates at ||grad f|| = {rho:g}")
    if method.kind == "relative":
        if rho >= 1:
            return dict.fromkeys(ALL, "an error against the gradient cancels it")
        long = [s for s in _eigenvalues(f) if t * s * (1 + rho) >= 2]
        return dict.fromkeys(ALL, f"an error along the gradient of lambda = {long[0]:g} overshoots") if long else {}
    for eigenvalue in _eigenvalues(f):
        if method.kind == "extragradient" and rho * eigenvalue >= 1:
            return dict.fromkeys(ALL, f"rho lambda = {rho * eigenvalue:g} >= 1: the step does not descend")
        by = factor(method.kind, t, rho, eigenvalue)
        if t > 0 and abs(by) >= 1:
            return dict.fromkeys(ALL, f"the quadratic with lambda = {eigenvalue:g} is multiplied by {by:.4g} each time")
    return {}


def stays_away(step: Rule, radius: Rule, f: FunctionClass, method: Family) -> float | None:
    """The distance to the minimiser that a quadratic's iterates keep in the end, where a closed form gives it."""
    t, rho = step.limit, radius.limit
    if not f.spectrum or min(f.spectrum) <= 0 or not t or not rho:
        return None
    if method.kind == "normalised" and method.climbs and t * max(f.spectrum) < 2:
        return limit_distance(t, rho, f.spectrum)
    return None


def _normalised(t: float, rho: float, f: FunctionClass, method: Family) -> Failures:
    if not (t > 0 and rho > 0):
        return {}
    found = dict.fromkeys(
        (3, 4, 5), "t and rho are bounded away from 0: near a quadratic's minimiser updates stay long"
    )
    if method.climbs:
        orbit = "SAM ends on a cycle of period 2 of a quadratic"
        if f.spectrum and min(f.spectrum) > 0 and t * max(f.spectrum) < 2:
            orbit += f", at distance {limit_distance(t, rho, f.spectrum):.6g} from its minimiser"
        found |= dict.fromkeys(ALL, orbit)
    return found


def _eigenvalues(f: FunctionClass) -> tuple[float, ...]:
    if f.spectrum:
        return tuple(s for s in f.spectrum if s > 0)
    return () if f.L is None else (f.L,)
