"""Channel statistics, superclasses and the validation split of image data sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel, for pixels scaled to [0, 1].

    Args:
        mean: one number per channel.
        std: one number per channel, above 0: the population standard deviation (divided by the number of pixels).

    Raises:
        ValueError: there is no channel, the lengths differ, or a standard deviation is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))
        object.__setattr__(self, "std", tuple(map(float, self.std)))
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                f"statistics need one mean and one std per channel, got {len(self.mean)} and {len(self.std)}."
            )
        if not all(map(math.isfinite, self.mean)) or not all(0 < std < math.inf for std in self.std):
            raise ValueError(
                f"statistics need finite means and standard deviations above 0, got {self.mean} and {self.std}; "
                "remove constant channels."
            )

    @classmethod
    def of(cls, x: Tensor) -> Statistics:
        """Compute the statistics of a data set from exact sums.

        mean = S / (255 N) and std = sqrt(N Q - S^2) / (255 N), where S is the sum of the N bytes of a channel and Q the
        sum of their squares. Both sums are exact integers; only the final division and square root are rounded.

        Args:
            x: training images, shape (n, C, H, W), uint8.

        Raises:
            ValueError: `x` has another dtype or shape, no pixels, or a constant channel.
        """
        check_bytes(x)
        means, deviations = [], []
        for channel in range(x.shape[1]):
            histogram = torch.bincount(x[:, channel].flatten(), minlength=256).tolist()
            pixels = sum(histogram)
            first = sum(value * count for value, count in enumerate(histogram))
            second = sum(value * value * count for value, count in enumerate(histogram))
            means.append(first / (255 * pixels))
            deviations.append(math.sqrt(pixels * second - first * first) / (255 * pixels))
        return cls(tuple(means), tuple(deviations))


CIFAR10 = Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
"""Statistics of the 50 000 training images of CIFAR-10, rounded to four digits as in the papers."""

CIFAR100 = Statistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
"""Statistics of the 50 000 training images of CIFAR-100, rounded to four digits as in the papers."""

IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Statistics of a part of ImageNet's training images, as in nearly all published code since Torch7."""

HALF = Statistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Maps bytes to the range from -1 to 1, as expected by many pretrained vision transformers."""

STATISTICS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "imagenet": IMAGENET, "half": HALF}

CIFAR100_COARSE = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)
"""The superclass of each of the 100 classes of CIFAR-100, as given in the records of the release."""


def check_bytes(x: Tensor) -> None:
    """Raise ValueError unless x is a batch of uint8 images with at least one pixel."""
    if x.dtype != torch.uint8 or x.dim() != 4 or not x.numel():
        raise ValueError(f"images must be uint8 of shape (n, C, H, W), got {x.dtype} of shape {tuple(x.shape)}.")


def split_validation(
    n: int, share: float = 0.1, *, seed: int = 42, stratified: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the indices of a training and a validation part.

    round(share * n) samples are drawn without replacement. Without `stratified`, they are the same as those of
    `torch.utils.data.random_split` with a generator of the same seed. The result depends only on the seed, not on the
    global random state.

    Args:
        n: number of samples.
        share: share of the validation part, in (0, 1). Default 0.1, which gives 45 000 and 5000 images of CIFAR, as in
            BiSAM and later papers.
        seed: seed of the generator. Default 42, from the same source.
        stratified: labels, shape (n,), int64. Each class then contributes in proportion to its size, rounded such that
            the total is kept. Default None: classes are ignored.

    Returns:
        Indices of the training part and of the validation part, ascending, int64. Together they are 0..n-1.

    Raises:
        ValueError: the share leaves one part empty, or the labels have another length.
    """
    if not 0 < share < 1:
        raise ValueError(f"the validation share must lie between 0 and 1, got {share!r}.")
    size = round(share * n)
    if not 0 < size < n:
        raise ValueError(f"a validation share of {share} of {n} samples leaves one part empty; use another share.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if stratified is None:
        taken = order[n - size :]
    else:
        if stratified.shape != (n,):
            raise ValueError(f"stratified must hold one label per sample, shape ({n},), got {tuple(stratified.shape)}.")
        taken = draw_share(order, stratified.cpu(), size)
    in_validation = torch.zeros(n, dtype=torch.bool)
    in_validation[taken] = True
    return (~in_validation).nonzero().flatten(), in_validation.nonzero().flatten()


def draw_share(order: Tensor, labels: Tensor, size: int) -> Tensor:
    """Select `size` samples, with each class in proportion to its size: the first of each class in `order`.

    Args:
        order: indices of the candidates in random order, shape (m,).
        labels: labels of all samples; labels[order] are those of the candidates.
        size: number of samples to select, at most m.

    Returns:
        Indices, shape (size,), grouped by class.
    """
    own = labels[order]
    classes, counts = own.unique(return_counts=True)
    quotas = apportion(counts.tolist(), size)
    parts = [order[own == label][:quota] for label, quota in zip(classes.tolist(), quotas, strict=True)]
    return torch.cat(parts) if parts else order[:0]


def apportion(counts: Sequence[int], size: int) -> list[int]:
    """Integers proportional to the counts that sum to `size`, by the largest remainder method.

    Each is size * count / sum(counts), rounded down or up. Of equal remainders, the earlier one is rounded up first.

    Examples:
        >>> apportion([5, 3, 2], 5)
        [3, 1, 1]
    """
    total = sum(counts)
    if not total:
        return [0] * len(counts)
    quotas = [size * count // total for count in counts]
    remainders = [size * count % total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda k: -remainders[k])
    for k in by_remainder[: size - sum(quotas)]:
        quotas[k] += 1
    return quotas
