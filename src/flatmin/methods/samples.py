"""Samples: on which samples of the batch is the second gradient taken?"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flatmin.methods.part import Need, Part, check_range

__all__ = ["EverySample", "Samples", "SharpnessSensitiveDataSelection"]


@dataclass(frozen=True, kw_only=True)
class Samples(Part):
    """Base class: on which samples of the batch is the second gradient taken?

    Attributes:
        selects: whether it may choose fewer than all samples. True if `__call__` is defined.
    """

    kind: ClassVar[str] = "samples"
    question: ClassVar[str] = "which samples give the second gradient?"
    declared_by: ClassVar = {"selects": "__call__"}
    selects: ClassVar[bool] = False

    def __call__(self, first: Tensor, second: Tensor) -> Tensor | None:
        """The positions of the chosen samples in the batch; None: all.

        Args:
            first: the losses of the samples at w, shape (N,).
            second: the losses at w + eps, shape (N,); -inf for samples that the loss ignores.
        """
        return None

    def count(self, samples: int) -> int:
        """The number of chosen samples in a batch of so many. Default: all."""
        return samples


@dataclass(frozen=True, kw_only=True)
class EverySample(Samples):
    """SAM: the whole batch."""


@dataclass(frozen=True, kw_only=True)
class SharpnessSensitiveDataSelection(Samples):
    """ESAM's SDS: the floor(gamma B) samples of a batch of B (at least one) whose loss rises most from w to w + eps.

    A sample's loss is the mean over its elements that the loss does not ignore, with class weights. Samples without
    such elements come last. The second gradient is that of the loss of the chosen samples (see `flatmin.Criterion`).

    Args:
        gamma: share of the batch, in (0, 1]. Default 0.5 (the official `run.sh`). 1 is the whole batch.

    Raises:
        ValueError: gamma outside (0, 1].

    The network runs on the chosen samples only if the loop asks for them (`flatmin.SAM.select_samples`), as
    `flatmin train` does. Otherwise pass 2 runs on the whole batch, which takes as long as SAM's; BatchNorm then
    normalises with the statistics of the whole batch.

    Differs from the official code: exactly floor(gamma B) samples are chosen, of equal ones the first (there a strict
    `>` drops one sample).

    Source: Du et al., Efficient Sharpness-Aware Minimization for Improved Training of Neural Networks, ICLR 2022.
    """

    former_names: ClassVar = ("Sharpest",)
    needs: ClassVar = frozenset({Need.PER_SAMPLE, Need.LOSSES_AT_W, Need.DESCENT_LOSS})
    conflicts: ClassVar = {Need.DESCENT_LOSS: "pass 2 uses some of the samples only"}
    gamma: float = 0.5

    def __post_init__(self) -> None:
        check_range(self, "gamma", 0.0, 1.0, open_low=True)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor | None:
        count = self.count(len(first))
        return None if count == len(first) else (second - first).sort(descending=True, stable=True).indices[:count]

    def count(self, samples: int) -> int:
        return max(1, int(self.gamma * samples + 1e-9))
