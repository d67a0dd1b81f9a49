"""Nets of up to 2,000 trained weights, in float64, against dense matrices made without this library, and scipy."""

import functools

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch.nn import functional as F

from flatmin.measure.curvature import EmpiricalFisher, Fisher, GaussNewton, Hessian, dense
from flatmin.measure.krylov import spectrum
from flatmin.measure.problem import Problem
from flatmin.measure.trace import density, diagonal, frobenius, trace
from tests.measure.nets import TRAINED, Matrix, batches, dense_jacobian, hessian_of, make, trained

SMALLER = [name for name in TRAINED if name != "large"]
EVERY = [*SMALLER, pytest.param("large", marks=pytest.mark.slow)]


def problem_of(name):
    model, x, y, loss = trained(name)
    return Problem(model, loss, batches(x, y, 50))


@functools.cache
def jacobian_of(name):
    return dense_jacobian(*trained(name))


def slopes_of(name, labels):
    """Gradients of each sample's cross-entropy at these labels, shape (N, size)."""
    model, x, _, _ = trained(name)
    rest = model(x).detach().softmax(1) - F.one_hot(labels, 5)
    return torch.einsum("nk,nkp->np", rest, jacobian_of(name))


def same_products(operator, want):
    g = torch.Generator().manual_seed(5)
    for v in torch.randn(3, operator.size, generator=g, dtype=torch.float64):
        assert float((operator.matvec(v) - want(v)).norm() / want(v).norm()) <= 1e-10


@pytest.mark.parametrize("name", EVERY)
class TestProducts:
    def test_hessian(self, name):
        same_products(Hessian(problem_of(name)), hessian_of(name)[0].matvec)

    def test_gauss_newton_is_the_fisher_information(self, name):
        """With every label at its chance, which is what the loss's Hessian in the outputs comes to."""
        model, x, _, _ = trained(name)
        chance = model(x).detach().softmax(1)
        rows = [slopes_of(name, torch.full((len(x),), k)) * chance[:, k : k + 1].sqrt() for k in range(5)]
        slopes = torch.cat(rows)
        same_products(GaussNewton(problem_of(name)), lambda v: slopes.T @ (slopes @ v) / len(x))

    def test_empirical_fisher(self, name):
        slopes = slopes_of(name, trained(name)[2])
        same_products(EmpiricalFisher(problem_of(name)), lambda v: slopes.T @ (slopes @ v) / len(slopes))

    def test_fisher_of_drawn_labels(self, name, monkeypatch):
        """The draws are replaced by known ones, two a sample."""
        labels = torch.randint(5, (120, 2), generator=torch.Generator().manual_seed(3))
        left = iter(labels.split(50))
        monkeypatch.setattr(torch, "multinomial", lambda *_, **__: next(left))
        slopes = torch.cat([slopes_of(name, labels[:, i]) for i in range(2)])
        same_products(Fisher(problem_of(name), draws=2), lambda v: slopes.T @ (slopes @ v) / len(slopes))


@pytest.mark.parametrize("name", EVERY)
def test_the_ends_of_the_spectrum(name):
    operator, values = hessian_of(name)
    found = spectrum(Hessian(problem_of(name)), top=8, bottom=4, tol=1e-5)
    off = torch.cat([found.top - values[:8], found.bottom - values.flip(0)[:4]])
    assert found.converged and off.abs().max() <= 1e-8 * values[0]
    for value, vector in zip(found.top, found.top_vectors, strict=True):
        assert (operator.matvec(vector) - value * vector).norm() <= 2e-5 * value


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLER)
def test_every_eigenvalue(name):
    operator, values = hessian_of(name)
    found = spectrum(operator, top=operator.size)
    assert found.converged and (found.top - values).abs().max() <= 1e-8 * values[0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, Hessian) for name in ("mlp", "batchnorm", "tied", "regression")),
        *((name, kind) for name in ("batchnorm", "tied") for kind in (GaussNewton, EmpiricalFisher)),
    ],
)
def test_with_every_eigenvalue_known_diagonal_trace_and_norm_are_exact(name, kind):
    model, x, y, loss = make(name)
    operator = kind(Problem(model, loss, batches(x, y, 7)))
    matrix = dense(operator)  # which has tests of its own
    known = spectrum(operator, top=operator.size)
    size = float(matrix.abs().max())
    assert (diagonal(operator, known, probes=2).value - matrix.diagonal()).abs().max() <= 1e-8 * size
    assert trace(operator, known).value == pytest.approx(float(matrix.trace()), abs=1e-8 * size)
    assert frobenius(operator, known).value == pytest.approx(float(matrix.norm()), rel=1e-8)


def covered(operator, known, **options):
    """The share of seeds 0 to 299 of which the 95 % interval holds the trace; 91.7 to 98.3 % is the 99 % range."""
    want = float(operator.matrix.trace())
    intervals = [trace(operator, known, seed=seed, **options).interval() for seed in range(300)]
    return sum(low <= want <= high for low, high in intervals) / 300


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "groupnorm"])
def test_the_interval_of_the_trace_covers_it_without_a_spectrum(name):
    assert 0.917 <= covered(hessian_of(name)[0], None) <= 0.983


@pytest.mark.parametrize(
    ("name", "seed"), [*zip(SMALLER, range(3), strict=True), pytest.param("large", 3, marks=pytest.mark.slow)]
)
def test_the_density_by_samples(name, seed, sampled):
    """The eigenvalues of the spectrum stand in it, so that the noise is that of the bulk."""
    operator, values = hessian_of(name)
    found = density(operator, spectrum(operator, top=5, bottom=1), seed=seed)
    assert found.products == 400 < operator.size and float(found.weights.sum()) == pytest.approx(1.0, rel=1e-12)
    far = wasserstein_distance(found.nodes.numpy(), values.numpy(), found.weights.numpy())
    assert far <= 0.002 * float(values[0])


@pytest.mark.parametrize("name", EVERY)
def test_the_density_of_a_small_net_is_exact(name):
    operator, values = hessian_of(name)
    found = density(operator)
    assert operator.size <= 2000 and found.products == operator.size
    far = wasserstein_distance(found.nodes.numpy(), values.numpy(), found.weights.numpy())
    assert far <= 1e-12 * float(values[0])


def test_the_density_is_exact_where_the_whole_matrix_costs_little_more():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = density(Matrix(torch.diag(values)), runs=1, steps=20)
    assert wasserstein_distance(found.nodes.numpy(), values.numpy(), found.weights.numpy()) <= 1e-12
