"""Published numbers from dense matrices, with each source's own data and statistic."""

import pytest
import torch

from flatmin.measure.curvature import Hessian, dense
from flatmin.measure.presets import (
    andriushchenko_m128,
    edge_of_stability,
    empirical_sam,
    pyhessian_batch,
    sam_paper,
)
from flatmin.measure.problem import Problem, only
from flatmin.measure.sharpness import worst_case
from tests.measure.nets import batches, make


@pytest.fixture
def problem():
    model, x, y, loss = make("mlp")
    return Problem(model, loss, batches(x, y, 5))


def values_of(problem):
    return torch.linalg.eigvalsh(dense(Hessian(problem)))


def test_a_part_of_the_batches_is_their_mean(problem):
    model, x, y, loss = make("mlp")
    part = only(problem, problem.batches[1:])
    torch.testing.assert_close(
        dense(Hessian(part)), dense(Hessian(Problem(model, loss, (x[5:], y[5:])))), rtol=0, atol=1e-12
    )
    assert (part.conventions.examples, part.conventions.batch) == (12, 5)
    assert problem.conventions.examples == 17
    with pytest.raises(ValueError, match="at least one batch"):
        only(problem, [])


def test_largest_magnitudes_of_the_first_batch(problem):
    model, x, y, loss = make("mlp")
    want = values_of(Problem(model, loss, (x[:5], y[:5])))
    want = want[want.abs().argsort(descending=True)][:4]
    found = pyhessian_batch(problem, top=4, tol=1e-6)
    assert list(found.numbers.values()) == pytest.approx(want.tolist(), rel=1e-8)
    assert found.conventions.examples == 5 and found.converged


def test_lambda_1_over_lambda_5(problem):
    want = values_of(problem).flip(0)
    found = sam_paper(problem, tol=1e-6).numbers
    assert found["lambda_1"] == pytest.approx(float(want[0]), rel=1e-8)
    assert found["lambda_1 / lambda_5"] == pytest.approx(float(want[0] / want[4]), rel=1e-8)


def test_top_eigenvalues_of_mini_batches(problem):
    each = [values_of(only(problem, [b])).flip(0)[:50] for b in problem.batches[:3]]
    pooled = torch.cat(each)
    found = empirical_sam(problem, top=50, batches=3, tol=1e-6).numbers
    assert found["largest"] == pytest.approx(float(pooled.max()), rel=1e-8)
    # Of a few samples many eigenvalues are zero, and rounding gives each a sign: the sum tells what the mean hides.
    assert 0.0 < found["mean of positives"] <= float(pooled[pooled > 1e-12].mean()) * (1 + 1e-8)
    assert 0.0 < found["share negative"] < 1.0
    with pytest.raises(ValueError, match="uses 40 batches, but the problem has 4"):
        empirical_sam(problem)


def test_the_edge(problem):
    found = edge_of_stability(problem, 0.1, momentum=0.9, tol=1e-6).numbers
    want = float(values_of(problem)[-1])
    assert found == pytest.approx({"lambda_1": want, "edge": 38.0, "lambda_1 / edge": want / 38.0}, rel=1e-8)


def test_m_sharpness_of_the_first_examples():
    model, x, y, loss = make("mlp")
    x, y = x.repeat(20, 1) + 0.1 * torch.randn(340, 5, dtype=torch.float64), y.repeat(20)
    problem = Problem(model, loss, batches(x, y, 100))
    found = andriushchenko_m128(problem, 0.01, examples=256)
    each = [
        worst_case(Problem(model, loss, (x[i : i + 128], y[i : i + 128])), 0.01, norm="linf", adaptive=True).value
        for i in (0, 128)
    ]
    assert found.m == 128 and found.groups == 2
    assert found.value == pytest.approx(sum(each) / 2, rel=0.05)
