"""Masks: which weights are perturbed?"""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from flatmin.methods.context import NewState, State, StepContext, Tensors
from flatmin.methods.part import Need, Part, check_range
from flatmin.words import nearest

__all__ = ["All", "Layers", "Mask", "Named", "StochasticWeightPerturbation"]


@dataclass(frozen=True, kw_only=True)
class Mask(Part):
    """Base class of masks: which weights are perturbed?

    Attributes:
        norm: "inside" (default): the mask is applied before the norm is computed, so that the masked perturbation has
            length rho. "full": it is applied afterwards.
        selects: whether some tensors may stay where they are. True if `select` is defined.
        keeps_graph: whether pass 1 may have to keep its graph. True if `graph` is defined.
        weighs: whether it multiplies perturbed tensors by factors. True if `__call__` is defined.
    """

    kind: ClassVar[str] = "mask"
    question: ClassVar[str] = "which weights are perturbed?"
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
        """Which tensors this step may perturb, one boolean each (None: all).

        The others cost no memory. Their gradients at w are not computed if nothing else needs them and the loop calls
        `SAM.backward`. Also called when the optimizer is built, then with random numbers of its own. Raise ValueError
        if no step could perturb anything.
        """
        return None

    def graph(self, state: State, c: StepContext) -> bool:
        """Whether pass 1 must keep its graph, so that `__call__` can use `StepContext.curvature` in this step."""
        return False

    def __call__(self, d: Tensors, state: State, c: StepContext) -> tuple[Tensors | list[float] | None, NewState]:
        """The factors, one tensor or one number for each tensor (None: all ones), and the new state."""
        return None, {}


NORM_LAYERS = "*BatchNorm*,*InstanceNorm*,*LayerNorm*,*GroupNorm*,*RMSNorm*"


@dataclass(frozen=True, kw_only=True)
class All(Mask):
    """SAM: all tensors of param groups with rho > 0 are perturbed."""

    entrywise: ClassVar = True


def _patterns(text: str) -> list[str]:
    return [p.strip() for p in text.split(",") if p.strip()]


def _chosen(names: Sequence[str], patterns: list[str]) -> list[bool]:
    return [any(fnmatch.fnmatchcase(name, p) for p in patterns) for name in names]


@dataclass(frozen=True, kw_only=True)
class Named(Mask):
    """Perturbs only the tensors whose names match. Their perturbation has length rho.

    The other tensors cost no memory. With `SAM.backward` their gradients at w cost no time either.

    Args:
        only: shell patterns of parameter names, separated by commas, for example "head.*,*.bias". Names are those of
            the model itself, without the levels that DataParallel, DistributedDataParallel, FSDP and torch.compile add
            ("module.", "_orig_mod."); a pattern may contain these levels. Default "*": all tensors.
        but: patterns of names to exclude. Default "": none.

    Raises:
        ValueError: when the optimizer is built, if a pattern matches no name or nothing is left; at a step, if a weight
            without a name was added to a param group.

    Examples:
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
            raise ValueError(f"Named: a weight of shape {shape} was added to a param group but has no name; {_RENEW}")
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
            raise ValueError(f"Named: only={self.only!r}, but={self.but!r} leaves no parameter to perturb.")
        return moves


_RENEW = "register it in the module given as model=, or build a new optimizer."


def _matching(names: Sequence[str], pattern: str) -> list[bool]:
    """Which names match. A pattern with the levels that wrappers add matches the names without them."""
    matches = _chosen(names, [pattern])
    if any(matches):
        return matches
    plain = re.sub(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", pattern)
    matches = _chosen(names, [plain])
    return matches if any(matches) else _chosen([f"module.{name}" for name in names], [plain])


def _holding(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that contain the longest word of a pattern."""
    words = sorted(re.findall(r"\w+", pattern), key=len)
    return [name for name in names if words and words[-1].lower() in name.lower()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@dataclass(frozen=True, kw_only=True)
class Layers(Mask):
    """SAM-ON: perturbs only the tensors of certain types of layers. Their perturbation has length rho.

    The other tensors cost no memory. With `SAM.backward` their gradients at w cost no time either.

    Args:
        kinds: shell patterns of module class names, separated by commas. Default: all normalisation layers.

    Raises:
        ValueError: when the optimizer is built, if no layer of the model matches.

    Source: Mueller et al., Normalization Layers Are All That Sharpness-Aware Minimization Needs, NeurIPS 2023.

    Examples:
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
                f"Layers: a weight of shape {shape} was added to a param group but belongs to no layer; {_RENEW}"
            )
        moves = _chosen(c.layers, _patterns(self.kinds))
        if not any(moves):
            trained = ", ".join(sorted(set(c.layers)))
            raise ValueError(f"Layers: no layer matches {self.kinds!r}; the trained layers are {trained}.")
        return moves


@dataclass(frozen=True, kw_only=True)
class StochasticWeightPerturbation(Mask):
    """ESAM's SWP: perturbs each tensor with probability beta, to a length of rho / beta in all.

        eps = rho m g / (beta ||m g||),   m = 1 with probability beta and 0 else, for each tensor

    The norm is that of the perturbed tensors, as in the official code, so that pass 1 need not compute the gradients of
    the others, see `SAM.backward`. Directions with a memory (`vasso`, `fsam`) learn from the drawn tensors only. In a
    step in which no tensor is drawn, no weight is perturbed. The draws come from the engine's generator and are the
    same on all replicas.

    Args:
        beta: probability, in (0, 1]. Default 0.6 (the official `run.sh`). With 1 all tensors are perturbed.

    Raises:
        ValueError: beta outside (0, 1].

    Source: Du et al., Efficient Sharpness-Aware Minimization for Improved Training of Neural Networks, ICLR 2022.

    Examples:
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

    def select(self, c: StepContext) -> Sequence[bool] | None:
        return None if self.beta == 1.0 else [u < self.beta for u in c.draws(len(c.w))]

    def __call__(self, d: Tensors, state: State, c: StepContext) -> tuple[Tensors | list[float] | None, NewState]:
        return None if self.beta == 1.0 else [1.0 / self.beta] * len(d), {}
