"""Sharpness of data that are spread over processes is that of all of them, and the same on every rank."""

import math

import pytest
import torch

from flatmin.measure.sharpness import m_sharpness
from tests.dist import scenarios_sharpness as scenarios
from tests.dist.pool import RankError

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("cut", [11, pytest.param(17, marks=pytest.mark.slow)], ids=["11+6", "17+0"])
def test_measures_are_those_of_all_data(ranks, cut):
    whole = scenarios.problem_of("mlp")
    found = {name: measure(whole) for name, measure in scenarios.MEASURES.items()}
    results = ranks.run(scenarios.measures, cut)
    for values, error_gap in results:
        for name, value in values.items():
            want = found[name].sigma if name == "pac-bayes" else found[name].value
            assert value == pytest.approx(want, rel=1e-9), name
        assert error_gap == pytest.approx(found["worst case"].error_gap)
    assert results[0][0] == results[1][0]


def test_groups_are_those_of_each_rank(ranks):
    """11 and 6 examples in groups of three: three groups and two, and two examples are left over on rank 0."""
    model_of = scenarios.problem_of
    parts = [m_sharpness(model_of("mlp", r, 2, cut=11), 3, 0.5, steps=4, errors=True) for r in range(2)]
    gaps = torch.tensor([*parts[0].gaps, *parts[1].gaps], dtype=torch.float64)
    for rank, found in enumerate(ranks.run(scenarios.groups, 3, 11)):
        assert found.value == pytest.approx(float(gaps.mean()), rel=1e-9)
        assert found.error == pytest.approx(float(gaps.std()) / math.sqrt(5), rel=1e-9)
        assert (found.groups, found.left_out) == (5, 2)
        assert found.gaps == pytest.approx(parts[rank].gaps, rel=1e-9)
        assert (found.conventions.examples, found.conventions.terms) == (15, 15.0)
        assert found.error_gap == pytest.approx((3 * parts[0].error_gap + 2 * parts[1].error_gap) / 5)


def test_groups_that_one_rank_is_too_small_for(ranks):
    found = ranks.run(scenarios.groups, 9, 11)
    assert [f.groups for f in found] == [1, 1] and [len(f.gaps) for f in found] == [1, 0]
    assert found[0].value == found[1].value and math.isnan(found[0].error)
    with pytest.raises(RankError, match="make no group of m=12"):
        ranks.run(scenarios.groups, 12, 11)
