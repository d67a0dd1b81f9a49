"""Combinations: which gradient does the base optimizer take?"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flatmin.methods.context import NewState, State, StepContext, Tensors, widened
from flatmin.methods.part import Need, Part, check_choice, check_count, check_range, learning_rate

__all__ = [
    "BSAM",
    "GNP",
    "GSAM",
    "SANER",
    "WSAM",
    "Combine",
    "Descent",
    "DirectionMagnitude",
    "LookSAM",
    "Mean",
    "SAMPa",
]


@dataclass(frozen=True, kw_only=True)
class Combine(Part):
    """Base class of combinations: which gradient does the base optimizer take?

    It is called with all trained tensors that have a gradient in every pass.

    Attributes:
        ascends: False for combinations that do not need a perturbation. Default True.
        uses_gradient: whether g is stored during pass 2, which costs one more copy of the weights. Default False: g is
            None.
        descents: number of descent gradients that it needs. Default 1.
        mixes: whether it does more than return the last descent gradient. True if `__call__` or `post` is defined.
        always: whether `off` is also called if no weight can be perturbed (rho = 0 everywhere), for methods whose step
            at rho = 0 is not the base optimizer's own. Default False.
        keeps_graph: whether the descent pass may have to keep its graph. True if `graph` is defined.
        off_step: whether a step without ascent differs from the base optimizer's. True if `off` is defined.
        post_step: whether something is added to w after the base optimizer's step. True if `post` is defined.
    """

    kind: ClassVar[str] = "combine"
    question: ClassVar[str] = "which gradient does the base take?"
    declared_by: ClassVar = {
        "mixes": ("__call__", "post"),
        "keeps_graph": "graph",
        "off_step": "off",
        "post_step": "post",
    }
    uses_gradient: ClassVar[bool] = False
    descents: ClassVar[int] = 1
    mixes: ClassVar[bool] = False
    always: ClassVar[bool] = False
    keeps_graph: ClassVar[bool] = False
    off_step: ClassVar[bool] = False
    post_step: ClassVar[bool] = False

    @property
    def implied(self) -> frozenset[Need]:
        # Products with the graph are computed after the weights are restored.
        return super().implied | (frozenset({Need.STAYS}) if self.keeps_graph else frozenset())

    def graph(self, state: State, c: StepContext) -> bool:
        """Whether the descent pass must keep its graph, so that `__call__` can use `StepContext.curvature`."""
        return False

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        """The gradient u for the base optimizer and the new state.

        Args:
            g: the gradient at w; None unless `uses_gradient`.
            gs: the descent gradients, one list of tensors for each point.
            state: what the part remembers.
            c: the context.
        """
        return gs[-1], {}

    def off(self, g: Tensors, state: State, c: StepContext) -> tuple[Tensors, NewState]:
        """The gradient u on a step without ascent. g is the descent gradient at w; `add_scaled` may overwrite it."""
        return g, {}

    def post(self, g: Tensors | None, gs: list[Tensors], c: StepContext) -> Tensors | None:
        """A term to add to w after the base optimizer's step; None: nothing."""
        return None


@dataclass(frozen=True, kw_only=True)
class Descent(Combine):
    """SAM: the gradient at w + eps, u = g_s. Source: Foret et al., SAM, ICLR 2021, Alg. 1."""

    entrywise: ClassVar = True


@dataclass(frozen=True, kw_only=True)
class GSAM(Combine):
    """GSAM: u = g_s - alpha g_perp, with g_perp = g - (<g, g_s> / ||g_s||^2) g_s.

    g_perp is the component of the gradient at w that is orthogonal to the descent gradient, over all tensors as one
    vector. A step against it lowers the surrogate gap without changing the perturbed loss, to first order.

    Args:
        alpha: weight of the orthogonal component, >= 0. Default 0.4 (the official repository's example). 0 is SAM.

    Raises:
        ValueError: alpha out of range.

    In the paper rho follows the learning rate; "gsam+rho-lr" does so. With rho = 0 the two gradients are equal and the
    method is the base optimizer.

    Source: Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, ICLR 2022, Alg. 1.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("gsam", alpha=0.2).combine)
        GSAM(alpha=0.2)
    """

    entrywise: ClassVar = True
    former_names: ClassVar = ("Orthogonal",)
    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True
    alpha: float = 0.4

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0.0, 1e6)

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        assert g is not None
        # g_s - alpha (g - k g_s) = (g_s - alpha g) + alpha k g_s
        k = c.share(g, gs[0])
        u = list(torch._foreach_add(gs[0], g, alpha=-self.alpha))
        return c.add_scaled(u, gs[0], self.alpha * k, spent=True), {}


@dataclass(frozen=True, kw_only=True)
class WSAM(Combine):
    """WSAM: the sharpness term g_s - g with the weight a = gamma / (1 - gamma).

    With `coupled=False` the base optimizer takes g, and then w <- w - lr a (g_s - g). Momentum and Adam's moments are
    then those of the plain gradient. With `coupled=True` the base optimizer takes u = (1 - a) g + a g_s, which
    extrapolates beyond g_s if a > 1.

    Args:
        gamma: weight of the sharpness term, in [0, 1). Default 0.9, which is a = 9 (official code). With
            `coupled=True`, 0.5 is SAM (a = 1). 0 is the base optimizer.
        coupled: whether the base optimizer takes the sharpness term too. Default False (official code).

    Raises:
        ValueError: gamma outside [0, 1).

    Source: Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term, KDD 2023,
    and the authors' code.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("wsam", gamma=0.5).combine)
        WSAM(gamma=0.5, coupled=False)
    """

    entrywise: ClassVar = True
    former_names: ClassVar = ("Weighted",)
    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True
    gamma: float = 0.9
    coupled: bool = False

    def __post_init__(self) -> None:
        check_range(self, "gamma", 0.0, 1.0)
        if self.gamma == 1.0:
            raise ValueError("WSAM: gamma must be below 1; with 1 the weight a = gamma / (1 - gamma) is infinite.")

    def demands(self) -> frozenset[Need]:
        return self.needs if self.coupled else self.needs | {Need.LR}

    @property
    def weight(self) -> float:
        """The weight a = gamma / (1 - gamma) of the sharpness term."""
        return self.gamma / (1.0 - self.gamma)

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        assert g is not None
        return (list(torch._foreach_lerp(g, gs[0], self.weight)) if self.coupled else g), {}

    def post(self, g: Tensors | None, gs: list[Tensors], c: StepContext) -> Tensors | None:
        if self.coupled or g is None:
            return None
        change = list(torch._foreach_sub(gs[0], g))
        torch._foreach_mul_(change, [-learning_rate(group, self) * self.weight for group in c.options])
        return change


@dataclass(frozen=True, kw_only=True)
class GNP(Combine):
    """GNP: u = (1 - alpha) g + alpha g_s, which penalises the gradient norm to first order.

    Args:
        alpha: weight of the gradient at w + eps, >= 0. Default 0.8 (the official recipes). 1 is SAM, 0 is the base
            optimizer.

    Raises:
        ValueError: alpha out of range.

    Follows the paper. The official code mixes (1 - alpha) g / ||g|| by default, in contrast to the paper's text.

    Source: Zhao, Zhang & Hu, Penalizing Gradient Norm for Efficiently Improving Generalization, ICML 2022, Alg. 1.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("gnp", alpha=0.5).combine)
        GNP(alpha=0.5)
    """

    entrywise: ClassVar = True
    former_names: ClassVar = ("Penalty",)
    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True
    alpha: float = 0.8

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0.0, 1e6)

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        assert g is not None
        return list(torch._foreach_lerp(g, gs[0], self.alpha)), {}


@dataclass(frozen=True, kw_only=True)
class Mean(Combine):
    """SAGM: the mean of both gradients, u = (g + g_s) / 2.

    It equals GNP with alpha = 1/2, but has no parameter that could be confused with SAGM's own alpha.

    Source: Wang et al., Sharpness-Aware Gradient Matching for Domain Generalization, CVPR 2023. The paper adds the two
    losses; the authors' code takes their mean.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("sagm").combine)
        Mean()
    """

    entrywise: ClassVar = True
    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        assert g is not None
        return list(torch._foreach_lerp(g, gs[0], 0.5)), {}


@dataclass(frozen=True, kw_only=True)
class LookSAM(Combine):
    """LookSAM: steps without ascent reuse the component that SAM added to the gradient on the last step with ascent.

        with ascent:     u = g_s,  and g_v = g_s - (<g_s, g> / ||g||^2) g is stored
        without ascent:  u = g + alpha (||g|| / ||g_v||) g_v

    Norms and projections are over all tensors as one vector. Use it with a schedule that ascends on every k-th step.

    Args:
        alpha: weight of the stored component, >= 0. Default 0.7 (the default of public re-implementations; no official
            code is known).

    Raises:
        ValueError: alpha out of range.

    Source: Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, CVPR 2022, Alg. 1.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("looksam", alpha=0.5).combine)
        LookSAM(alpha=0.5)
    """

    entrywise: ClassVar = True
    former_names: ClassVar = ("Look",)
    needs: ClassVar = frozenset({Need.GRADIENT_AT_W, Need.WHOLE_BATCH})
    slots: ClassVar = {"sharp": "param", "size": "scalar"}
    uses_gradient: ClassVar = True
    alpha: float = 0.7

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0.0, 1e6)

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        assert g is not None
        sharp, size = c.reject(gs[0], g)
        return gs[0], {"sharp": sharp, "size": size}

    def off(self, g: Tensors, state: State, c: StepContext) -> tuple[Tensors, NewState]:
        sharp, size = state["sharp"], state["size"]
        if size is None:
            return g, {}
        if any(s is None for s in sharp):
            sharp = [torch.zeros_like(x) if s is None else s for s, x in zip(sharp, g, strict=True)]
        factor = torch.where(size > 0, self.alpha * c.norm(g) / size, torch.zeros_like(size))
        return c.add_scaled(g, sharp, factor, spent=True), {}


@dataclass(frozen=True, kw_only=True)
class DirectionMagnitude(Combine):
    """SAMDIRECTION, SAMMAGNITUDE: the direction of one gradient with the magnitude of the other, as an ablation.

        keep="direction":  u = sign(g_s) |g|      or  g_s ||g|| / ||g_s||
        keep="magnitude":  u = |g_s| sign(g)      or  g ||g_s|| / ||g||

    With granularity "element" (the first form) direction and magnitude are the sign and the absolute value of each
    entry. With "tensor" and "global" (the second form) they are v / ||v|| and ||v||, for each tensor or for all tensors
    together.

    Args:
        keep: what is kept of SAM's gradient: "direction" (default) or "magnitude".
        granularity: "element" (default, as in the original code), "tensor" or "global".
        legacy_names: True swaps the two values of `keep`, as the original classes do: its class SAMDIRECTION keeps
            SAM's magnitude and SAMMAGNITUDE keeps its direction, in contrast to its text and table. Default False: as
            in the text.

    Raises:
        ValueError: an unknown word.

    Source: Luong, empirical study of direction and magnitude in SAM (2024), text and classes `samdirection.py`,
    `sammagnitude.py`.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("sam-direction", granularity="tensor").combine)
        DirectionMagnitude(keep='direction', granularity='tensor', legacy_names=False)
    """

    former_names: ClassVar = ("Keep",)
    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True
    keep: str = "direction"
    granularity: str = "element"
    legacy_names: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "keep", ("direction", "magnitude"))
        check_choice(self, "granularity", ("element", "tensor", "global"))

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        return self.granularity != "tensor"

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        assert g is not None
        of_sam = (self.keep == "direction") != self.legacy_names
        direction, magnitude = (gs[0], g) if of_sam else (g, gs[0])
        if self.granularity == "element":
            return list(torch._foreach_mul(torch._foreach_sign(direction), torch._foreach_abs(magnitude))), {}
        if self.granularity == "global":
            factors = [_ratio(c.norm(magnitude), c.norm(direction))] * len(direction)
        else:
            factors = [_ratio(c.norm([m]), c.norm([d])) for m, d in zip(magnitude, direction, strict=True)]
        return [d * f.to(d.device, d.dtype) for d, f in zip(direction, factors, strict=True)], {}


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """The quotient a / b; 0 where b is 0."""
    return torch.where(b > 0, a / b, torch.zeros_like(a))


@dataclass(frozen=True, kw_only=True)
class SANER(Combine):
    """SANER: u = (1 - alpha 1[0 < r < 1]) g_s, entry by entry, with r = g_s / g.

    Damps the entries whose gradient at w + eps is smaller than at w and has the same sign.

    Args:
        alpha: by how much these entries are reduced, in [0, 1]. Default 0.5. 0 is SAM. The original code's alpha is the
            part that remains, 1 - alpha here.
        warm_up: number of updates at the start that are plain SAM, >= 0. Default 0 (the original: 50 of 200 epochs).

    Raises:
        ValueError: out of range.

    Source: Luong et al., Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting, AISTATS 2026,
    and the README of the authors' repository.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("saner", alpha=0.25).combine)
        SANER(alpha=0.25, warm_up=0)
    """

    entrywise: ClassVar = True
    former_names: ClassVar = ("Saner",)
    step_dependent: ClassVar = True
    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True
    alpha: float = 0.5
    warm_up: int = 0

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0.0, 1.0)
        check_count(self, "warm_up", 0)

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        assert g is not None
        if c.step < self.warm_up:
            return gs[0], {}
        # 0 < g_s / g < 1 without a division: the same sign, and smaller.
        return [
            torch.where(((s > 0) & (s < x)) | ((s < 0) & (s > x)), s * (1.0 - self.alpha), s)
            for s, x in zip(gs[0], g, strict=True)
        ], {}


@dataclass(frozen=True, kw_only=True)
class BSAM(Combine):
    """bSAM: a moving average m of the descent gradient, divided elementwise by a running scale s of the gradients.

        m <- beta1 m + (1 - beta1) (g_s + delta w)
        u  = m / s                                                      with s before its update
        s <- beta2 s + (1 - beta2) (sqrt(s) |g| + gamma + delta)        with g of pass 1

    s starts at s_init and m at 0, without bias correction. s is the precision of the weights divided by the number N of
    samples: 1 / (N s) is the variance of the posterior over which predictions can be averaged. Read s as
    `optimizer.state[w]["flatmin.combine.s"]`. On steps without ascent (rho = 0, or by the schedule) both g and g_s are
    the gradient at w.

    Args:
        beta1: decay of m, in [0, 1). Default 0.9.
        beta2: decay of s, in [0, 1]. Default 0.999. With 1, s stays at s_init.
        s_init: initial value of s, > 0. Default 1.0.
        gamma: damping, >= 0. Default 0.1.
        delta: precision of the prior divided by N, which acts as a weight decay inside m, >= 0. Default 2e-4: the 40 of
            the official CIFAR runs over their N, 4 times 50,000.

    Raises:
        ValueError: a parameter out of range; when the optimizer is built, a base other than SGD without momentum and
            weight decay, which would average twice.

    m and s are stored in float32 or better. The official code splits a batch into 8 parts, each with its own noise;
    here the batch is one part.

    Source: Moellenhoff & Khan, SAM as an Optimal Relaxation of Bayes, ICLR 2023, Alg. 1 (b); defaults of the official
    code (`train.py`).

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("bsam", gamma=0.05).combine)
        BSAM(beta1=0.9, beta2=0.999, s_init=1.0, gamma=0.05, delta=0.0002)
    """

    needs: ClassVar = frozenset({Need.PASS_1, Need.OWN_LOSS, Need.BARE_SGD})
    slots: ClassVar = {"s": "param", "m": "param"}
    uses_gradient: ClassVar = True
    always: ClassVar = True
    beta1: float = 0.9
    beta2: float = 0.999
    s_init: float = 1.0
    gamma: float = 0.1
    delta: float = 2e-4

    def __post_init__(self) -> None:
        check_range(self, "beta1", 0.0, 1.0, open_high=True)
        check_range(self, "beta2", 0.0, 1.0)
        check_range(self, "s_init", 0.0, 1e12, open_low=True)
        check_range(self, "gamma", 0.0, 1e6)
        check_range(self, "delta", 0.0, 1e6)

    def initial(self, slot: str) -> float:
        return self.s_init if slot == "s" else 0.0

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        assert g is not None
        # In half precision a change of s by a thousandth would be rounded away.
        s, m, g, sharp, w = map(widened, (state["s"], state["m"], g, gs[0], c.w))
        decayed = torch._foreach_add(sharp, w, alpha=self.delta)
        m = list(torch._foreach_lerp(m, list(decayed), 1.0 - self.beta1))
        u = list(torch._foreach_div(m, s))
        size = torch._foreach_mul(torch._foreach_sqrt(s), torch._foreach_abs(g))
        torch._foreach_add_(size, self.gamma + self.delta)
        new = {"m": m, "s": list(torch._foreach_lerp(s, list(size), 1.0 - self.beta2))}
        return [x.to(y.dtype) for x, y in zip(u, gs[0], strict=True)], new

    def off(self, g: Tensors, state: State, c: StepContext) -> tuple[Tensors, NewState]:
        return self(g, [g], state, c)


@dataclass(frozen=True, kw_only=True)
class SAMPa(Combine):
    """SAMPa: u = (1 - lam) g_1 + lam g_2, with the two gradients of `Extrapolation`: at w + eps and one step ahead.

    Args:
        lam: weight of the gradient one step ahead, in [0, 1]. Default 0.2 (official code). The default rho is 0.1
            (official code).

    Raises:
        ValueError: lam out of range.

    With lam = 0 it is SAM with a perturbation along the gradient at the extrapolated point. The official code divides
    by lam to recover that gradient, so with lam = 0 it does not perturb at all. With rho = 0 the method is the base
    optimizer; this is not the limit of small rho, where u tends to (1 - lam) g + lam g_2. A step that a schedule leaves
    out stores no gradient, so the next perturbation uses the gradient from before it. With batch="previous" the
    returned loss, the diagnostics and the gradients of other optimizers' weights are those of the previous batch.

    Source: Xie, Pethick & Cevher, SAMPa: Sharpness-aware Minimization Parallelized, NeurIPS 2024, Alg. 1.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("sampa", lam=0.5).combine)
        SAMPa(lam=0.5)
    """

    descents: ClassVar = 2
    default_rho: ClassVar = 0.1
    lam: float = 0.2

    def __post_init__(self) -> None:
        check_range(self, "lam", 0.0, 1.0)

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        return (gs[0] if len(gs) == 1 else list(torch._foreach_lerp(gs[0], gs[1], self.lam))), {}
