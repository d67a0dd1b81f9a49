"""Which samples of the batch are descended on?"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flatmin.methods.part import Need, Part, check_range

__all__ = ["EverySample", "Samples", "SharpnessSensitiveDataSelection"]


@dataclass(frozen=True, kw_only=True)
class Samples(Part):
    """Which samples of the batch are descended on?

    Attributes:
        selects: whether it can be fewer than all; true where `__call__` is defined.
    """

    kind: ClassVar[str] = "samples"
    question: ClassVar[str] = "which samples are descended on?"
    declared_by: ClassVar = {"selects": "__call__"}
    selects: ClassVar[bool] = False

    def __call__(self, first: Tensor, second: Tensor) -> Tensor | None:
        """Positions of the samples, from each one's loss at w and at w + eps; None: all.

        A sample of which the loss counts nothing has the loss -inf in `second`.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class EverySample(Samples):
    """The whole batch."""


@dataclass(frozen=True, kw_only=True)
class SharpnessSensitiveDataSelection(Samples):
    """ESAM's SDS: the floor(gamma B) samples (at least one) whose loss rises most from w to w + eps.

    A sample's loss is the mean over its elements that the loss counts, class weights included, and samples without any
    come last; what is descended is the loss of the chosen samples alone (see `flatmin.Criterion`).

    Args:
        gamma: share of the batch, in (0, 1]. Default 0.5 (the official `run.sh`); 1 is the whole batch.

    Raises:
        ValueError: gamma outside (0, 1].

    Differs from the official code: exactly floor(gamma B) samples are taken, of equal ones the first (there a strict
    `>` drops the boundary sample), BatchNorm sees the whole batch, and the pass at w + eps runs on all of it, so that
    a plain closure can serve it; the published saving of time comes from a second forward on the part and is not had
    here.

    Source: Du et al., Efficient Sharpness-Aware Minimization for Improved Training of Neural Networks, ICLR 2022.
    """

    former_names: ClassVar = ("Sharpest",)
    needs: ClassVar = frozenset({Need.PER_SAMPLE, Need.LOSSES_AT_W, Need.DESCENT_LOSS})
    conflicts: ClassVar = {Need.DESCENT_LOSS: "pass 2 descends on some of the samples"}
    gamma: float = 0.5

    def __post_init__(self) -> None:
        check_range(self, "gamma", 0.0, 1.0, open_low=True)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor | None:
        count = max(1, int(self.gamma * len(first) + 1e-9))
        return None if count >= len(first) else (second - first).sort(descending=True, stable=True).indices[:count]
