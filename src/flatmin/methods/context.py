"""What a part sees of a step: contexts, and the requests and perturbations that go to the engine."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

__all__ = [
    "Ascend",
    "GradientRequest",
    "Gradients",
    "NewState",
    "Perturbation",
    "Products",
    "State",
    "StepContext",
    "Tensors",
    "filled",
]

Tensors = list[Tensor]
Gradients = list[Tensor | None]
# One list per tensor slot (None: never filled for that tensor), one tensor per scalar slot.
State = Mapping[str, Any]
NewState = dict[str, Any]


def filled(slot: list[Tensor | None], default: Tensors) -> Tensors:
    """The slot's tensors in the dtypes of `default`, and `default` where a tensor has not been seen before.

    A checkpoint may have been saved in another precision than training goes on in.
    """
    return [d if s is None else s if s.dtype is d.dtype else s.to(d.dtype) for s, d in zip(slot, default, strict=True)]


def widened(tensors: Tensors) -> Tensors:
    """The tensors, those in half precision in single precision."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


@dataclass(slots=True)
class Perturbation:
    """A displacement eps from w over some of the moved tensors: eps_i = factors_i * direction_i / (norm + eps).

    A `GradientRequest` consumes its perturbation: the engine frees it once the weights have moved, so a part that needs
    it later keeps its own copy through `tensors()`.

    Args:
        index: positions of the displaced tensors among the step's.
        direction: one tensor for each.
        norm: what all of them are divided by; None: unnormalised.
        size: the norm whose finiteness decides whether the weights move at all.
        factors: rho times the radius, for each tensor.
        eps: added to the norm.
        scratch: whether the direction's tensors may be overwritten. Default False.
        gradients: of the pass that it was made of, one for each trained weight, for inner loops that declare
            `uses_gradient`. Default empty.
    """

    index: Sequence[int]
    direction: Tensors
    norm: Tensor | None
    size: Tensor
    factors: list[float | Tensor]
    eps: float
    scratch: bool = False
    gradients: Gradients = field(default_factory=list)

    def tensors(self) -> Tensors:
        """The displacement itself, in fresh tensors; zero everywhere if the direction is not finite."""
        numbers = [f for f in self.factors if isinstance(f, float)]
        if len(numbers) == len(self.factors):
            scaled = list(torch._foreach_mul(self.direction, numbers))
        else:
            scaled = [d * f for d, f in zip(self.direction, self.factors, strict=True)]
        if self.norm is not None:
            scaled = [s / (self.norm + self.eps).to(s.device) for s in scaled]
        finite = self.size < math.inf
        return [s.where(finite.to(s.device), s.new_zeros(())) for s in scaled]

    @classmethod
    def of(cls, index: Sequence[int], tensors: Tensors, c: StepContext) -> Perturbation:
        """A displacement given as tensors, to be used as it is; `index` in any order."""
        order = sorted(range(len(index)), key=index.__getitem__)
        index, tensors = [index[i] for i in order], [tensors[i] for i in order]
        return cls(index, tensors, None, c.norm(tensors), [1.0] * len(tensors), 0.0)


@dataclass(slots=True)
class GradientRequest:
    """Asks the engine for one gradient.

    Args:
        role: of which loss.
        at: where. Default None: at w.
        chunk: on which micro-batch. Default None: on the whole batch.
        graph: whether `StepContext.curvature` shall work once this gradient is there. Default False.
        share: by which a descent gradient counts for weights that another optimizer trains, which take theirs from
            the descent passes. Default 1. With 0 the pass is a probe: diagnostics pass over it too.
    """

    role: Literal["ascent", "descent"]
    at: Perturbation | None = None
    chunk: int | None = None
    graph: bool = False
    share: float = 1.0

    @property
    def probe(self) -> bool:
        """Whether only the recipe itself looks at what this pass finds."""
        return self.role == "descent" and self.share == 0.0


class Ascend(Protocol):
    """Takes one ascent: pass 1 where the direction wants it, then direction, mask, geometry and radius."""

    def __call__(
        self, at: Perturbation | None = None, chunk: int | None = None
    ) -> Generator[GradientRequest, Gradients, Perturbation | None]:
        """The perturbation of an ascent whose gradient is taken at `at` (None: where the direction starts, normally w).

        None means that no weight moves.
        """


class Products(Protocol):
    """Second-order products on the batch of the last pass; lists run over the context's tensors."""

    def hessian(self, vectors: Tensors) -> Tensors:
        """H v for the Hessian H of the pass's loss."""

    def gauss_newton(self, vectors: Tensors) -> Tensors:
        """J^T H_out J v, with J the Jacobian of the outputs and H_out the loss's Hessian in them."""

    def squared_gradients(self, limit: int) -> Tensors:
        """Sum over the first `limit` samples of the batch of their squared gradients, one backward each.

        Samples of which the loss counts nothing come last. An empty batch gives an empty list.
        """


class StepContext(Protocol):
    """What a part may see of a step. Lists run over the tensors that the call is about."""

    @property
    def w(self) -> Tensors:
        """The tensors at the step's own point."""

    @property
    def names(self) -> Sequence[str]:
        """Their names; only for parts that declare Need.NAMES."""

    @property
    def layers(self) -> Sequence[str]:
        """The class name of the module that holds each; only for parts that declare Need.LAYERS."""

    @property
    def start(self) -> Tensors:
        """Where pass 1 was taken, as a displacement from w; only for directions that move the start."""

    @property
    def momentum(self) -> list[Tensor | None]:
        """The base's momentum of each, None where it has none yet; only for parts that declare BASE_MOMENTUM."""

    @property
    def curvature(self) -> Products | None:
        """Products with second derivatives at the last pass, if it was asked for with a graph."""

    @property
    def chunks(self) -> int:
        """Number of micro-batches of this step; 1 if the loop gave none."""

    @property
    def options(self) -> Sequence[Mapping[str, Any]]:
        """The param group of each tensor (lr, ...)."""

    @property
    def rhos(self) -> Sequence[float]:
        """The radius of each tensor's group."""

    @property
    def step(self) -> int:
        """Number of updates begun and finished before this one."""

    def norm(self, tensors: Tensors) -> Tensor:
        """Global L2 norm, one scalar in fp32 or better, over all devices and shards."""

    def dot(self, a: Tensors, b: Tensors) -> Tensor:
        """Global inner product, one scalar in fp32 or better."""

    def add_scaled(self, a: Tensors, b: Tensors, factor: Tensor, *, spent: bool = False) -> Tensors:
        """A + factor b for a scalar tensor, in the dtype of a; `spent`: nobody needs a afterwards."""

    def share(self, a: Tensors, along: Tensors) -> Tensor:
        """K = <a, along> / ||along||^2, so that k along is the projection of a; 0 for a zero vector."""

    def reject(self, a: Tensors, along: Tensors) -> tuple[Sequence[Tensor], Tensor]:
        """A minus its projection on `along`, as new tensors, and the norm of that."""

    def copied(self, tensors: Tensors) -> Sequence[Tensor]:
        """The same values in memory of their own, as state that is to outlive the step's gradients."""

    def noise(self) -> Tensors:
        """Standard normal numbers, shaped like w, from the engine's own generator."""

    def bernoulli(self, p: float) -> Tensors:
        """0/1 draws with mean p, shaped like w, from the engine's own generator."""

    def uniform(self) -> Tensors:
        """Draws from [0, 1), shaped like w, from the engine's own generator."""

    def draws(self, count: int) -> list[float]:
        """Numbers from [0, 1), from the engine's own generator."""
