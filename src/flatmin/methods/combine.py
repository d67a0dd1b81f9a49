"""What goes to the base optimizer?"""

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
    """What goes to the base optimizer? Runs over every trained tensor that has a gradient in all passes.

    Attributes:
        ascends: False for combinations that work where the weights never leave w. Default True.
        uses_gradient: whether g is kept through pass 2, which costs one more copy. Default False: g is None.
        descents: how many descent gradients it takes. Default 1.
        mixes: whether it does anything but hand on the last descent gradient; true where `__call__` or `post` is
            defined.
        always: whether `off` acts also where no weight can move, because rho = 0 everywhere: the method's limit is then
            a rule of its own, and not the base's step. Default False.
        keeps_graph: whether the descent pass may have to keep its graph; true where `graph` is defined.
        off_step: whether a step without ascent is more than the base's; true where `off` is defined.
        post_step: whether something is added to w after the base's step; true where `post` is defined.
    """

    kind: ClassVar[str] = "combine"
    question: ClassVar[str] = "what goes to the base?"
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
        # The products of a graph are taken after the weights are put back.
        return super().implied | (frozenset({Need.STAYS}) if self.keeps_graph else frozenset())

    def graph(self, state: State, c: StepContext) -> bool:
        """Whether the descent pass shall keep its graph, so that `StepContext.curvature` works in this step's call."""
        return False

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        """The update's gradient u from g (at w, or None) and the descent gradients, one list per point."""
        return gs[-1], {}

    def off(self, g: Tensors, state: State, c: StepContext) -> tuple[Tensors, NewState]:
        """U on a step without ascent; g is the descent gradient at w, and may be given to `add_scaled` as spent."""
        return g, {}

    def post(self, g: Tensors | None, gs: list[Tensors], c: StepContext) -> Tensors | None:
        """Added to w after the base's step, for decoupled terms; None: nothing."""
        return None


@dataclass(frozen=True, kw_only=True)
class Descent(Combine):
    """u = g_s: the base takes the gradient at w + eps. Source: Foret et al., SAM, ICLR 2021, Alg. 1."""


@dataclass(frozen=True, kw_only=True)
class GSAM(Combine):
    """GSAM: u = g_s - alpha g_perp, with g_perp = g - (<g, g_s> / ||g_s||^2) g_s.

    g_perp is the part of the gradient at w that is orthogonal to the descent gradient, over all tensors as one vector:
    going against it lowers the surrogate gap without changing the perturbed loss to first order.

    Args:
        alpha: >= 0. Default 0.4 (the official repository's example); 0 is SAM.

    Raises:
        ValueError: alpha out of range.

    The paper ties rho to lr as well; add "+rho-lr" for that. With rho = 0 the two gradients are one, g_perp = 0 and the
    method is its base.

    Source: Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, ICLR 2022, Alg. 1.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("gsam", alpha=0.2).combine)
        GSAM(alpha=0.2)
    """

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
    """WSAM: coupled u = (1 - a) g + a g_s, with a = gamma / (1 - gamma); a > 1 extrapolates.

    `coupled=False`: the base takes g, and then w <- w - lr a (g_s - g), so that momentum and Adam's moments see the
    plain gradient only.

    Args:
        gamma: weight of the sharpness term, in [0, 1). Default 0.9, so a = 9 (official code); 0.5 coupled is SAM
            (a = 1), 0 is the base.
        coupled: default False (official code).

    Raises:
        ValueError: gamma outside [0, 1).

    Source: Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term, KDD 2023,
    and the authors' code.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("wsam", gamma=0.5).combine)
        WSAM(gamma=0.5, coupled=False)
    """

    former_names: ClassVar = ("Weighted",)
    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True
    gamma: float = 0.9
    coupled: bool = False

    def __post_init__(self) -> None:
        check_range(self, "gamma", 0.0, 1.0)
        if self.gamma == 1.0:
            raise ValueError("WSAM: gamma must be below 1, where the weight a = gamma / (1 - gamma) is infinite.")

    def demands(self) -> frozenset[Need]:
        return self.needs if self.coupled else self.needs | {Need.LR}

    @property
    def weight(self) -> float:
        """A = gamma / (1 - gamma)."""
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
    """GNP: u = (1 - alpha) g + alpha g_s, which penalises the gradient's norm to first order.

    Args:
        alpha: >= 0. Default 0.8 (the official recipes); 1 is SAM, 0 the base.

    Raises:
        ValueError: alpha out of range.

    Differs from the official code, whose default mixes (1 - alpha) g / ||g||, against its text.

    Source: Zhao, Zhang & Hu, Penalizing Gradient Norm for Efficiently Improving Generalization, ICML 2022, Alg. 1.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("gnp", alpha=0.5).combine)
        GNP(alpha=0.5)
    """

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
    """u = (g + g_s) / 2: GNP at alpha = 1/2, without a parameter that could be taken for the method's own alpha.

    Source: Wang et al., Sharpness-Aware Gradient Matching for Domain Generalization, CVPR 2023, whose sum of two losses
    the authors' code halves.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("sagm").combine)
        Mean()
    """

    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: StepContext) -> tuple[Tensors, NewState]:
        assert g is not None
        return list(torch._foreach_lerp(g, gs[0], 0.5)), {}


@dataclass(frozen=True, kw_only=True)
class LookSAM(Combine):
    """LookSAM's memory: what SAM adds to the gradient is used again on the steps that do not ascend.

        on:   u = g_s,  g_v = g_s - (<g_s, g> / ||g||^2) g is kept
        off:  u = g + alpha (||g|| / ||g_v||) g_v

    Norms and projection over all tensors as one vector. Meant for a rule that ascends every k-th step.

    Args:
        alpha: >= 0. Default 0.7 (the default of the public re-implementations; no official code is known).

    Raises:
        ValueError: alpha out of range.

    Source: Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, CVPR 2022, Alg. 1.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("looksam", alpha=0.5).combine)
        LookSAM(alpha=0.5)
    """

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
    """Ablation: one half of g_s and the other half of g.

    granularity "element": direction = sign, magnitude = absolute value of each entry;
    "tensor" and "global": direction = v / ||v||, magnitude = ||v|| of each tensor or of all.

        keep="direction":  u = sign(g_s) |g|      or  g_s ||g|| / ||g_s||
        keep="magnitude":  u = |g_s| sign(g)      or  g ||g_s|| / ||g||

    Args:
        keep: "direction" or "magnitude" of SAM's gradient.
        granularity: "element" (default, as coded), "tensor" or "global".
        legacy_names: True swaps the two, as the original classes do: its class SAMDIRECTION keeps SAM's magnitude and
            SAMMAGNITUDE its direction, against its text and table. Default False: named by the text.

    Raises:
        ValueError: another word.

    Source: Luong, empirical study of direction and magnitude in SAM (2024), prose and classes `samdirection.py`,
    `sammagnitude.py`.

    Example:
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
    """A / b, and 0 where b is 0."""
    return torch.where(b > 0, a / b, torch.zeros_like(a))


@dataclass(frozen=True, kw_only=True)
class SANER(Combine):
    """SANER: u = (1 - alpha 1[0 < r < 1]) g_s entry by entry, with r = g_s / g.

    Entries whose gradient shrank without changing sign on the way to w + eps are damped.

    Args:
        alpha: in [0, 1]. Default 0.5; 0 is SAM. The original code's alpha is the part that is kept, 1 - alpha here.
        warm_up: updates that are plain SAM first. Default 0; the original waits 50 of 200 epochs.

    Raises:
        ValueError: out of range.

    Source: README of the SANER repository (Luong and co-authors).

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("saner", alpha=0.25).combine)
        SANER(alpha=0.25, warm_up=0)
    """

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
        # 0 < g_s / g < 1 without dividing: the same sign, and smaller.
        return [
            torch.where(((s > 0) & (s < x)) | ((s < 0) & (s > x)), s * (1.0 - self.alpha), s)
            for s, x in zip(gs[0], g, strict=True)
        ], {}


@dataclass(frozen=True, kw_only=True)
class BSAM(Combine):
    """bSAM's update: the descent gradient's average m over a scale s that follows the gradients' size, by element.

        m <- beta1 m + (1 - beta1) (g_s + delta w)
        u  = m / s                                                      with s before it changes
        s <- beta2 s + (1 - beta2) (sqrt(s) |g| + gamma + delta)        g that of pass 1

    s begins at s_init, m at 0; neither is corrected for its beginning. s is the precision of the weights divided by the
    number of samples: 1 / (N s) is the variance of the posterior that predictions are averaged over, and
    `optimizer.state[w]["flatmin.combine.s"]` is s. Where nothing ascends (rho = 0, or a step that a schedule leaves
    out) g and g_s are the gradient at w.

    Args:
        beta1: of m, in [0, 1). Default 0.9.
        beta2: of s, in [0, 1]. Default 0.999; 1 leaves s at s_init.
        s_init: > 0. Default 1.0.
        gamma: damping, >= 0. Default 0.1.
        delta: the prior's precision divided by N, a weight decay inside m, >= 0. Default 2e-4: the 40 of the official
            CIFAR runs over their N, 4 times 50,000.

    Raises:
        ValueError: out of range; at the construction of the optimizer, for a base other than SGD without momentum and
            weight decay, which would average twice.

    m and s are kept in single precision or better. The official code splits a batch into 8 parts with a noise of their
    own; here it is one part.

    Source: Moellenhoff & Khan, SAM as an Optimal Relaxation of Bayes, ICLR 2023, Alg. 1 (b); defaults of the official
    code (`train.py`).

    Example:
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
        # In half precision s would stand still: it changes by a thousandth.
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
    """SAMPa: u = (1 - lam) g_1 + lam g_2, with the gradients of `Extrapolation`: at w + eps and one step ahead.

    Args:
        lam: in [0, 1]. Default 0.2 (official code), as the default rho 0.1.

    Raises:
        ValueError: out of range.

    With lam = 0 it is SAM along the gradient at the extrapolated point; the official code divides by lam to find that
    gradient again and does not perturb at all then. With rho = 0 it is the base, which is not the limit of small rho:
    there u tends to (1 - lam) g + lam g_2. On a step that a schedule leaves out nothing is remembered: the next ascent
    is along the gradient from before it. With batch="previous" the loss that a step returns, diagnostics and the
    weights of other optimizers are of the batch before.

    Source: Xie, Pethick & Cevher, SAMPa: Sharpness-aware Minimization Parallelized, NeurIPS 2024, Alg. 1.

    Example:
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
