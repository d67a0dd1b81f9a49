import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flatmin.data.images import STATISTICS, Statistics, apportion, split_validation


@settings(deadline=None)
@given(n=st.integers(1, 9), channels=st.integers(1, 4), high=st.sampled_from([2, 17, 256]), seed=st.integers(0, 99))
def test_statistics_are_those_of_numpy_in_float64(n, channels, high, seed):
    x = torch.randint(0, high, (n, channels, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    pixels = x.numpy().astype(np.float64) / 255
    assume((x.flatten(2).amax((0, 2)) > x.flatten(2).amin((0, 2))).all())
    found = Statistics.of(x)
    np.testing.assert_allclose(found.mean, pixels.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(found.std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_statistics_do_not_lose_a_small_deviation_of_many_bright_pixels():
    # One pixel in 250 000 differs by one: E x^2 - (E x)^2 in float32 would give noise, or a negative variance.
    x = torch.full((1, 1, 500, 500), 254, dtype=torch.uint8)
    x[0, 0, 0, 0] = 255
    n = 250_000
    assert Statistics.of(x).std[0] == pytest.approx((n - 1) ** 0.5 / n / 255, rel=1e-12)


def test_published_statistics():
    assert STATISTICS["cifar10"].mean == (0.4914, 0.4822, 0.4465)
    assert STATISTICS["cifar100"].std == (0.2673, 0.2564, 0.2762)


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ((0.5,), (0.1, 0.2), "one mean and one std per channel, got 1 and 2"),
        ((), (), "one mean and one std per channel"),
        ((0.5,), (0.0,), "deviations above 0"),
        ((float("nan"),), (0.1,), "finite means"),
    ],
)
def test_bad_statistics(mean, std, words):
    with pytest.raises(ValueError, match=words):
        Statistics(mean, std)


def test_statistics_of_something_else():
    with pytest.raises(ValueError, match=r"uint8 of shape \(n, C, H, W\), got torch.float32"):
        Statistics.of(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="remove constant channels"):
        Statistics.of(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


@settings(deadline=None)
@given(n=st.integers(2, 200), share=st.floats(0.05, 0.95), seed=st.integers(0, 2**40), classes=st.integers(1, 6))
def test_the_parts_share_nothing_and_cover_everything(n, share, seed, classes):
    size = round(share * n)
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))
    for stratified in (None, labels):
        if not 0 < size < n:
            with pytest.raises(ValueError, match="leaves one part empty"):
                split_validation(n, share, seed=seed, stratified=stratified)
            continue
        train, val = split_validation(n, share, seed=seed, stratified=stratified)
        assert len(val) == size
        assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(n))
        assert torch.equal(train, train.sort().values)
    if 0 < size < n:
        quotas = labels[val].bincount(minlength=classes).double()
        assert ((quotas - size * labels.bincount(minlength=classes).double() / n).abs() < 1).all()


def test_the_split_is_that_of_random_split():
    parts = torch.utils.data.random_split(range(500), [450, 50], generator=torch.Generator().manual_seed(42))
    train, val = split_validation(500)
    assert sorted(parts[0].indices) == train.tolist()
    assert sorted(parts[1].indices) == val.tolist()


def test_the_split_leaves_the_global_state():
    before = torch.get_rng_state()
    first = split_validation(50, seed=3)[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(split_validation(50, seed=3)[1], first)
    assert not torch.equal(split_validation(50, seed=4)[1], first)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_bad_share(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_validation(10, share)


def test_labels_of_another_length():
    with pytest.raises(ValueError, match=r"one label per sample, shape \(10,\), got \(9,\)"):
        split_validation(10, stratified=torch.zeros(9, dtype=torch.int64))


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 50), max_size=8), share=st.floats(0, 1))
def test_quotas_add_up_and_fit(counts, share):
    size = round(share * sum(counts))
    quotas = apportion(counts, size)
    assert sum(quotas) == size
    for count, quota in zip(counts, quotas, strict=True):
        assert 0 <= quota <= count
        assert abs(quota * sum(counts) - size * count) < max(sum(counts), 1)
