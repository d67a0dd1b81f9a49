"""The interface between parts and engine: contexts, gradient requests and perturbations."""

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
# For a "param" slot a list (None: no value yet for this tensor), for a "scalar" slot one tensor.
State = Mapping[str, Any]
NewState = dict[str, Any]


def filled(slot: list[Tensor | None], default: Tensors) -> Tensors:
    """The slot's tensors in the dtypes of `default`; where the slot has no value yet, the tensor of `default`.

    The dtypes can differ if a checkpoint was saved in another precision.
    """
    return [d if s is None else s if s.dtype is d.dtype else s.to(d.dtype) for s, d in zip(slot, default, strict=True)]


def widened(tensors: Tensors) -> Tensors:
    """The tensors, with those in half precision converted to float32."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


@dataclass(slots=True)
class Perturbation:
    """A displacement from w of some of the step's tensors: eps_i = factors_i * direction_i / (norm + eps).

    A `GradientRequest` consumes its perturbation: the engine frees it as soon as the weights have moved. A part that
    needs the displacement later must call `tensors()` before and keep the result.

    Args:
        index: positions of the displaced tensors among the step's tensors.
        direction: one tensor for each position.
        norm: scalar by which all tensors are divided. None: no normalisation.
        size: scalar norm; if it is not finite, the weights are not moved.
        factors: rho times the radius factor, one for each tensor.
        eps: added to `norm`.
        scratch: whether the tensors in `direction` may be overwritten. Default False.
        gradients: the gradients of the pass that the direction was made from, one for each trained weight. Filled only
            for inner loops that declare `uses_gradient`. Default empty.
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
        """The displacement in new tensors; all zeros if the direction is not finite."""
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
        """A perturbation by exactly these tensors. The positions in `index` may be in any order."""
        order = sorted(range(len(index)), key=index.__getitem__)
        index, tensors = [index[i] for i in order], [tensors[i] for i in order]
        return cls(index, tensors, None, c.norm(tensors), [1.0] * len(tensors), 0.0)


@dataclass(slots=True)
class GradientRequest:
    """A request to the engine for one gradient, that is for one pass (forward and backward).

    Args:
        role: which loss: "ascent" or "descent".
        at: where, as a displacement from w. Default None: at w.
        chunk: on which micro-batch, counted from 0. Default None: on the whole batch.
        graph: whether to keep the graph of the pass, so that `StepContext.curvature` is available afterwards. Default
            False.
        weights: positions of the weights whose gradients are used. Default None: of all weights.
        share: weight of a descent gradient in the gradients of weights that another optimizer trains, since those are
            taken from the descent passes. Default 1. With 0 the pass is a probe, which diagnostics ignore as well.
    """

    role: Literal["ascent", "descent"]
    at: Perturbation | None = None
    chunk: int | None = None
    graph: bool = False
    weights: Sequence[int] | None = None
    share: float = 1.0

    @property
    def probe(self) -> bool:
        """Whether only the recipe itself uses the result of this pass."""
        return self.role == "descent" and self.share == 0.0


class Ascend(Protocol):
    """Computes one perturbation: pass 1 if the direction needs it, then direction, mask, geometry and radius."""

    def __call__(
        self, at: Perturbation | None = None, chunk: int | None = None
    ) -> Generator[GradientRequest, Gradients, Perturbation | None]:
        """Compute a perturbation.

        Args:
            at: where its gradient is taken. Default None: where the direction starts, normally at w.
            chunk: on which micro-batch. Default None: on the whole batch.

        Returns:
            The perturbation; None if no weight is moved.
        """


class Products(Protocol):
    """Products with second derivatives on the batch of the last pass; one tensor for each of the context's tensors."""

    def hessian(self, vectors: Tensors) -> Tensors:
        """The product H v with the Hessian H of the loss of the pass."""

    def gauss_newton(self, vectors: Tensors) -> Tensors:
        """J^T H_out J v, with J the Jacobian of the outputs and H_out the Hessian of the loss in the outputs."""

    def squared_gradients(self, limit: int) -> Tensors:
        """The sum of the squared gradients of the first `limit` samples of the batch; one backward pass for each.

        Samples that the loss ignores come last. An empty batch gives an empty list.
        """


class StepContext(Protocol):
    """What a part can see of a step. Each list has one entry for each tensor that the call is about."""

    @property
    def w(self) -> Tensors:
        """The unperturbed weights."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the weights. Only for parts that declare Need.NAMES."""

    @property
    def layers(self) -> Sequence[str]:
        """The class name of the module that holds each weight. Only for parts that declare Need.LAYERS."""

    @property
    def start(self) -> Tensors:
        """Where pass 1 was taken, as a displacement from w. Only for directions that declare `moves_start`."""

    @property
    def momentum(self) -> list[Tensor | None]:
        """The base optimizer's momentum, None where it has none yet. Only for parts that declare BASE_MOMENTUM."""

    @property
    def curvature(self) -> Products | None:
        """Products with second derivatives at the last pass; None if its graph was not requested."""

    @property
    def chunks(self) -> int:
        """Number of micro-batches of this step; 1 if the loop gave a whole batch."""

    @property
    def options(self) -> Sequence[Mapping[str, Any]]:
        """The param group (lr, ...) of each tensor."""

    @property
    def rhos(self) -> Sequence[float]:
        """The radius of each tensor's param group."""

    @property
    def step(self) -> int:
        """Number of updates before this one."""

    def norm(self, tensors: Tensors) -> Tensor:
        """The L2 norm of all tensors as one vector, over all devices and shards: a scalar in float32 or better."""

    def dot(self, a: Tensors, b: Tensors) -> Tensor:
        """The inner product of both lists as two vectors: a scalar in float32 or better."""

    def add_scaled(self, a: Tensors, b: Tensors, factor: Tensor, *, spent: bool = False) -> Tensors:
        """Return a + factor * b in the dtypes of a, for a scalar factor. With `spent`, a may be overwritten."""

    def share(self, a: Tensors, along: Tensors) -> Tensor:
        """The scalar k = <a, along> / ||along||^2: k * along is the projection of a. 0 if `along` is zero."""

    def reject(self, a: Tensors, along: Tensors) -> tuple[Sequence[Tensor], Tensor]:
        """The part of a that is orthogonal to `along`, in new tensors, and its norm."""

    def copied(self, tensors: Tensors) -> Sequence[Tensor]:
        """Copies of the tensors, for state that must not share memory with the step's gradients."""

    def noise(self) -> Tensors:
        """Standard normal numbers in the shapes of w, from the engine's generator."""

    def bernoulli(self, p: float) -> Tensors:
        """Tensors in the shapes of w whose entries are 1 with probability p and else 0, from the engine's generator."""

    def uniform(self) -> Tensors:
        """Numbers from [0, 1) in the shapes of w, from the engine's generator."""

    def draws(self, count: int) -> list[float]:
        """`count` numbers from [0, 1), from the engine's generator."""
