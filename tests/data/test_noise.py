import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatmin.data.noise import symmetric_noise


@given(n=st.integers(1, 60), share=st.floats(0, 1), classes=st.integers(2, 7), seed=st.integers(0, 2**40))
def test_exactly_the_share_is_wrong_and_in_range(n, share, classes, seed):
    clean = torch.arange(n) % classes
    noisy = symmetric_noise(clean, share, classes, seed=seed)
    assert int((noisy != clean).sum()) == round(share * n)
    assert noisy.min() >= 0
    assert noisy.max() < classes
    assert torch.equal(clean, torch.arange(n) % classes)


def test_wrong_classes_are_drawn_evenly():
    clean = torch.zeros(30_000, dtype=torch.int64)
    counts = symmetric_noise(clean, 1.0, 4, seed=0).bincount(minlength=4)
    assert counts[0] == 0
    assert all(abs(int(count) - 10_000) < 400 for count in counts[1:])  # 5 standard deviations


def test_the_seed_decides_and_the_global_state_does_not():
    clean = torch.zeros(50, dtype=torch.int64)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = symmetric_noise(clean, 0.5, 3, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(symmetric_noise(clean, 0.5, 3, seed=7), first)
    assert not torch.equal(symmetric_noise(clean, 0.5, 3, seed=8), first)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_bad_share(share):
    with pytest.raises(ValueError, match="share in"):
        symmetric_noise(torch.zeros(3).long(), share, 3, seed=0)


def test_one_class():
    with pytest.raises(ValueError, match="two classes"):
        symmetric_noise(torch.zeros(3).long(), 0.5, 1, seed=0)
