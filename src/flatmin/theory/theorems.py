"""The theorems of the convergence paper as functions of a step size, a radius, a class of functions and a method.

Source: Khanh, Luong, Mordukhovich & Tran, Fundamental Convergence Analysis of Sharpness-Aware Minimization, NeurIPS
2024. The reason of a consequence that goes beyond the paper's statement says "derived".
"""

from __future__ import annotations

from flatmin.theory import sums
from flatmin.theory.classes import FunctionClass
from flatmin.theory.closed import largest_step
from flatmin.theory.families import Family
from flatmin.theory.kl import kl_condition
from flatmin.theory.rules import Product, Rule
from flatmin.theory.verdict import Condition, Theorem

CONVEX = "Theorem 3.2 (SAM, convex)"
IGD = "Theorem 3.3 (inexact gradient, absolute error)"
NORMALISED = "Corollary 3.5 (normalised methods)"
RELATIVE = "Section 4 (inexact gradient, relative error)"
UNNORMALISED = "Section 4 (unnormalised SAM)"
GIVE_L = "L is not known; give it as FunctionClass(L=...)"


def convex(step: Rule, radius: Rule, f: FunctionClass, method: Family) -> Theorem:
    """Theorem 3.2: SAM on a convex function; the radius may be constant.

    sum t_k = inf, sum t_k^2 < inf, sup rho_k < inf => (1); with a unique minimiser x^k -> x*.
    As the gradient is monotone, <grad f(x + eps), grad f> >= ||grad f||^2, and the descent lemma gives
    f(x+) <= f - t (1 - L t) ||grad f||^2 + L^3 t^2 rho^2. Derived: so sum t ||grad f||^2 < inf and f(x^k) converges;
    from | ||grad f(x+)|| - ||grad f|| | <= L t (||grad f|| + L rho) and t -> 0, a gradient norm that rose from e to 2e
    infinitely often would need sum t >= c over each rise, against the first sum; hence grad f(x^k) -> 0. inf f > -inf
    is needed, as f(x) = x shows.
    """
    top = sums.limsup(radius)
    bounded = None if top.value is None else top.value < float("inf")
    along = "is along" if method.climbs else "is not along"
    conditions = (
        Condition("f convex", f.convex, "given" if f.convex else "the class is not convex", about="setting"),
        _below(f),
        _lipschitz(f),
        Condition.of("sum t = inf", sums.sum_is_finite(step).negated()),
        Condition.of("sum t^2 < inf", sums.sum_is_finite(step, 2)),
        Condition("sup rho < inf", bounded, top.reason, top.proof),
        Condition("d = grad f", method.climbs, f"the perturbation {along} the gradient", about="setting"),
    )
    gives = {1: CONVEX, 2: f"{CONVEX}, derived", 3: f"{CONVEX}, derived"}
    lacks: dict[int, str] = {}
    if f.minimisers == "unique":
        gives |= {2: CONVEX, 3: CONVEX, 4: CONVEX, 5: f"{CONVEX}, as the minimiser is unique"}
    elif f.accumulates:
        gives[4] = f"{CONVEX}, as the minimisers are bounded; f(x^k) converges (derived)"
        lacks[5] = "it needs a unique minimiser"
    else:
        lacks[4] = lacks[5] = f"it needs a bounded set of minimisers, but the set is {f.minimisers}"
    return Theorem(CONVEX, conditions, gives, lacks)


def absolute(step: Rule, radius: Rule, f: FunctionClass, method: Family) -> Theorem:
    """Theorem 3.3 and Corollary 3.5: ||g - grad f|| <= eps_k, which is L rho_k for every normalised method.

    sum t_k = inf, t_k decreasing to 0, sum t_k eps_k < inf, limsup eps_k < 2 => grad f(x^k) -> 0, accumulation points
    are stationary, f(x^k) -> f(x) at one; with KL and sum_k t_k (sum_{i >= k} t_i eps_i)^(1-q) < inf, x^k -> x.
    By f(x+) <= f - t (1 - eps/2) ||grad f||^2 + t eps / 2 + L t^2 (||grad f|| + eps)^2 / 2.
    """
    framework = method.kind == "absolute"
    name, error = (IGD, "eps") if framework else (NORMALISED, "rho")
    top = sums.limsup(radius)
    size = top.value
    limit = 2.0 if framework else None if f.L is None else 2 / f.L
    bound = "2" if framework else "2/L" if limit is None else f"2/L = {limit:.4g}"
    if size is None:
        small = Condition(f"limsup {error} < {bound}", None, top.reason, top.proof)
    elif limit is None and size > 0:
        small = Condition(f"limsup {error} < 2/L", None, f"{GIVE_L}, or a radius that tends to 0", top.proof)
    else:
        small = Condition(f"limsup {error} < {bound}", limit is None or size < limit, top.reason, top.proof)
    conditions = (
        _below(f),
        _lipschitz(f),
        Condition.of("sum t = inf", sums.sum_is_finite(step).negated()),
        Condition.of("t decreasing", sums.is_decreasing(step)),
        Condition.of("t -> 0", sums.tends_to_zero(step)),
        Condition.of(f"sum t {error} < inf", sums.sum_is_finite(Product((step, radius)))),
        small,
    )
    gives, lacks = {1: name, 2: name, 3: name}, dict[int, str]()
    if f.accumulates:
        gives[4] = f"{name}, as bounded f keeps the iterates bounded"
    else:
        lacks[4] = lacks[5] = "it needs an accumulation point, and the level sets of f are not known to be bounded"
    if f.accumulates and f.convex and f.minimisers == "unique":
        gives[5] = f"{name}, as there is one stationary point"
    elif f.accumulates:
        kl = kl_condition(step, radius, f)
        reason = f"{name} with KL: {kl.reason} (derived)"
        (gives if kl.holds else lacks)[5] = reason if kl.holds else kl.reason
    return Theorem(name, conditions, gives, lacks)


def relative(step: Rule, radius: Rule, f: FunctionClass, method: Family) -> Theorem:
    """Section 4: ||g - grad f|| <= nu ||grad f||, with nu = L rho for USAM and the extragradient, 0 for the gradient.

    nu < 1, sum t_k = inf, limsup t_k < 2 (1 - nu) / (L (1 + nu)^2) => f falls from some update on, and f(x^k) -> -inf
    or accumulation points are stationary and grad f(x^k) -> 0; with KL, x^k -> x. Constant t and rho suffice.
    By f(x+) <= f - (t (1 - nu) - L t^2 (1 + nu)^2 / 2) ||grad f||^2.
    """
    framework, plain = method.kind == "relative", method.kind == "gradient"
    name = RELATIVE if framework else UNNORMALISED
    if plain:
        name = "Section 4 (gradient descent, nu = 0)"
    top = sums.limsup(radius)
    nu = top.value if framework or not top.value else None if f.L is None else f.L * top.value
    label = "limsup nu < 1" if framework or plain else "limsup rho < 1/L"
    why = f"nu = {nu:.4g}; {top.reason}" if nu is not None else top.reason if top.value is None else GIVE_L
    error = Condition(label, None if nu is None else nu < 1, why, top.proof)
    conditions = (
        _lipschitz(f),
        error,
        Condition.of("sum t = inf", sums.sum_is_finite(step).negated()),
        _step_bound(step, nu, f),
    )
    gives, lacks = {2: f"{name} (or f(x^k) -> -inf)"}, dict[int, str]()
    if f.bounded_below:
        gives |= {1: name, 2: name, 3: name}
    else:
        lacks |= {k: "f may not be bounded below" for k in (1, 3, 4, 5)}
        return Theorem(name, conditions, gives, lacks)
    if f.accumulates:
        gives[4] = f"{name}, as f falls and its level sets are bounded"
    else:
        lacks[4] = lacks[5] = "it needs an accumulation point, and the level sets of f are not known to be bounded"
    if f.accumulates and f.convex and f.minimisers == "unique":
        gives[5] = f"{name}, as there is one stationary point"
    elif f.accumulates and f.has_kl:
        gives[5] = f"{name} with KL"
    elif f.accumulates:
        lacks[5] = "it needs the KL property"
    return Theorem(name, conditions, gives, lacks)


def _step_bound(step: Rule, nu: float | None, f: FunctionClass) -> Condition:
    top = sums.limsup(step)
    t, why, proof = top.value, top.reason, top.proof
    name = "limsup t < 2 (1 - nu) / (L (1 + nu)^2)"
    if nu is not None and nu >= 1:
        return Condition(name, False, f"there is no such step, because nu = {nu:.4g} is not below 1")
    if t is None:
        return Condition(name, None, why, proof)
    if t == 0 and nu is not None:
        first = ""
        if f.L is not None and (n := sums.last_above(step, largest_step(f.L, nu) * (1 - 1e-12))):
            first = f", from n = {n + 1} on" if n < sums.EVIDENCE else ", beyond n = 1e6"
        return Condition(name, True, f"{why}{first}", proof)
    if nu is None and f.L is not None:
        return Condition(name, None, "nu is not known", proof)
    if f.L is None or nu is None:
        return Condition(name, None, f"{GIVE_L}, or a step size that tends to 0", proof)
    bound = largest_step(f.L, nu)
    return Condition(f"{name} = {bound:.4g}", t < bound, why, proof)


def _below(f: FunctionClass) -> Condition:
    why = "given" if f.bounded_below else "f is not bounded below"
    return Condition("inf f > -inf", f.bounded_below, why, about="setting")


def _lipschitz(f: FunctionClass) -> Condition:
    constant = "" if f.L is None else f"L = {f.L:.4g}, "
    if f.where == "everywhere":
        return Condition("grad f Lipschitz", True, f"{constant}given")
    where = f.where.removeprefix("on ")
    why = f"{constant}only on {where}; the theorem holds for runs whose iterates x and points x + eps stay there"
    return Condition("grad f Lipschitz", None, why, about="setting")
