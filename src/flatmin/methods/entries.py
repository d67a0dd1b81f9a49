"""Masks of single entries: which entries of the weights are perturbed?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flatmin.methods.context import NewState, State, StepContext, Tensors
from flatmin.methods.mask import Mask
from flatmin.methods.part import Need, check_choice, check_count, check_range

__all__ = ["DynamicMask", "FisherMask", "ZScore"]


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [t.numel() for t in tensors]


def _top(scores: Tensors, count: int) -> Tensors:
    """Masks that are 1 at the `count` largest entries of all tensors together (of ties the earlier one), else 0."""
    flat = torch.cat([s.reshape(-1).to(scores[0].device, torch.float32) for s in scores])
    chosen = torch.zeros_like(flat)
    chosen[flat.sort(descending=True, stable=True).indices[:count]] = 1.0
    parts = chosen.split(_sizes(scores))
    return [p.reshape(s.shape).to(s.device, s.dtype) for p, s in zip(parts, scores, strict=True)]


@dataclass(frozen=True, kw_only=True)
class FisherMask(Mask):
    """SSAM-F: perturbs only the entries with the largest diagonal Fisher information F = sum_i (grad l_i)^2.

    The top (1 - sparsity) of all entries are perturbed; the norm is that of the gradient before masking. F is computed
    from the first `num_samples` samples of the batch in pass 1, on the first ascent and on steps 0, k, 2k, ... Each
    sample takes one backward pass. l_i is the mean of the loss over the elements of a sample that count, with class
    weights (see `flatmin.Criterion`); samples without such elements come last.

    Args:
        sparsity: share of entries that are not perturbed, in [0, 1). Default 0.5 (the official README's example; the
            code's default is 0.2). With 0 all entries are perturbed.
        num_samples: number of samples in each refresh, at most the batch, >= 1. Default 16 (the official README's
            example).
        interval: k, the number of updates between refreshes, >= 1. Default 100.

    Raises:
        ValueError: a parameter out of range.

    Differs from the official code, which computes F in a loop over 1024 samples with batch size 1 every 5 epochs, so
    that BatchNorm would see single samples, and whose mask is zero until the first refresh. Here F is computed from the
    training batch, and the first mask is used at once.

    Source: Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, NeurIPS 2022.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("ssam-f", sparsity=0.9).mask)
        FisherMask(sparsity=0.9, num_samples=16, interval=100)
    """

    former_names: ClassVar = ("Fisher",)
    step_dependent: ClassVar = True
    needs: ClassVar = frozenset({Need.PER_SAMPLE, Need.SECOND_ORDER, Need.LOSSES_AT_W, Need.GLOBAL_ORDER})
    slots: ClassVar = {"mask": "param"}
    norm: ClassVar = "full"
    sparsity: float = 0.5
    num_samples: int = 16
    interval: int = 100

    def __post_init__(self) -> None:
        check_sparsity(self)
        check_count(self, "num_samples", 1)
        check_count(self, "interval", 1)

    @property
    def surcharge(self) -> float:
        return 2.0 / 3.0 * self.num_samples / self.interval if self.sparsity else 0.0

    def graph(self, state: State, c: StepContext) -> bool:
        never = all(m is None for m in state["mask"])
        return self.sparsity > 0 and (never or c.step % self.interval == 0)

    def __call__(self, d: Tensors, state: State, c: StepContext) -> tuple[Tensors | list[float] | None, NewState]:
        if self.sparsity == 0:
            return None, {}
        squares = [] if c.curvature is None else c.curvature.squared_gradients(self.num_samples)
        if not squares:  # no refresh is due, or the batch is empty: a missing mask is made in a later step
            return [torch.zeros_like(x) if s is None else s for s, x in zip(state["mask"], d, strict=True)], {}
        mask = _top(squares, moving_count(self.sparsity, squares))
        if not any(s is None for s in state["mask"]):
            counted = c.norm(squares) > 0  # the mask stays if no sample of this batch counts
            mask = [torch.where(counted.to(m.device), m, s) for m, s in zip(mask, state["mask"], strict=True)]
        return mask, {"mask": mask}


def check_sparsity(part: Mask) -> None:
    """Raise ValueError for a sparsity outside [0, 1)."""
    check_range(part, "sparsity", 0.0, 1.0)
    if part.parameters()["sparsity"] == 1.0:
        raise ValueError(f"{type(part).__name__}: sparsity must be below 1; with 1 no entry would be perturbed.")


def moving_count(sparsity: float, tensors: Sequence[Tensor]) -> int:
    """The number of entries that are perturbed at this sparsity, at least one."""
    return max(1, round((1.0 - sparsity) * sum(_sizes(tensors))))


@dataclass(frozen=True, kw_only=True)
class DynamicMask(Mask):
    """SSAM-D: perturbs a random sparse set of entries; every k steps some are dropped and as many others are added.

    The first mask holds (1 - sparsity) of all entries, chosen at random. On steps t = k, 2k, ... the drop rate is

        r = rate (1 + cos(pi t / total)) / 2

    The share r of the perturbed entries with the lowest score is dropped; then as many of the other entries are added,
    not counting those just dropped. The norm is that of the gradient before masking.

    Args:
        sparsity: share of entries that are not perturbed, in [0, 1). Default 0.5. With 0 all entries are perturbed.
        rate: drop rate at the start, in [0, 1]. Default 0.5.
        drop: which entries are dropped: "gradient" (default, smallest |g|), "weight" (smallest |w|) or "random".
        growth: which entries are added: "random" (default) or "gradient" (largest |g|).
        interval: k, the number of updates between changes, >= 1. Default 100.
        total: number of updates of the whole training, over which r falls to 0. Default 0: r = rate throughout.

    Raises:
        ValueError: a parameter out of range.

    Differs from the official code: the number of perturbed entries is constant (there additions are limited by another
    count, and at sparsity 0.2 the first change loses a quarter of the perturbed entries), |w| is taken at w and not at
    w + eps, and a new mask is used in the same step.

    Source: Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, NeurIPS 2022.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("ssam-d", sparsity=0.9).mask)
        DynamicMask(sparsity=0.9, rate=0.5, drop='gradient', growth='random', interval=100, total=0)
    """

    former_names: ClassVar = ("Dynamic",)
    step_dependent: ClassVar = True
    needs: ClassVar = frozenset({Need.RANDOM, Need.ONE_ASCENT, Need.GLOBAL_ORDER})
    slots: ClassVar = {"mask": "param"}
    norm: ClassVar = "full"
    sparsity: float = 0.5
    rate: float = 0.5
    drop: str = "gradient"
    growth: str = "random"
    interval: int = 100
    total: int = 0

    def __post_init__(self) -> None:
        check_sparsity(self)
        check_range(self, "rate", 0.0, 1.0)
        check_choice(self, "drop", ("gradient", "weight", "random"))
        check_choice(self, "growth", ("random", "gradient"))
        check_count(self, "interval", 1)
        check_count(self, "total", 0)

    def __call__(self, d: Tensors, state: State, c: StepContext) -> tuple[Tensors | list[float] | None, NewState]:
        if self.sparsity == 0:
            return None, {}
        mask = state["mask"]
        if all(m is None for m in mask):
            mask = _top(c.uniform(), moving_count(self.sparsity, d))
            return mask, {"mask": mask}
        mask = [torch.zeros_like(x) if m is None else m for m, x in zip(mask, d, strict=True)]
        if c.step % self.interval:
            return mask, {}
        done = min(c.step / self.total, 1.0) if self.total else 0.0
        rate = self.rate * (1.0 + math.cos(math.pi * done)) / 2.0
        moving = moving_count(self.sparsity, d)
        swaps = min(round(rate * moving), sum(_sizes(d)) - moving)
        if swaps == 0:
            return mask, {}
        out, into = self._score(self.drop, d, c), self._score(self.growth, d, c)
        # Scores are >= 0, so -1 excludes an entry.
        stay = _top([torch.where(m > 0, s, -1.0) for m, s in zip(mask, out, strict=True)], moving - swaps)
        grown = _top([torch.where(m > 0, -1.0, s) for m, s in zip(mask, into, strict=True)], swaps)
        new = list(torch._foreach_add(stay, grown))
        return new, {"mask": new}

    def _score(self, rule: str, d: Tensors, c: StepContext) -> Tensors:
        if rule == "random":
            return c.uniform()
        return list(torch._foreach_abs(c.w if rule == "weight" else d))


@dataclass(frozen=True, kw_only=True)
class ZScore(Mask):
    """ZSharp: perturbs only the entries whose gradient is unusual within its matrix.

        kept = |z| > quantile(|z|, q),   z = (d - mean d) / std d     within each tensor of two or more dimensions

    Tensors of fewer dimensions are perturbed whole, as is a matrix without an entry above its quantile.

    Args:
        q: share of the entries of a matrix that are not perturbed, in [0, 1). Default 0.95 (official code).
        per_tensor: False (default): one norm over all kept entries, so that ||eps|| = rho. True: the official code's
            form, eps_i = rho (kept d_i) / ||kept d_i|| for each matrix and rho d_i / ||d|| for each vector, so that
            ||eps|| is about rho times the square root of the number of matrices. It assumes the Euclidean geometry,
            whose displacement it rescales. The accessible text of the paper does not mention a norm for each layer.

    Raises:
        ValueError: q outside [0, 1).

    Source: Yun, Sharpness-Aware Minimization with Z-Score Gradient Filtering, OPT workshop at NeurIPS 2025, and the
    author's code.

    Examples:
        >>> import flatmin
        >>> print(flatmin.compose("zsharp", q=0.9).mask)
        ZScore(q=0.9, per_tensor=False)
    """

    needs: ClassVar = frozenset({Need.GLOBAL_ORDER})
    q: float = 0.95
    per_tensor: bool = False

    def __post_init__(self) -> None:
        check_range(self, "q", 0.0, 1.0)
        if self.q == 1.0:
            raise ValueError("ZScore: q must be below 1; with 1 no entry lies above the quantile.")

    @property
    def norm(self) -> Literal["inside", "full"]:  # type: ignore[override]
        return "full" if self.per_tensor else "inside"

    def __call__(self, d: Tensors, state: State, c: StepContext) -> tuple[Tensors | list[float] | None, NewState]:
        whole = c.norm(d)
        factors = [torch.ones_like(x) if x.ndim < 2 else self._kept(x) for x in d]
        if self.per_tensor:
            for i, x in enumerate(d):
                if x.ndim > 1:
                    part = c.norm([x * factors[i]])
                    ratio = torch.where(part > 0, whole.to(part.device) / part, torch.zeros_like(part))
                    factors[i] = factors[i] * ratio.to(x.dtype)
        return factors, {}

    def _kept(self, x: Tensor) -> Tensor:
        """A mask that is 1 at the entries above the quantile. |z| and |x - mean| have the same order."""
        if not x.numel():
            return torch.ones_like(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        far = (wide - wide.mean()).abs().flatten()
        # The quantile lies between two sorted entries; topk finds the lower one. torch.quantile has a size limit.
        above = far.numel() - math.floor(self.q * (far.numel() - 1))
        kept = far > far.topk(above, sorted=False).values.min()
        return (kept | ~kept.any()).view(x.shape).to(x.dtype)
