"""The exact values of the counter-examples and of the demonstrations, through the library's own recipes."""

import math

import numpy as np
import pytest
import torch

from flatmin.theory import (
    LogSum,
    Quadratic,
    Square,
    check,
    largest_step,
    limit_distance,
    orbit_square,
    random_system,
    read_rule,
    run,
    sam_floor,
)

DRIVERS = ("optimizer", "program")
FAMILY = [("sam", {}), ("vasso", {"theta": 0.4}), ("fsam", {"sigma": 1.0, "lam": 0.6})]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("t", "rho", "expected"),
    [(0.1, 0.1, 0.1 * 0.1 / 0.9), (0.01, 0.1, 0.001 / 0.99), (0.3, 0.5, 0.15 / 0.7)],
)
def test_sam_enters_the_cycle_of_period_two_on_x_squared(t, rho, expected, driver):
    trace = run(Square(), "sam", steps=t, radius=rho, updates=2000, driver=driver)
    assert trace.distance[-1] == pytest.approx(expected, abs=1e-10)
    assert trace.x[-1, 0] == pytest.approx(-trace.x[-2, 0], abs=1e-10)
    assert orbit_square(t, rho) == pytest.approx(expected, abs=1e-15)
    assert check(t, rho, Square()).distance == pytest.approx(expected, abs=1e-15)


def test_the_published_digits_of_the_cycle():
    assert round(orbit_square(0.1, 0.1), 7) == 0.0111111
    assert round(orbit_square(0.01, 0.1), 8) == 0.00101010
    assert round(orbit_square(0.3, 0.5), 7) == 0.2142857


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("method", "how"), FAMILY)
def test_normalised_methods_stay_at_the_same_distance(method, how, driver):
    trace = run(Quadratic([1.0, 4.0]), method, steps=0.1, radius=0.1, updates=800, driver=driver, **how)
    assert limit_distance(0.1, 0.1, [1.0, 4.0]) == pytest.approx(0.025, abs=1e-15)
    assert trace.distance[-1] == pytest.approx(0.025, abs=1e-10)
    assert abs(trace.x[-1, 1]) == pytest.approx(0.025, abs=1e-10)  # along the top eigenvector
    assert abs(trace.x[-1, 0]) < 1e-10


@pytest.mark.parametrize("method", ["sgd", "usam", "extragradient"])
def test_the_gradient_and_unnormalised_methods_reach_the_minimiser(method):
    trace = run(Quadratic([1.0, 4.0], centre=[0.0, 0.0]), method, steps=0.1, radius=0.1, updates=800)
    assert trace.distance[-1] < 1e-15


def test_the_limit_lies_along_the_rotated_top_eigenvector():
    problem = Quadratic([0.5, 1.0, 4.0], centre=[3.0, -1.0, 2.0], seed=7)
    trace = run(problem, "sam", steps=0.1, radius=0.1, updates=2000)
    offset = torch.tensor(trace.x[-1]) - problem.centre
    assert float((problem.rotation[:, 2] @ offset).abs()) == pytest.approx(0.025, abs=1e-10)
    assert problem.distance(torch.tensor(trace.x[-1])) == pytest.approx(0.025, abs=1e-10)


@pytest.mark.parametrize(("steps", "slow"), [("harmonic:1,shift=4", 5e-9), ("power:c=0.5,p=0.5001", 1e-5)])
def test_diminishing_steps_shrink_the_cycle_with_a_constant_radius(steps, slow):
    trace = run(Quadratic([1.0, 4.0]), "sam", steps=steps, radius=0.1, updates=5000, driver="program")
    t = read_rule(steps).at(5000)
    assert trace.gradient[-1] == pytest.approx(sam_floor(t, 0.1, 4.0), rel=0.02)
    assert trace.f[-1] < slow


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "gap"), [("harmonic:1,shift=4", 8e-12), ("power:c=0.5,p=0.5001", 2e-7)])
def test_the_gaps_after_a_hundred_thousand_updates(steps, gap):
    trace = run(Quadratic([1.0, 4.0]), "sam", steps=steps, radius=0.1, updates=100_000, driver="program")
    assert trace.f[-1] == pytest.approx(gap, rel=0.05)


@pytest.mark.slow
def test_x_squared_follows_the_step_times_the_radius():
    trace = run(Square(), "sam", steps="power:c=0.5,p=0.5001", radius=0.1, updates=100_000, driver="program")
    assert trace.distance[-1] == pytest.approx(1.58e-4, rel=2e-3)
    assert trace.distance[-1] == pytest.approx(trace.t[-1] * 0.1, rel=2e-3)


@pytest.mark.parametrize("n", [2, 20])
def test_constant_and_almost_constant_radii_almost_coincide(n):
    problem = LogSum(*random_system(n, n, seed=n))
    steps = f"harmonic:1,shift={math.ceil(problem.function_class.L)}"
    one, other = (
        run(problem, "sam", steps=steps, radius=r, updates=1500, driver="program") for r in (0.1, "power:c=0.1,p=0.001")
    )
    assert np.allclose(one.f, other.f, rtol=1e-2, atol=0.0)


def test_a_constant_step_stalls_at_a_floor_that_follows_the_radius():
    problem = LogSum.random(20)
    floors = [
        run(problem, "sam", steps=1 / problem.function_class.L, radius=r, updates=1500, driver="program").gradient[-1]
        for r in (0.1, 0.01, 0.001)
    ]
    assert floors[0] / floors[1] == pytest.approx(10, rel=0.3)
    assert floors[1] / floors[2] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("nu", [0.0, 0.3, 0.6, 0.9])
def test_usam_is_monotone_below_the_bounds(nu):
    problem = LogSum.random(5)
    t = 0.99 * largest_step(problem.function_class.L, nu)
    trace = run(problem, "usam", steps=t, radius=nu / problem.function_class.L, updates=300)
    assert bool((np.diff(trace.f) <= 1e-12).all())


def test_usam_beyond_the_bounds_need_not_be():
    problem = Quadratic([1.0, 4.0])
    trace = run(problem, "usam", steps=0.45, radius=0.5, updates=20)  # factor 1 - 0.45 * 4 * 3 = -4.4
    assert bool((np.diff(trace.f) > 0).any())
