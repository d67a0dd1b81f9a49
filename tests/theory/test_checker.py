"""The checker's verdicts on rule pairs that were worked out by hand."""

import pytest

from flatmin.theory import (
    Custom,
    FunctionClass,
    LeastSquares,
    MexicanHat,
    Quadratic,
    Square,
    check,
    random_system,
)
from flatmin.theory.failures import failures

NONCONVEX = FunctionClass(L=4.0)
UNIQUE = FunctionClass(L=4.0, convex=True, minimisers="unique")
BOUNDED = FunctionClass(L=4.0, convex=True, minimisers="bounded")
PLANE = FunctionClass(L=4.0, convex=True, minimisers="unbounded")
QUADRATIC = Quadratic([1.0, 4.0]).function_class
HALF = FunctionClass(L=4.0, bounded_levels=True, kl=0.5)
QUARTER = FunctionClass(L=4.0, bounded_levels=True, kl=0.25)
SOME_KL = FunctionClass(L=4.0, bounded_levels=True, has_kl=True)
FALLING = FunctionClass(L=4.0, bounded_below=False)
UNKNOWN = FunctionClass()
ALMOST = "power:c=0.1,p=0.001"
INVERSE_LOG = "power:c=0.1,p=0,q=1,shift=1"
INVERSE_LOG2 = "power:c=0.1,p=0,q=2,shift=1"

# method, step, radius, class, theorem (its first words; None: none applies), properties 1-5:
# F follows, n not shown, X fails. The working stands beside each.
TABLE = [
    # Constant step, constant radius, normalised: the cycle of period 2 at t rho L / (2 - t L).
    ("sam", 0.1, 0.1, QUADRATIC, None, "XXXXX"),
    ("sam", 0.1, 0.1, NONCONVEX, None, "XXXXX"),  # lambda x^2 / 2 is in the class
    ("vasso", 0.1, 0.1, QUADRATIC, None, "nnXXX"),  # the orbit is worked out for d = grad f only
    ("fsam", 0.01, 0.3, UNIQUE, None, "nnXXX"),
    ("sam", "cosine:T=200,floor=0.01", 0.1, QUADRATIC, None, "XXXXX"),  # constant after 200
    # Theorem 3.2: 1/n has sum inf, sum of squares finite; the radius may be constant.
    ("sam", "harmonic:1", 0.1, UNIQUE, "Theorem 3.2", "FFFFF"),
    ("sam", "harmonic:1", 0.1, BOUNDED, "Theorem 3.2", "FFFFn"),
    ("sam", "harmonic:1", 0.1, PLANE, "Theorem 3.2", "FFFnn"),
    ("sam", "diminish1", 10.0, UNIQUE, "Theorem 3.2", "FFFFF"),  # no bound on a constant radius
    ("sam", "diminish2", 0.1, UNIQUE, "Theorem 3.2", "FFFFF"),  # 2 * 0.5001 > 1
    ("sam", "diminish3", 0.1, UNIQUE, "Theorem 3.2", "FFFFF"),  # 1/(n log n): inf; squares finite
    ("sam", "diminish3:lr=0.1,epoch=390", 0.1, UNIQUE, "Theorem 3.2", "FFFFF"),
    ("sam", "power:p=0.5", 0.1, UNIQUE, None, "nnnnn"),  # sum t^2 = sum 1/n = inf
    ("sam", "power:p=0.4", 0.1, UNIQUE, None, "nnnnn"),
    ("vasso", "harmonic:1", 0.1, UNIQUE, None, "nnnnn"),  # T3.2 is for d = grad f; C3.5 lacks sum t rho
    ("sam", "harmonic:1", 0.1, NONCONVEX, None, "nnnnn"),  # not convex, and sum t rho = inf
    # sum t < inf: the way is finite.
    ("sam", "power:p=1.5", 0.1, UNIQUE, None, "XXXXX"),
    ("sam", "cosine:T=200", 0.1, UNIQUE, None, "XXXXX"),
    ("sgd", "power:p=1,q=2,shift=1", 0.0, UNIQUE, None, "XXXXX"),  # 1/(n log^2 n) converges
    ("usam", "power:p=2", 0.1, NONCONVEX, None, "XXXXX"),
    # Corollary 3.5: t decreasing to 0, sum t = inf, sum t rho < inf.
    ("sam", "harmonic:1", ALMOST, NONCONVEX, "Corollary 3.5", "FFFnn"),  # 1 + 0.001 > 1
    ("rsam", "harmonic:1", ALMOST, NONCONVEX, "Corollary 3.5", "FFFnn"),
    ("sam", "harmonic:1", ALMOST, HALF, "Corollary 3.5", "FFFFF"),  # 1 + 0.001 / 2 > 1
    ("sam", "harmonic:1", ALMOST, SOME_KL, "Corollary 3.5", "FFFFF"),  # 1 + 0.001 (1 - q) > 1 for every q < 1
    ("vasso", "harmonic:1", ALMOST, UNIQUE, "Corollary 3.5", "FFFFF"),
    ("sam", "diminish2", ALMOST, NONCONVEX, None, "nnnnn"),  # 0.5001 + 0.001 < 1
    ("sam", "diminish2", "power:c=0.1,p=0.5", NONCONVEX, "Corollary 3.5", "FFFnn"),  # 1.0001 > 1
    ("sam", "diminish2", "power:c=0.1,p=0.5", HALF, "Corollary 3.5", "FFFFn"),  # 0.5001 + 0.0001 / 2 < 1
    ("sam", "diminish2", "power:c=0.1,p=1.6", HALF, "Corollary 3.5", "FFFFF"),  # 0.5001 + 1.1001 / 2 = 1.05 > 1
    ("sam", "diminish2", "power:c=0.1,p=1.2", HALF, "Corollary 3.5", "FFFFn"),  # 0.5001 + 0.7001 / 2 = 0.85
    ("sam", "diminish2", "power:c=0.1,p=1.2", QUARTER, "Corollary 3.5", "FFFFF"),  # 0.5001 + 0.7001 * 3/4 = 1.03
    ("sam", "diminish2", "power:c=0.1,p=1.6", SOME_KL, "Corollary 3.5", "FFFFn"),
    ("sam", "diminish3", 0.1, NONCONVEX, None, "nnnnn"),  # sum 1/(n log n) = inf
    ("sam", "diminish3", INVERSE_LOG, NONCONVEX, "Corollary 3.5", "FFFnn"),  # sum 1/(n log^2 n) < inf
    ("sam", "diminish3", INVERSE_LOG, HALF, "Corollary 3.5", "FFFFF"),  # R ~ 1/log; n^-1 log^-(1 + 1/2)
    ("sam", "harmonic:1", INVERSE_LOG, NONCONVEX, None, "nnnnn"),  # sum 1/(n log n) = inf
    ("sam", "harmonic:1", INVERSE_LOG2, HALF, "Corollary 3.5", "FFFFn"),  # R ~ 1/log; n^-1 log^-1/2 diverges
    ("sam", "harmonic:1", "tied:0.5", NONCONVEX, "Corollary 3.5", "FFFnn"),  # sum t^2 < inf
    ("sam", "power:p=0.5", "tied:0.5", NONCONVEX, None, "nnnnn"),  # sum t^2 = inf
    ("sam", 0.1, "power:p=2", NONCONVEX, None, "nnnnn"),  # t does not tend to 0
    ("rho-power", "harmonic:1", 0.1, NONCONVEX, "Corollary 3.5", "FFFnn"),  # the recipe's own n^-0.001
    ("sam", "harmonic:1", ALMOST, FALLING, None, "nnnnn"),
    ("sam", "harmonic:1", ALMOST, UNKNOWN, "Corollary 3.5", "FFFnn"),  # rho -> 0 < 2/L whatever L
    ("igd", "harmonic:1", "power:p=1", NONCONVEX, "Theorem 3.3", "FFFnn"),
    ("igd", "harmonic:1", 0.1, NONCONVEX, None, "XXXXX"),  # against the gradient: stops at ||grad f|| = 0.1
    # Section 4: nu = L rho, t < 2 (1 - nu) / (L (1 + nu)^2).
    ("sgd", 0.1, 0.0, NONCONVEX, "Section 4", "FFFnn"),
    ("sgd", 0.5, 0.0, QUADRATIC, None, "XXXXX"),  # 2 / L: the factor is -1
    ("sam", 0.1, 0.0, QUADRATIC, "Section 4", "FFFFF"),  # no radius is the gradient
    ("usam", 0.1, 0.1, NONCONVEX, "Section 4", "FFFnn"),  # nu = 0.4: 1.2 / 7.84 = 0.153
    ("usam", 0.1, 0.1, HALF, "Section 4", "FFFFF"),
    ("usam", 0.1, 0.1, BOUNDED, "Section 4", "FFFFn"),  # no KL known
    ("usam", 0.2, 0.1, NONCONVEX, None, "nnnnn"),  # above 0.153, but 1 - 0.8 * 1.4 = -0.12
    ("usam", 0.4, 0.1, NONCONVEX, None, "XXXXX"),  # 1 - 1.6 * 1.4 = -1.24
    ("usam", 0.1, 0.3, NONCONVEX, None, "nnnnn"),  # nu = 1.2
    ("usam", 0.1, 0.25, NONCONVEX, None, "nnnnn"),  # nu = 1 is not below 1
    ("usam", "harmonic:1", 0.1, NONCONVEX, "Section 4", "FFFnn"),  # 1/n < 0.153 from n = 7 on
    ("usam", 0.1, 0.1, FALLING, "Section 4", "nFnnn"),  # or f -> -inf
    ("extragradient", 0.1, 0.1, QUADRATIC, "Section 4", "FFFFF"),
    ("extragradient", 0.1, 0.25, QUADRATIC, None, "XXXXX"),  # rho L = 1: the gradient there is 0
    ("igdr", 0.1, 0.4, QUADRATIC, "Section 4", "FFFFF"),
    ("igdr", 0.1, 1.0, QUADRATIC, None, "XXXXX"),
    ("igdr", 0.4, 0.3, QUADRATIC, None, "nnnnn"),  # against the gradient: 1 - 0.4 * 4 * 0.7 = -0.12
    ("igdr", 0.3, 0.3, QUADRATIC, None, "nnnnn"),  # 1.4 / 6.76 = 0.207 < 0.3, 0.3 * 4 * 1.3 = 1.56 < 2
    ("asam", "harmonic:1", ALMOST, UNIQUE, None, "nnnnn"),
    ("gsam", "harmonic:1", ALMOST, UNIQUE, None, "nnnnn"),
    ("vasso+usam", 0.1, 0.1, UNIQUE, None, "nnnnn"),
]
LETTER = {"follows": "F", "not shown": "n", "fails": "X"}


def letters(verdict):
    return "".join(LETTER[s] for s in verdict.statuses)


def test_verdicts_worked_out_by_hand():
    for method, step, radius, functions, theorem, properties in TABLE:
        verdict, row = check(step, radius, functions, method), (method, step, radius, functions)
        assert letters(verdict) == properties, row
        assert (verdict.theorem is None) if theorem is None else verdict.theorem.startswith(theorem), row
        assert not verdict.numeric and all(p.reason for p in verdict.properties), row
        # No property follows and fails.
        wrong = failures(verdict.step, verdict.radius, verdict.functions, verdict.family)
        assert not wrong.keys() & {p.number for p in verdict.properties if p.status == "follows"} or radius == 0.0, row


def test_the_table_is_long_enough():
    assert len({row[1:3] for row in TABLE}) >= 30


def test_reasons_are_words():
    verdict = check("diminish2", "power:c=0.1,p=0.001", NONCONVEX)
    missing = {c.name: c.reason for t in verdict.theorems for c in t.missing}
    assert "sum t rho < inf" in missing and "is at most 1" in missing["sum t rho < inf"]
    assert missing["f convex"] == "the class is not convex"
    assert verdict.theorems[0].name.startswith("Corollary 3.5")  # other rules could not make f convex
    assert "nearest" in str(verdict) and "(3) grad f(x^k) -> 0: not shown" in str(verdict)
    usam = check("harmonic:1", 0.1, NONCONVEX, "usam")
    assert "from n = 7 on" in str(usam)
    assert check(0.1, 0.1, Square()).distance == pytest.approx(1 / 90)
    assert "ASAM" in str(check(0.1, 0.1, UNIQUE, "asam")) or "asam" in str(check(0.1, 0.1, UNIQUE, "asam"))


def test_rates():
    assert "linear" in check(0.1, 0.1, Quadratic([1.0, 4.0]), "usam").rate
    everywhere = FunctionClass(L=12.0, convex=True, minimisers="unique", kl=0.25)
    quartic = check(0.01, 0.01, everywhere, "usam").rate  # q = 1/4: k^-2 and k^-1/2
    assert "O(k^-2)" in quartic and "O(k^-0.5)" in quartic
    assert "exp(-c S_k)" in check("harmonic:1", 0.1, Quadratic([1.0, 4.0]), "usam").rate
    assert "0.1 / n" in check("harmonic:1", 0.1, Quadratic([1.0, 4.0])).rate


def test_unknown_rules_are_judged_by_numbers_that_say_so():
    verdict = check(lambda n: 1 / n, 0.1, UNIQUE)
    assert letters(verdict) == "FFFFF" and verdict.numeric
    assert any("numeric evidence up to n = 1e6, not a proof" in c.reason for c in verdict.conditions)
    slow = check(Custom(lambda n: n**-0.4), 0.1, UNIQUE)
    assert slow.theorem is None and slow.statuses[2] == "not shown"
    rising = check(lambda n: (1 + (n % 2)) / n, ALMOST, NONCONVEX)
    found = {c.name: c.holds for theorem in rising.theorems for c in theorem.conditions}
    assert found["t decreasing"] is False and rising.theorem is None


def test_a_missing_L_is_named():
    verdict = check(0.1, 0.1, UNKNOWN, "usam")
    assert verdict.theorem is None and verdict.theorems[0].holds is None
    assert all("L is not known; give it as FunctionClass(L=...)" in c.reason for c in verdict.theorems[0].missing)
    assert check("diminish1", ALMOST, MexicanHat()).statuses == ("follows", "follows", "follows", *["not shown"] * 2)


def test_a_plane_of_minimisers_has_no_known_accumulation_point():
    verdict = check(0.01, 0.0, LeastSquares(*random_system(2, 4)), "sgd")
    assert letters(verdict) == "FFFnn" and "level sets" in verdict.properties[4].reason


def test_bad_questions_are_refused_in_a_sentence():
    for call, error, message in [
        (lambda: check(0.0, 0.1, UNIQUE), ValueError, "^step sizes must be positive, but constant:0.0 is 0 at n = 1.$"),
        (lambda: check(-0.1, 0.1, UNIQUE), ValueError, "c must be a finite number >= 0, got -0.1"),
        (lambda: check("harmoni:1", 0.1, UNIQUE), ValueError, "did you mean 'harmonic'"),
        (lambda: check(0.1, "tie:1", UNIQUE), ValueError, "did you mean 'tied'"),
        (lambda: check(0.1, 0.1, UNIQUE, "vaso"), ValueError, "unknown method 'vaso'; did you mean 'vasso'"),
        (lambda: check(0.1, 0.1, UNIQUE, "igd", error="agianst"), ValueError, "did you mean 'against'"),
        (lambda: check(0.1, 0.1, UNIQUE, "igd", theta=1), ValueError, "igd has no parameter 'theta'"),
        (lambda: check(0.1, 0.1, UNIQUE, "sam", theta=0.4), ValueError, "theta"),
        (lambda: check(0.1, 0.1, 4.0), TypeError, "must be a FunctionClass or a Problem, got float"),
    ]:
        with pytest.raises(error, match=message):
            call()
