"""The largest eigenvalue of a symmetric operator by Lanczos iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmin.measure.operators import Operator


@dataclass(frozen=True, kw_only=True)
class Eigenvalue:
    """An eigenvalue and how far to trust it.

    Args:
        value: the largest Ritz value (LA: by sign, not by magnitude).
        residual: ||H v - value v|| / |value| of its unit Ritz vector; 0 if H is 0.
        hvps: products with the operator that were spent.
        converged: whether the residual reached the tolerance and then stayed there for two more steps.
    """

    value: float
    residual: float
    hvps: int
    converged: bool


def largest_eigenvalue(
    operator: Operator, *, tol: float = 1e-2, max_steps: int = 100, confirm: int = 2, seed: int = 0
) -> Eigenvalue:
    """The largest eigenvalue (LA) of a symmetric operator.

    Lanczos with full reorthogonalisation, twice per step, in the operator's own dtype; the tridiagonal matrix is
    kept in float64. Stops when the relative residual is at most `tol` and stays so, at an eigenvalue that moved by
    at most `tol`, for `confirm` further steps: the residual of the vector found says nothing about one not found
    yet. The error of the eigenvalue is of the order residual^2 / gap, far below the residual.

    Args:
        operator: anything with `size`, `dtype`, `device` and `matvec`.
        tol: relative residual. Default 1e-2.
        max_steps: most products. Default 100.
        confirm: further steps for which it must hold. Default 2.
        seed: of the start vector.

    Raises:
        ValueError: a tolerance or a number of steps that is not positive.
        ArithmeticError: a product that is not finite.

    Example:
        >>> class Diagonal:
        ...     size, dtype, device = 3, torch.float64, torch.device("cpu")
        ...     def matvec(self, v): return torch.tensor([1.0, -5.0, 2.0], dtype=v.dtype) * v
        >>> round(largest_eigenvalue(Diagonal()).value, 9)
        2.0
    """
    if not tol > 0 or max_steps < 1:
        raise ValueError(f"Lanczos needs tol > 0 and max_steps >= 1, got tol={tol!r} and max_steps={max_steps!r}.")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(operator.size, generator=generator, dtype=torch.float64)
    vector = (start / start.norm()).to(device=operator.device, dtype=operator.dtype)
    basis: list[Tensor] = []
    diagonal: list[float] = []
    off: list[float] = []
    held, previous = 0, math.inf
    value = residual = math.nan
    for step in range(1, min(max_steps, operator.size) + 1):
        product = operator.matvec(vector)
        basis.append(vector)
        diagonal.append(_dot(vector, product))
        if not math.isfinite(diagonal[-1]):
            raise ArithmeticError("the Hessian-vector product is not finite; the loss surface cannot be measured here.")
        for known in basis + basis:
            product = product - torch.dot(known, product) * known
        beta = math.sqrt(_dot(product, product))
        value, weight = _top(diagonal, off)
        scale = max(abs(value), _EPS * max(map(abs, diagonal + off)))
        residual = beta * weight / scale if scale else 0.0
        exhausted = beta <= _EPS * max(map(abs, diagonal + off)) or step == operator.size
        if exhausted:
            # The space spanned so far is mapped to itself: the Ritz values are exact eigenvalues.
            return Eigenvalue(value=value, residual=residual, hvps=step, converged=True)
        holds = residual <= tol and (held == 0 or abs(value - previous) <= tol * scale)
        held = held + 1 if holds else 0
        if held > confirm:
            return Eigenvalue(value=value, residual=residual, hvps=step, converged=True)
        previous = value
        off.append(beta)
        vector = product / beta
    return Eigenvalue(value=value, residual=residual, hvps=len(basis), converged=False)


_EPS = 1e-6  # below this share of the spectrum's size, what is left of a product is round-off


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()))


def _top(diagonal: list[float], off: list[float]) -> tuple[float, float]:
    """Largest eigenvalue of the tridiagonal matrix and |last entry| of its eigenvector."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off:
        beside = torch.tensor(off, dtype=torch.float64)
        matrix += torch.diag(beside, 1) + torch.diag(beside, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return float(values[-1]), abs(float(vectors[-1, -1]))
