"""Handwritten digits: 1797 grey images of 8x8 pixels in 10 classes, included in scikit-learn.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI (test part), as packed by scikit-learn.
"""

from __future__ import annotations

import torch

from flatmin.data.dataset import Data, Split
from flatmin.words import install

TRAIN, VALIDATION, TEST = 900, 100, 797


def load_digits(*, split_seed: int = 0) -> Data:
    """Load the digits, split into 900 training, 100 validation and 797 test images.

    Pixels are normalised with the mean and the standard deviation of the training part. The labels are clean.
    `flatmin.data.noise` adds label noise to the training part only: with 40 % wrong labels, 100 validation samples
    would choose hyperparameters almost at random.

    Args:
        split_seed: seed of the permutation that makes the parts. Default 0.

    Returns:
        The data: x of shape (n, 1, 8, 8), float32.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the digits data set needs scikit-learn; run: {install('digits')}, or use your own data."
        ) from error
    loaded = load()
    x = torch.as_tensor(loaded.images, dtype=torch.float32).unsqueeze(1)
    y = torch.as_tensor(loaded.target, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split_seed))
    train, val, test = order.split([TRAIN, VALIDATION, TEST])
    x = (x - x[train].mean()) / x[train].std()
    splits = [Split(x[part], y[part]) for part in (train, val, test)]
    return Data(splits[0], splits[1], splits[2], num_classes=10, name="digits")
