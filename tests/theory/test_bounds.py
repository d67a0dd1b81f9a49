"""Random quadratics and rules: where the checker says "converges" runs stay below its bounds, else at its distance."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flatmin.theory import (
    ConstantRule,
    LogSum,
    MexicanHat,
    PowerRule,
    Quadratic,
    check,
    gradient_bound,
    largest_step,
    limit_distance,
    run,
    sam_floor,
)

spectra = st.lists(st.floats(0.3, 3.0), min_size=1, max_size=4)
METHODS = [
    ("sam", {}),
    ("vasso", {"theta": 0.4}),
    ("fsam", {"sigma": 1.0, "lam": 0.6}),
    ("rsam", {}),
    ("usam", {}),
    ("extragradient", {}),
    ("sgd", {}),
    ("igd", {"error": "against"}),
    ("igd", {"error": "random"}),
    ("igdr", {"error": "along"}),
]


@settings(max_examples=40, deadline=None)
@given(
    spectra,
    st.integers(0, 99),
    st.sampled_from(METHODS),
    st.floats(0.1, 1.4),
    st.sampled_from([0.0, 0.51, 0.6, 0.8, 1.0]),
    st.floats(0.01, 0.9),
    st.sampled_from([0.0, 0.001, 0.5, 1.0]),
)
def test_gradients_stay_below_the_bound_where_the_checker_says_converges(spectrum, seed, method, u, p, r, q):
    name, how = method
    problem = Quadratic(spectrum, seed=seed)
    L = problem.function_class.L
    size = r if name == "igdr" else r / L
    radius = PowerRule(size, q) if q else ConstantRule(size)
    scale = 0.6 * largest_step(L, r) if name in ("usam", "extragradient", "igdr") else 1 / L
    step = PowerRule(u * scale, p) if p else ConstantRule(u * scale)
    verdict = check(step, radius, problem, name, **how)
    assume(verdict.converges)
    trace = run(problem, name, steps=step, radius=radius, updates=300, driver="program", **how)
    bound = gradient_bound(problem, step, radius, 300, name, **how)
    slack = 1e-10
    assert bool((trace.gradient <= bound.last * (1 + 1e-9) + slack).all())
    assert bool((np.minimum.accumulate(trace.gradient) <= bound.best * (1 + 1e-9) + slack).all())


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.floats(1.5, 2.5), min_size=1, max_size=3),
    st.integers(0, 99),
    st.floats(0.7, 1.0),
    st.sampled_from([0.51, 0.55, 0.6]),
    st.sampled_from([0.0, 0.25, 0.5]),
)
@pytest.mark.slow
def test_gradients_fall_like_step_times_radius(spectrum, seed, u, p, q):
    """With p < 1, exp(-mu sum t) is gone soon; what is left follows t_k rho_k, whatever the rules."""
    largest = 3.0
    problem = Quadratic([*spectrum, largest], seed=seed)
    step, radius = PowerRule(u / largest, p), PowerRule(0.1, q) if q else ConstantRule(0.1)
    verdict = check(step, radius, problem)
    assert verdict.converges and "falls like t_k rho_k" in verdict.rate
    K = 3000
    bound = gradient_bound(problem, step, radius, K)
    floor = np.array([step.at(n) * radius.at(n) for n in range(1, K + 1)]) * largest**2
    forgotten = int(np.flatnonzero(bound.last[1:] <= floor * (1 + 1e-9))[0])
    assume(2 * forgotten <= K // 3)
    trace = run(problem, "sam", steps=step, radius=radius, updates=K, driver="program")
    late, early = trace.at(K), trace.at(max(K // 10, 2 * forgotten))
    fell = trace.gradient[late] / trace.gradient[early]
    predicted = (trace.t[late] * trace.rho[late]) / (trace.t[early] * trace.rho[early])
    assert fell == pytest.approx(predicted, rel=0.25)
    assert bound.last[K] / bound.last[trace.k[early]] == pytest.approx(predicted, rel=0.25)
    assert trace.gradient[-1] == pytest.approx(sam_floor(trace.t[-1], trace.rho[-1], largest), rel=0.1)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.3, 2.4), max_size=3),
    st.integers(0, 99),
    st.floats(0.3, 1.5),
    st.floats(0.01, 1.0),
)
def test_constant_rules_end_at_the_predicted_distance(spectrum, seed, u, rho):
    problem = Quadratic([*spectrum, 3.0], seed=seed)
    t = u / 3.0
    verdict = check(t, rho, problem)
    assert verdict.converges is False
    assert verdict.distance == pytest.approx(limit_distance(t, rho, [3.0]))
    trace = run(problem, "sam", steps=t, radius=rho, updates=600, driver="program")
    assert trace.distance[-1] == pytest.approx(verdict.distance, rel=1e-6)


@pytest.mark.parametrize(("method", "radius"), [("sam", "power:c=0.1,p=0.5"), ("vasso", "power:c=0.1,p=0.5"),
                                                ("usam", "constant:0.05"), ("igd", "power:p=1")])  # fmt: skip
def test_the_best_iterate_of_a_nonconvex_function_is_below_its_bound(method, radius):
    problem = LogSum.random(4)
    step = "power:c=0.07,p=0.6"
    assert check(step, radius, problem, method).converges
    bound = gradient_bound(problem, step, radius, 600, method)
    trace = run(problem, method, steps=step, radius=radius, updates=600)
    assert bound.last is None
    assert bool((np.minimum.accumulate(trace.gradient) <= bound.best * (1 + 1e-9)).all())


def test_igd_stops_at_the_error_against_the_gradient():
    problem = Quadratic([1.0, 4.0])
    trace = run(problem, "igd", steps="harmonic:0.5", radius=0.1, updates=3000, driver="program")
    assert check("harmonic:0.5", 0.1, problem, "igd").converges is False
    assert trace.gradient[-1] == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradient_bound(MexicanHat(), 0.1, 0.1, 5), "no bound: L of Mexican hat is not known"),
        (lambda: gradient_bound(Quadratic([1.0]), 0.1, 0.1, 5, "asam"), "no bound: asam measures eps in a norm"),
        (lambda: gradient_bound(Quadratic([4.0]), 0.4, 0.1, 5), "t = 0.4 of update 1 is too long for L = 4"),
        (lambda: limit_distance(0.5, 0.1, [4.0]), "t lambda must be below 2, got 0.5 \\* 4.0 = 2"),
        (lambda: limit_distance(0.5, 0.1, [-1.0]), "positive eigenvalues"),
        (lambda: largest_step(4.0, 1.0), "nu in \\[0, 1\\), got L = 4.0, nu = 1.0"),
    ],
)
def test_bad_questions_are_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
