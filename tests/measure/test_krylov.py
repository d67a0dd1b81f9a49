"""Ends of the spectrum against known ones, and honesty about what was not seen."""

import math

import pytest
import torch

from flatmin.measure.curvature import Hessian, dense
from flatmin.measure.krylov import spectrum
from flatmin.measure.problem import Problem
from tests.measure.nets import Matrix, batches, make, symmetric

SPREAD = torch.cat([torch.tensor([10.0, 7.0, 5.0, 4.0, 3.5, -3.0, -2.5]), torch.linspace(-1, 1, 493)]).double()


@pytest.mark.parametrize("name", ["mlp", "relu", "batchnorm", "tied", "regression", "linear"])
def test_every_eigenvalue_of_a_net(name):
    """Asked for all of them, in float64, they are those of the dense matrix."""
    model, x, y, loss = make(name)
    operator = Hessian(Problem(model, loss, batches(x, y, 7)))
    want = torch.linalg.eigvalsh(dense(operator)).flip(0)
    found = spectrum(operator, top=operator.size)
    assert found.converged
    assert (found.top - want).abs().max() <= 1e-8 * want.abs().max()
    h = dense(operator)
    for value, vector in zip(found.top[:5], found.top_vectors[:5], strict=True):
        assert (h @ vector - value * vector).norm() <= 1e-8 * want.abs().max()


@pytest.mark.parametrize("memory", [2**31, 22 * 500 * 8, 26 * 500 * 8], ids=["whole", "22 vectors", "26 vectors"])
@pytest.mark.parametrize(("top", "bottom"), [(1, 0), (5, 2), (0, 2)])
def test_the_ends(top, bottom, memory):
    for seed in range(4):
        found = spectrum(symmetric(SPREAD), top=top, bottom=bottom, seed=seed, memory=memory)
        assert found.converged
        torch.testing.assert_close(found.top, SPREAD[:top], rtol=1e-4, atol=0)
        torch.testing.assert_close(found.bottom, torch.tensor([-3.0, -2.5]).double()[:bottom], rtol=1e-4, atol=0)
        assert found.products - found.searched <= 20 and found.searched <= (8 if top + bottom > 1 else 0)
        assert 0.0 < found.chance_missed < 0.1
        gram = found.basis @ found.basis.T
        assert (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() <= 1e-12


def test_restarts_find_what_the_whole_basis_finds():
    """A crowded top that needs many steps, in a basis far smaller than these."""
    values = torch.cat([2.0 - torch.arange(8) / 40, torch.linspace(-1, 1.5, 400)]).double()
    operator = symmetric(values)
    whole = spectrum(operator, top=4, tol=1e-3)
    short = spectrum(operator, top=4, tol=1e-3, memory=24 * 408 * 8)
    assert whole.converged and short.converged
    assert whole.restarts == 0 < short.restarts
    assert len(short.basis) <= 24 < whole.products
    torch.testing.assert_close(short.top, values[:4], rtol=1e-6, atol=0)
    torch.testing.assert_close(short.top, whole.top, rtol=1e-6, atol=0)
    for value, vector, residual in zip(short.top, short.top_vectors, short.top_residuals, strict=True):
        true = (operator.matvec(vector) - value * vector).norm() / value.abs()
        assert float(true) == pytest.approx(float(residual), abs=1e-9)


BULK = torch.linspace(-1, 1, 400).double().tolist()
# name -> (eigenvalues beside a crowd in [-1, 1], top, bottom)
COPIES = {
    "one pair": ([10, 10, 5, 4, 3.5, -3, -2.5], 5, 2),
    "four of each": ([10] * 4 + [7] * 4 + [5] * 4 + [-3] * 3, 5, 3),
    "ten of each": ([10] * 10 + [7] * 10, 12, 0),
    "of the bottom": ([-10] * 3 + [-7, -7, 2], 0, 5),
    "of the last but one": ([10, 8, 5, 4, 4, 3.9], 5, 1),
    "cluster": ([10, 9.999, 9.998, 9.998, 5, 4, 4], 6, 0),
}


@pytest.mark.parametrize("memory", [2**31, 34 * 420 * 8], ids=["whole", "34 vectors"])
@pytest.mark.parametrize("name", COPIES)
def test_copies_of_eigenvalues(name, memory):
    """A Krylov space holds one vector of each eigenspace, in exact arithmetic; ours is asked for all of them.

    With their vectors, residuals that are true, and a basis that is orthonormal still.
    """
    values, top, bottom = COPIES[name]
    want = torch.tensor([*values, *BULK]).double().sort().values
    operator = symmetric(want, seed=1)
    for seed in range(3):
        found = spectrum(operator, top=top, bottom=bottom, tol=1e-3, seed=seed, memory=memory)
        assert found.converged and found.searched > 0 and found.chance_missed < 1
        torch.testing.assert_close(found.top, want.flip(0)[:top], rtol=1e-5, atol=0)
        torch.testing.assert_close(found.bottom, want[:bottom], rtol=1e-5, atol=0)
        for value, vector, residual in zip(found.top, found.top_vectors, found.top_residuals, strict=True):
            true = (operator.matvec(vector) - value * vector).norm() / value.abs()
            assert float(true) == pytest.approx(float(residual), rel=1e-3, abs=1e-9) and true <= 1e-3
        gram = found.basis @ found.basis.T
        assert (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() <= 1e-12
        exact = (found.basis * (operator.matrix @ found.basis.T).T).sum(1)
        torch.testing.assert_close(found.diagonal, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("outputs", [2, 4])
def test_copies_in_a_regression_with_several_outputs(outputs):
    """The head of it has every eigenvalue as often as it has outputs; so has the spectrum, at both ends."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, outputs)).double()
    x, y = torch.randn(60, 10).double(), torch.randn(60, outputs).double()
    operator = Hessian(Problem(net, torch.nn.MSELoss(), (x, y), params="2.*"))
    want = torch.linalg.eigvalsh(dense(operator)).flip(0)
    found = spectrum(operator, top=5, bottom=3)
    assert found.converged and (found.top - want[:5]).abs().max() <= 1e-4 * want[0]
    assert (found.bottom - want.flip(0)[:3]).abs().max() <= 1e-4 * want[0]
    one = spectrum(operator)
    assert one.searched == 0 and one.largest == pytest.approx(float(want[0]), rel=1e-4)


@pytest.mark.parametrize("seed", [12, 16])
def test_a_search_that_restarts_cut_short_is_no_convergence(seed):
    """Three copies beside a crowd: of each chain too little is left to bound the chance that one was missed."""
    crowd = torch.rand(100, generator=torch.Generator().manual_seed(seed)).double().sort().values
    operator = symmetric(torch.cat([crowd, torch.full((3,), 1.03).double()]), seed=1)
    short = spectrum(operator, top=5, memory=20 * 103 * 8, max_products=200, seed=seed)
    assert short.restarts > 0 and short.chance_missed == 1 and not short.converged
    whole = spectrum(operator, top=5, seed=seed)
    assert whole.converged and int((whole.top > 1.02).sum()) == 3


def test_too_few_products_for_the_search_say_so():
    operator = symmetric([10.0, 10.0, 5.0, 4.0, *BULK])
    full = spectrum(operator, top=3)
    short = spectrum(operator, top=3, max_products=full.products - full.searched + 1)
    assert full.converged and not short.converged and short.chance_missed > 0.01


def test_residuals_are_the_true_ones():
    operator = symmetric(SPREAD)
    found = spectrum(operator, top=5, bottom=2, tol=0.3, confirm=0)
    pairs = [
        (found.top, found.top_vectors, found.top_residuals),
        (found.bottom, found.bottom_vectors, found.bottom_residuals),
    ]
    for values, vectors, residuals in pairs:
        for value, vector, residual in zip(values, vectors, residuals, strict=True):
            true = (operator.matvec(vector) - value * vector).norm() / value.abs()
            assert float(true) == pytest.approx(float(residual), rel=1e-6, abs=1e-12)
            # The distance to the spectrum is at most the residual.
            assert (SPREAD - value).abs().min() <= true * value.abs() + 1e-12


def test_no_ghosts_however_many_steps():
    """Without reorthogonalisation copies of the largest eigenvalue turn up and count as converged."""
    found = spectrum(symmetric(SPREAD, dtype=torch.float32), top=5, min_steps=200, tol=1e-3)
    torch.testing.assert_close(found.top, SPREAD[:5], rtol=1e-5, atol=0)


def test_the_sign_decides_not_the_magnitude():
    found = spectrum(symmetric([-50.0, -3.0, 1.0, 2.0, *torch.linspace(-2, 1, 40).tolist()]))
    assert found.largest == pytest.approx(2.0, rel=1e-3)


def test_two_confirming_steps_are_spent():
    operator = symmetric([10.0] + [0.1 * i for i in range(30)])
    with_two, with_none = (spectrum(operator, confirm=c) for c in (2, 0))
    assert with_two.products == with_none.products + 2


def test_a_late_eigenvalue_is_not_missed_in_silence():
    """Nearly orthogonal to the start vector: either it is found, or the chance that is stated says so."""
    values = torch.cat([torch.tensor([5.0, 4.9]), torch.linspace(0, 1, 300)]).double()
    for seed in range(20):
        found = spectrum(symmetric(values, seed=1), top=2, tol=3e-2, confirm=0, seed=seed)
        assert abs(float(found.top[1]) - 4.9) < 0.05 or found.chance_missed > 0.01


@pytest.mark.slow
def test_the_stated_chance_is_a_bound():
    """Over start vectors, the top eigenvalue is missed by more than the tolerance less often than stated."""
    values = torch.cat([torch.tensor([1.0]), torch.linspace(0, 0.97, 400)]).double()
    operator = symmetric(values)
    runs = [spectrum(operator, max_products=12, tol=1e-9, seed=seed) for seed in range(200)]
    for run in runs:
        run.__dict__["missed"] = run.largest + 1e-9 * (run.nodes.max() - run.nodes.min()) < 1.0
    stated = [spectrum(operator, max_products=12, tol=0.03, seed=seed).chance_missed for seed in range(200)]
    missed = [run.largest < 1.0 - 0.03 for run in runs]
    assert sum(missed) <= sum(stated) + 3 * math.sqrt(len(runs))


@pytest.mark.parametrize(
    ("matrix", "top", "want"),
    [
        (torch.zeros(4, 4), 1, [0.0]),
        (torch.zeros(400, 400), 2, [0.0, 0.0]),
        (torch.eye(4) * -3, 2, [-3.0, -3.0]),
        (torch.tensor([[2.0]]), 1, [2.0]),
        (torch.diag(torch.tensor([1.0, 1.0, 5.0, 5.0])), 2, [5.0, 5.0]),
        (torch.diag(torch.tensor([1.0, 1.0, 5.0, 5.0])), 4, [5.0, 5.0, 1.0, 1.0]),
    ],
)
def test_degenerate_spectra(matrix, top, want):
    found = spectrum(Matrix(matrix.double()), top=top)
    assert found.converged
    torch.testing.assert_close(found.top, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-9)
    assert found.products <= 8


def test_too_few_steps_say_so():
    found = spectrum(symmetric(torch.linspace(0, 1, 200)), tol=1e-8, max_products=4)
    assert not found.converged and found.products == 4 and found.chance_missed == 1.0


def test_a_warm_start_saves_products():
    operator = symmetric(SPREAD)
    cold = spectrum(operator, tol=1e-4)
    warm = spectrum(operator, tol=1e-4, start=cold.top_vectors[0], seed=5)
    assert warm.largest == pytest.approx(10.0, rel=1e-6) and warm.products < cold.products


def test_nodes_and_weights_have_the_moments_of_the_start_vector():
    operator = symmetric(SPREAD)
    found = spectrum(operator, min_steps=30)
    g = torch.Generator().manual_seed(0)
    v = torch.randn(operator.size, generator=g, dtype=torch.float64)
    v /= v.norm()
    for power, want in ((0, 1.0), (1, v @ operator.matvec(v)), (2, operator.matvec(v).square().sum())):
        assert float((found.weights * found.nodes**power).sum()) == pytest.approx(float(want), rel=1e-9)


def test_progress_and_seed():
    operator, seen = symmetric(SPREAD), []
    first = spectrum(operator, top=2, seed=3, progress=lambda done, worst: seen.append((done, worst)))
    assert [done for done, _ in seen] == list(range(2, first.products + 1))
    assert seen[-1][1] <= 1e-2
    assert torch.equal(first.top, spectrum(operator, top=2, seed=3).top)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top": 0}, "at least one eigenvalue"),
        ({"top": 5}, "5 eigenvalues were requested, but the operator has size 4"),
        ({"top": 3, "bottom": 2}, "5 eigenvalues were requested, but the operator has size 4"),
        ({"tol": 0.0}, "tol and max_products must be positive"),
        ({"max_products": 0}, "tol and max_products must be positive"),
        ({"start": torch.ones(3)}, r"start must have shape \(4,\)"),
    ],
)
def test_bad_numbers(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        spectrum(Matrix(torch.eye(4, dtype=torch.float64)), **options)


def test_products_that_are_not_finite():
    with pytest.raises(ArithmeticError, match="not finite"):
        spectrum(Matrix(torch.full((3, 3), torch.nan)))
