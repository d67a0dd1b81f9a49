"""From an official training and test part to the three parts of `Data`."""

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
    """Images of bytes with a validation part drawn from the training part by `split_validation`.

    Args:
        train: official training part, uint8.
        test: official test part.
        num_classes: K.
        name: what tables and errors call it.
        validation: share of the training part. None: no part of its own; train on all of it and validate on the test
            part, the protocol of VaSSO. Default 0.1.
        split_seed: of the split. Default 42.
        stratified: give every class the same share in the validation part. Default False.
        statistics: Default: those of the official training part, validation part included, as the papers have it; all
            of it is read for them.
        augment: of the training images. Default: none.

    Raises:
        ValueError: as `split_validation`, `Statistics.of` and `Data`.
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
