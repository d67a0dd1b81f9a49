"""The checker: which theorem covers a method with a step size and a radius on a class of functions."""

from __future__ import annotations

from typing import Any

from flatmin.methods import Recipe
from flatmin.theory import theorems
from flatmin.theory.classes import FunctionClass
from flatmin.theory.failures import failures, stays_away
from flatmin.theory.families import Family, family
from flatmin.theory.functions import Function
from flatmin.theory.kl import rate_words
from flatmin.theory.methods import RadiusLike, StepLike, positive
from flatmin.theory.parse import as_radius, as_step
from flatmin.theory.rules import Asymptotics, ConstantRule, Product, Rule
from flatmin.theory.sums import CAUTION, converges
from flatmin.theory.verdict import PROPERTIES, Property, Theorem, Verdict

_STATEMENTS = {
    "gradient": (theorems.relative,),
    "normalised": (theorems.convex, theorems.absolute),
    "unnormalised": (theorems.relative,),
    "extragradient": (theorems.relative,),
    "absolute": (theorems.absolute,),
    "relative": (theorems.relative,),
    "other": (),
}


def check(
    step: StepLike,
    radius: RadiusLike,
    functions: FunctionClass | Function,
    method: str | Recipe | Family = "sam",
    **how: Any,
) -> Verdict:
    """Check which convergence properties follow for a method with given rules on a class of functions.

        >>> verdict = check("diminish2", "power:c=0.1,p=0.5", FunctionClass(L=4.0))
        >>> verdict.theorem, verdict.statuses
        ('Corollary 3.5 (normalised methods)', ('follows', 'follows', 'follows', 'not shown', 'not shown'))
        >>> verdict = check(0.1, 0.1, FunctionClass(L=4.0, convex=True, spectrum=(1.0, 4.0), minimisers="unique"))
        >>> verdict.theorem, verdict.statuses[2], round(verdict.distance, 12)
        (None, 'fails', 0.025)

    "fails" means that the property fails for some member of the class. For a problem without a spectrum, that member
    is a different function, and the reason says so.

    Args:
        step: t_n, n = 1, 2, ...: a rule, a number, text as in `read_rule`, or a function of n.
        radius: rho_n, in the same forms, or tied to the step; eps_n for igd, nu_n for igdr.
        functions: the class, or a problem, whose `function_class` is used.
        method: as in `flatmin.theory.families.family`. Default: "sam".
        how: parameters of the recipe's parts.

    Raises:
        ValueError: unknown text or method, or a step size that is not positive at n = 1.
        TypeError: an argument is neither a rule nor a class.
    """
    chosen = family(method, **how)
    f = functions.function_class if isinstance(functions, Function) else functions
    if not isinstance(f, FunctionClass):
        raise TypeError(f"functions must be a FunctionClass or a Problem, got {type(f).__name__}.")
    t = as_step(step)
    rho = as_radius(radius, t)
    positive(t, 1)
    rho.at(1)
    if chosen.factor is not None:
        rho = Product((rho, chosen.factor))
    if chosen.kind == "gradient":
        rho = ConstantRule(0.0)
    judged = _without_radius(chosen) if _is_zero(rho) and chosen.kind in _MOVING else chosen
    tried = sorted((s(t, rho, f, judged) for s in _STATEMENTS[judged.kind]), key=_nearness)
    nearest = tried[0] if tried else None
    wrong = failures(t, rho, f, judged)
    other = functions.name if isinstance(functions, Function) and not f.spectrum else ""
    applies = nearest.name if nearest is not None and nearest.holds else None
    return Verdict(
        step=t,
        radius=rho,
        functions=f,
        family=chosen,
        theorem=applies,
        conditions=() if nearest is None else nearest.conditions,
        theorems=tuple(tried),
        properties=tuple(_property(k, tried, wrong, chosen, other) for k in range(1, len(PROPERTIES) + 1)),
        rate=_rate(t, rho, f, judged, applies),
        distance=stays_away(t, rho, f, judged),
    )


_MOVING = ("normalised", "unnormalised", "extragradient")


def _is_zero(rule: Rule) -> bool:
    growth = rule.asymptotics
    return isinstance(growth, Asymptotics) and growth.c == 0


def _without_radius(chosen: Family) -> Family:
    return Family(chosen.name, "gradient", chosen.recipe)


def _nearness(theorem: Theorem) -> tuple[int, int, int]:
    """Sort key: theorems that hold come first, those that give most before others; then those nearest to holding."""
    setting = sum(c.about == "setting" for c in theorem.missing)
    return (setting, len(theorem.missing), -len(theorem.gives))


def _property(number: int, tried: list[Theorem], wrong: dict[int, str], method: Family, other: str) -> Property:
    """The status of a property.

    Args:
        number: number of the property.
        tried: the theorems, best first.
        wrong: properties that fail, with the reason.
        method: the method.
        other: name of the function in question if `wrong` is about quadratics of its class only; else "".
    """
    for theorem in tried:
        if theorem.holds and number in theorem.gives:
            numeric = any(c.proof == "numeric" for c in theorem.conditions)
            return Property(number, "follows", theorem.gives[number] + (f"; {CAUTION}" if numeric else ""))
    if number in wrong:
        about = f" (for a quadratic of the class; not shown for {other} itself)" if other else ""
        return Property(number, "fails", wrong[number] + about, elsewhere=bool(other))
    if method.kind == "other":
        return Property(number, "not shown", f"no theorem: {method.reason}")
    nearest = tried[0]
    if nearest.holds:
        return Property(number, "not shown", nearest.lacks.get(number, "the theorem does not include it"))
    lacking = ", ".join(c.name for c in nearest.missing)
    return Property(number, "not shown", f"conditions of {nearest.name} that are not met: {lacking}")


def _rate(t: Rule, rho: Rule, f: FunctionClass, method: Family, applies: str | None) -> str:
    if applies is None:
        return ""
    if method.kind in ("gradient", "unnormalised", "extragradient", "relative"):
        arrives = f.accumulates or (f.convex and f.minimisers in ("unique", "bounded", "unbounded"))
        return rate_words(f.kl, t) if f.bounded_below and arrives else ""
    return _rate_of_the_cycle(t, rho, f) if method.climbs and f.spectrum and min(f.spectrum) > 0 else ""


def _rate_of_the_cycle(t: Rule, rho: Rule, f: FunctionClass) -> str:
    """The rate of SAM on a quadratic with vanishing steps.

    Far out ||g+|| <= (1 - t mu) ||g|| - t rho mu^2, so that the influence of the start vanishes if sum t rho = inf, or
    if exp(-mu sum t), k^(-c mu) for t ~ c/k, is smaller than t_k rho_k; then ||g|| = O(t_k rho_k). The distance from
    the cycle of the current step is multiplied by 1 - t lambda in modulus, lambda the largest eigenvalue; that product,
    k^(-c lambda), is smaller than the cycle if n t_n -> inf, or c lambda exceeds the exponent of t_k rho_k.
    """
    both, growth = Product((t, rho)).asymptotics, t.asymptotics
    if not (isinstance(both, Asymptotics) and isinstance(growth, Asymptotics)) or both.c == 0:
        return ""
    harmonic = growth.c if growth.p == 1 and growth.q == 0 else 0.0
    far, near = (growth.p < 1 or harmonic * s > both.p for s in (min(f.spectrum), max(f.spectrum)))
    if not far and converges(both):
        return ""
    if near:
        return f"||grad f(x^k)|| eventually falls like t_k rho_k ~ {both} (derived, quadratics)"
    return f"||grad f(x^k)|| = O(t_k rho_k), t_k rho_k ~ {both} (derived, quadratics)"
