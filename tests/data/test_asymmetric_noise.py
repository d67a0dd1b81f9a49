import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatmin.data.images import CIFAR100_COARSE
from flatmin.data.noise import CIFAR10_CONFUSIONS, CIFAR100_CONFUSIONS, asymmetric_noise, next_of_group


@settings(deadline=None)
@given(n=st.integers(1, 120), share=st.floats(0, 1), seed=st.integers(0, 2**40))
def test_exactly_the_share_of_the_affected_is_wrong(n, share, seed):
    clean = torch.randint(0, 10, (n,), generator=torch.Generator().manual_seed(seed))
    before = clean.clone()
    noisy = asymmetric_noise(clean, share, CIFAR10_CONFUSIONS, seed=seed)
    assert torch.equal(clean, before)
    affected = torch.isin(clean, torch.tensor(list(CIFAR10_CONFUSIONS)))
    wrong = noisy != clean
    assert int(wrong.sum()) == round(share * int(affected.sum()))
    assert not (wrong & ~affected).any()
    for source, target in CIFAR10_CONFUSIONS.items():
        own = clean == source
        assert (noisy[own & wrong] == target).all()
        assert abs(int((own & wrong).sum()) * int(affected.sum()) - int(wrong.sum()) * int(own.sum())) <= n


def test_of_cifar_each_class_gives_the_same_number():
    clean = torch.arange(10).repeat_interleave(4500)
    noisy = asymmetric_noise(clean, 0.4, CIFAR10_CONFUSIONS, seed=0)
    matrix = torch.zeros(10, 10, dtype=torch.int64)
    matrix.index_put_((clean, noisy), torch.ones_like(clean), accumulate=True)
    for label in range(10):
        target = CIFAR10_CONFUSIONS.get(label)
        assert int(matrix[label, label]) == (4500 if target is None else 2700)
        assert target is None or int(matrix[label, target]) == 1800


def test_cats_and_dogs_change_places():
    clean = torch.tensor([3, 3, 5, 5])
    assert asymmetric_noise(clean, 1.0, CIFAR10_CONFUSIONS, seed=0).tolist() == [5, 5, 3, 3]


def test_the_samples_are_drawn_evenly():
    clean = torch.zeros(8, dtype=torch.int64)
    times = sum((asymmetric_noise(clean, 0.5, {0: 1}, seed=seed) for seed in range(2000)), torch.zeros(8))
    assert ((times - 1000).abs() < 5 * 500**0.5).all()


def test_the_seed_decides_and_the_global_state_does_not():
    clean = torch.zeros(50, dtype=torch.int64)
    before = torch.get_rng_state()
    first = asymmetric_noise(clean, 0.5, {0: 1}, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(asymmetric_noise(clean, 0.5, {0: 1}, seed=7), first)
    assert not torch.equal(asymmetric_noise(clean, 0.5, {0: 1}, seed=8), first)


def test_nothing_affected():
    clean = torch.tensor([0, 1])
    assert torch.equal(asymmetric_noise(clean, 1.0, {7: 8}, seed=0), clean)
    assert torch.equal(asymmetric_noise(clean, 1.0, {}, seed=0), clean)


def test_classes_of_cifar100_go_round_within_their_superclass():
    assert sorted(CIFAR100_CONFUSIONS) == sorted(CIFAR100_CONFUSIONS.values()) == list(range(100))
    for label in range(100):
        circle = [label]
        while (after := CIFAR100_CONFUSIONS[circle[-1]]) != label:
            circle.append(after)
        assert len(circle) == 5
        assert len({CIFAR100_COARSE[member] for member in circle}) == 1
    # Aquatic mammals: beaver 4, dolphin 30, otter 55, seal 72, whale 95.
    assert [CIFAR100_CONFUSIONS[label] for label in (4, 30, 55, 72, 95)] == [30, 55, 72, 95, 4]


def test_a_group_of_one_is_left_out():
    assert next_of_group((0, 1, 0)) == {0: 2, 2: 0}


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_bad_share(share):
    with pytest.raises(ValueError, match="share in"):
        asymmetric_noise(torch.zeros(3).long(), share, {0: 1}, seed=0)


@pytest.mark.parametrize("pair", [(1, 1), (-1, 0), (0, -1)])
def test_bad_confusions(pair):
    with pytest.raises(ValueError, match=f"must map a class to another class, got {pair[0]} to {pair[1]}"):
        asymmetric_noise(torch.zeros(3).long(), 0.5, dict([pair]), seed=0)
