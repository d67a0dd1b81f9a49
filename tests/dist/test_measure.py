"""Data spread over processes: every measure is that of all of them."""

import pytest
import torch

from flatmin.measure.curvature import Hessian, dense
from flatmin.measure.krylov import spectrum
from flatmin.measure.trace import trace
from tests.dist import scenarios_measure as scenarios

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("cut", [11, 16, 17], ids=["11+6", "16+1", "17+0"])
@pytest.mark.parametrize("name", ["mlp", "sum", "class weights", "batchnorm"])
def test_products_are_those_of_all_data(ranks, name, cut):
    whole = scenarios.problem_of(name)
    want_value, want_gradient = whole.gradient()
    want = {key: dense(operator(whole)) for key, operator in scenarios.OPERATORS.items() if key}
    for value, gradient, found, record, sent in ranks.run(scenarios.matrices, name, cut):
        assert value == pytest.approx(want_value, rel=1e-12)
        torch.testing.assert_close(gradient, want_gradient, rtol=0, atol=1e-12)
        for key, matrix in found.items():
            torch.testing.assert_close(matrix, want[key], rtol=0, atol=1e-12)
        assert (record.examples, record.terms) == (17, whole.conventions.terms)
        assert sent == [whole.size]  # one message a product


def test_runs_agree_on_all_ranks(ranks):
    operator = Hessian(scenarios.problem_of("mlp"))
    known = spectrum(operator, top=3)
    want = trace(operator, known, tol=0.1).value
    results = ranks.run(scenarios.runs, "mlp")
    # Where a run stops may hang on rounding, but never on the rank.
    assert results[0][1] == results[1][1] == pytest.approx(want, rel=0.02)
    for top, _ in results:
        assert torch.equal(top, results[0][0])
        torch.testing.assert_close(top, known.top, rtol=1e-6, atol=0)
