"""Balls of displacements over which sharpness is measured: around the weights, or relative to each weight."""

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
    """Displacements delta = s * u with ||u|| <= rho, where s = 1, or s = |w| + eta in an adaptive ball.

    In terms of u, the adaptive ball is an ordinary ball: the gradient is s * g, the projection is exact, and a weight
    with s = 0 has gradient zero and does not move.

    Args:
        rho: radius.
        norm: norm of u, "l2" or "linf".
        scale: s, shape (size,). None means all ones.
        moving: number of weights with s > 0.
    """

    rho: float
    norm: Norm
    scale: Tensor | None
    moving: int

    @property
    def reach(self) -> float:
        """The largest l2 norm of u in the ball."""
        return self.rho * (1.0 if self.norm == "l2" else math.sqrt(self.moving))

    def displacement(self, u: Tensor) -> Tensor:
        """Return s * u. For a gradient in the weights, this is the gradient in u."""
        return u if self.scale is None else self.scale * u

    def farthest(self, g: Tensor) -> Tensor:
        """The u in the ball that maximises <g, u>: the ascent step of SAM, in the adaptive ball that of ASAM."""
        return g.sign() * self.rho if self.norm == "linf" else g * (self.rho / length(g))

    def support(self, g: Tensor) -> float:
        """The maximum of <g, u> in the ball: rho times the dual norm of g."""
        return self.rho * (float(g.double().abs().sum()) if self.norm == "linf" else length(g))

    def project(self, u: Tensor) -> Tensor:
        """Project u onto the ball."""
        if self.norm == "linf":
            return u.clamp(-self.rho, self.rho)
        size = length(u)
        return u * (self.rho / size) if size > self.rho else u

    def draw(self, generator: torch.Generator, like: Tensor) -> Tensor:
        """Draw a random u: uniform on the sphere (l2) or in the box (linf)."""
        if self.norm == "linf":
            u = 2.0 * torch.rand(len(like), generator=generator, dtype=torch.float64) - 1.0
            return self._masked(u.to(like)) * self.rho
        u = self._masked(torch.randn(len(like), generator=generator, dtype=torch.float64).to(like))
        return u * (self.rho / length(u))

    def _masked(self, u: Tensor) -> Tensor:
        return u if self.scale is None else u * (self.scale != 0)


def ball(problem: Problem, rho: float, norm: Norm, adaptive: bool, eta: float) -> Ball:
    """Make the ball around the weights of a problem.

    Raises:
        ValueError: `rho` is not a positive number; `norm` is unknown; `eta` is negative or given without `adaptive`;
            all weights are zero (adaptive); or the weights are in half precision.
    """
    if not (rho > 0 and math.isfinite(rho)):
        raise ValueError(f"rho must be a positive number, got {rho!r}.")
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm must be 'l2' or 'linf', got {norm!r}.")
    check_dtype(problem)
    scale = magnitudes(problem, eta) if adaptive else None
    if eta and not adaptive:
        raise ValueError(f"eta={eta!r} has an effect only with adaptive=True; set adaptive=True or leave eta out.")
    return Ball(rho, norm, scale, problem.size if scale is None else int((scale != 0).sum()))


def magnitudes(problem: Problem, eta: float) -> Tensor:
    """Return |w| + eta, shape (size,).

    Raises:
        ValueError: `eta` is negative, or all entries are zero.
    """
    if not (eta >= 0 and math.isfinite(eta)):
        raise ValueError(f"eta must be a number >= 0, got {eta!r}.")
    scale = problem.flat(problem.weights).abs() + eta
    if not scale.any():
        raise ValueError("every selected weight is zero, so adaptive displacements are zero too; use eta > 0.")
    return scale


def check_dtype(problem: Problem) -> None:
    """Raise ValueError for weights in half precision, in which a small displacement is lost to rounding."""
    if problem.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"small displacements are lost to rounding in {str(problem.dtype).removeprefix('torch.')} weights; make "
            "the Problem with dtype=torch.float32."
        )


def length(v: Tensor) -> float:
    """||v||_2, summed in double precision."""
    return float(v.double().norm())


def dot(a: Tensor, b: Tensor) -> float:
    """<a, b>, summed in double precision."""
    return float(torch.dot(a.double(), b.double()))
