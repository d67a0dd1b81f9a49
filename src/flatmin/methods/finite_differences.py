"""Combinations of gradients at several points: finite differences in place of second derivatives."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from flatmin.methods.combine import Combine
from flatmin.methods.context import NewState, State, StepContext, Tensors
from flatmin.methods.part import Need, check_range

__all__ = ["CRSAM", "GAM", "CFlat"]


@dataclass(frozen=True, kw_only=True)
class GAM(Combine):
    """GAM: u = v - gamma (m - (<m, v> / ||v||^2) v), with m = g + |beta2| g_2 and v = beta1 g_1 + beta3 g_3.

    The gradients are those of `GradientNormAscent`. The last term removes part of the component of m that is orthogonal
    to v, over all tensors as one vector. u is about (beta1 + beta3) g, so with the defaults the learning rate counts
    twice. On steps without ascent (rho = 0, or by the schedule) u = (beta1 + beta3) g. The default rho is 0.02.
    Gradients in half precision are too coarse for the difference of two of them.

    Args:
        beta1: weight of g_1, >= 0. Default 1.
        beta2: weight of g_2; its absolute value is used, as in the official code. Default -1.
        beta3: weight of g_3, >= 0. Default 1. With beta3 = gamma = 0 the method is SAM.
        gamma: weight of the orthogonal component, >= 0. Default 0.03.

    Raises:
        ValueError: a parameter out of range.

    Source: Zhang et al., Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves Generalization, CVPR
    2023, in the form and with the defaults of the official code (`gam/gam.py`), which needs no second derivatives. The
    beta in its README sets a parameter (`grad_beta_0`) that the code never reads.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("gam", gamma=0.1).combine)
        GAM(beta1=1.0, beta2=-1.0, beta3=1.0, gamma=0.1)
    """

    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True
    descents: ClassVar = 3
    always: ClassVar = True
    default_rho: ClassVar = 0.02
    beta1: float = 1.0
    beta2: float = -1.0
    beta3: float = 1.0
    gamma: float = 0.03

    def __post_init__(self) -> None:
        check_range(self, "beta2", -1e6, 1e6)
        for name in ("beta1", "beta3", "gamma"):
            check_range(self, name, 0.0, 1e6)

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        assert g is not None
        m = list(torch._foreach_add(g, gs[1], alpha=abs(self.beta2)))
        v = list(torch._foreach_mul(gs[0], self.beta1))
        torch._foreach_add_(v, gs[2], alpha=self.beta3)
        # v - gamma (m - k v) = (v - gamma m) + gamma k v
        u = list(torch._foreach_add(v, m, alpha=-self.gamma))
        return c.add_scaled(u, v, self.gamma * c.share(m, v), spent=True), {}

    def off(self, g: Tensors, state: State, c: StepContext) -> tuple[Tensors, NewState]:
        return list(torch._foreach_mul(g, self.beta1 + self.beta3)), {}


@dataclass(frozen=True, kw_only=True)
class CFlat(Combine):
    """C-Flat: u = g_1 + lam (g_3 - g_2), with the gradients of `GradientNormAscent`.

    The default rho is 0.1. Gradients in half precision are too coarse for the difference of two of them.

    Args:
        lam: weight of the first-order flatness, >= 0. Default 0.2 (the official code's). 0 is SAM.

    Raises:
        ValueError: lam out of range.

    Source: Bian et al., Make Continual Learning Stronger via C-Flat, NeurIPS 2024, and its code in the INFTY package.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("c-flat", lam=0.1).combine)
        CFlat(lam=0.1)
    """

    descents: ClassVar = 3
    default_rho: ClassVar = 0.1
    lam: float = 0.2

    def __post_init__(self) -> None:
        check_range(self, "lam", 0.0, math.inf)

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        u = list(torch._foreach_add(gs[0], gs[2], alpha=self.lam))
        torch._foreach_sub_(u, gs[1], alpha=self.lam)
        return u, {}


@dataclass(frozen=True, kw_only=True)
class CRSAM(Combine):
    """CR-SAM: u = g_+ + gamma (g_+ + g_- - 2 g) + beta (g_+ - g_-), with the gradients g_+- at w +- eps.

    The two terms are finite differences of the gradient along eps. gamma weighs the term of second order in eps, which
    is 0 for a quadratic loss; beta weighs the term of first order, 2 H eps. The default rho is 0.1. Gradients in half
    precision are too coarse for the difference of two of them.

    Args:
        gamma: weight of the second-order term, >= 0. Default 0.1 (official code).
        beta: weight of the first-order term, >= 0. Default 0.01 (the official command line; its class has 0.1). With
            gamma = beta = 0 the method is SAM.

    Raises:
        ValueError: a parameter out of range.

    The paper regularises a normalised trace of the Hessian. This class follows the authors' code; it has not been
    compared with the paper's algorithm.

    Source: Wu, Luo & Wunsch, CR-SAM: Curvature Regularized Sharpness-Aware Minimization, AAAI 2024, and the authors'
    code.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("cr-sam", beta=0.1).combine)
        CRSAM(gamma=0.1, beta=0.1)
    """

    default_rho: ClassVar = 0.1
    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True
    descents: ClassVar = 2
    gamma: float = 0.1
    beta: float = 0.01

    def __post_init__(self) -> None:
        check_range(self, "gamma", 0.0, 1e6)
        check_range(self, "beta", 0.0, 1e6)

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        assert g is not None
        below, above = gs
        # (gamma + beta) (g_+ - g) + (gamma - beta) (g_- - g): nearly equal gradients are subtracted first
        u = list(torch._foreach_add(above, torch._foreach_sub(above, g), alpha=self.gamma + self.beta))
        torch._foreach_add_(u, torch._foreach_sub(below, g), alpha=self.gamma - self.beta)
        return u, {}
