import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmin.stats import Stat, incomplete_beta, paired, summarise, t_quantile


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
