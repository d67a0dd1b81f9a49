"""Trace, diagonal, Frobenius norm and density against dense matrices, and the honesty of their errors."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import wasserstein_distance

from flatmin.measure.curvature import Hessian, dense
from flatmin.measure.krylov import spectrum
from flatmin.measure.problem import Problem
from flatmin.measure.trace import density, diagonal, frobenius, trace
from tests.measure.nets import Matrix, batches, make, symmetric

VALUES = torch.cat(
    [torch.tensor([10.0, 7.0, 5.0, 4.0, 3.5, -3.0, -2.5]), torch.logspace(-4, 0, 200), -torch.logspace(-4, -2, 100)]
).double()
TRACE = float(VALUES.sum())


@pytest.fixture(scope="module")
def operator():
    return symmetric(VALUES)


@pytest.fixture(scope="module")
def known(operator):
    return spectrum(operator, top=5, bottom=2, min_steps=30)


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.slow
def test_the_interval_of_the_trace_covers_it_as_often_as_it_says(operator, known, deflated):
    """300 seeds; 91.7 to 98.3 % is the 99 % range of a binomial with 95 %."""
    tol = 0.01 if deflated else 0.05
    found = [trace(operator, known if deflated else None, seed=seed, tol=tol) for seed in range(300)]
    covered = sum(low <= TRACE <= high for low, high in (f.interval() for f in found)) / 300
    assert 0.917 <= covered <= 0.983
    assert all(f.converged for f in found)
    if deflated:
        plain = trace(operator, tol=tol)
        assert plain.products >= 8 * sum(f.products for f in found) / 300


def test_two_means_that_are_alike_stop_nothing():
    """Probes of 1, and one in ten of 2: the mean stays where it is for long."""

    class Rare:
        size, dtype, device = 50, torch.float64, torch.device("cpu")
        calls = 0

        def matvec(self, v):
            self.calls += 1
            return v * (1.0 + 1.0 * (self.calls % 10 == 9))

    found = trace(Rare(), tol=0.02)
    assert found.converged and found.probes > 100 and found.value == pytest.approx(55.0, rel=0.05)


def test_a_whole_basis_gives_the_exact_trace(operator):
    whole = spectrum(operator, top=operator.size)
    found = trace(operator, whole)
    assert found.value == pytest.approx(TRACE, rel=1e-10)
    assert (found.error, found.probes, found.interval()) == (0.0, 0, (found.value, found.value))


def test_the_trace_of_a_net_with_another_sign():
    model, x, y, loss = make("mlp")
    operator = Hessian(Problem(model, loss, batches(x, y, 7)))
    want = float(dense(operator).trace())
    found = trace(operator, spectrum(operator, top=3, min_steps=30), tol=2e-2)
    assert found.converged and abs(found.value - want) <= 5 * found.error
    negated = Matrix(-dense(operator))
    assert trace(negated, tol=5e-2).value == pytest.approx(-want, rel=0.3)


@pytest.mark.parametrize("deflated", [False, True])
def test_the_frobenius_norm(operator, known, deflated):
    want = float(VALUES.norm())
    found = [frobenius(operator, known if deflated else None, seed=seed, tol=0.025) for seed in range(20)]
    assert sum(f.value for f in found) / 20 == pytest.approx(want, rel=0.015)
    assert all(f.converged and f.error <= 0.025 * f.value * 1.1 for f in found)
    assert sum(abs(f.value - want) <= 3 * f.error + 1e-9 * want for f in found) >= 17
    assert frobenius(operator, spectrum(operator, top=operator.size)).value == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("deflated", [False, True])
def test_the_diagonal(operator, known, deflated):
    want = operator.matrix.diagonal()
    found = diagonal(operator, known if deflated else None, probes=400)
    off = (found.value - want).abs() / found.error
    assert 0.55 <= float((off <= 1.0).double().mean()) <= 0.8
    assert float(off.max()) < 6.0
    if deflated:
        assert found.error.norm() < 0.3 * diagonal(operator, probes=400).error.norm()


def test_the_diagonal_of_a_diagonal_matrix_is_exact():
    found = diagonal(Matrix(torch.diag(VALUES)), probes=2)
    torch.testing.assert_close(found.value, VALUES, rtol=1e-12, atol=1e-14)
    assert not found.error.any()


def test_the_density(operator, known, sampled):
    """Eigenvalues that are known stand in it exactly, the bulk is sampled."""
    found = density(operator, known, runs=4, steps=70)
    far = {
        name: wasserstein_distance(d.nodes.numpy(), VALUES.numpy(), d.weights.numpy()) / 10.0
        for name, d in (("known", found), ("plain", density(operator, runs=4, steps=70)))
    }
    assert far["known"] <= 0.002 and far["known"] < far["plain"] < 0.02
    assert float(found.weights.sum()) == pytest.approx(1.0, rel=1e-12)
    assert found.products == 280
    for value in VALUES[:7]:
        at = (found.nodes - value).abs().argmin()
        assert float(found.nodes[at]) == pytest.approx(float(value), rel=1e-3)
        assert float(found.weights[at]) == pytest.approx(1.0 / operator.size, rel=1e-12)


@pytest.mark.parametrize("name", ["mlp", "relu", "groupnorm", "tied"])
def test_the_density_of_a_net(name):
    model, x, y, loss = make(name)
    operator = Hessian(Problem(model, loss, batches(x, y, 7)))
    want = torch.linalg.eigvalsh(dense(operator))
    found = density(operator, spectrum(operator, top=5, bottom=5), runs=4, steps=100)
    assert wasserstein_distance(found.nodes.numpy(), want.numpy(), found.weights.numpy()) <= 1e-8 * float(want[-1])


def test_smoothing_keeps_the_mass(operator, sampled):
    found = density(operator, runs=1, steps=40)
    assert found.products == 40
    grid = torch.linspace(-6, 13, 4000, dtype=torch.float64)
    curve = found.smoothed(grid, 0.2)
    assert float(torch.trapezoid(curve, grid)) == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(ValueError, match="width must be positive"):
        found.smoothed(grid, 0.0)


def test_errors_and_seeds(operator, known):
    model, x, y, loss = make("mlp")
    net = Hessian(Problem(model, loss, (x, y)))
    assert trace(net, seed=7, max_probes=3).conventions.seed == 7
    assert trace(operator, seed=1, tol=0.1) == trace(operator, seed=1, tol=0.1)
    assert not trace(operator, max_probes=3).converged
    with pytest.raises(ValueError, match=r"the spectrum has size 307, but the operator has size 57"):
        trace(net, known)
    with pytest.raises(ValueError, match="tol must be positive"):
        trace(net, tol=0)
    with pytest.raises(ValueError, match="probes must be at least 2"):
        diagonal(net, probes=1)
    with pytest.raises(ValueError, match="runs must be at least 0"):
        density(net, runs=-1)
    with pytest.raises(ArithmeticError, match="not finite"):
        trace(Matrix(torch.full((30, 30), torch.nan)))


def test_the_first_sample_of_the_density_is_free(operator):
    found = [spectrum(operator, top=5, bottom=2, min_steps=40, seed=seed) for seed in range(20)]
    free = [density(operator, one, runs=0) for one in found]
    assert {d.products for d in free} == {0}
    assert all(
        torch.equal(d.nodes, one.nodes) and torch.equal(d.weights, one.weights)
        for d, one in zip(free, found, strict=True)
    )
    means = torch.tensor([float(d.nodes @ d.weights) for d in free])
    assert abs(float(means.mean()) - TRACE / len(VALUES)) < 3 * float(means.std()) / 20**0.5


def test_a_spectrum_without_its_vectors_is_refused(operator, known):
    bare = replace(known, basis=known.basis[:0])
    with pytest.raises(ValueError, match="the spectrum has no vectors"):
        trace(operator, bare)


def test_progress_of_a_whole_matrix(operator):
    seen = []
    density(operator, runs=1, steps=100, progress=lambda products, share: seen.append((products, share)))
    assert seen[-1] == (operator.size, 1.0) and len(seen) == operator.size


def test_the_first_sample_needs_a_random_start(operator):
    steered = spectrum(operator, start=torch.ones(operator.size, dtype=torch.float64))
    for known in (None, steered):
        with pytest.raises(ValueError, match="computed without start="):
            density(operator, known, runs=0)


def test_a_density_refuses_a_spectrum_without_its_vectors(operator, known, sampled):
    with pytest.raises(ValueError, match="the spectrum has no vectors"):
        density(operator, replace(known, basis=known.basis[:0]), runs=1, steps=5)
