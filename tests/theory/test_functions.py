"""Functions: gradients against autograd, L against dense Hessians, minimisers and exponents."""

import math

import pytest
import torch

from flatmin.theory import FUNCTIONS as NAMED
from flatmin.theory import (
    FunctionClass,
    LeastSquares,
    Logistic,
    LogSum,
    MexicanHat,
    Quadratic,
    Quartic,
    Rosenbrock,
    Square,
    Wave,
    breast_cancer,
    digits_pair,
    random_system,
    read_function,
)


def small_logistic(l2=1e-3):
    X, noise = random_system(40, 3, seed=3)
    return Logistic(X, torch.sign(X[:, 0] + noise), l2)


FUNCTIONS = [
    Quadratic([0.5, 1.0, 4.0], centre=[1.0, -2.0, 0.0], seed=2),
    Quadratic([0.0, 3.0]),
    Quadratic([-1.0, 3.0], seed=1),
    Square(),
    LeastSquares(*random_system(7, 3)),
    LeastSquares(*random_system(2, 4)),
    LogSum(*random_system(5, 5, seed=4)),
    LogSum.random(3),
    Rosenbrock(),
    Quartic(),
    small_logistic(),
    small_logistic(0.0),
    MexicanHat(),
    Wave(),
]


def points(problem, count=25):
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(count, problem.dim, dtype=torch.float64, generator=generator)
    if isinstance(problem, Rosenbrock):
        return unit * torch.tensor([4.0, 5.0]) - torch.tensor([2.0, 1.0])
    if isinstance(problem, MexicanHat):
        return 0.65 * (2 * unit - 1)
    return 4 * unit - 2


def hessian(problem, x):
    return torch.autograd.functional.hessian(problem.value, x)


@pytest.mark.parametrize("problem", FUNCTIONS, ids=lambda p: p.name)
def test_what_is_said_of_a_function_holds(problem):
    """Its gradient by autograd, which goes by the value; L, convexity and f* at many points."""
    kind = problem.function_class
    for x in points(problem, 60):
        y = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(problem.value(y), y)
        assert torch.allclose(problem.gradient(x), found, rtol=1e-9, atol=1e-11)
        curvatures = torch.linalg.eigvalsh(hessian(problem, x))
        assert not kind.L or float(curvatures.abs().max()) <= kind.L * (1 + 1e-12)
        assert not kind.convex or float(curvatures.min()) > -1e-12
        if problem.f_star is not None and math.isfinite(problem.f_star):
            assert float(problem.value(x)) >= problem.f_star - 1e-12


def test_L_is_attained():
    cases = [
        (LogSum.random(3), None),
        (small_logistic(), torch.zeros(3, dtype=torch.float64)),
        (Rosenbrock(), torch.tensor([2.0, -1.0], dtype=torch.float64)),
        (Quartic(), torch.tensor([2.0], dtype=torch.float64)),
        (LeastSquares(*random_system(7, 3)), torch.zeros(3, dtype=torch.float64)),
    ]
    for problem, x in cases:
        at = problem.solution if x is None else x
        assert float(torch.linalg.matrix_norm(hessian(problem, at), 2)) == pytest.approx(
            problem.function_class.L, rel=1e-9
        )
    assert abs(LogSum.random(3).function_class.L - 8) < 1e-12


@pytest.mark.parametrize("problem", [FUNCTIONS[0], *FUNCTIONS[3:9], FUNCTIONS[10]], ids=lambda p: p.name)
def test_the_gradient_vanishes_at_the_minimisers(problem):
    x = {"Rosenbrock": torch.ones(2, dtype=torch.float64)}.get(problem.name)
    if x is None:
        x = problem.centre if isinstance(problem, Quadratic) else problem.solution
    assert float(problem.gradient(x).norm()) < 1e-9 and problem.distance(x) < 1e-9
    assert float(problem.value(x)) == pytest.approx(problem.f_star, abs=1e-12)


@pytest.mark.parametrize("problem", [Quadratic([1.0, 4.0]), Quadratic([0.0, 3.0]), Quartic(), LeastSquares(
    *random_system(2, 4))], ids=lambda p: p.name)  # fmt: skip
def test_kl_exponents(problem):
    """||grad f|| / (f - f*)^(1-q) is bounded away from 0 and inf at all scales."""
    generator = torch.Generator().manual_seed(5)
    ratios = []
    for scale in (1.0, 1e-2, 1e-4):
        d = torch.randn(problem.dim, dtype=torch.float64, generator=generator)
        x = getattr(problem, "solution", torch.zeros(problem.dim, dtype=torch.float64)) + scale * d
        gap = float(problem.value(x)) - problem.f_star
        ratios.append(float(problem.gradient(x).norm()) / gap ** (1 - problem.function_class.kl))
    assert min(ratios) > 1e-2 and max(ratios) / min(ratios) < 10


def test_a_plane_of_minimisers():
    problem = LeastSquares(*random_system(2, 4))
    x = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert problem.function_class.minimisers == "unbounded" and problem.f_star < 1e-20
    null = torch.eye(4, dtype=torch.float64) - torch.linalg.pinv(problem.A) @ problem.A
    assert problem.distance(x + 5 * null @ x) == pytest.approx(problem.distance(x))


def test_the_hat_has_value_zero_on_and_outside_of_the_circle():
    hat = MexicanHat()
    for x in ([1.0, 0.0], [0.0, 1.5]):
        at = torch.tensor(x, dtype=torch.float64)
        assert float(hat.value(at)) == 0 and float(hat.gradient(at).norm()) == 0
    assert float(hat.value(hat.start())) > 0 and hat.function_class.L is None and not hat.function_class.has_kl


def test_functions_by_name():
    for name in NAMED:
        if name not in ("breast-cancer", "digits"):
            problem = read_function(name)
            assert problem.start().shape == (problem.dim,)
    assert read_function("quadratic:0.5,1,3").function_class.spectrum == (0.5, 1.0, 3.0)
    assert read_function("log-sum:7").dim == 7
    words = "convex, L=4, unique, kl=0.5"
    assert FunctionClass.read(words) == FunctionClass(L=4.0, convex=True, minimisers="unique", kl=0.5)


def test_real_data():
    pytest.importorskip("sklearn")
    for problem in (breast_cancer(), digits_pair()):
        assert problem.distance(problem.solution) == 0
        assert float(problem.gradient(problem.solution).norm()) < 1e-10
        H = hessian(problem, torch.zeros(problem.dim, dtype=torch.float64))
        assert float(torch.linalg.matrix_norm(H, 2)) == pytest.approx(problem.function_class.L, rel=1e-9)
    assert breast_cancer().dim == 31


def test_bad_functions_are_refused_in_a_sentence():
    for call, message in [
        (lambda: Quadratic([0.0, 0.0]), "not all 0"),
        (lambda: Quadratic([1.0], centre=[1.0, 2.0]), "centre must have 1 entries, got 2"),
        (lambda: LogSum(torch.zeros(2, 2), torch.zeros(2)), "not all 0"),
        (lambda: LeastSquares(torch.eye(2), torch.zeros(3)), "shape"),
        (lambda: Logistic(torch.eye(2), torch.tensor([0.0, 1.0])), "labels y must be -1 and"),
        (lambda: Logistic(torch.eye(2), torch.ones(2), l2=-1), "l2 must be >= 0, got -1"),
        (lambda: Rosenbrock(0.5), "reach must be at least 1"),
        (lambda: Quartic(0), "reach must be positive"),
        (lambda: digits_pair(3, 3), "two different digits"),
        (lambda: read_function("squre"), "unknown function 'squre'; did you mean 'square'"),
        (lambda: read_function("square:2"), "square takes at most 0 numbers, got 1"),
        (lambda: read_function("quadratic:a"), "must be numbers separated by commas"),
        (lambda: FunctionClass.read("covex"), "unknown word 'covex'; did you mean 'convex'"),
        (lambda: FunctionClass.read("L=four"), "L must be a number, got 'four'"),
        (lambda: FunctionClass(L=0), "L must be positive and finite, or None if it is not known, got 0."),
        (lambda: FunctionClass(kl=1.0), r"the KL exponent q must be within \(0, 1\), got 1.0"),
        (lambda: FunctionClass(L=3.0, spectrum=(1.0, 2.0)), "largest modulus of the spectrum must be L"),
        (lambda: FunctionClass(minimisers="some"), "minimisers must be unique, bounded"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
