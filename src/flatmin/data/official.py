"""Make the three parts of `Data` from an official training and test part."""

from __future__ import annotations

from flatmin.data.augment import Augment
from flatmin.data.dataset import Data, Split
from flatmin.data.images import Statistics, split_validation


def three_parts(
    train: Split,
    test: Split,
    *,
    num_classes: int,
    name: str,
    validation: float | None = 0.1,
    split_seed: int = 42,
    stratified: bool = False,
    statistics: Statistics | None = None,
    augment: Augment | None = None,
) -> Data:
    """Make a data set of byte images whose validation part is drawn from the training part by `split_validation`.

    Args:
        train: official training part, uint8.
        test: official test part.
        num_classes: number of classes, K.
        name: name for tables and error messages.
        validation: share of the training part used for validation. None: train on the whole training part and validate
            on the test part, which is the protocol of VaSSO. Default 0.1.
        split_seed: seed of the validation split. Default 42.
        stratified: give each class the same share in the validation part. Default False.
        statistics: channel statistics for normalisation. Default None: those of the official training part including
            the validation part, as in the papers. Computing them reads all training images.
        augment: augmentation of the training images. Default None: no augmentation.

    Raises:
        ValueError: see `split_validation`, `Statistics.of` and `Data`.
    """
    used = Statistics.of(train.x[:]) if statistics is None else statistics
    if validation is None:
        return Data(train, test, test, num_classes=num_classes, name=name, statistics=used, augment=augment)
    labels = train.y if stratified else None
    chosen, held_out = split_validation(len(train), validation, seed=split_seed, stratified=labels)
    return Data(
        train.only(chosen),
        train.only(held_out),
        test,
        num_classes=num_classes,
        name=name,
        statistics=used,
        augment=augment,
    )
