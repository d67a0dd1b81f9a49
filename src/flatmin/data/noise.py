"""Symmetric and asymmetric label noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flatmin.data.images import CIFAR100_COARSE, draw_share

CIFAR10_CONFUSIONS = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
"""Truck to automobile, bird to airplane, deer to horse, cat to dog and dog to cat (Patrini et al., CVPR 2017)."""


def symmetric_noise(labels: Tensor, share: float, num_classes: int, *, seed: int) -> Tensor:
    """Replace an exact share of the labels by wrong ones.

    round(share * n) samples are drawn without replacement. Each gets one of the K - 1 other classes with equal
    probability. The result depends only on the seed, not on the global random state.

    Args:
        labels: shape (n,), int64 in 0..K-1.
        share: share of wrong labels, in [0, 1].
        num_classes: number of classes, K, at least 2.
        seed: seed of the generator.

    Returns:
        New labels, shape (n,).

    Raises:
        ValueError: the share is outside [0, 1], or there are fewer than two classes.

    Examples:
        >>> clean = torch.zeros(10, dtype=torch.int64)
        >>> int((symmetric_noise(clean, 0.4, 3, seed=0) != clean).sum())
        4
    """
    if not 0 <= share <= 1:
        raise ValueError(f"noise must be a share in [0, 1], got {share!r}.")
    if share and num_classes < 2:
        raise ValueError(f"label noise needs at least two classes, got {num_classes}.")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, max(num_classes, 2), (len(chosen),), generator=generator)
    noisy = labels.cpu().clone()
    noisy[chosen] = (noisy[chosen] + shift) % num_classes
    return noisy.to(labels.device)


def asymmetric_noise(labels: Tensor, share: float, confusions: Mapping[int, int], *, seed: int) -> Tensor:
    """Replace an exact share of the labels in some classes by the class that each is confused with.

    Of the m samples whose class is in `confusions`, round(share * m) are drawn without replacement, from each class in
    proportion to its size. All other labels stay the same. The result depends only on the seed, not on the global
    random state.

    Args:
        labels: shape (n,), int64.
        share: share of wrong labels among these m samples, in [0, 1]. `CIFAR10_CONFUSIONS` covers half of the classes,
            so 0.4 makes a fifth of all labels wrong; papers call this 40 % noise.
        confusions: maps a class to the class it is confused with: `CIFAR10_CONFUSIONS`, `CIFAR100_CONFUSIONS`, or
            another.
        seed: seed of the generator.

    Returns:
        New labels, shape (n,).

    Raises:
        ValueError: the share is outside [0, 1], a class is negative, or a class is mapped to itself.

    Examples:
        >>> clean = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> asymmetric_noise(clean, 0.5, {0: 2}, seed=0).bincount().tolist()
        [2, 2, 2]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"noise must be a share in [0, 1], got {share!r}.")
    for source, target in confusions.items():
        if source == target or source < 0 or target < 0:
            raise ValueError(
                f"confusions must map a class to another class, got {source} to {target}; leave out classes without "
                "noise."
            )
    clean = labels.cpu()
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))
    order = order[torch.isin(clean[order], torch.tensor(list(confusions), dtype=torch.int64))]
    chosen = draw_share(order, clean, round(share * len(order)))
    noisy = clean.clone()
    for source, target in confusions.items():
        noisy[chosen[clean[chosen] == source]] = target
    return noisy.to(labels.device)


def next_of_group(groups: tuple[int, ...]) -> dict[int, int]:
    """Map each class to the next class of its group, and the last to the first. Groups of one class are left out.

    Args:
        groups: the group of class 0, 1, ...

    Examples:
        >>> next_of_group((7, 3, 7, 7))
        {0: 2, 2: 3, 3: 0}
    """
    members: dict[int, list[int]] = {}
    for label, group in enumerate(groups):
        members.setdefault(group, []).append(label)
    after = {a: b for own in members.values() for a, b in zip(own, own[1:] + own[:1], strict=True) if a != b}
    return dict(sorted(after.items()))


CIFAR100_CONFUSIONS = next_of_group(CIFAR100_COARSE)
"""Each class to the next class of its superclass, in cycles of five (Patrini et al., CVPR 2017)."""
