import numpy as np
import pytest
import torch

from flatmin.data.dataset import Data, Split, as_data


def pair(n=4, shape=(3,), classes=2):
    return torch.randn(n, *shape), torch.arange(n) % classes


def test_three_pairs_become_data():
    data = as_data((pair(6, classes=3), pair(3), pair(2)), "mine")
    assert (len(data.train), len(data.val), len(data.test)) == (6, 3, 2)
    assert data.num_classes == 3
    assert data.name == "mine"
    assert not data.wrong.any()


def read_only(x):
    x.flags.writeable = False
    return x


def test_arrays_of_any_layout_become_float32_and_int64():
    """Without a warning, which the settings of pytest make an error."""
    for change in [
        lambda x: x,
        read_only,  # as pandas hands them out
        lambda x: x[::-1].copy()[::-1],
        lambda x: np.asfortranarray(x),
        lambda x: x.astype(x.dtype.newbyteorder(">")),
        lambda x: x.astype(object),
        lambda x: x.astype(np.longdouble if x.dtype.kind == "f" else np.uint16),
        lambda x: x.astype(np.float16 if x.dtype.kind == "f" else np.uint64),
        lambda x: list(x),
        lambda x: [torch.tensor(row) for row in x.tolist()],
    ]:
        x, y = np.arange(12.0).reshape(4, 3) / 8, np.array([0, 1, 0, 1], dtype=np.int32)
        data = as_data([(change(x.copy()), change(y.copy()))] * 3, "mine")
        assert data.train.x.dtype == torch.float32 and data.train.y.dtype == torch.int64
        assert data.train.x.tolist() == x.tolist() and data.train.y.tolist() == y.tolist()
        data.train.x[0, 0] = 9.0
        assert as_data([(x > 0.5, y)] * 3, "mine").train.x.tolist() == (x > 0.5).astype(float).tolist()


def test_data_passes_through():
    data = as_data((pair(), pair(), pair()), "mine")
    assert as_data(data, "other") is data


def test_noisy_labels_keep_the_clean_ones():
    data = as_data((pair(), pair(), pair()), "mine")
    noisy = data.with_labels(1 - data.train.y)
    assert noisy.wrong.all()
    assert torch.equal(noisy.clean, data.train.y)
    assert not data.wrong.any()


def test_misfits_are_one_sentence():
    for found, words in [
        (None, "mine returned a NoneType; expected .* three pairs"),
        ((pair(), pair()), "mine returned a tuple of 2"),
        ((pair(), 3, pair()), "mine returned a int for validation"),
        ((("text", [1]), pair(), pair()), "mine: train.x cannot be converted to a tensor: it contains text"),
        (((torch.randn(2, 3), ["cat", "dog"]), pair(), pair()), "train.y cannot .* contains text; convert it"),
        (((np.array([["a", 1.0]], object), [0]), pair(), pair()), "has dtype object and contains str"),
        (((np.ma.masked_less(np.eye(2), 1), [0, 1]), pair(), pair()), "entries are masked"),
        (((torch.eye(2).to_sparse(), [0, 1]), pair(), pair()), "sparse or complex"),
        ((pair(), pair(), (torch.randn(4, 5), torch.zeros(4).long())), "test.x has samples of shape .5,., but train.x"),
        (((torch.randn(4, 3), torch.randn(4)), pair(), pair()), "train.y must be int64 labels"),
        (((torch.randn(4, 3), torch.zeros(5).long()), pair(), pair()), "as many inputs as labels"),
        (((torch.randn(0, 3), torch.zeros(0).long()), pair(), pair()), "at least one"),
        ((pair(), pair(), (torch.full((2, 3), torch.nan), torch.zeros(2).long())), "test.x contains NaN"),
        (((torch.randn(2, 3), torch.tensor([-1, 0])), pair(), pair()), "labels from -1 to 0, expected 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            as_data(found, "mine")


def test_labels_beyond_the_number_of_classes():
    with pytest.raises(ValueError, match=r"expected 0 to 1 \(2 classes\)"):
        Data(Split(*pair(classes=3)), Split(*pair()), Split(*pair()), num_classes=2)


def test_clean_labels_of_another_shape():
    with pytest.raises(ValueError, match="clean has shape"):
        Data(Split(*pair()), Split(*pair()), Split(*pair()), num_classes=2, clean=torch.zeros(3).long())
