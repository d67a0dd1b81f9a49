"""Parts that use second derivatives: a combination and a direction."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flatmin.methods.combine import Combine
from flatmin.methods.context import NewState, State, StepContext, Tensors, filled, widened
from flatmin.methods.direction import Direction
from flatmin.methods.part import Need, check_choice, check_count, check_range

__all__ = ["EigenSAM", "SGDHess"]


ESTIMATES = ("hutchinson_abs", "hutchinson_diag", "ggn", "exact")


@dataclass(frozen=True, kw_only=True)
class SGDHess(Combine):
    """SGDHESS: u = g + rho h * g with an elementwise curvature estimate h, or u = g + rho H g. No perturbation.

    curvature:
        "hutchinson_abs" (default, as in the original code): h = |H z| with random signs z = +-1, averaged over the
            spatial dimensions of convolution kernels. This does not estimate the diagonal of H: off-diagonal entries
            contribute, and h >= 0.
        "hutchinson_diag": h = z * (H z), whose mean over z is diag(H).
        "ggn": h = z * (G z) with the generalised Gauss-Newton matrix G. Needs `criterion=`.
        "exact": H g itself, the formula of the original's text.

    Between refreshes h is reused; for "exact", the vector H g.

    Args:
        curvature: "hutchinson_abs" (default), "hutchinson_diag", "ggn" or "exact", see above.
        draws: number of vectors z that are averaged, >= 1. Default 1.
        interval: k: h is refreshed on its first step and on steps 0, k, 2k, ...; >= 1. Default 1.
        spatial_mean: whether "hutchinson_abs" averages over spatial dimensions. Default True.

    Raises:
        ValueError: a parameter out of range.

    rho is a factor, not a length, and each param group has its own (default 0.05, as in the original code). Groups with
    rho = 0 take g. A refresh costs `draws` products with H or G, each about three gradients.

    Source: Luong, empirical study of SAM (2024), `sgdhess.py`, after AdaHessian (Yao et al., AAAI 2021).

    Examples:
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
class EigenSAM(Direction):
    """Eigen-SAM: d = n + alpha sign(<g, v>) (v - <n, v> n), with n = g / ||g|| and v the Hessian's leading eigenvector.

    v is computed by power iterations v <- H v / ||H v|| with the Hessian H of the batch's loss at w. They start from
    the last v, at first from a random normal vector. v tends to the eigenvector of the eigenvalue with the largest
    absolute value. eps = rho d is not rescaled to length rho: ||eps|| = rho sqrt(1 + alpha^2 ||v - <n, v> n||^2).

    Args:
        alpha: weight of the eigenvector, >= 0. Default 0.2. 0 is SAM.
        iterations: number of power iterations in a refresh, >= 1. Default 5.
        interval: k: v is refreshed on its first step and on steps 0, k, 2k, ...; >= 1. Default 100.

    Raises:
        ValueError: a parameter out of range.

    Differs from the official code, whose first `interval` steps have no v and do not normalise g, and which computes
    the Hessian in evaluation mode. A refresh costs `iterations` products with H, each about three gradients.

    Source: Luo et al., Explicit Eigenvalue Regularization Improves Sharpness-Aware Minimization, NeurIPS 2024, Alg. 1,
    and its code (`utils.py`, `sam.py`).

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("eigen-sam", interval=10).direction)
        EigenSAM(alpha=0.2, iterations=5, interval=10)
    """

    step_dependent: ClassVar = True
    slots: ClassVar = {"vector": "param"}
    needs: ClassVar = frozenset({Need.SECOND_ORDER, Need.RANDOM, Need.ONE_ASCENT})
    alpha: float = 0.2
    iterations: int = 5
    interval: int = 100

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0.0, 1e6)
        check_count(self, "iterations", 1)
        check_count(self, "interval", 1)

    @property
    def surcharge(self) -> float:
        return 3.0 * self.iterations / self.interval

    def graph(self, state: State, c: StepContext) -> bool:
        return c.step % self.interval == 0 or all(v is None for v in state["vector"])

    def __call__(self, g: Tensors | None, state: State, c: StepContext) -> tuple[Tensors | None, NewState]:
        assert g is not None
        n, new = _unit(g, c), {}
        # A weight that was added after the last power iteration has a zero entry in v until the next one.
        v = filled(state["vector"], [torch.zeros_like(x) for x in g])
        if c.curvature is not None:
            v = [z.to(x.dtype) if s is None else x for z, s, x in zip(c.noise(), state["vector"], v, strict=True)]
            for _ in range(self.iterations):
                v = _unit(c.curvature.hessian(v), c)
            new["vector"] = v
        across, _ = c.reject(v, n)
        return c.add_scaled(n, list(across), self.alpha * c.dot(g, v).sign()), new


def _unit(tensors: Tensors, c: StepContext) -> Tensors:
    """The tensors divided by their global norm; zeros stay zeros."""
    (size,) = widened([c.norm(tensors)])
    size = size + 1e-12
    return [(x / size.to(x.device)).to(x.dtype) for x in tensors]
