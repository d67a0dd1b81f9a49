import sys

import pytest
import torch

from flatmin.data.digits import load_digits

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_sizes_and_types(digits):
    assert digits.train.x.shape == (900, 1, 8, 8)
    assert digits.val.x.shape == (100, 1, 8, 8)
    assert digits.test.x.shape == (797, 1, 8, 8)
    assert digits.train.x.dtype == torch.float32
    assert digits.num_classes == 10


def test_parts_are_disjoint_and_cover_everything(digits):
    from sklearn.datasets import load_digits as load

    # 1797 images, no two alike: as many different ones in the three parts together as in the source.
    assert len({tuple(row) for row in load().data}) == 1797
    seen = [tuple(x.flatten().tolist()) for part in (digits.train, digits.val, digits.test) for x in part.x]
    assert len(seen) == len(set(seen)) == 1797


def test_normalised_by_the_training_part(digits):
    assert abs(digits.train.x.mean().item()) < 1e-5
    assert abs(digits.train.x.std().item() - 1) < 1e-5
    assert digits.test.x.mean().item() != 0


def test_the_split_is_fixed_by_its_seed(digits):
    assert torch.equal(load_digits().train.x, digits.train.x)
    assert not torch.equal(load_digits(split_seed=1).train.y, digits.train.y)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[digits\]'"):
        load_digits()
