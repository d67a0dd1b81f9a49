"""Combinations with second derivatives: what goes to the base optimizer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flatmin.methods.combine import Combine
from flatmin.methods.context import NewState, State, StepContext, Tensors
from flatmin.methods.part import Need, check_choice, check_count, check_range

__all__ = ["CRSAM", "SGDHess"]


ESTIMATES = ("hutchinson_abs", "hutchinson_diag", "ggn", "exact")


@dataclass(frozen=True, kw_only=True)
class SGDHess(Combine):
    """SGDHESS: u = g + rho h * g with a diagonal curvature h, or u = g + rho H g.

    curvature:
        "hutchinson_abs" (default, as coded): h = |H z|, z = +-1, averaged over the spatial dimensions of convolution
            kernels. Not a diagonal: off-diagonal mass leaks in, and h >= 0.
        "hutchinson_diag": h = z * (H z), whose mean over z is diag(H).
        "ggn": h = z * (G z) with the generalised Gauss-Newton matrix G; needs the loss object.
        "exact": H g itself, the formula of the original's text.

    Between refreshes h, or for "exact" the vector H g, is reused.

    Args:
        curvature: which of the above: "hutchinson_abs", "hutchinson_diag", "ggn" or "exact".
        draws: how many z are averaged, >= 1. Default 1.
        interval: h is refreshed on its first step and on steps 0, k, 2k, ...; k >= 1. Default 1.
        spatial_mean: for "hutchinson_abs". Default True.

    Raises:
        ValueError: out of range.

    rho is each group's own (default 0.05, as coded); groups with rho = 0 take g. The cost of a refresh is `draws`
    products, each about three gradients.

    Source: Luong, empirical study of SAM (2024), `sgdhess.py`, after AdaHessian (Yao et al., AAAI 2021).

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("sgdhess", curvature="ggn").combine)
        SGDHess(curvature='ggn', draws=1, interval=1, spatial_mean=True)
    """

    former_names: ClassVar = ("Curved",)
    step_dependent: ClassVar = True
    slots: ClassVar = {"h": "param"}
    needs: ClassVar = frozenset({Need.SECOND_ORDER})
    ascends: ClassVar[bool] = False
    curvature: str = "hutchinson_abs"
    draws: int = 1
    interval: int = 1
    spatial_mean: bool = True

    def __post_init__(self) -> None:
        check_choice(self, "curvature", ESTIMATES)
        check_count(self, "draws", 1)
        check_count(self, "interval", 1)

    @property
    def surcharge(self) -> float:
        return 3.0 * (1 if self.curvature == "exact" else self.draws) / self.interval

    def graph(self, state: State, c: StepContext) -> bool:
        return c.step % self.interval == 0 or all(h is None for h in state["h"])

    def demands(self) -> frozenset[Need]:
        draws = frozenset[Need]() if self.curvature == "exact" else frozenset({Need.RANDOM})
        loss = frozenset({Need.CRITERION}) if self.curvature == "ggn" else frozenset[Need]()
        return self.needs | draws | loss

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        grads = gs[0]
        if c.curvature is None:
            h = [torch.zeros_like(x) if s is None else s for s, x in zip(state["h"], grads, strict=True)]
        elif self.curvature == "exact":
            h = c.curvature.hessian(grads)
        else:
            h = self._estimate(c)
        change = list(h) if self.curvature == "exact" else list(torch._foreach_mul(h, grads))
        update = torch._foreach_add(grads, torch._foreach_mul(change, list(c.rhos)))
        return list(update), ({} if c.curvature is None else {"h": h})

    def _estimate(self, c: StepContext) -> Tensors:
        products = c.curvature
        assert products is not None
        total: Tensors | None = None
        for _ in range(self.draws):
            z = [2.0 * b - 1.0 for b in c.bernoulli(0.5)]
            hz = products.gauss_newton(z) if self.curvature == "ggn" else products.hessian(z)
            one = [self._size(x) for x in hz] if self.curvature == "hutchinson_abs" else torch._foreach_mul(z, hz)
            total = list(one) if total is None else list(torch._foreach_add(total, one))
        assert total is not None
        return list(torch._foreach_div(total, float(self.draws)))

    def _size(self, hz: Tensor) -> Tensor:
        size = hz.abs()
        if self.spatial_mean and size.ndim == 4:
            size = size.mean((2, 3), keepdim=True).expand_as(size).contiguous()
        return size


@dataclass(frozen=True, kw_only=True)
class CRSAM(Combine):
    """CR-SAM: u = g_+ + gamma (g_+ + g_- - 2 g) + beta (g_+ - g_-), with the gradients g_+- at w +- eps.

    These are finite differences of the gradient along eps: gamma weighs the part of second order in eps, which is 0
    where the loss is quadratic, and beta the part of first order, 2 H eps. Default rho 0.1.

    Args:
        gamma: >= 0. Default 0.1 (official code).
        beta: >= 0. Default 0.01 (the official command line; its class has 0.1). gamma = beta = 0 is SAM.

    Raises:
        ValueError: out of range; at the step, for an inner loop that does not give two points.

    Gradients in half precision are too coarse for the differences. The paper regularises a normalised trace of the
    Hessian; whether its algorithm is what the code does could not be read.

    Source: Wu, Luo & Wunsch, CR-SAM: Curvature Regularized Sharpness-Aware Minimization, AAAI 2024, and the authors'
    code.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("cr-sam", beta=0.1).combine)
        CRSAM(gamma=0.1, beta=0.1)
    """

    default_rho: ClassVar = 0.1
    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True
    gamma: float = 0.1
    beta: float = 0.01

    def __post_init__(self) -> None:
        check_range(self, "gamma", 0.0, 1e6)
        check_range(self, "beta", 0.0, 1e6)

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        assert g is not None
        if len(gs) != 2:
            raise ValueError(f"CRSAM wants gradients at w - eps and w + eps, as BothSides gives them; got {len(gs)}.")
        below, above = gs
        # (gamma + beta) (g_+ - g) + (gamma - beta) (g_- - g): the near ones are subtracted first
        u = list(torch._foreach_add(above, torch._foreach_sub(above, g), alpha=self.gamma + self.beta))
        torch._foreach_add_(u, torch._foreach_sub(below, g), alpha=self.gamma - self.beta)
        return u, {}
