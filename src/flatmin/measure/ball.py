"""The sets of displacements over which sharpness is taken: balls in the weights, or in multiples of each weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flatmin.measure.problem import Problem

Norm = Literal["l2", "linf"]


@dataclass(frozen=True, eq=False)
class Ball:
    r"""Displacements delta = s * u with \|u\| \le rho; s = 1, or |w| + eta where adaptive.

    In u the adaptive ball is a round one: the gradient is s * g, the projection exact, and a weight whose s is zero has
    no gradient and stays.

    Args:
        rho: radius.
        norm: of u.
        scale: s, shape (size,); None is all ones.
        moving: how many weights have s > 0.
    """

    rho: float
    norm: Norm
    scale: Tensor | None
    moving: int

    @property
    def reach(self) -> float:
        """The largest length of u."""
        return self.rho * (1.0 if self.norm == "l2" else math.sqrt(self.moving))

    def displacement(self, u: Tensor) -> Tensor:
        """Delta of u; as a map of gradients, the gradient in u of one in the weights."""
        return u if self.scale is None else self.scale * u

    def farthest(self, g: Tensor) -> Tensor:
        """The u of the ball with the largest <g, u>: the ascent of SAM, and in the adaptive ball that of ASAM."""
        return g.sign() * self.rho if self.norm == "linf" else g * (self.rho / length(g))

    def support(self, g: Tensor) -> float:
        """The largest <g, u> in the ball: rho times the dual norm of g."""
        return self.rho * (float(g.double().abs().sum()) if self.norm == "linf" else length(g))

    def project(self, u: Tensor) -> Tensor:
        """The nearest u of the ball."""
        if self.norm == "linf":
            return u.clamp(-self.rho, self.rho)
        size = length(u)
        return u * (self.rho / size) if size > self.rho else u

    def draw(self, generator: torch.Generator, like: Tensor) -> Tensor:
        """A random u: uniform on the sphere, or in the box."""
        if self.norm == "linf":
            u = 2.0 * torch.rand(len(like), generator=generator, dtype=torch.float64) - 1.0
            return self._masked(u.to(like)) * self.rho
        u = self._masked(torch.randn(len(like), generator=generator, dtype=torch.float64).to(like))
        return u * (self.rho / length(u))

    def _masked(self, u: Tensor) -> Tensor:
        return u if self.scale is None else u * (self.scale != 0)


def ball(problem: Problem, rho: float, norm: Norm, adaptive: bool, eta: float) -> Ball:
    """The ball around the weights of a problem.

    Raises:
        ValueError: rho that is not a positive number, another norm, eta below 0 or without adaptive, weights of which
            every one is zero, weights in half precision.
    """
    if not (rho > 0 and math.isfinite(rho)):
        raise ValueError(f"rho must be a positive number, got {rho!r}.")
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm must be 'l2' or 'linf', got {norm!r}.")
    check_dtype(problem)
    scale = magnitudes(problem, eta) if adaptive else None
    if eta and not adaptive:
        raise ValueError(f"eta={eta!r} is added to |w| in the adaptive ball; without adaptive=True it does nothing.")
    return Ball(rho, norm, scale, problem.size if scale is None else int((scale != 0).sum()))


def magnitudes(problem: Problem, eta: float) -> Tensor:
    """|w| + eta, shape (size,).

    Raises:
        ValueError: eta below 0, or all of it zero.
    """
    if not (eta >= 0 and math.isfinite(eta)):
        raise ValueError(f"eta must be a number >= 0, got {eta!r}.")
    scale = problem.flat(problem.weights).abs() + eta
    if not scale.any():
        raise ValueError("every selected weight is zero, so nothing can move in proportion to it; give eta > 0.")
    return scale


def check_dtype(problem: Problem) -> None:
    """Refuse weights that would round a small displacement away."""
    if problem.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"weights in {str(problem.dtype).removeprefix('torch.')} round small displacements away; make the Problem "
            "with dtype=torch.float32."
        )


def length(v: Tensor) -> float:
    """||v||_2, summed in double precision."""
    return float(v.double().norm())


def dot(a: Tensor, b: Tensor) -> float:
    """<a, b>, summed in double precision."""
    return float(torch.dot(a.double(), b.double()))
