"""Which weights, how far, when, how often, and what the base gets: the remaining defaults."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from flatmin.parts.base import (
    Ascend,
    Combine,
    Context,
    Eval,
    Gradients,
    Mask,
    Need,
    NewState,
    Points,
    Radius,
    State,
    Tensors,
    When,
)


@dataclass(frozen=True, kw_only=True)
class All(Mask):
    """Every tensor of the groups with rho > 0 moves."""


@dataclass(frozen=True, kw_only=True)
class Constant(Radius):
    """The radius is each group's rho."""


@dataclass(frozen=True, kw_only=True)
class Always(When):
    """Ascend on every step."""


@dataclass(frozen=True, kw_only=True)
class Never(When):
    """Never ascend: the base optimizer itself, one gradient a step."""

    withholds: ClassVar = {Need.ASCENT: "it never ascends"}
    duty: ClassVar[float] = 0.0

    def before(self, state: State, c: Context) -> bool | None:
        return False


@dataclass(frozen=True, kw_only=True)
class One(Points):
    """One ascent, one descent gradient. Source: Foret et al., SAM, ICLR 2021, Alg. 1."""

    def __call__(self, ascend: Ascend, c: Context) -> Generator[Eval, Gradients, list[Gradients]]:
        return [(yield Eval("descent", (yield from ascend())))]


@dataclass(frozen=True, kw_only=True)
class Descent(Combine):
    """u = g_s: the base takes the gradient at w + eps. Source: Foret et al., SAM, ICLR 2021, Alg. 1."""

    def __call__(self, g: Tensors | None, gs: list[Tensors], state: State, c: Context) -> tuple[Tensors, NewState]:
        return gs[0], {}
