"""Which weights move?"""

import fnmatch
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flatmin.methods.context import NewState, State, StepContext, Tensors
from flatmin.methods.part import Need, Part, check_choice, check_count, check_range
from flatmin.words import nearest

__all__ = ["All", "DynamicMask", "FisherMask", "Layers", "Mask", "Named", "StochasticWeightPerturbation"]


@dataclass(frozen=True, kw_only=True)
class Mask(Part):
    """Which weights move?

    Attributes:
        norm: "inside", the default, if the mask acts before the norm is taken, so that the masked displacement has
            length rho; "full" if it acts after.
        selects: whether some tensors cannot move at all; true where `select` is defined.
        keeps_graph: whether pass 1 may have to keep its graph; true where `graph` is defined.
        weighs: whether it has factors for the moving ones; true where `__call__` is defined.
    """

    kind: ClassVar[str] = "mask"
    question: ClassVar[str] = "which weights move?"
    declared_by: ClassVar = {
        "selects": "select",
        "keeps_graph": "graph",
        "weighs": "__call__",
    }
    norm: ClassVar[Literal["inside", "full"]] = "inside"
    selects: ClassVar[bool] = False
    keeps_graph: ClassVar[bool] = False
    weighs: ClassVar[bool] = False

    def select(self, c: StepContext) -> Sequence[bool] | None:
        """Which tensors can move at all (None: every one); the others cost nothing.

        Asked at construction too, so that a selection of nothing is refused there by raising ValueError.
        """
        return None

    def graph(self, state: State, c: StepContext) -> bool:
        """Whether pass 1 shall keep its graph, so that `StepContext.curvature` works in this step's call."""
        return False

    def __call__(self, d: Tensors, state: State, c: StepContext) -> tuple[Tensors | list[float] | None, NewState]:
        """Factors per element or per tensor (None: all ones) and the new state."""
        return None, {}


NORM_LAYERS = "*BatchNorm*,*InstanceNorm*,*LayerNorm*,*GroupNorm*,*RMSNorm*"


@dataclass(frozen=True, kw_only=True)
class All(Mask):
    """Every tensor of the groups with rho > 0 moves."""


def _patterns(text: str) -> list[str]:
    return [p.strip() for p in text.split(",") if p.strip()]


def _chosen(names: Sequence[str], patterns: list[str]) -> list[bool]:
    return [any(fnmatch.fnmatchcase(name, p) for p in patterns) for name in names]


@dataclass(frozen=True, kw_only=True)
class Named(Mask):
    """Only tensors whose name matches move; before the norm, so that their displacement has length rho.

    The others cost no copy and no work.

    Args:
        only: shell patterns of parameter names joined by commas, e.g. "head.*,*.bias"; "*" is every tensor. Names are
            those of the model itself: the levels that DataParallel, DistributedDataParallel, FSDP and torch.compile
            add ("module.", "_orig_mod.") are left out, and may stand in a pattern. Default "*".
        but: patterns of names that stay although they match. Default "".

    Raises:
        ValueError: at construction of the optimizer, for a pattern that matches nothing, or if nothing is left; at a
            step, for a weight without a name that has been put into a group since.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("only", but="*.bias").mask)
        Named(only='*', but='*.bias')
    """

    needs: ClassVar = frozenset({Need.NAMES})
    only: str = "*"
    but: str = ""

    def select(self, c: StepContext) -> Sequence[bool]:
        names = c.names
        if "" in names:
            shape = tuple(c.w[names.index("")].shape)
            raise ValueError(f"Named: a weight of shape {shape} was put into a param group and has no name; {_RENEW}")
        moves = [False] * len(names)
        for patterns, value in ((self.only, True), (self.but, False)):
            for pattern in _patterns(patterns):
                matches = _matching(names, pattern)
                if not any(matches):
                    near = nearest(pattern.strip("*."), names, 3) or _holding(pattern, names)
                    hint = f"; did you mean {_some(near)}?" if near else f" (there are {_some(names)})."
                    raise ValueError(f"Named: no parameter matches {pattern!r}{hint}")
                moves = [value if match else before for match, before in zip(matches, moves, strict=True)]
        if not any(moves):
            raise ValueError(f"Named: only={self.only!r}, but={self.but!r} leaves no parameter to move.")
        return moves


_RENEW = "register it in the module that was given as model=, or build the optimizer anew."


def _matching(names: Sequence[str], pattern: str) -> list[bool]:
    """Which names match; a pattern that names the levels of wrappers matches the names below them."""
    matches = _chosen(names, [pattern])
    if any(matches):
        return matches
    plain = re.sub(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", pattern)
    matches = _chosen(names, [plain])
    return matches if any(matches) else _chosen([f"module.{name}" for name in names], [plain])


def _holding(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that hold the longest word of a pattern."""
    words = sorted(re.findall(r"\w+", pattern), key=len)
    return [name for name in names if words and words[-1].lower() in name.lower()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@dataclass(frozen=True, kw_only=True)
class Layers(Mask):
    """SAM-ON: only tensors of certain kinds of layers move; before the norm, so that their displacement has length rho.

    The others cost no copy and no work.

    Args:
        kinds: shell patterns of module class names joined by commas. Default: all normalisation layers.

    Raises:
        ValueError: at construction of the optimizer, if no layer of the model matches.

    Source: Mueller et al., Normalization Layers Are All That Sharpness-Aware Minimization Needs, NeurIPS 2023.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("sam-on", kinds="LayerNorm").mask)
        Layers(kinds='LayerNorm')
    """

    needs: ClassVar = frozenset({Need.LAYERS})
    kinds: str = NORM_LAYERS

    def select(self, c: StepContext) -> Sequence[bool]:
        if "" in c.layers:
            shape = tuple(c.w[list(c.layers).index("")].shape)
            raise ValueError(
                f"Layers: a weight of shape {shape} was put into a param group and is in no layer; {_RENEW}"
            )
        moves = _chosen(c.layers, _patterns(self.kinds))
        if not any(moves):
            trained = ", ".join(sorted(set(c.layers)))
            raise ValueError(f"Layers: no layer matches {self.kinds!r}; the trained ones are {trained}.")
        return moves


@dataclass(frozen=True, kw_only=True)
class StochasticWeightPerturbation(Mask):
    """ESAM's SWP: each tensor moves with probability beta and then by 1/beta; after the norm over all tensors.

    So eps is SAM's in the mean (the paper's form). The official code takes the norm over the moving tensors only, whose
    ||eps|| is rho / beta. Drawn from the engine's generator, so that replicas agree.

    Args:
        beta: in (0, 1]. Default 0.6 (the official `run.sh`); 1 is every tensor.

    Raises:
        ValueError: beta outside (0, 1].

    Source: Du et al., Efficient Sharpness-Aware Minimization for Improved Training of Neural Networks, ICLR 2022.

    Example:
        >>> import flatmin
        >>> print(flatmin.compose("esam", beta=0.5).mask)
        StochasticWeightPerturbation(beta=0.5)
    """

    former_names: ClassVar = ("RandomTensors",)
    needs: ClassVar = frozenset({Need.RANDOM})
    norm: ClassVar = "full"
    beta: float = 0.6

    def __post_init__(self) -> None:
        check_range(self, "beta", 0.0, 1.0, open_low=True)

    def __call__(self, d: Tensors, state: State, c: StepContext) -> tuple[Tensors | list[float] | None, NewState]:
        if self.beta == 1.0:
            return None, {}
        return [1.0 / self.beta if u < self.beta else 0.0 for u in c.draws(len(d))], {}


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [t.numel() for t in tensors]


def _top(scores: Tensors, count: int) -> Tensors:
    """1 at the `count` largest entries of all tensors together (ties: the earlier one), else 0, shaped like them."""
    flat = torch.cat([s.reshape(-1).to(scores[0].device, torch.float32) for s in scores])
    chosen = torch.zeros_like(flat)
    chosen[flat.sort(descending=True, stable=True).indices[:count]] = 1.0
    parts = chosen.split(_sizes(scores))
    return [p.reshape(s.shape).to(s.device, s.dtype) for p, s in zip(parts, scores, strict=True)]


@dataclass(frozen=True, kw_only=True)
class FisherMask(Mask):
    """SSAM-F: only the entries with the largest Fisher diagonal F = sum_i (grad l_i)^2 move; after the norm.

    The top (1 - sparsity) of all entries move, by the norm of the unmasked gradient. F comes from the first
    `num_samples` samples of the batch in pass 1, on the first ascent and on steps 0, k, 2k, ...; each sample is one
    backward pass. l_i is the mean of the loss over the elements of a sample that it counts, class weights included (see
    `flatmin.Criterion`); samples without any come last.

    Args:
        sparsity: share of entries that stay, in [0, 1). Default 0.5 (the official README's example; the code's default
            is 0.2); 0 is every entry.
        num_samples: at most so many per refresh, >= 1. Default 16 (the official README's example).
        interval: k in updates, >= 1. Default 100.

    Raises:
        ValueError: out of range.

    Differs from the official code: there F comes from a loop over 1024 samples with batch size 1 every 5 epochs, its
    first mask is all zeros until the first refresh, and BatchNorm would see single samples; here F is from the
    training batch itself and the first mask is refreshed at once.

    Source: Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, NeurIPS 2022.

    Example:
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
        if not squares:  # no refresh is due; a mask that never was is made next time
            return [torch.zeros_like(x) if s is None else s for s, x in zip(state["mask"], d, strict=True)], {}
        mask = _top(squares, moving_count(self.sparsity, squares))
        if not any(s is None for s in state["mask"]):
            counted = c.norm(squares) > 0  # else the loss counts nothing of this batch, and the mask stays
            mask = [torch.where(counted.to(m.device), m, s) for m, s in zip(mask, state["mask"], strict=True)]
        return mask, {"mask": mask}


def check_sparsity(part: Mask) -> None:
    """Refuse a sparsity outside [0, 1)."""
    check_range(part, "sparsity", 0.0, 1.0)
    if part.parameters()["sparsity"] == 1.0:
        raise ValueError(f"{type(part).__name__}: sparsity must be below 1, or nothing moves.")


def moving_count(sparsity: float, tensors: Sequence[Tensor]) -> int:
    """How many of all entries a sparsity leaves, at least one."""
    return max(1, round((1.0 - sparsity) * sum(_sizes(tensors))))


@dataclass(frozen=True, kw_only=True)
class DynamicMask(Mask):
    """SSAM-D: a random sparse mask of which every k steps some entries are dropped and as many grow; after the norm.

    The first mask has (1 - sparsity) of all entries at random. At steps k, 2k, ... the death rate is

        r = rate (1 + cos(pi t / total)) / 2

    and of the moving entries the share r with the lowest score is dropped, then as many of the resting ones (those just
    dropped not among them) grow.

    Args:
        sparsity: share of entries that stay, in [0, 1). Default 0.5; 0 is every entry.
        rate: death rate at the start, in [0, 1]. Default 0.5.
        drop: score of what is dropped: "gradient" (default, smallest |g|), "weight" (smallest |w|) or "random".
        growth: "random" (default) or "gradient" (largest |g|).
        interval: k in updates, >= 1. Default 100.
        total: updates of the whole training, over which r falls to 0; 0 keeps r = rate. Default 0.

    Raises:
        ValueError: out of range.

    Differs from the official code: the number of moving entries stays what it was (there growth is limited by another
    count, and at sparsity 0.2 the first update loses a quarter of the moving entries), |w| is taken at w and not at
    w + eps, and a new mask acts in the very step.

    Source: Mi et al., Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach, NeurIPS 2022.

    Example:
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
        # Scores are >= 0: -1 puts an entry out of the choice.
        stay = _top([torch.where(m > 0, s, -1.0) for m, s in zip(mask, out, strict=True)], moving - swaps)
        grown = _top([torch.where(m > 0, -1.0, s) for m, s in zip(mask, into, strict=True)], swaps)
        new = list(torch._foreach_add(stay, grown))
        return new, {"mask": new}

    def _score(self, rule: str, d: Tensors, c: StepContext) -> Tensors:
        if rule == "random":
            return c.uniform()
        return list(torch._foreach_abs(c.w if rule == "weight" else d))
