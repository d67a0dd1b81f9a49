"""What image data sets share: statistics of their channels, classes of classes, and the validation split."""

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
        std: one number per channel, above 0; of the population, that is, divided by the number of pixels.

    Raises:
        ValueError: no channel, different lengths, or a deviation that is not above 0.
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
                f"statistics need finite means and deviations above 0, got {self.mean} and {self.std}; "
                "a channel that never changes must be left out."
            )

    @classmethod
    def of(cls, x: Tensor) -> Statistics:
        """The statistics of a data set, from exact sums.

        mean = S / (255 N) and std = sqrt(N Q - S^2) / (255 N) with the sums S of a channel's N bytes and Q of their
        squares, which are integers; only the last division and root round.

        Args:
            x: training images, shape (n, C, H, W), uint8.

        Raises:
            ValueError: another type or shape, no pixels, or a channel that never changes.
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
"""Of the 50 000 training images of CIFAR-10, rounded to four digits as the papers print them."""

CIFAR100 = Statistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
"""Of the 50 000 training images of CIFAR-100, rounded to four digits as the papers print them."""

IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of a part of ImageNet's training images, as nearly all published code has them since Torch7's."""

HALF = Statistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Of no data: it takes bytes to the range from -1 to 1, as pretrained vision transformers want them."""

STATISTICS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "imagenet": IMAGENET, "half": HALF}

CIFAR100_COARSE = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)
"""The coarse class of each fine class of CIFAR-100, as the release has them in every record."""


def check_bytes(x: Tensor) -> None:
    """Raise ValueError unless x is a batch of uint8 images with at least one pixel."""
    if x.dtype != torch.uint8 or x.dim() != 4 or not x.numel():
        raise ValueError(f"images must be uint8 of shape (n, C, H, W), got {x.dtype} of shape {tuple(x.shape)}.")


def split_validation(
    n: int, share: float = 0.1, *, seed: int = 42, stratified: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Indices of the training part and of the validation part.

    round(share * n) samples are drawn without replacement. Without `stratified` they are those that
    `torch.utils.data.random_split` takes with a generator of the same seed. The result depends on the seed alone, not
    on the global random state.

    Args:
        n: number of samples.
        share: of the validation part, in (0, 1). Default 0.1: 45 000 and 5000 of CIFAR, as in BiSAM and the papers
            after it.
        seed: of the generator. Default 42, from the same source.
        stratified: labels, shape (n,), int64: then every class gives its share, to the nearest sample that keeps
            the sum. Default: classes are ignored.

    Returns:
        Two tensors of ascending int64 indices, together 0..n-1.

    Raises:
        ValueError: a share that leaves one part empty, or labels of another length.
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
    """The first samples of each class in a drawn order, `size` in all, as many per class as its share asks.

    Args:
        order: indices of the candidates in the order in which they are drawn, shape (m,).
        labels: of all samples; labels[order] are those of the candidates.
        size: how many to take, at most m.

    Returns:
        Indices, shape (size,), class by class.
    """
    own = labels[order]
    classes, counts = own.unique(return_counts=True)
    quotas = apportion(counts.tolist(), size)
    parts = [order[own == label][:quota] for label, quota in zip(classes.tolist(), quotas, strict=True)]
    return torch.cat(parts) if parts else order[:0]


def apportion(counts: Sequence[int], size: int) -> list[int]:
    """Whole numbers in proportion to the counts that add up to `size`, by the largest remainders.

    Each is size * count / sum(counts) rounded down or up; equal remainders are served in the given order.

    Example:
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
