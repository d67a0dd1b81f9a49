"""Which loss is climbed?"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flatmin.methods.losses import bisam_log, bisam_tanh
from flatmin.methods.part import Need, Part, check_range

__all__ = ["BiSAMLog", "BiSAMTanh", "FunctionalSAM", "Objective", "SameLoss"]


@dataclass(frozen=True, kw_only=True)
class Objective(Part):
    """Which loss is climbed?

    Attributes:
        by_class: whether the ascent loss is one of class logits and class indices; `ascent` then gets the arguments of
            the wrapped loss by which targets count, as the keywords `weight`, `ignore_index` and `reduction`. Default
            False.
        keeps: whether pass 2 descends a loss of its own, made of what pass 1 has left; true where `keep` is defined.
    """

    kind: ClassVar[str] = "objective"
    question: ClassVar[str] = "which loss is climbed?"
    declared_by: ClassVar = {"keeps": "keep"}
    by_class: ClassVar[bool] = False
    keeps: ClassVar[bool] = False

    def conflict(self, need: Need) -> str | None:
        if need is Need.DESCENT_LOSS and self.keeps:
            return "pass 2 descends a loss of its own"
        return super().conflict(need)

    def ascent(self, outputs: Tensor, target: Tensor) -> Tensor | None:
        """The ascent loss of a batch, or None for the descent loss itself."""
        return None

    def keep(self, outputs: Tensor, loss: Tensor) -> Tensor:
        """What pass 1 leaves of a batch for pass 2; `loss` is the wrapped loss of the outputs, with graph."""
        raise AttributeError(f"{type(self).__name__} defines no keep().")

    def descent(self, outputs: Tensor, kept: Tensor) -> Tensor:
        """The loss whose gradient pass 2 takes, from the outputs at w + eps and what pass 1 has left."""
        raise AttributeError(f"{type(self).__name__} defines keep() and no descent().")


_OTHER_LOSS = "pass 1 climbs another loss"


@dataclass(frozen=True, kw_only=True)
class SameLoss(Objective):
    """The ascent climbs the loss that is descended. Source: Foret et al., SAM, ICLR 2021, Eq. 2."""


@dataclass(frozen=True, kw_only=True)
class BiSAMLog(Objective):
    """BiSAM(-log): climbs Q = (1/mu) log sum_j exp(mu phi(F_j)), phi(x) = 1 - log(1 + exp(log(e-1) - x)).

    Args:
        mu: sharpness of the soft maximum over classes. Default 1.0 (original code).

    Raises:
        ValueError: mu <= 0.

    Targets count as in the loss: by its `ignore_index`, class `weight` and `reduction`. Label smoothing has no place in
    a bound of the 0-1 loss and acts in the descent loss only; soft targets are refused.

    Source: Xie et al., ICML 2024, Eq. 11; see `flatmin.methods.losses.bisam_log`.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("bisam-log", mu=2.0).objective)
        BiSAMLog(mu=2.0)
    """

    needs: ClassVar = frozenset({Need.CRITERION, Need.PASS_1})
    conflicts: ClassVar = {Need.OWN_LOSS: _OTHER_LOSS, Need.GRADIENT_AT_W: _OTHER_LOSS}
    by_class: ClassVar[bool] = True
    mu: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "mu", 0.0, math.inf, open_low=True)

    def ascent(self, outputs: Tensor, target: Tensor, **counting: Any) -> Tensor:
        return bisam_log(outputs, target, self.mu, **counting)


@dataclass(frozen=True, kw_only=True)
class BiSAMTanh(Objective):
    """BiSAM(tanh): climbs Q = (1/mu) log sum_j exp(mu tanh(alpha F_j)).

    Args:
        mu: sharpness of the soft maximum over classes. Default 10.0 (original function; its command line passes 1).
        alpha: slope of phi at 0. Default 0.1 (original code).

    Raises:
        ValueError: mu <= 0 or alpha <= 0.

    Targets count as in the loss: by its `ignore_index`, class `weight` and `reduction`. Label smoothing has no place in
    a bound of the 0-1 loss and acts in the descent loss only; soft targets are refused.

    Source: Xie et al., ICML 2024, Eq. 11; see `flatmin.methods.losses.bisam_tanh`.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("bisam-tanh", mu=5.0).objective)
        BiSAMTanh(mu=5.0, alpha=0.1)
    """

    needs: ClassVar = frozenset({Need.CRITERION, Need.PASS_1})
    conflicts: ClassVar = {Need.OWN_LOSS: _OTHER_LOSS, Need.GRADIENT_AT_W: _OTHER_LOSS}
    by_class: ClassVar[bool] = True
    mu: float = 10.0
    alpha: float = 0.1

    def __post_init__(self) -> None:
        check_range(self, "mu", 0.0, math.inf, open_low=True)
        check_range(self, "alpha", 0.0, math.inf, open_low=True)

    def ascent(self, outputs: Tensor, target: Tensor, **counting: Any) -> Tensor:
        return bisam_tanh(outputs, target, self.mu, self.alpha, **counting)


@dataclass(frozen=True, kw_only=True)
class FunctionalSAM(Objective):
    """Functional SAM: u = J(w + eps)^T G(w), with J the Jacobian of the outputs and G = dL/d outputs.

    The outputs move with the weights and the slope of the loss does not, so that sharpness is lowered through the
    network's function and not through the loss's statistics of the logits. Pass 2 descends <G, outputs>, with G kept
    from pass 1: as many numbers as the outputs have (of a language model, tokens times vocabulary).

    The loss that a loop sees is the wrapped loss. In half precision G is taken in float32.

    Raises:
        TypeError: at the step, for outputs that are no tensor or a loss that is no scalar.

    Source: Singh, Mobahi, Agarwala & Dauphin, Avoiding Spurious Sharpness Minimization Broadens Applicability of SAM,
    ICML 2025. No official code is known; the preconditioned form is left out.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("functional-sam").objective)
        FunctionalSAM()
    """

    needs: ClassVar = frozenset({Need.CRITERION, Need.PASS_1, Need.LOSSES_AT_W})

    def keep(self, outputs: Tensor, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, outputs, retain_graph=True)[0]

    def descent(self, outputs: Tensor, kept: Tensor) -> Tensor:
        return (kept * outputs.to(kept.dtype)).sum()
