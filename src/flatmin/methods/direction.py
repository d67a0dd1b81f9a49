"""Along what?"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from flatmin.methods.part import Context, Direction, NewState, State, Tensors, check_range


def filled(slot: list[torch.Tensor | None], default: Tensors) -> Tensors:
    """The slot's tensors in the dtypes of `default`, and `default` where a tensor has not been seen before.

    A checkpoint may have been saved in another precision than training goes on in.
    """
    return [d if s is None else s if s.dtype is d.dtype else s.to(d.dtype) for s, d in zip(slot, default, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Gradient(Direction):
    """d = g. Source: Foret et al., SAM, ICLR 2021, Eq. 2."""

    def __call__(self, g: Tensors | None, state: State, c: Context) -> tuple[Tensors | None, NewState]:
        return g, {}


@dataclass(frozen=True, kw_only=True)
class EMA(Direction):
    """VaSSO: d_t = (1 - theta) d_{t-1} + theta g_t, with d_0 = g_0 for each tensor's first gradient.

    Args:
        theta: weight of the newest gradient, in (0, 1]. Default 0.9 (original command line); 1 is SAM.

    Raises:
        ValueError: theta outside (0, 1].

    Source: Li & Giannakis, VaSSO, NeurIPS 2023; `solver/vasso.py` of the original code.

    Cost of vasso: 2 gradient evaluations a step, 3 extra copies of the moved weights.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("vasso", theta=0.4).direction)
        EMA(theta=0.4)
    """

    slots: ClassVar = {"ema": "param"}
    theta: float = 0.9

    def __post_init__(self) -> None:
        check_range(self, "theta", 0.0, 1.0, open_low=True)

    def __call__(self, g: Tensors | None, state: State, c: Context) -> tuple[Tensors | None, NewState]:
        assert g is not None
        ema = torch._foreach_lerp(filled(state["ema"], g), g, self.theta)
        return list(ema), {"ema": list(ema)}


@dataclass(frozen=True, kw_only=True)
class Friendly(Direction):
    """F-SAM: d = g - sigma m, with m_t = lam m_{t-1} + (1 - lam) g_t: the batch-specific part of the gradient.

    A tensor's first gradient starts m at g; the first step is plain SAM (d = g), because g - m would vanish.
    With sigma = 1 the paper's form (`ema="current"`, m_t) and the code's (`ema="previous"`, m_{t-1}) point along
    the same direction; otherwise they differ.

    Args:
        sigma: share of the smoothed gradient that is removed. Default 1.0 (original code); 0 is SAM.
        lam: memory of the average, in [0, 1). Default 0.9 (class default of the original code; its command line
            has 0.95, its script 0.6).
        ema: "current" (paper, default) or "previous" (original code).

    Raises:
        ValueError: lam outside [0, 1), a sigma that is not finite, or an unknown ema.

    Source: Li et al., Friendly SAM, CVPR 2024; `utils.py` of the original code.

    Cost of fsam: 2 gradient evaluations a step, 3 extra copies of the moved weights.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("fsam", sigma=0.5).direction)
        Friendly(sigma=0.5, lam=0.9, ema='current')
    """

    slots: ClassVar = {"mean": "param"}
    sigma: float = 1.0
    lam: float = 0.9
    ema: str = "current"

    def __post_init__(self) -> None:
        check_range(self, "sigma", -1e6, 1e6)
        check_range(self, "lam", 0.0, 1.0)
        if self.lam == 1.0:
            raise ValueError("Friendly: lam must be below 1, or the average never moves from the first gradient.")
        if self.ema not in ("current", "previous"):
            raise ValueError(
                f"Friendly: ema must be 'current' (paper) or 'previous' (original code), got {self.ema!r}."
            )

    def __call__(self, g: Tensors | None, state: State, c: Context) -> tuple[Tensors | None, NewState]:
        assert g is not None
        previous = filled(state["mean"], g)
        mean = list(torch._foreach_lerp(previous, g, 1.0 - self.lam))
        removed = mean if self.ema == "current" else previous
        d = list(torch._foreach_add(g, removed, alpha=-self.sigma))
        first = [s is None for s in state["mean"]]
        if any(first):
            d = [x if new else y for new, x, y in zip(first, g, d, strict=True)]
        return d, {"mean": mean}
