import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmin.stats import Stat, holm, incomplete_beta, paired, paired_p, summarise, t_quantile


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 29, 100, 1000])
@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.995, 0.9999])
def test_quantiles_against_scipy(df, p):
    scipy = pytest.importorskip("scipy.stats")
    assert t_quantile(p, df) == pytest.approx(scipy.t.ppf(p, df), rel=1e-8)
    assert t_quantile(1 - p, df) == pytest.approx(scipy.t.ppf(1 - p, df), rel=1e-8)


@given(a=st.floats(0.1, 60), b=st.floats(0.1, 60), x=st.floats(0, 1))
def test_incomplete_beta_against_scipy(a, b, x):
    scipy = pytest.importorskip("scipy.special")
    assert incomplete_beta(a, b, x) == pytest.approx(scipy.betainc(a, b, x), rel=1e-8, abs=1e-10)


def test_known_quantiles():
    assert t_quantile(0.975, 2) == pytest.approx(4.302652729911275, rel=1e-10)
    assert t_quantile(0.75, 1) == pytest.approx(1.0, rel=1e-12)  # Cauchy
    assert t_quantile(0.5, 7) == 0


@pytest.mark.parametrize(("p", "df"), [(0, 3), (1, 3), (0.9, 0), (math.nan, 3)])
def test_quantiles_outside_their_range(p, df):
    with pytest.raises(ValueError, match="0 < p < 1"):
        t_quantile(p, df)


def test_interval():
    stat = summarise([90.0, 92.0, 94.0])
    assert stat.mean == 92
    assert stat.half == pytest.approx(4.302652729911275 * 2 / math.sqrt(3))
    assert stat.n == 3
    assert stat.values == (90.0, 92.0, 94.0)


def test_one_value_and_none():
    assert math.isnan(summarise([5.0]).half)
    assert summarise([5.0]).mean == 5
    assert summarise([]).n == 0
    assert math.isnan(summarise([]).mean)
    assert summarise([5.0]).covers_zero


def test_paired_differences_use_shared_seeds():
    stat = paired({0: 95.0, 1: 94.0, 3: 50.0}, {0: 90.0, 1: 90.0, 2: 10.0})
    assert stat.values == (5.0, 4.0)
    assert not Stat(mean=2.0, half=1.0, n=3, values=()).covers_zero
    assert Stat(mean=-2.0, half=3.0, n=3, values=()).covers_zero
    assert paired({0: 1.0}, {1: 1.0}) is None


@given(st.lists(st.floats(-50, 50).map(lambda x: round(x, 3)), min_size=2, max_size=8))
def test_paired_p_against_scipy(values):
    scipy = pytest.importorskip("scipy.stats")
    diff = summarise(values)
    if diff.half < 1e-9:
        return
    assert paired_p(diff) == pytest.approx(scipy.ttest_1samp(values, 0).pvalue, rel=1e-6, abs=1e-12)


def test_paired_p_by_hand():
    # df = 1 is Cauchy: P(|T| > t) = 1 - 2 atan(t) / pi; mean 2, s = sqrt(2), t = 2.
    assert paired_p(summarise([1.0, 3.0])) == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    # df = 2: P(|T| > t) = 1 - t / sqrt(2 + t^2); mean 2, s = 1, t = 2 sqrt(3).
    assert paired_p(summarise([1.0, 2.0, 3.0])) == pytest.approx(1 - math.sqrt(12 / 14))
    assert paired_p(summarise([0.0, 0.0])) == 1 and paired_p(summarise([2.0, 2.0])) == 0
    assert paired_p(summarise([-1.0, 1.0])) == 1
    for few in ([], [1.0]):
        with pytest.raises(ValueError, match="needs two differences"):
            paired_p(summarise(few))


def test_paired_p_of_two_samples_is_scipys():
    scipy = pytest.importorskip("scipy.stats")
    a, b = [95.0, 96.1, 95.5, 97.0], [94.0, 96.3, 94.9, 95.8]
    diff = paired(dict(enumerate(a)), dict(enumerate(b)))
    assert paired_p(diff) == pytest.approx(scipy.ttest_rel(a, b).pvalue, rel=1e-8)


def test_holm_by_hand():
    assert holm([]) == [] and holm([0.2]) == [0.2]
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5, 0.001]) == pytest.approx([1.0, 1.0, 0.003])
    assert holm([0.02, 0.02]) == [0.04, 0.04]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni_and_keeps_the_order(p):
    found = holm(p)
    for raw, corrected in zip(p, found, strict=True):
        assert raw <= corrected <= min(1.0, len(p) * raw)
    order = sorted(range(len(p)), key=lambda i: p[i])
    assert [found[i] for i in order] == sorted(found)
    # The definition: the largest of (m - j + 1) p_(j) over the j smallest, at most 1.
    for k, i in enumerate(order):
        assert found[i] == min(1.0, max((len(p) - j) * p[order[j]] for j in range(k + 1)))
