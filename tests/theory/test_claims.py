"""What the checker must not claim: counter-examples to verdicts that reach too far, each held against a run."""

import numpy as np
import pytest

from flatmin.theory import (
    ConstantRule,
    Custom,
    FunctionClass,
    LogSum,
    Quadratic,
    Quartic,
    Square,
    Wave,
    check,
    gradient_bound,
    limit_distance,
    read_rule,
    run,
    sums,
)
from flatmin.theory.failures import failures
from flatmin.theory.families import family
from flatmin.theory.kl import rate_words
from flatmin.theory.named import read_function

LETTER = {"follows": "F", "not shown": "n", "fails": "X"}
LINE, PLANE = Quadratic([4.0]), Quadratic([1.0, 4.0])
UNIQUE = FunctionClass(L=4.0, convex=True, minimisers="unique")


def letters(*what, **how):
    return "".join(LETTER[s] for s in check(*what, **how).statuses)


def ends(problem, method, steps, radius, updates=600, **how):
    return run(problem, method, steps=steps, radius=radius, updates=updates, driver="program", **how)


# Rules of unknown growth.


@pytest.mark.slow
def test_a_radius_that_still_rises_is_not_bounded():
    def rising(n):
        return float(n)

    verdict = check("harmonic:1", rising, Square())
    assert letters("harmonic:1", rising, Square()) == "nnnnn"
    assert [c.holds for c in verdict.conditions if c.name == "sup rho < inf"] == [None]
    assert "still rising" in str(verdict)
    assert ends(Square(), "sam", "harmonic:1", rising, 300).distance[-2:].min() > 0.5
    assert sums.limsup(Custom(lambda n: 0.1)).value == 0.1 and sums.limsup(Custom(rising)).value is None
    for method, radius in (("usam", rising), ("igd", rising), ("igdr", lambda n: n**0.01)):
        assert check("harmonic:1", radius, UNIQUE, method).theorem is None
    assert check(lambda n: 0.01 * (2 - 1 / n), 0.1, UNIQUE, "usam").theorem is None


@pytest.mark.parametrize(
    ("values", "holds"),
    [
        (lambda n: 1 / n, True),
        (lambda n: n**-0.1, True),
        (lambda n: 0.1 * (n % 2), False),  # it is 0 at n = 1e6
        (lambda n: 0.1 if n < 200_000 else 0.05, False),
        (lambda n: 0.1 if n <= 100_000 else 0.05, None),  # a single drop
        (lambda n: 0.1 if n <= 100_000 else 0.0, None),
        (lambda n: n**-0.001, None),
    ],
)
def test_only_a_fall_over_several_decades_is_evidence_of_a_limit_0(values, holds):
    found = sums.tends_to_zero(Custom(values))
    assert found.holds is holds and sums.CAUTION in found.reason


def test_numeric_evidence_is_said_beside_every_property_that_uses_it():
    for p in check(lambda n: 1 / n, 0.1, UNIQUE).properties:
        assert p.status == "follows" and p.reason.endswith(sums.CAUTION)
    assert not any(sums.CAUTION in p.reason for p in check("harmonic:1", 0.1, UNIQUE).properties)


# Constants that hold on a part of the space only.


def test_a_local_L_carries_no_theorem():
    verdict = check("harmonic:1", 10.0, Quartic())
    assert letters("harmonic:1", 10.0, Quartic()) == "nnnnn"
    assert "only on |x| <= 2" in str(verdict)
    assert ends(Quartic(), "sam", "harmonic:1", 10.0, 50).stopped
    assert check(0.01, 0.01, Quartic(), "usam").theorem is None
    with pytest.raises(
        ValueError, match=r"^no bound: L of x\^4 / 4 holds only on \|x\| <= 2, and a run may leave that"
    ):
        gradient_bound(Quartic(), 0.01, 0.01, 5)


# Failures.


@pytest.mark.parametrize(
    ("method", "error", "t", "size", "expected"),
    [
        ("igdr", "against", 0.4, 0.3, "nnnnn"),  # 1 - 1.6 * 0.7 = -0.12
        ("igdr", "along", 0.4, 0.3, "XnXXX"),  # 1 - 1.6 * 1.3 = -1.08
        ("igdr", "random", 0.4, 0.3, "nnnnn"),
        ("igdr", "against", 0.4, 1.0, "XXXXX"),
        ("igdr", "against", 0.4, 1.5, "XnXXX"),
        ("igdr", "against", 0.75, 0.25, "XnXXX"),  # 1 - 3 * 0.75 = -1.25
        ("igd", "against", 0.1, 0.1, "XXXXX"),
        ("igd", "against", 0.6, 0.1, "nnXXX"),
        ("igd", "along", 0.1, 0.1, "XXXXX"),
        ("igd", "random", 0.1, 0.1, "nnnnn"),
    ],
)
def test_the_error_of_inexact_gradients_decides(method, error, t, size, expected):
    assert letters(t, size, LINE, method, error=error) == expected
    trace = ends(LINE, method, t, size, 2000 if method == "igd" else 200, error=error)
    if expected[2] == "X":
        assert trace.gradient[-50:].max() > 1e-3
    elif method == "igdr":
        assert trace.gradient[-1] < 1e-12


def test_an_error_along_the_gradient_vanishes_with_the_step():
    assert letters("harmonic:1", 0.1, LINE, "igd", error="along") == "nnnnn"
    assert ends(LINE, "igd", "harmonic:1", 0.1, 3000, error="along").gradient[-1] < 1e-3


@pytest.mark.parametrize(
    ("method", "t", "radius"), [("sam", 0.6, 0.1), ("sgd", 0.6, 0.0), ("usam", 0.4, 0.1), ("extragradient", 0.1, 0.5)]
)
def test_a_quadratic_that_diverges_has_no_accumulation_point(method, t, radius):
    verdict = check(t, radius, PLANE, method)
    assert letters(t, radius, PLANE, method) == "XnXXX"
    assert "cycle" not in verdict.properties[0].reason and verdict.distance is None
    trace = ends(PLANE, method, t, radius, 800)
    assert trace.distance[-1] > 1e3
    assert letters(t, radius, FunctionClass(L=4.0), method) == "XXXXX"  # a smaller lambda has a cycle


def test_the_sign_at_the_border_needs_a_constant_radius():
    assert letters(0.5, "power:p=0.5", LINE, "extragradient") == "nnnnn"
    assert ends(LINE, "extragradient", 0.5, "power:c=0.1,p=0.5", 600).distance[-1] < 1e-6


def test_a_finite_sum_of_steps_fails_from_far_away_only():
    short = "power:c=0.25,p=1.5"
    verdict = check(short, 10.0, Square())
    assert letters(short, 10.0, Square()) == "XXXXX" and "from a distant start" in verdict.properties[0].reason
    assert ends(Square(), "sam", short, 10.0, 5000).distance[-1] < 1e-4
    assert ends(Square(), "sam", short, 10.0, 5000, start=[1000.0]).distance[-1] > 100
    assert letters(short, 0.0, LINE, "sgd") == "nnnnn"  # t_1 lambda = 1
    assert ends(LINE, "sgd", short, 0.0, 3).distance[-1] == 0
    assert letters(short, 0.0, PLANE, "sgd") == "XXXXX"  # the other eigenvalue stays
    assert letters("power:c=0.125,p=1.5", 0.25, LINE, "usam") == "nnnnn"  # 1 - 0.5 (1 + 1)


@pytest.mark.parametrize(
    "words", ["convex, L=4, none", "L=4, falling", "L=4, kl=0.75, coercive", "convex, L=4, none, kl=0.5"]
)
def test_classes_without_a_quadratic_are_not_refuted_by_one(words):
    f = FunctionClass.read(words)
    for method, radius in (("sam", "0.1"), ("usam", "0.3"), ("sgd", "0"), ("igd", "0.1")):
        for step in ("0.6", "power:p=2"):
            assert failures(read_rule(step), read_rule(radius), f, family(method)) == {}
            assert "fails" not in check(step, radius, f, method).statuses


@pytest.mark.parametrize("problem", [LogSum.random(3), Wave()])
def test_a_counter_example_in_the_class_says_nothing_of_a_function(problem):
    verdict = check(0.1, 0.1, problem)
    assert verdict.statuses == ("fails",) * 5 and verdict.converges is None
    assert f"not shown for {problem.name} itself" in verdict.properties[2].reason
    assert check(0.1, 0.1, problem.function_class).converges is False
    assert check(0.1, 0.1, PLANE).converges is False


# Families.


def test_an_ascent_that_may_rest_is_neither_convergent_nor_refuted():
    assert not family("gcsam").climbs and family("gcsam").kind == "normalised"
    assert letters("harmonic:1", 0.1, UNIQUE, "gcsam") == "nnnnn"
    assert letters(0.1, 0.1, UNIQUE, "gcsam") == "nnnnn"
    assert letters("harmonic:1", "power:c=0.1,p=0.001", UNIQUE, "gcsam") == "FFFFF"  # ||eps|| <= rho
    still = {"sigma": 1.0, "lam": 0.0}
    assert letters(0.1, 0.1, PLANE, "fsam", **still) == "nnnnn"
    assert ends(PLANE, "fsam", 0.1, 0.1, 800, **still).gradient[-1] < 1e-12
    assert letters(0.1, 0.1, PLANE, "fsam", sigma=1.0, lam=0.6) == "nnXXX"


def test_the_momentum_of_the_base_is_outside():
    chosen = family("momentum-sam")
    assert chosen.kind == "other" and "momentum of the base" in chosen.reason
    assert letters("harmonic:1", 0.0, UNIQUE, "momentum-sam") == "nnnnn"


# Rates.


def test_rates_need_a_limit():
    for words in ("convex, L=1, none, kl=0.5", "L=1, falling, kl=0.5", "L=1, kl=0.5"):  # log(1 + e^-x) is the first
        assert check(0.1, 0.0, FunctionClass.read(words), "sgd").rate == ""
    assert "f(x^k) - f(x)" in check(0.1, 0.0, FunctionClass.read("convex, L=1, unbounded, kl=0.5"), "sgd").rate
    assert not any("f*" in rate_words(q, ConstantRule(0.1)) for q in (0.25, 0.5))


def test_the_cycle_is_followed_only_by_steps_that_forget():
    line = Quadratic([1.0])
    spread = {}
    for c in (0.3, 2.0):
        trace = run(line, "sam", steps=f"harmonic:{c}", radius=0.1, updates=5000, driver="program", record=5001)
        late = (trace.gradient / (trace.t * trace.rho))[4000:]
        spread[c] = (late.min(), late.max())
        rate = check(f"harmonic:{c}", 0.1, line).rate
        assert ("falls like t_k rho_k" in rate) == (c > 1) and ("O(t_k rho_k)" in rate) == (c < 1)
    assert spread[2.0] == pytest.approx((0.5, 0.5), rel=1e-3)
    assert spread[0.3][0] < 0.3 and 0.7 < spread[0.3][1] < 1.5
    assert "O(t_k rho_k)" in check("diminish3", 0.1, line).rate  # n t_n -> 0
    assert check("harmonic:0.3", "power:p=0.5", line).rate == ""  # k^-0.3 of the start stays


def test_vasso_may_end_on_another_cycle():
    here = ends(LINE, "vasso", 0.1, 0.1, 900, theta=0.1, start=[1.0])
    assert np.allclose(here.x[-1], -here.x[-3]) and here.distance[-1] != pytest.approx(here.distance[-2], rel=0.5)
    assert here.distance[-2:].max() > 1.5 * limit_distance(0.1, 0.1, [4.0])


def test_what_goes_beyond_the_paper_is_marked():
    f = FunctionClass(L=4.0, bounded_levels=True, kl=0.5)
    reason = check("harmonic:1", "power:c=0.1,p=0.001", f).properties[4].reason
    assert reason.endswith("(derived)") and "eventually" not in reason


# Words.


def test_mistakes_are_one_sentence():
    for call, message in [
        (lambda: read_rule("diminish1:lr=0.1,epoch=inf"), "^diminish1: epoch must be a whole number >= 1, got inf.$"),
        (lambda: read_rule("cosine:inf"), "^cosine: T must be a whole number >= 1, got inf.$"),
        (lambda: read_rule("cosine:nan"), "^cosine: T must be a whole number >= 1, got nan.$"),
        (lambda: read_rule("cosine:2.5"), "^cosine: T must be a whole number >= 1, got 2.5.$"),
        (lambda: read_function("log-sum:inf"), "the numbers must be finite, got inf.$"),
        (lambda: read_function("log-sum:0"), "log-sum takes whole numbers >= 1, got 0.$"),
        (lambda: read_function("log-sum:2.7"), "log-sum takes whole numbers >= 1, got 2.7.$"),
        (lambda: read_function("least-squares:nan"), "the numbers must be finite, got nan.$"),
        (lambda: read_function("least-squares:-1"), "least-squares takes whole numbers >= 1, got -1.$"),
        (lambda: read_function("digits:3.5,8"), "digits takes whole numbers >= 0, got 3.5.$"),
        (lambda: gradient_bound(PLANE, 0.1, 0.5, 5, "usam"), "the radius 0.5 of update 1 is too wide, rho L = 2 >= 1"),
        (lambda: gradient_bound(PLANE, 0.1, 1.0, 5, "igdr"), "the radius 1 of update 1 is too wide, nu = 1 >= 1"),
        (lambda: FunctionClass.read("unique, none"), "^'unique' and 'none' contradict each other.$"),
        (lambda: FunctionClass.read("falling, coercive"), "contradictory class: .* not bounded below"),
        (lambda: FunctionClass.read("convex, falling, unique"), "contradictory class: .* not bounded below"),
        (lambda: FunctionClass.read("coercive, none"), "contradictory class: .* but minimisers none"),
        (lambda: FunctionClass.read("L=4, L=5"), "^'L=4' and 'L=5' contradict each other.$"),
    ]:
        with pytest.raises(ValueError, match=message) as found:
            call()
        assert "\n" not in str(found.value)


def test_whole_numbers_are_read():
    assert read_function("log-sum").dim == 20 and read_function("log-sum:3").dim == 3
    assert read_function("least-squares:4,3").dim == 3 and read_function("least-squares").dim == 5
