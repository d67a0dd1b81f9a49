"""Handwritten digits: 1797 grey images of 8x8 pixels in 10 classes, shipped inside scikit-learn.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI (test part), as packed by scikit-learn.
"""

from __future__ import annotations

import torch

from flatmin.data.dataset import Data, Split

TRAIN, VALIDATION, TEST = 900, 100, 797


def load_digits(*, split_seed: int = 0) -> Data:
    """The digits with a fixed split: 900 train, 100 validation, 797 test.

    Pixels are shifted and scaled by the mean and the standard deviation of the training part. Labels are clean in
    all parts: noise is added to the training part by `flatmin.data.noise`. The validation labels stay clean too,
    because 100 samples with 40 % wrong labels would choose almost at random.

    Args:
        split_seed: of the permutation that makes the parts. Default 0.

    Returns:
        x of shape (n, 1, 8, 8), float32.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits data needs scikit-learn: pip install '.[digits]' in a clone of flatmin, or use your own data."
        ) from error
    loaded = load()
    x = torch.as_tensor(loaded.images, dtype=torch.float32).unsqueeze(1)
    y = torch.as_tensor(loaded.target, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split_seed))
    train, val, test = order.split([TRAIN, VALIDATION, TEST])
    x = (x - x[train].mean()) / x[train].std()
    splits = [Split(x[part], y[part]) for part in (train, val, test)]
    return Data(splits[0], splits[1], splits[2], num_classes=10, name="digits")
