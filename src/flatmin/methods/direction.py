"""Directions: along what are the weights perturbed?"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flatmin.methods.context import NewState, State, StepContext, Tensors, filled, widened
from flatmin.methods.part import Need, Part, check_choice, check_range

__all__ = ["EMA", "FSAM", "RSAM", "BSAMNoise", "Direction", "Gradient", "Momentum", "StaleGradient"]


@dataclass(frozen=True, kw_only=True)
class Direction(Part):
    """Base class of directions: along what are the weights perturbed?

    Attributes:
        evaluates: whether it needs the gradient of pass 1. If False, pass 1 is left out and `__call__` gets g = None.
            Default True.
        turns: whether d may differ from g. True if `__call__` is defined.
        moves_start: whether pass 1 is taken at w + `start()`. Default False.
        observes: whether it uses the descent gradient. True if `observe` is defined.
        keeps_graph: whether pass 1 may have to keep its graph. True if `graph` is defined.
    """

    kind: ClassVar[str] = "direction"
    question: ClassVar[str] = "in which direction?"
    declared_by: ClassVar = {"turns": "__call__", "observes": "observe", "keeps_graph": "graph"}
    evaluates: ClassVar[bool] = True
    turns: ClassVar[bool] = False
    moves_start: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    keeps_graph: ClassVar[bool] = False

    def validate(self) -> None:
        if not (self.evaluates or self.turns):
            name = type(self).__name__
            raise ValueError(f"{name} takes no pass 1, so it must define __call__(), which returns the direction.")

    def conflict(self, need: Need) -> str | None:
        if need in (Need.GRADIENT_AT_W, Need.LOSSES_AT_W) and self.moves_start:
            return "pass 1 is not taken at w"
        if need in (Need.GRADIENT_AT_W, Need.LOSSES_AT_W, Need.PASS_1) and not self.evaluates:
            return "it takes no pass 1"
        return super().conflict(need)

    def factor(self) -> float:
        """The factor on the perturbation along d; -1 perturbs against d. Read once, when the recipe is made."""
        return 1.0

    def start(self, state: State, c: StepContext) -> Tensors:
        """Where pass 1 is taken, as a displacement from w."""
        raise AttributeError(f"{type(self).__name__} declares moves_start but does not define start().")

    def __call__(self, g: Tensors | None, state: State, c: StepContext) -> tuple[Tensors | None, NewState]:
        """The direction d (None: no perturbation in this step) and the new state."""
        return g, {}

    def observe(self, gs: Tensors, state: State, c: StepContext) -> NewState:
        """The new state, given the descent gradient."""
        return {}

    def graph(self, state: State, c: StepContext) -> bool:
        """Whether pass 1 must keep its graph, so that `__call__` can use `StepContext.curvature` in this step."""
        return False


@dataclass(frozen=True, kw_only=True)
class Gradient(Direction):
    """SAM: the gradient itself, d = g. Source: Foret et al., SAM, ICLR 2021, Eq. 2."""

    entrywise: ClassVar = True


@dataclass(frozen=True, kw_only=True)
class EMA(Direction):
    """VaSSO: a moving average of the gradients, d_t = (1 - theta) d_{t-1} + theta g_t.

    Each tensor's average starts at its first gradient, d_0 = g_0.

    Args:
        theta: weight of the newest gradient, in (0, 1]. Default 0.9 (the original command line). 1 is SAM.

    Raises:
        ValueError: theta outside (0, 1].

    Source: Li & Giannakis, VaSSO, NeurIPS 2023; `solver/vasso.py` of the original code.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("vasso", theta=0.4).direction)
        EMA(theta=0.4)
    """

    entrywise: ClassVar = True
    slots: ClassVar = {"ema": "param"}
    theta: float = 0.9

    def __post_init__(self) -> None:
        check_range(self, "theta", 0.0, 1.0, open_low=True)

    def __call__(self, g: Tensors | None, state: State, c: StepContext) -> tuple[Tensors | None, NewState]:
        assert g is not None
        ema = torch._foreach_lerp(filled(state["ema"], g), g, self.theta)
        return list(ema), {"ema": list(ema)}


@dataclass(frozen=True, kw_only=True)
class FSAM(Direction):
    """F-SAM: the batch-specific part of the gradient, d = g - sigma m, with m_t = lam m_{t-1} + (1 - lam) g_t.

    Each tensor's average m starts at its first gradient. Its first step is SAM's (d = g), since g - m would be zero.
    With sigma = 1 the paper's form (`ema="current"`, m_t) and the official code's (`ema="previous"`, m_{t-1}) have the
    same direction; otherwise they differ.

    Args:
        sigma: factor on the average that is subtracted. Default 1.0 (official code). 0 is SAM.
        lam: decay of the average, in [0, 1). Default 0.9 (class default of the official code; its command line has
            0.95, its script 0.6).
        ema: which average is subtracted: "current" (default, paper) or "previous" (official code).

    Raises:
        ValueError: lam outside [0, 1), sigma not finite, or an unknown ema.

    Source: Li et al., Friendly SAM, CVPR 2024; `utils.py` of the official code.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("fsam", sigma=0.5).direction)
        FSAM(sigma=0.5, lam=0.9, ema='current')
    """

    entrywise: ClassVar = True
    former_names: ClassVar = ("Friendly",)
    slots: ClassVar = {"mean": "param"}
    sigma: float = 1.0
    lam: float = 0.9
    ema: str = "current"

    def __post_init__(self) -> None:
        check_range(self, "sigma", -1e6, 1e6)
        check_range(self, "lam", 0.0, 1.0)
        if self.lam == 1.0:
            raise ValueError("FSAM: lam must be below 1; with 1 the average stays at the first gradient.")
        if self.ema not in ("current", "previous"):
            raise ValueError(f"FSAM: ema must be 'current' (paper) or 'previous' (official code), got {self.ema!r}.")

    def __call__(self, g: Tensors | None, state: State, c: StepContext) -> tuple[Tensors | None, NewState]:
        assert g is not None
        previous = filled(state["mean"], g)
        mean = list(torch._foreach_lerp(previous, g, 1.0 - self.lam))
        removed = mean if self.ema == "current" else previous
        d = list(torch._foreach_add(g, removed, alpha=-self.sigma))
        first = [s is None for s in state["mean"]]
        if any(first):
            d = [x if new else y for new, x, y in zip(first, g, d, strict=True)]
        return d, {"mean": mean}


@dataclass(frozen=True, kw_only=True)
class RSAM(Direction):
    """RSAM: noise plus the gradient at the noisy weights, d = Delta + lam grad L(w + Delta).

    Delta = sigma n ||w_filter|| with n ~ N(0, I). Pass 1 is taken at w + Delta; Delta is stored during pass 1 (one more
    copy of the weights then, none in pass 2). The perturbation along d starts from w.

    Args:
        sigma: scale of the noise, >= 0. Default 0.001 (the official runs go from 0.0005 to 0.0025).
        lam: weight of the gradient, > 0. Default 2.0 (official code). With sigma = 0 it cancels and the method is SAM.
        scale: "filter" (default, official code): the noise of every entry is multiplied by the norm of its filter, a
            slice along the first dimension (a vector is one filter). "none": Delta = sigma n.

    Raises:
        ValueError: out of range.

    Source: Liu et al., Random Sharpness-Aware Minimization, NeurIPS 2022, and its code.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("rsam", sigma=0.002).direction)
        RSAM(sigma=0.002, lam=2.0, scale='filter')
    """

    former_names: ClassVar = ("Randomised",)
    needs: ClassVar = frozenset({Need.RANDOM, Need.FREE_START})
    moves_start: ClassVar = True
    sigma: float = 0.001
    lam: float = 2.0
    scale: str = "filter"

    def __post_init__(self) -> None:
        check_range(self, "sigma", 0.0, 1e6)
        check_range(self, "lam", 0.0, 1e12, open_low=True)
        check_choice(self, "scale", ("filter", "none"))

    def start(self, state: State, c: StepContext) -> Tensors:
        noise = list(torch._foreach_mul(c.noise(), self.sigma))
        return noise if self.scale == "none" else list(torch._foreach_mul(noise, [_filter_norms(w) for w in c.w]))

    def __call__(self, g: Tensors | None, state: State, c: StepContext) -> tuple[Tensors | None, NewState]:
        assert g is not None
        return list(torch._foreach_add(c.start, g, alpha=self.lam)), {}


def _filter_norms(w: Tensor) -> Tensor:
    """The norm of each filter, expanded to the filter's entries."""
    axes = tuple(range(1, w.ndim)) if w.ndim > 1 else tuple(range(w.ndim))
    return torch.linalg.vector_norm(w, dim=axes, keepdim=True).expand_as(w) if axes else w.abs()


@dataclass(frozen=True, kw_only=True)
class Momentum(Direction):
    """Momentum-SAM: d = sign * v, with v the base optimizer's momentum. No pass 1: one gradient a step.

    v is SGD's momentum buffer or Adam's first moment (not preconditioned). The weights are not perturbed until the base
    optimizer has a momentum.

    Args:
        sign: -1 (default) perturbs along the coming update, as the official code does; +1 perturbs uphill.

    Choose rho: the official runs use a larger radius than SAM's (0.3 to 10; 3 on CIFAR).

    Raises:
        ValueError: another sign.

    Source: Becker, Altrock & Risse, Momentum-SAM: Sharpness Aware Minimization without Computational Overhead, 2024;
    official code `optimizer/msam.py`.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("momentum-sam", sign=1).direction)
        Momentum(sign=1)
    """

    entrywise: ClassVar = True
    evaluates: ClassVar = False
    needs: ClassVar = frozenset({Need.BASE_MOMENTUM})
    sign: int = -1

    def __post_init__(self) -> None:
        if self.sign not in (-1, 1):
            raise ValueError(f"Momentum: sign must be -1 (along the update) or 1 (uphill), got {self.sign!r}.")

    def factor(self) -> float:
        return float(self.sign)

    def __call__(self, g: Tensors | None, state: State, c: StepContext) -> tuple[Tensors | None, NewState]:
        momenta = c.momentum
        if all(v is None for v in momenta):
            return None, {}
        return [torch.zeros_like(w) if v is None else v for v, w in zip(momenta, c.w, strict=True)], {}


@dataclass(frozen=True, kw_only=True)
class StaleGradient(Direction):
    """The last step's descent gradient, d_t = grad L_{B_{t-1}}(w_{t-1} + eps_{t-1}). No pass 1: one gradient a step.

    The first step is not perturbed. AsyncSAM differs: its old gradient is taken at the old w, in a separate stream.

    Source: AsyncSAM's idea of a gradient that is one step old.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("stale-sam").direction)
        StaleGradient()
    """

    entrywise: ClassVar = True
    former_names: ClassVar = ("Stale",)
    evaluates: ClassVar = False
    slots: ClassVar = {"gradient": "param"}

    def __call__(self, g: Tensors | None, state: State, c: StepContext) -> tuple[Tensors | None, NewState]:
        last = state["gradient"]
        if all(s is None for s in last):
            return None, {}
        return [torch.zeros_like(w) if s is None else s for s, w in zip(last, c.w, strict=True)], {}

    def observe(self, gs: Tensors, state: State, c: StepContext) -> NewState:
        # The base optimizer may write to its gradients.
        return {"gradient": c.copied(gs)}


@dataclass(frozen=True, kw_only=True)
class BSAMNoise(Direction):
    """bSAM: d = grad L(w + n / sqrt(N s)) / s elementwise, with n ~ N(0, I) and the s of `BSAM`.

    Pass 1 is taken at the noisy weights; the perturbation rho d starts from w.

    Args:
        data_size: N, the number of training samples. (The official runs count each sample 4 times where images are
            cropped and flipped at random.) `flatmin train` fills it in. Default 0: not given, which is an error when
            the optimizer is built. inf: no noise.

    Raises:
        ValueError: data_size below 0; when the optimizer is built, data_size not given.

    Source: Moellenhoff & Khan, SAM as an Optimal Relaxation of Bayes, ICLR 2023, Alg. 1 (b), and its code (`optim.py`).

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("bsam", data_size=50_000).direction)
        BSAMNoise(data_size=50000.0)
    """

    needs: ClassVar = frozenset({Need.RANDOM, Need.FREE_START})
    moves_start: ClassVar = True
    reads: ClassVar = {"s": "combine.s"}
    default_rho: ClassVar = 0.1
    data_size: float = 0.0

    def __post_init__(self) -> None:
        if self.data_size != math.inf:
            check_range(self, "data_size", 0.0, math.inf)

    def validate(self) -> None:
        if not self.data_size:
            raise ValueError("bsam needs data_size=N, the number of training samples, which scales its noise.")

    def start(self, state: State, c: StepContext) -> Tensors:
        spread = torch._foreach_mul(torch._foreach_sqrt(widened(state["s"])), math.sqrt(self.data_size))
        return [(n / s).to(n.dtype) for n, s in zip(c.noise(), spread, strict=True)]

    def __call__(self, g: Tensors | None, state: State, c: StepContext) -> tuple[Tensors | None, NewState]:
        assert g is not None
        return [(x / s).to(x.dtype) for x, s in zip(g, state["s"], strict=True)], {}
