"""Which weights move?"""

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
