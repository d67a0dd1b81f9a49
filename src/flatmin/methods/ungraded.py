"""Directions that do not come from the gradient at w: noise, momentum, the last step's gradient."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flatmin.methods.part import Context, Direction, Need, NewState, State, Tensors, check_choice, check_range


@dataclass(frozen=True, kw_only=True)
class Randomised(Direction):
    """RSAM: d = Delta + lam grad L(w + Delta), with Delta = sigma n ||w_filter|| and n ~ N(0, I).

    Pass 1 is taken at w + Delta; Delta is held through it (one more copy then, none in pass 2). The displacement is
    taken from w.

    Args:
        sigma: scale of the noise, >= 0. Default 0.001 (the official runs go from 0.0005 to 0.0025).
        lam: weight of the gradient, > 0. Default 2.0 (official code). With sigma = 0 it cancels: the method is SAM.
        scale: "filter" (default, official code): every entry's noise is multiplied by the norm of its filter (a slice
            along the first dimension; a vector is one filter). "none": Delta = sigma n.

    Raises:
        ValueError: out of range.

    Source: Liu et al., Random Sharpness-Aware Minimization, NeurIPS 2022, and its code.

    Cost of rsam: 2 gradient evaluations a step, 1 extra copy of the moved weights.
    Needs: random draws.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("rsam", sigma=0.002).direction)
        Randomised(sigma=0.002, lam=2.0, scale='filter')
    """

    needs: ClassVar = frozenset({Need.RANDOM, Need.FREE_START})
    moves_start: ClassVar = True
    sigma: float = 0.001
    lam: float = 2.0
    scale: str = "filter"

    def __post_init__(self) -> None:
        check_range(self, "sigma", 0.0, 1e6)
        check_range(self, "lam", 0.0, 1e12, open_low=True)
        check_choice(self, "scale", ("filter", "none"))

    def start(self, state: State, c: Context) -> Tensors:
        noise = list(torch._foreach_mul(c.noise(), self.sigma))
        return noise if self.scale == "none" else list(torch._foreach_mul(noise, [_filter_norms(w) for w in c.w]))

    def __call__(self, g: Tensors | None, state: State, c: Context) -> tuple[Tensors | None, NewState]:
        assert g is not None
        return list(torch._foreach_add(c.start, g, alpha=self.lam)), {}


def _filter_norms(w: Tensor) -> Tensor:
    """The norm of each filter, shaped so that it multiplies every entry of it."""
    axes = tuple(range(1, w.ndim)) if w.ndim > 1 else tuple(range(w.ndim))
    return torch.linalg.vector_norm(w, dim=axes, keepdim=True).expand_as(w) if axes else w.abs()


@dataclass(frozen=True, kw_only=True)
class Momentum(Direction):
    """Momentum-SAM: d = sign * v with v the base optimizer's momentum; no pass 1, one gradient a step.

    v is SGD's momentum buffer or Adam's first moment (not preconditioned). Until the base has one, the weights stay.

    Args:
        sign: -1 (default) looks ahead along the update, as the official code and its followers do, whatever their
            comments say; +1 climbs.

    The official runs use a larger radius than SAM's (0.3 to 10; 3 on CIFAR): set rho.

    Raises:
        ValueError: another sign.

    Source: Becker, Altrock & Risse, Momentum-SAM: Sharpness Aware Minimization without Computational Overhead, 2024;
    official code `optimizer/msam.py`.

    Cost of momentum-sam: 1 gradient evaluation a step, 1 extra copy of the moved weights.
    Needs: the base optimizer's momentum.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("momentum-sam", sign=1).direction)
        Momentum(sign=1)
    """

    evaluates: ClassVar = False
    needs: ClassVar = frozenset({Need.BASE_MOMENTUM})
    sign: int = -1

    def __post_init__(self) -> None:
        if self.sign not in (-1, 1):
            raise ValueError(f"Momentum: sign must be -1 (look ahead) or 1 (climb), got {self.sign!r}.")

    def factor(self) -> float:
        return float(self.sign)

    def __call__(self, g: Tensors | None, state: State, c: Context) -> tuple[Tensors | None, NewState]:
        known = c.momentum
        if all(v is None for v in known):
            return None, {}
        v = [torch.zeros_like(w) if v is None else v for v, w in zip(known, c.w, strict=True)]
        return v, {}


@dataclass(frozen=True, kw_only=True)
class Stale(Direction):
    """d_t = the last step's descent gradient, grad L_{B_{t-1}}(w_{t-1} + eps_{t-1}); no pass 1, one gradient a step.

    The first step stays at w. AsyncSAM differs: its old gradient is taken at the old w, in a stream of its own.

    Source: the idea of a gradient one step old, as in AsyncSAM.

    Cost of stale-sam: 1 gradient evaluation a step, 2 extra copies of the moved weights.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("stale-sam").direction)
        Stale()
    """

    evaluates: ClassVar = False
    slots: ClassVar = {"gradient": "param"}

    def __call__(self, g: Tensors | None, state: State, c: Context) -> tuple[Tensors | None, NewState]:
        last = state["gradient"]
        if all(s is None for s in last):
            return None, {}
        return [torch.zeros_like(w) if s is None else s for s, w in zip(last, c.w, strict=True)], {}

    def observe(self, gs: Tensors, state: State, c: Context) -> NewState:
        # The base may write to what it is given.
        return {"gradient": c.copied(gs)}
