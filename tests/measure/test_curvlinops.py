"""Matrices, traces and eigenvalues beside those of curvlinops, on nets on which it runs.

It is no dependency, as it brings torchvision. To run this, in an environment of its own:

    pip install -c constraints.txt torch numpy scipy scikit-learn pytest pytest-timeout hypothesis rich typer
    pip install -c constraints.txt curvlinops-for-pytorch==3.0.1
"""

import pytest
import torch
from scipy.sparse.linalg import eigsh

from flatmin.measure.curvature import EmpiricalFisher, Fisher, GaussNewton, Hessian, dense
from flatmin.measure.krylov import spectrum
from flatmin.measure.problem import Problem
from flatmin.measure.trace import trace
from tests.measure.nets import batches, hessian_of, make, trained

curvlinops = pytest.importorskip(
    "curvlinops", reason="curvlinops-for-pytorch==3.0.1 is not installed; it is an oracle, not a dependency"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, in its forward derivatives

# It has no Hessian of GroupNorm, nothing of attention, and other Fishers of squared errors (one term a sample).
RUNS = {
    "Hessian": ["mlp", "relu", "batchnorm", "lstm", "tied", "regression", "linear"],
    "GaussNewton": ["mlp", "relu", "groupnorm", "batchnorm", "lstm", "tied", "regression", "linear"],
    "EmpiricalFisher": ["mlp", "relu", "groupnorm", "batchnorm", "lstm", "tied"],
}
OURS = {"Hessian": Hessian, "GaussNewton": GaussNewton, "EmpiricalFisher": EmpiricalFisher}
THEIRS = {
    "Hessian": curvlinops.HessianLinearOperator,
    "GaussNewton": curvlinops.GGNLinearOperator,
    "EmpiricalFisher": curvlinops.EFLinearOperator,
}


def theirs(kind, model, loss, data, names=None):
    params = [p for n, p in model.named_parameters() if names is None or n in names]
    operator = THEIRS[kind](model, loss, params, data)
    return operator @ torch.eye(operator.shape[1], dtype=torch.float64)


def same(found, want):
    assert found.shape == want.shape and (found - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("size", [17, 16, 7])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in RUNS.items() for name in names])
def test_matrices(kind, name, size):
    """In one batch, with a single example in the last one, and with 7, 7 and 3."""
    model, x, y, loss = make(name)
    data = batches(x, y, size)
    same(dense(OURS[kind](Problem(model, loss, data))), theirs(kind, model, loss, data))


@pytest.mark.parametrize("kind", OURS)
def test_of_a_sum_theirs_is_the_sum(kind):
    model, x, y, loss = make("sum")
    data = batches(x, y, 7)
    same(17 * dense(OURS[kind](Problem(model, loss, data))), theirs(kind, model, loss, data))


@pytest.mark.parametrize("kind", ["Hessian", "GaussNewton"])
def test_class_weights(kind):
    """In one batch: they weigh batches by examples."""
    model, x, y, loss = make("class weights")
    same(dense(OURS[kind](Problem(model, loss, (x, y)))), theirs(kind, model, loss, [(x, y)]))


@pytest.mark.parametrize("kind", OURS)
def test_a_part_of_the_weights(kind):
    model, x, y, loss = make("mlp")
    data = batches(x, y, 7)
    want = theirs(kind, model, loss, data, names=["2.weight", "2.bias"])
    same(dense(OURS[kind](Problem(model, loss, data, params="2.*"))), want)


def test_the_fisher_with_drawn_labels():
    """Theirs and ours draw others, and have the same mean, which is not that of the labels of the data."""
    model, x, y, loss = make("mlp")
    data = batches(x, y, 7)
    problem, params = Problem(model, loss, data), list(model.parameters())
    want = dense(GaussNewton(problem))
    operator = curvlinops.FisherMCLinearOperator(model, loss, params, data, mc_samples=500)
    drawn = [operator @ torch.eye(57, dtype=torch.float64), dense(Fisher(problem, draws=500))]
    apart = float((dense(EmpiricalFisher(problem)) - want).norm())
    assert all(float((found - want).norm()) < 0.08 * float(want.norm()) < 0.5 * apart for found in drawn)


@pytest.fixture(scope="module")
def pair():
    """Their Hessian of a trained net and ours."""
    model, x, y, loss = trained("relu")
    data = batches(x, y, 50)
    return THEIRS["Hessian"](model, loss, list(model.parameters()), data), Hessian(Problem(model, loss, data))


def test_the_trace(pair):
    """Three estimators of theirs, which tell no error, lie around the interval of ours and the truth."""
    operator, ours = pair
    want = float(hessian_of("relu")[1].sum())
    found = trace(ours, spectrum(ours, top=5, bottom=1))
    low, high = found.interval()
    assert low <= want <= high and high - low < 0.05 * want
    torch.manual_seed(0)
    for estimate, tol in (
        (curvlinops.xtrace(operator, 100), 0.02),
        (curvlinops.hutchpp_trace(operator, 102), 0.05),
        (curvlinops.hutchinson_trace(operator, 100), 0.3),
    ):
        assert float(estimate) == pytest.approx(found.value, rel=tol)


def test_the_ends_of_the_spectrum(pair):
    operator, ours = pair
    found = spectrum(ours, top=5, bottom=2, tol=1e-5)
    for which, k, mine in (("LA", 5, found.top.flip(0)), ("SA", 2, found.bottom)):
        values = eigsh(operator.to_scipy(), k=k, which=which, return_eigenvectors=False)
        want = torch.from_numpy(values).double().sort().values
        assert (mine - want).abs().max() <= 1e-8 * found.largest
