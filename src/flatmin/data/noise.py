"""Label noise."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetric_noise(labels: Tensor, share: float, num_classes: int, *, seed: int) -> Tensor:
    """Labels with an exact share of them replaced by a wrong one.

    round(share * n) samples are drawn without replacement; each gets one of the K - 1 other classes, all equally
    likely. The result depends on the seed alone, not on the global random state.

    Args:
        labels: shape (n,), int64 in 0..K-1.
        share: in [0, 1].
        num_classes: K, at least 2.
        seed: of the generator.

    Returns:
        New labels, shape (n,).

    Raises:
        ValueError: a share outside [0, 1], or noise with fewer than two classes.

    Example:
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
