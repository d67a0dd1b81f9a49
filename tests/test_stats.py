import itertools
import math
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmin.stats import (
    PERCENT,
    POINTS,
    Stat,
    holm,
    incomplete_beta,
    paired,
    paired_p,
    summarise,
    t_quantile,
)


def test_quantiles_against_scipy():
    scipy = pytest.importorskip("scipy.stats")
    for df, p in itertools.product((1, 2, 3, 4, 5, 9, 29, 100, 1000), (0.6, 0.9, 0.975, 0.995, 0.9999)):
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


def test_quantiles_outside_their_range():
    for p, df in ((0, 3), (1, 3), (0.9, 0), (math.nan, 3)):
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
    if math.isnan(diff.half):
        assert len(set(values)) == 1
        return
    assert paired_p(diff) == pytest.approx(scipy.ttest_1samp(values, 0).pvalue, rel=1e-6, abs=1e-12)


def test_paired_p_by_hand():
    # df = 1 is Cauchy: P(|T| > t) = 1 - 2 atan(t) / pi; mean 2, s = sqrt(2), t = 2.
    assert paired_p(summarise([1.0, 3.0])) == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    # df = 2: P(|T| > t) = 1 - t / sqrt(2 + t^2); mean 2, s = 1, t = 2 sqrt(3).
    assert paired_p(summarise([1.0, 2.0, 3.0])) == pytest.approx(1 - math.sqrt(12 / 14))
    assert paired_p(summarise([0.0, 0.0])) == paired_p(summarise([-1.0, 1.0])) == 1
    for few in ([], [1.0]):
        with pytest.raises(ValueError, match="needs two differences"):
            paired_p(summarise(few))


def test_paired_p_of_two_samples_is_scipys():
    scipy = pytest.importorskip("scipy.stats")
    a, b = [95.0, 96.1, 95.5, 97.0], [94.0, 96.3, 94.9, 95.8]
    diff = paired(dict(enumerate(a)), dict(enumerate(b)))
    assert paired_p(diff) == pytest.approx(scipy.ttest_rel(a, b).pvalue, rel=1e-8)


@pytest.mark.parametrize(("seeds", "offset"), [(2, -0.3), (3, 12.5), (5, 1.0)])
def test_equal_differences_show_no_certainty(seeds, offset):
    """Differences of counts agree by chance, also where floating point makes 90.1 - 90.4 and 80.4 - 80.7 differ."""
    base = {seed: 90.4 - 9.7 * seed for seed in range(seeds)}
    values = {seed: round(value + offset, 1) for seed, value in base.items()}
    unknown = paired(values, base)
    assert math.isnan(unknown.half) and math.isnan(paired_p(unknown)) and unknown.covers_zero
    assert unknown.text("+.2f") == f"{offset:+.2f}"
    # A tenth of a point is a sample of 1000; t is then mean sqrt(n) over that tenth.
    known = paired(values, base, step=0.1)
    assert known.half == pytest.approx(t_quantile(0.975, seeds - 1) * 0.1 / math.sqrt(seeds))
    scipy = pytest.importorskip("scipy.stats")
    expected = 2 * scipy.t.sf(abs(offset) * math.sqrt(seeds) / 0.1, seeds - 1)
    assert paired_p(known) == pytest.approx(expected, rel=1e-6)


def test_equal_differences_of_none_and_of_single_precision():
    nothing = paired({0: 90.0, 1: 91.0}, {0: 90.0, 1: 91.0}, step=1.0)
    assert nothing.half > 8 and paired_p(nothing) == 1 and nothing.covers_zero
    # What float32 makes of 90.1 - 90.4 and 80.4 - 80.7.
    assert math.isnan(summarise([90.10000610351562, 90.0999984741211]).half)
    assert not math.isnan(summarise([0.5, 0.5001]).half)


@given(st.lists(st.integers(0, 797), min_size=2, max_size=10), st.integers(0, 200))
def test_ordinary_spreads_keep_their_interval(counts, shift):
    """The floor changes nothing where the standard deviation is a sample or more."""
    values = [100 * count / 797 for count in counts]
    deviation = statistics.stdev(values)
    plain = t_quantile(0.975, len(values) - 1) * max(deviation, 100 / 797) / math.sqrt(len(values))
    assert summarise(values, step=100 / 797).half == pytest.approx(plain)
    if deviation >= 100 / 797:
        assert summarise(values, step=100 / 797).half == pytest.approx(summarise(values).half)


def wrong_by_chance(chances, seeds, step=1.0):
    """The exact chances that the test finds a difference and that the interval misses the mean: {count: chance}."""
    mean = sum(count * chance for count, chance in chances.items())
    found = missed = 0.0
    for counts in itertools.combinations_with_replacement(chances, seeds):
        weight = math.factorial(seeds)
        for count, times in Counter(counts).items():
            weight *= chances[count] ** times / math.factorial(times)
        diff = paired({i: 50.0 + c for i, c in enumerate(counts)}, dict.fromkeys(range(seeds), 50.0), step=step)
        found += weight * (paired_p(diff) < 0.05)
        missed += weight * (abs(diff.mean - mean) > diff.half)
    return found, missed


def rounded(mean, deviation):
    """Chances of a normal number that is rounded to whole samples."""
    normal = statistics.NormalDist(mean, deviation)
    reach = range(math.floor(mean - 5 * deviation), math.ceil(mean + 5 * deviation) + 1)
    return {count: normal.cdf(count + 0.5) - normal.cdf(count - 0.5) for count in reach}


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_the_level_holds_for_differences_of_few_samples(seeds):
    """Counted out, not drawn: no p value below 5 % and no interval beside the mean in more than 5 % of the cases."""
    coins = [{-1: q, 0: 1 - 2 * q, 1: q} for q in (0.02, 0.25, 0.4, 0.5)]
    bells = [rounded(0.0, deviation) for deviation in (0.2, 0.5, 1.0, 2.0)[: 9 - 2 * seeds]]
    for chances in (*coins, *bells):
        found, missed = wrong_by_chance(chances, seeds)
        assert found <= 0.05 and missed <= 0.05
    for chances in ({0: 0.9, 1: 0.1}, {0: 0.5, 1: 0.5}, rounded(0.3, 0.4), rounded(0.5, 1.0)):
        assert wrong_by_chance(chances, seeds)[1] <= 0.05
    # Without the floor of a sample equal differences count as certain.
    assert wrong_by_chance({-1: 0.5, 1: 0.5}, seeds, step=1e-9)[0] == pytest.approx(2.0 ** (1 - seeds))


@pytest.mark.slow
def test_the_level_holds_from_2_to_10_seeds_and_from_100_to_10000_samples(capsys):
    """Simulated test sets; `python -m pytest -m slow tests/test_stats.py -s` prints that of docs/studies/compare.md.

    Two methods of equal accuracy get a count each by seed, the same but for `unsure` images that each of them answers
    by a coin, alone at the lower end of what a share can be; the last kind of networks answers every image by chances
    that differ from seed to seed.
    """
    numpy = pytest.importorskip("numpy")
    draws, lines = 4000, ["samples  unsure    " + "".join(f"{seeds:>13}" for seeds in range(2, 11)) + "  seeds"]
    kinds = [*itertools.product((100, 1000, 10_000), (1, 4, 16, 64, None), (True,)), (1000, 4, False)]
    for samples, unsure, floor in kinds:
        step = 100 / samples if floor else 1e-9
        random = numpy.random.default_rng([samples, unsure or 0])
        cells = []
        for seeds in range(2, 11):
            shape = (2, draws, seeds)
            if unsure is None:
                chance = numpy.clip(random.normal(0.9, 0.02, shape[1:]), 0, 1)
                counts, shared, truth = random.binomial(samples, chance, shape), 0, 90.0
            else:
                shared = random.integers(0, samples - unsure + 1, shape[1:])
                counts, truth = random.binomial(unsure, 0.5, shape) + shared, 50 * unsure / samples
            accuracies = (100 * counts / samples).tolist()
            alone = (100 * (counts[0] - shared) / samples).tolist()
            found = missed = 0
            for draw in range(draws):
                ours, theirs = (dict(enumerate(part[draw])) for part in accuracies)
                diff = paired(ours, theirs, step=step, ends=POINTS)
                found += paired_p(diff) < 0.05
                assert (paired_p(diff) < 0.05) is not diff.covers_zero
                share = summarise(alone[draw], step=step, ends=PERCENT)
                missed += not share.low <= truth <= share.high
            # Four standard errors of a share of 5 %: there are 270 of them.
            assert not floor or max(found, missed) / draws < 0.05 + 4 * math.sqrt(0.05 * 0.95 / draws)
            cells.append(f"{100 * found / draws:6.1f} / {100 * missed / draws:4.1f}")
        lines.append(f"{samples:7}  {unsure or 'all':>6}    {''.join(cells)}{'' if floor else '  (no floor)'}")
    with capsys.disabled():
        print("\nShare of differences found where there is none / of intervals that miss the mean, in %\n")
        print("\n".join(lines))


def test_intervals_end_where_numbers_end():
    """Of a share "50 ± 220 %" says less than it seems to."""
    wide = summarise([28.0, 72.0], ends=PERCENT)
    assert wide.half > 200 and (wide.low, wide.high) == (0, 100) and wide.cut
    assert wide.text() == "50.0 (0 to 100)"
    high = summarise([92.0, 96.0, 100.0], ends=PERCENT)
    assert high.text(".2f") == f"96.00 ({96 - high.half:.2f} to 100)" and not summarise([70.0, 71.0], ends=PERCENT).cut
    assert summarise([-60.0, 60.0], ends=POINTS).text("+.1f") == "+0.0 (-100 to +100)"
    assert summarise([92.0, 96.0, 100.0]).text(gap=" ") == "96.0 ± 9.9"
    # A half width that rounds to 0 is shown all the same.
    assert summarise([0.5, 0.5001, 0.5002]).text(".2f") == "0.50 ±0.0002"
    assert summarise([5.0]).text() == "5.0" and not summarise([]).cut


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
