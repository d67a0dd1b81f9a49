"""Runs: the two doors agree, errors have the size that was asked for, and bad input is refused."""

import numpy as np
import pytest
import torch

from flatmin.theory import LogSum, MexicanHat, Quadratic, Rosenbrock, Square, breast_cancer, family, run
from flatmin.theory.methods import Inexact, recorded

RECIPES = [
    ("sgd", {}),
    ("sam", {}),
    ("asam", {}),
    ("usam", {}),
    ("vasso", {"theta": 0.4}),
    ("fsam", {"sigma": 0.7}),
    ("rsam", {}),
    ("gsam", {}),
    ("gnp", {}),
    ("looksam", {}),
    ("n-step", {}),
    ("stale-sam", {}),
    ("saner", {}),
    ("rho-power", {"p": 0.5}),
    ("igd", {"error": "random"}),
    ("igdr", {"error": "along"}),
    ("extragradient", {}),
]


@pytest.mark.parametrize(("method", "how"), RECIPES)
def test_the_doors_agree(method, how):
    problem = LogSum.random(4)
    one, other = (
        run(problem, method, steps="power:c=0.05,p=0.6", radius="power:c=0.1,p=0.3", updates=60, driver=driver, **how)
        for driver in ("optimizer", "program")
    )
    assert np.allclose(one.x, other.x, rtol=1e-10, atol=1e-13)
    assert not one.stopped and len(one.k) == 61


def test_recipes_with_second_derivatives_run_through_the_optimizer():
    trace = run(Quadratic([1.0, 2.0]), "sgdhess", steps=0.1, radius=0.05, updates=50)
    assert trace.distance[-1] < 0.1 * trace.distance[0]
    with pytest.raises(ValueError, match="use driver='optimizer'"):
        run(Square(), "sgdhess", steps=0.1, updates=5, driver="program")


def test_errors_have_the_size_that_was_asked_for():
    problem = LogSum.random(5)
    x = problem.start()
    g = problem.gradient(x)
    for error in ("against", "along", "random"):
        for method, size in (("igd", 0.3), ("igdr", 0.3 * float(g.norm()))):
            source = Inexact(problem, family(method, error=error), seed=0)
            source.size = 0.3
            e = source(x) - g
            assert float(e.norm()) == pytest.approx(size)
            if error != "random":
                cosine = float(e @ g / (e.norm() * g.norm()))
                assert cosine == pytest.approx(1 if error == "along" else -1)


def test_the_extragradient_is_an_instance_of_the_relative_error():
    problem = LogSum.random(5)
    rho, x = 0.05, problem.start()
    source = Inexact(problem, family("extragradient"), seed=0)
    source.size = rho
    g = problem.gradient(x)
    assert torch.allclose(source(x), problem.gradient(x - rho * g))
    assert float((source(x) - g).norm()) <= problem.function_class.L * rho * float(g.norm())


@pytest.mark.slow
def test_random_errors_leave_a_floor_that_follows_the_step():
    """x+ = (1 - t) x + t e on x^2/2: E|x|^2 = t eps^2 / (2 - t)."""
    problem = Quadratic([1.0])
    for t in (0.1, 0.01):
        trace = run(problem, "igd", steps=t, radius=0.5, updates=6000, driver="program", error="random", record=6001)
        late = trace.distance[2000:]
        assert float((late**2).mean()) == pytest.approx(t * 0.25 / (2 - t), rel=0.35)


def test_traces_keep_the_ends_and_the_step_that_led_there():
    trace = run(Square(), steps="harmonic:0.1", radius=0.0, updates=2000, record=50, driver="program")
    assert trace.k[0] == 0 and trace.k[-1] == 2000 and len(trace.k) <= 51
    assert trace.t[-1] == pytest.approx(0.1 / 2000) and trace.t[0] == 0.1
    assert trace.x.shape == (len(trace.k), 1) and trace.at(2000) == len(trace.k) - 1
    assert recorded(5, 10) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("driver", ["optimizer", "program"])
def test_divergence_ends_the_run_and_says_so(driver):
    trace = run(Rosenbrock(), "sam", steps=0.1, radius=0.05, updates=500, driver=driver)
    assert trace.stopped.startswith("the gradient is not finite at update ") and trace.k[-1] < 500


def test_a_start_of_ones_own_and_one_seed_one_run():
    start = torch.tensor([3.0, -1.0])
    runs = [run(Quadratic([1.0, 2.0]), "rsam", steps=0.1, radius=0.1, updates=20, start=start, seed=4).x for _ in "ab"]
    assert runs[0][0].tolist() == [3.0, -1.0] and (runs[0] == runs[1]).all()


def test_the_hat_is_descended_and_the_angle_keeps_turning():
    trace = run(MexicanHat(), "sgd", steps=0.05, updates=3000, driver="program")
    assert trace.f[-1] < 0.1 * trace.f[0]
    angle = np.unwrap(np.arctan2(trace.x[:, 1], trace.x[:, 0]))
    assert abs(angle[-1] - angle[0]) > 0.5


def test_logistic_regression_on_real_data_comes_close_to_its_minimiser():
    pytest.importorskip("sklearn")
    problem = breast_cancer(l2=0.1)
    step = 1 / problem.function_class.L
    usam = run(problem, "usam", steps=0.5 * step, radius=0.1 * step, updates=400, driver="program")
    sam = run(problem, "sam", steps=0.5 * step, radius=0.1, updates=400, driver="program")
    assert usam.distance[-1] < 1e-3 and usam.distance[-1] < 0.5 * sam.distance[-1]


def test_bad_runs_are_refused_in_a_sentence():
    for call, message in [
        (lambda: run(Square(), steps=0.0, updates=3), "step sizes must be positive, but constant:0.0 is 0 at n = 1"),
        (lambda: run(Square(), steps="cosine:T=5", updates=9), "is 0 at n = 6"),
        (lambda: run(Square(), steps=0.1, updates=0), "updates must be at least 1, got 0"),
        (lambda: run(Square(), steps=0.1, updates=3, record=1), "record must be at least 2"),
        (lambda: run(Square(), steps=0.1, updates=3, start=torch.ones(2)), "start must be 1 finite numbers"),
        (lambda: run(Square(), steps=0.1, updates=3, driver="window"), "driver must be 'optimizer' or 'program'"),
        (lambda: run(Square(), "sma", steps=0.1, updates=3), "unknown method 'sma'; did you mean 'sam'"),
        (lambda: run(Square(), steps=lambda n: 1 / n - 0.3, updates=9), "must give finite numbers >= 0"),
        (lambda: run(Square(), steps=0.1, radius=-1.0, updates=3), "c must be a finite number >= 0, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
