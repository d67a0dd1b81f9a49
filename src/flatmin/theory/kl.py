"""Consequences of the Kurdyka-Lojasiewicz property: convergence of the iterates, and rates."""

from __future__ import annotations

from flatmin.theory import sums
from flatmin.theory.classes import FunctionClass
from flatmin.theory.rules import Asymptotics, Product, Rule
from flatmin.theory.sums import Judgement


def kl_condition(step: Rule, radius: Rule, f: FunctionClass) -> Judgement:
    """Whether sum_k t_k (sum_{i >= k} t_i rho_i)^(1-q) < inf, for phi(s) = M s^q.

    Derivation: with R_k the tail sum and D_k = f(x^k) + c R_k - f(x), which falls by c t ||grad f||^2 or more,
    concavity gives phi(D_k) - phi(D_{k+1}) >= phi'(f - f(x) + c R_k) c t ||grad f||^2, and KL bounds 1 / phi' by
    C (||grad f|| + R_k^(1-q)). As a^2 / (a + b) >= a - b, sum t ||grad f|| <= C phi(D_1) + C sum_k t_k R_k^(1-q): the
    iterates have finite length. With t ~ n^-p and R ~ n^-s the sum is finite where p + s (1 - q) > 1.

    Args:
        step: t.
        radius: rho.
        f: its `kl` is q; if only `has_kl` is known, the sum must be finite for every q below 1.
    """
    if not f.has_kl:
        return Judgement(None, "it needs the KL property, which is not known for f")
    both, t = Product((step, radius)).asymptotics, step.asymptotics
    if not isinstance(both, Asymptotics) or not isinstance(t, Asymptotics):
        return Judgement(None, "the KL condition needs rules of known growth")
    if not sums.converges(both):
        return Judgement(False, "sum t rho diverges and has no tails")
    if both.c == 0:
        return Judgement(True, "there is no error")
    rest = sums.tail(both)
    if f.kl is None:
        always = t.p >= 1 and rest.p > 0
        words = f"t ~ n^-{t.p:g} and tails ~ {_power(rest)}"
        return Judgement(True if always else None, f"{words}: finite for {'every' if always else 'small'} exponent q")
    terms = Asymptotics(1.0, t.p + rest.p * (1 - f.kl), t.q + rest.q * (1 - f.kl))
    finite = sums.converges(terms)
    says = "finite" if finite else "infinite"
    return Judgement(finite, f"sum t R^(1-q) with q = {f.kl:g} has terms ~ {_power(terms)}: {says}")


def rate_words(q: float | None, step: Rule) -> str:
    """The rate, as text, that KL with exponent q gives for a relative error.

    x is the limit, which must exist: an accumulation point, or a minimiser of a convex f. From
    f+ - f(x) <= (f - f(x)) - c (f - f(x))^(2-2q): linear for q >= 1/2, else f - f(x) = O(k^(-1/(1-2q))) and
    ||x^k - x|| = O(k^(-q/(1-2q))). For vanishing steps k is replaced by sum t (derived).

    Args:
        q: the exponent, in (0, 1); None if it is not known.
        step: t.
    """
    limit = step.limit
    if q is None or limit is None:
        return ""
    if limit > 0:
        if q >= 0.5:
            return f"linear: f(x^k) - f(x) and ||x^k - x|| fall geometrically (KL with q = {q:g})"
        return f"f(x^k) - f(x) = O(k^-{1 / (1 - 2 * q):g}), ||x^k - x|| = O(k^-{q / (1 - 2 * q):g}) (KL with q = {q:g})"
    if q >= 0.5:
        return f"f(x^k) - f(x) = O(exp(-c S_k)), S_k = t_1 + ... + t_k (KL with q = {q:g}, derived)"
    return f"f(x^k) - f(x) = O(S_k^-{1 / (1 - 2 * q):g}), S_k = t_1 + ... + t_k (KL with q = {q:g}, derived)"


def _power(terms: Asymptotics) -> str:
    return str(Asymptotics(1.0, terms.p, terms.q))
