"""Geometries: in which norm is the perturbation measured?"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flatmin.methods.context import StepContext, Tensors, widened
from flatmin.methods.part import Need, Part, check_choice, check_range

__all__ = ["L2", "SAGM", "Adaptive", "Centralised", "FisherMetric", "Geometry", "Unnormalised"]


@dataclass(frozen=True, kw_only=True)
class Geometry(Part):
    """Base class of geometries: in which norm is the perturbation measured?

    Attributes:
        scales: whether it differs from the Euclidean norm. True if `__call__` is defined.
        adaptive: whether it follows the magnitude of the weights, except in param groups with `adaptive=False`. Default
            False: groups with `adaptive=True` are an error.
    """

    kind: ClassVar[str] = "geometry"
    question: ClassVar[str] = "in which norm?"
    declared_by: ClassVar = {"scales": "__call__"}
    scales: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False

    def __call__(self, d: Tensors, c: StepContext) -> tuple[Tensors, Tensor | None]:
        """The scaled direction T(T d) and the norm ||T d|| that divides it (None: no normalisation).

        May return d itself.
        """
        return d, c.norm(d)


@dataclass(frozen=True, kw_only=True)
class L2(Geometry):
    """SAM: eps = rho d / ||d||, with the Euclidean norm over all perturbed tensors. Default rho 0.05.

    Source: Foret et al., SAM, ICLR 2021, Eq. 2 (p = 2), rho of their Section 3.
    """

    entrywise: ClassVar = True


@dataclass(frozen=True, kw_only=True)
class Adaptive(Geometry):
    """ASAM: eps = rho T^2 d / ||T d|| with T = |w| + eta. Default rho 0.5.

    In param groups with adaptive=False, T = 1.

    Args:
        eta: added to |w|, >= 0. Default 0.0 (the example command of the official code; its class default is 0.01).
        weights_only: True: T = 1 for tensors without "weight" in their name, as in the official code. This excludes
            biases and includes the scale of BatchNorm; it needs parameter names. Default False: all tensors, as in
            common re-implementations, which needs a larger rho than the official form.

    Raises:
        ValueError: eta < 0.

    Source: Kwon et al., ASAM, ICML 2021, Eq. 7 and `asam.py`.

    Examples:
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

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        return not self.weights_only

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
    """USAM: eps = rho d, without normalisation, so that eps shrinks with the gradient. Default rho 0.05.

    The default rho is a choice of this library; no published default for deep networks is known.

    Source: Andriushchenko & Flammarion, ICML 2022; also the unnormalised method of Khanh et al., NeurIPS 2024.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("usam").geometry)
        Unnormalised()
    """

    entrywise: ClassVar = True

    def __call__(self, d: Tensors, c: StepContext) -> tuple[Tensors, Tensor | None]:
        return d, None


@dataclass(frozen=True, kw_only=True)
class Centralised(Geometry):
    """GCSAM: eps = rho C d / ||d||, where C subtracts the mean over all dimensions but the first. Default rho 0.05.

    Tensors of fewer than two dimensions are not centred. The norm is that of d before centring (as in the official
    code), so that ||eps|| <= rho.

    Source: Hassan et al., GCSAM: Gradient Centralized Sharpness Aware Minimization, 2025, after Yong et al., ECCV 2020.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("gcsam").geometry)
        Centralised()
    """

    def __call__(self, d: Tensors, c: StepContext) -> tuple[Tensors, Tensor | None]:
        centred = [x - x.mean(tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else x for x in d]
        return centred, c.norm(d)


@dataclass(frozen=True, kw_only=True)
class FisherMetric(Geometry):
    """Fisher SAM: eps = rho F^-1 d / sqrt(<d, F^-1 d>) with the diagonal F = 1 + eta d^2. Default rho 0.1.

    Among all eps with <eps, F eps> <= rho^2 it is the one with the largest <d, eps>. Entries with a large gradient are
    perturbed less than in SAM. d is the recipe's direction: in "vasso+fisher-sam", F comes from the averaged gradient.

    F is made from the batch's mean gradient, not from single samples, and depends on the scale of the loss: a loss
    summed over the batch gives another direction than its mean. Where eta d^2 is far below 1 the method is close to
    SAM; with gradients of 0.01 in each entry, eta = 1 changes eps by 1e-4 of its length.

    Args:
        eta: weight of the Fisher diagonal, >= 0. Default 1.0 (the re-implementation's class; its command line has 0.2).
            0 is SAM, bit for bit.
        norm: "metric" (default) divides by sqrt(<d, F^-1 d>), so that <eps, F eps> = rho^2 and the Euclidean length is
            at most rho. "euclid" divides by ||F^-1 d||, so that the Euclidean length is rho (another
            re-implementation).

    Raises:
        ValueError: eta < 0, or an unknown norm.

    No official code is known; rule and defaults are those of a public re-implementation
    (johnjaejunlee95/torch-unified-SAM-optimization). The mask of `ssam-f` also uses a Fisher diagonal, but to choose
    entries; the two are unrelated.

    Source: Kim, Li, Hu & Hospedales, Fisher SAM: Information Geometry and Sharpness Aware Minimisation, ICML 2022.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("fisher-sam", eta=0.2).geometry)
        FisherMetric(eta=0.2, norm='metric')
    """

    entrywise: ClassVar = True
    default_rho: ClassVar[float] = 0.1
    eta: float = 1.0
    norm: str = "metric"

    def __post_init__(self) -> None:
        check_range(self, "eta", 0.0, math.inf)
        check_choice(self, "norm", ("metric", "euclid"))

    def __call__(self, d: Tensors, c: StepContext) -> tuple[Tensors, Tensor | None]:
        if self.eta == 0:
            return d, c.norm(d)
        fisher = list(torch._foreach_mul(widened(d), math.sqrt(self.eta)))  # the square may leave half precision
        torch._foreach_mul_(fisher, fisher)
        torch._foreach_add_(fisher, 1.0)
        natural = [(x / f).to(x.dtype) for x, f in zip(d, fisher, strict=True)]
        return natural, c.norm(natural) if self.norm == "euclid" else c.dot(d, natural).sqrt()


@dataclass(frozen=True, kw_only=True)
class SAGM(Geometry):
    """SAGM: eps = (rho / ||d|| - alpha) d, SAM's perturbation minus alpha d. Default rho 0.05.

    The length of eps is |rho - alpha ||d|| |; eps points downhill where ||d|| > rho / alpha (50 with the defaults). A
    radius rule such as `rho-lr` multiplies all of eps and so scales alpha too. A group with rho = 0 is not perturbed.

    Args:
        alpha: factor on the gradient that is subtracted, >= 0. Default 0.001 (official code; 0.0005 for OfficeHome). 0
            is SAM's perturbation.

    Raises:
        ValueError: alpha < 0.

    Source: Wang et al., Sharpness-Aware Gradient Matching for Domain Generalization, CVPR 2023, and the authors' code.
    Although a function of that code is named "decompose", it makes no projection.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("sagm", alpha=0.01).geometry)
        SAGM(alpha=0.01)
    """

    entrywise: ClassVar = True
    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0.0, 1e6)

    def __call__(self, d: Tensors, c: StepContext) -> tuple[Tensors, Tensor | None]:
        norm = c.norm(d)
        if self.alpha == 0:
            return d, norm
        # rho (1 - alpha ||d|| / rho) / ||d||, each tensor with its own rho
        back = list(torch._foreach_mul(d, [self.alpha / rho for rho in c.rhos]))
        return c.add_scaled(d, back, -norm), norm
