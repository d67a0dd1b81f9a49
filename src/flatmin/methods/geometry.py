"""In which norm?"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flatmin.methods.context import StepContext, Tensors
from flatmin.methods.part import Need, Part, check_range

__all__ = ["L2", "Adaptive", "Centralised", "Geometry", "Unnormalised"]


@dataclass(frozen=True, kw_only=True)
class Geometry(Part):
    """In which norm?

    Attributes:
        scales: whether T is anything but 1; true where `__call__` is defined.
        adaptive: whether it follows the scale of the weights, except in param groups with `adaptive=False`. Default
            False: groups with `adaptive=True` are refused.
    """

    kind: ClassVar[str] = "geometry"
    question: ClassVar[str] = "in which norm?"
    declared_by: ClassVar = {"scales": "__call__"}
    scales: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False

    def __call__(self, d: Tensors, c: StepContext) -> tuple[Tensors, Tensor | None]:
        """T(T d) and ||T d||; None for no normalisation. May return d itself."""
        return d, c.norm(d)


@dataclass(frozen=True, kw_only=True)
class L2(Geometry):
    """eps = rho d / ||d||, the global Euclidean norm over all moved tensors. Default rho 0.05.

    Source: Foret et al., SAM, ICLR 2021, Eq. 2 (p = 2), rho of their Section 3.
    """


@dataclass(frozen=True, kw_only=True)
class Adaptive(Geometry):
    """ASAM: eps = rho T^2 d / ||T d|| with T = |w| + eta; T = 1 in param groups with adaptive=False. Default rho 0.5.

    Args:
        eta: added to |w|, >= 0. Default 0.0 (the example command of the official code; its class default is 0.01).
        weights_only: T = 1 for tensors whose name has no "weight" in it, as the official code does (this leaves out
            biases and keeps the scale of BatchNorm). Default False: all tensors, the form of the common
            re-implementations, which wants a larger rho.

    Raises:
        ValueError: eta < 0.

    Needs parameter names if weights_only. Source: Kwon et al., ASAM, ICML 2021, Eq. 7 and `asam.py`.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("asam", eta=0.01).geometry)
        Adaptive(eta=0.01, weights_only=False)
    """

    default_rho: ClassVar[float] = 0.5
    adaptive: ClassVar[bool] = True
    eta: float = 0.0
    weights_only: bool = False

    def __post_init__(self) -> None:
        check_range(self, "eta", 0.0, 1e6)

    def demands(self) -> frozenset[Need]:
        return frozenset({Need.NAMES}) if self.weights_only else frozenset()

    def __call__(self, d: Tensors, c: StepContext) -> tuple[Tensors, Tensor | None]:
        t = list(torch._foreach_abs(c.w))
        if self.eta:
            torch._foreach_add_(t, self.eta)
        plain = [options.get("adaptive") is False for options in c.options]
        if any(plain):
            t = [torch.ones_like(x) if one else x for x, one in zip(t, plain, strict=True)]
        if self.weights_only:
            t = [x if "weight" in name else torch.ones_like(x) for x, name in zip(t, c.names, strict=True)]
        td = list(torch._foreach_mul(d, t))
        norm = c.norm(td)
        torch._foreach_mul_(td, t)
        return td, norm


@dataclass(frozen=True, kw_only=True)
class Unnormalised(Geometry):
    """USAM: eps = rho d, without normalisation, so eps shrinks with the gradient. Default rho 0.05.

    The default is a choice of this library: no published default for deep networks is known to it.
    Source: Andriushchenko & Flammarion, ICML 2022; also the unnormalised method of Khanh et al., NeurIPS 2024.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("usam").geometry)
        Unnormalised()
    """

    def __call__(self, d: Tensors, c: StepContext) -> tuple[Tensors, Tensor | None]:
        return d, None


@dataclass(frozen=True, kw_only=True)
class Centralised(Geometry):
    """GCSAM: eps = rho C d / ||d||, where C takes off the mean over all dimensions but the first. Default rho 0.05.

    Tensors of fewer than two dimensions are not centred. The norm is that of d before centring (official code), so
    ||eps|| <= rho.

    Source: Hassan et al., GCSAM: Gradient Centralized Sharpness Aware Minimization, 2025, after Yong et al., ECCV 2020.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("gcsam").geometry)
        Centralised()
    """

    def __call__(self, d: Tensors, c: StepContext) -> tuple[Tensors, Tensor | None]:
        centred = [x - x.mean(tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else x for x in d]
        return centred, c.norm(d)
