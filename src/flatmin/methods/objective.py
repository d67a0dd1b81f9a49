"""Objectives: which loss does the ascent maximise?"""

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
    """Base class of objectives: which loss does the ascent maximise?

    Attributes:
        by_class: whether the ascent loss is a function of class logits and class indices. `ascent` then also gets the
            wrapped loss's `weight`, `ignore_index` and `reduction` as keywords. Default False.
        keeps: whether pass 2 minimises another loss, made from what `keep` stored in pass 1. True if `keep` is defined.
    """

    kind: ClassVar[str] = "objective"
    question: ClassVar[str] = "which loss does the ascent maximise?"
    declared_by: ClassVar = {"keeps": "keep"}
    by_class: ClassVar[bool] = False
    keeps: ClassVar[bool] = False

    def conflict(self, need: Need) -> str | None:
        if need is Need.DESCENT_LOSS and self.keeps:
            return "pass 2 minimises another loss"
        return super().conflict(need)

    def ascent(self, outputs: Tensor, target: Tensor) -> Tensor | None:
        """The ascent loss of a batch; None: the training loss itself."""
        return None

    def keep(self, outputs: Tensor, loss: Tensor) -> Tensor:
        """What pass 1 stores for pass 2 of the batch. `loss` is the training loss of the outputs, with graph."""
        raise AttributeError(f"{type(self).__name__} does not define keep().")

    def descent(self, outputs: Tensor, kept: Tensor) -> Tensor:
        """The loss of pass 2, a scalar, from the outputs at w + eps and what `keep` stored."""
        raise AttributeError(f"{type(self).__name__} defines keep() but not descent().")


_OTHER_LOSS = "pass 1 maximises another loss"


@dataclass(frozen=True, kw_only=True)
class SameLoss(Objective):
    """SAM: the ascent maximises the training loss. Source: Foret et al., SAM, ICLR 2021, Eq. 2."""


@dataclass(frozen=True, kw_only=True)
class BiSAMLog(Objective):
    """BiSAM(-log): maximises Q = (1/mu) log sum_j exp(mu phi(F_j)), phi(x) = 1 - log(1 + exp(log(e-1) - x)).

    F_j = f_j - f_y is the margin of class j against the true class y. Q is a smooth lower bound of the 0-1 loss.

    Args:
        mu: sharpness of the soft maximum over classes, > 0. Default 1.0 (original code).

    Raises:
        ValueError: mu <= 0.

    The training loss's `ignore_index`, class `weight` and `reduction` apply to Q as well. Its label smoothing applies
    to the descent loss only. Soft targets are an error.

    Source: Xie et al., ICML 2024, Eq. 11; see `flatmin.methods.losses.bisam_log`.

    Examples:
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
    """BiSAM(tanh): maximises Q = (1/mu) log sum_j exp(mu tanh(alpha F_j)).

    F_j = f_j - f_y is the margin of class j against the true class y. Q is a smooth lower bound of the 0-1 loss.

    Args:
        mu: sharpness of the soft maximum over classes, > 0. Default 10.0 (original function; its command line passes
            1).
        alpha: slope of tanh(alpha x) at 0, > 0. Default 0.1 (original code).

    Raises:
        ValueError: mu <= 0 or alpha <= 0.

    The training loss's `ignore_index`, class `weight` and `reduction` apply to Q as well. Its label smoothing applies
    to the descent loss only. Soft targets are an error.

    Source: Xie et al., ICML 2024, Eq. 11; see `flatmin.methods.losses.bisam_tanh`.

    Examples:
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

    The Jacobian is that of the perturbed weights, but the slope G of the loss is that at w. So sharpness is lowered in
    the function of the network, not through the statistics of the logits. Pass 2 minimises <G, outputs>, with G stored
    in pass 1: as many numbers as the outputs have (in a language model, tokens times vocabulary).

    The value of the loss in both passes is that of the training loss. For outputs in half precision G is computed in
    float32.

    Raises:
        TypeError: at the step, if the outputs are not a tensor or the loss is not a scalar.

    Source: Singh, Mobahi, Agarwala & Dauphin, Avoiding Spurious Sharpness Minimization Broadens Applicability of SAM,
    ICML 2025. No official code is known. The paper's preconditioned form is not implemented.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("functional-sam").objective)
        FunctionalSAM()
    """

    needs: ClassVar = frozenset({Need.CRITERION, Need.PASS_1, Need.LOSSES_AT_W})

    def keep(self, outputs: Tensor, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, outputs, retain_graph=True)[0]

    def descent(self, outputs: Tensor, kept: Tensor) -> Tensor:
        return (kept * outputs.to(kept.dtype)).sum()
