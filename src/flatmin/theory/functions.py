"""Functions in float64 with known constants: the base class, quadratics and least squares."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from flatmin.theory.classes import FunctionClass


class Function(ABC):
    """A differentiable function f on R^dim, in float64, with its gradient in closed form.

    Attributes:
        name: name in tables.
        dim: number of variables.
        function_class: L, convexity, minimisers and KL exponent, as used by the checker.
        f_star: inf f; None if it is not known.
        why: a sentence on how L and the KL exponent were derived.
    """

    name: str
    dim: int
    function_class: FunctionClass
    f_star: float | None
    why: str

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """f(x), a scalar tensor; x of shape (dim,), float64."""

    @abstractmethod
    def gradient(self, x: Tensor) -> Tensor:
        """The gradient at x, shape (dim,)."""

    def distance(self, x: Tensor) -> float:
        """Euclidean distance from x to the set of minimisers; nan if the set is not known."""
        return math.nan

    def start(self) -> Tensor:
        """A generic start, the same at every call: standard normal with a fixed seed, shape (dim,)."""
        return torch.randn(self.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def __repr__(self) -> str:
        return f"{self.name} ({self.function_class})"


class Quadratic(Function):
    """f(x) = (x - c)^T A (x - c) / 2 with A = Q diag(spectrum) Q^T.

    L = max |lambda|; KL with q = 1/2, because ||grad f||^2 >= 2 mu (f - f*) with mu the smallest |lambda| > 0.

    Args:
        spectrum: eigenvalues, shape (dim,); a negative one makes f unbounded below.
        centre: c, shape (dim,). Default: 0.
        seed: seed of the random rotation Q. Default: None, so that Q is the identity.
        name: name in tables. Default: "quadratic".

    Attributes:
        matrix: A, shape (dim, dim).
        mu: the smallest eigenvalue.

    Raises:
        ValueError: all eigenvalues are 0, or the centre has a different length.
    """

    def __init__(
        self,
        spectrum: Sequence[float],
        *,
        centre: Sequence[float] | None = None,
        seed: int | None = None,
        name: str = "quadratic",
    ) -> None:
        eigenvalues = tuple(float(s) for s in spectrum)
        if not any(eigenvalues) or not all(map(math.isfinite, eigenvalues)):
            raise ValueError(f"a quadratic needs finite eigenvalues, not all 0, got {list(spectrum)!r}.")
        self.name, self.dim = name, len(eigenvalues)
        self.spectrum = torch.tensor(eigenvalues, dtype=torch.float64)
        if centre is not None and len(centre) != self.dim:
            raise ValueError(f"the centre must have {self.dim} entries, got {len(centre)}.")
        self.centre = torch.zeros(self.dim, dtype=torch.float64)
        if centre is not None:
            self.centre = torch.as_tensor(list(centre), dtype=torch.float64)
        self.rotation = rotation(self.dim, seed)
        self.matrix = self.rotation @ torch.diag(self.spectrum) @ self.rotation.T
        self._diagonal = seed is None
        low = min(eigenvalues)
        self.mu = low
        self.f_star = 0.0 if low >= 0 else -math.inf
        self.why = "L and mu are the extreme eigenvalues; q = 1/2 as ||grad f||^2 >= 2 mu (f - f*)."
        self.function_class = FunctionClass(
            L=max(map(abs, eigenvalues)),
            convex=low >= 0,
            minimisers="unique" if low > 0 else "unbounded" if low == 0 else "none",
            bounded_below=low >= 0,
            bounded_levels=low > 0,
            kl=0.5,
            spectrum=eigenvalues,
        )

    def value(self, x: Tensor) -> Tensor:
        value: Tensor = 0.5 * (x - self.centre) @ self.gradient(x)
        return value

    def gradient(self, x: Tensor) -> Tensor:
        y = x - self.centre
        return self.spectrum * y if self._diagonal else self.matrix @ y

    def distance(self, x: Tensor) -> float:
        if self.mu < 0:
            return math.nan
        return float((self.rotation.T @ (x - self.centre))[self.spectrum > 0].norm())


class Square(Quadratic):
    """f(x) = x^2 on R, L = 2: the counterexample for a constant step size (Example 3.1). Starts at x = 1."""

    def __init__(self) -> None:
        super().__init__([2.0], name="x^2")

    def start(self) -> Tensor:
        return torch.ones(1, dtype=torch.float64)


class LeastSquares(Function):
    """f(x) = ||A x - b||^2 / 2.

    L = sigma_max(A)^2; KL with q = 1/2 and mu = sigma_min+(A)^2, the square of the smallest singular value that is not
    0. If A has a null space, f is not strongly convex and the minimisers form an affine subspace.

    Args:
        A: shape (m, dim).
        b: shape (m,).

    Attributes:
        mu: sigma_min+(A)^2.
    """

    def __init__(self, A: Tensor, b: Tensor) -> None:
        self.A, self.b = A.to(torch.float64), b.to(torch.float64)
        check_system(self.A, self.b)
        self.name, self.dim = "least squares", self.A.shape[1]
        _, singular, V = torch.linalg.svd(self.A, full_matrices=False)
        rank = int((singular > 1e-12 * singular[0]).sum())
        self.solution = torch.linalg.pinv(self.A) @ self.b
        self._rows = V[:rank]
        self.mu = float(singular[rank - 1] ** 2)
        self.f_star = float(self.value(self.solution))
        self.why = "L = sigma_max(A)^2; q = 1/2 with mu the square of the smallest singular value that is not 0."
        self.function_class = FunctionClass(
            L=float(singular[0] ** 2),
            convex=True,
            minimisers="unique" if rank == self.dim else "unbounded",
            bounded_levels=rank == self.dim,
            kl=0.5,
            spectrum=(*(float(s) ** 2 for s in singular[:rank]), *[0.0] * (self.dim - rank)),
        )

    def value(self, x: Tensor) -> Tensor:
        r = self.A @ x - self.b
        return 0.5 * r @ r

    def gradient(self, x: Tensor) -> Tensor:
        return self.A.T @ (self.A @ x - self.b)

    def distance(self, x: Tensor) -> float:
        return float((self._rows @ (x - self.solution)).norm())


def rotation(dim: int, seed: int | None) -> Tensor:
    """A uniformly distributed random orthogonal matrix of shape (dim, dim); the identity if seed is None."""
    if seed is None:
        return torch.eye(dim, dtype=torch.float64)
    Q, R = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return torch.mul(Q, R.diagonal().sign())


def random_system(rows: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A of shape (rows, dim) and b of shape (rows,) with standard normal entries, float64."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rows, dim, dtype=torch.float64, generator=generator)
    return A, torch.randn(rows, dtype=torch.float64, generator=generator)


def check_system(A: Tensor, b: Tensor) -> None:
    """Check a matrix and a right-hand side.

    Raises:
        ValueError: A is not a finite matrix with an entry other than 0, or b has the wrong length.
    """
    if A.ndim != 2 or not bool(A.any()) or not bool(torch.isfinite(A).all()):
        raise ValueError(f"A must be a finite matrix, not all 0, got shape {tuple(A.shape)}.")
    if b.shape != A.shape[:1]:
        raise ValueError(f"b must have shape ({A.shape[0]},), one entry for each row of A, got {tuple(b.shape)}.")
