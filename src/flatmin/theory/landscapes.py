"""Functions beyond quadratics: log-sums, Rosenbrock, x^4, a cosine, and a function without the KL property."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatmin.theory.classes import FunctionClass
from flatmin.theory.functions import Function, check_system, rotation


class LogSum(Function):
    """f(x) = sum_i log(1 + (A x - b)_i^2), not convex.

    With h(u) = log(1 + u^2), h'' = 2 (1 - u^2) / (1 + u^2)^2 lies in [-1/4, 2], so L = 2 sigma_max(A)^2, attained at a
    solution of A x = b. KL holds because f is real-analytic; where A x = b has one solution, the Hessian there is
    2 A^T A > 0, and q = 1/2 at it.

    Args:
        A: shape (m, dim).
        b: shape (m,).

    Source: Khanh et al., NeurIPS 2024, the numerical experiments of the appendix on nonconvex problems.
    """

    def __init__(self, A: Tensor, b: Tensor) -> None:
        self.A, self.b = A.to(torch.float64), b.to(torch.float64)
        check_system(self.A, self.b)
        self.name, self.dim = "log-sum", self.A.shape[1]
        singular = torch.linalg.svdvals(self.A)
        full = len(singular) == self.dim and float(singular[-1]) > 1e-12 * float(singular[0])
        solution = torch.linalg.pinv(self.A) @ self.b
        solved = float((self.A @ solution - self.b).norm()) <= 1e-9 * max(1.0, float(self.b.norm()))
        self.solution = solution if full and solved else None
        self.f_star = 0.0 if solved else None
        self.why = "L = 2 sigma_max(A)^2, as log(1 + u^2) has second derivatives in [-1/4, 2]; real-analytic, so KL."
        self.function_class = FunctionClass(
            L=2 * float(singular[0]) ** 2,
            minimisers="unique" if self.solution is not None else "bounded" if full else "unknown",
            bounded_levels=full,
            has_kl=True,
        )

    def value(self, x: Tensor) -> Tensor:
        return torch.log1p((self.A @ x - self.b).square()).sum()

    def gradient(self, x: Tensor) -> Tensor:
        r = self.A @ x - self.b
        return self.A.T @ (2 * r / (1 + r * r))

    def distance(self, x: Tensor) -> float:
        return math.nan if self.solution is None else float((x - self.solution).norm())

    @classmethod
    def random(cls, n: int, seed: int = 0) -> LogSum:
        """A function with a square A whose singular values are from 1 to 2, so that L = 8.

        Args:
            n: number of rows and variables.
            seed: seed of the two rotations and of b, which is standard normal. Default: 0.
        """
        singular = torch.linspace(1, 2, n, dtype=torch.float64)
        A = rotation(n, 2 * seed) @ torch.diag(singular) @ rotation(n, 2 * seed + 1)
        b = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return cls(A, b)


class Rosenbrock(Function):
    """f(x, y) = (1 - x)^2 + 100 (y - x^2)^2, minimal at (1, 1). Starts at (-1.2, 1).

    L is the largest eigenvalue of the Hessian ((1200 x^2 - 400 y + 2, -400 x), (-400 x, 200)) over the box
    |x| <= `reach`, -1 <= y <= 4: it grows with |x| and falls with y, so it is attained at (reach, -1). Outside the box
    L does not hold.

    Args:
        reach: half width of the box, >= 1. Default 2.0.

    Raises:
        ValueError: reach below 1.

    Source: Rosenbrock, An automatic method for finding the greatest or least value of a function, 1960.
    """

    f_star = 0.0

    def __init__(self, reach: float = 2.0) -> None:
        if not 1 <= reach < math.inf:
            raise ValueError(f"reach must be at least 1, so that the minimiser is inside, got {reach!r}.")
        self.name, self.dim, self.reach = "Rosenbrock", 2, float(reach)
        a, b, c = 1200 * reach**2 + 402, -400 * reach, 200.0
        largest = (a + c) / 2 + math.hypot((a - c) / 2, b)
        self.why = "L over the box from the 2x2 Hessian; q = 1/2 as the only stationary point is nondegenerate."
        self.function_class = FunctionClass(
            L=largest,
            minimisers="unique",
            bounded_levels=True,
            kl=0.5,
            where=f"on |x| <= {reach:g}, -1 <= y <= 4",
        )

    def value(self, x: Tensor) -> Tensor:
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    def gradient(self, x: Tensor) -> Tensor:
        a, b = float(x[0]), float(x[1])
        rise = 200 * (b - a * a)
        return torch.tensor([-2 * (1 - a) - 2 * a * rise, rise], dtype=torch.float64)

    def distance(self, x: Tensor) -> float:
        return float((x - 1).norm())

    def start(self) -> Tensor:
        return torch.tensor([-1.2, 1.0], dtype=torch.float64)


class Quartic(Function):
    """f(x) = x^4 / 4 on R: KL with q = 1/4, so that rates are polynomial. Starts at x = 1.

    |f'| = |x|^3 = (4 f)^(3/4), and 1 - q = 3/4. L = 3 reach^2 on |x| <= reach.

    Args:
        reach: > 0. Default 2.0, so that x + eps stays inside from the start.

    Raises:
        ValueError: reach is not positive.
    """

    f_star = 0.0

    def __init__(self, reach: float = 2.0) -> None:
        if not 0 < reach < math.inf:
            raise ValueError(f"reach must be positive, got {reach!r}.")
        self.name, self.dim = "x^4 / 4", 1
        self.why = "f'' = 3 x^2; q = 1/4 as |f'| = (4 f)^(3/4)."
        self.function_class = FunctionClass(
            L=3 * reach**2,
            convex=True,
            minimisers="unique",
            bounded_levels=True,
            kl=0.25,
            where=f"on |x| <= {reach:g}",
        )

    def value(self, x: Tensor) -> Tensor:
        return x[0] ** 4 / 4

    def gradient(self, x: Tensor) -> Tensor:
        return x**3

    def distance(self, x: Tensor) -> float:
        return float(x.abs())

    def start(self) -> Tensor:
        return torch.ones(1, dtype=torch.float64)


class Wave(Function):
    """f(x) = 1 - cos x on R, L = 1: minima at 2 pi Z, and maxima between them with the same curvature. Starts at x = 2.

    Every stationary point is nondegenerate, so KL holds with q = 1/2.
    """

    f_star = 0.0

    def __init__(self) -> None:
        self.name, self.dim = "1 - cos x", 1
        self.why = "f'' = cos x; q = 1/2 as f'' is 1 or -1 at every stationary point."
        self.function_class = FunctionClass(L=1.0, minimisers="unbounded", kl=0.5)

    def value(self, x: Tensor) -> Tensor:
        return 2 * torch.sin(x[0] / 2) ** 2

    def gradient(self, x: Tensor) -> Tensor:
        return torch.sin(x)

    def distance(self, x: Tensor) -> float:
        return abs(math.remainder(float(x), 2 * math.pi))

    def start(self) -> Tensor:
        return torch.full((1,), 2.0, dtype=torch.float64)


class MexicanHat(Function):
    """A smooth function without the KL property: gradient curves spiral towards the unit circle without converging.

    f(r, a) = e^(-1 / (1 - r^2)) (1 - m sin(a - 1 / (1 - r^2))), m = 4 r^4 / (4 r^4 + (1 - r^2)^4), for r < 1 in polar
    coordinates, and 0 for r >= 1. Infinitely often differentiable, and 0 <= f; on the circle, which is reached only in
    the limit, f = 0. Its gradient is Lipschitz with a constant that is not known here.

    Source: Absil, Mahony & Andrews, Convergence of the Iterates of Descent Methods for Analytic Cost Functions, SIAM
    Journal on Optimization 16(2), 2005, the "Mexican hat" of their introduction.
    """

    f_star = 0.0

    def __init__(self) -> None:
        self.name, self.dim = "Mexican hat", 2
        self.why = "smooth, but not analytic on the unit circle, where it has no KL property; no L is claimed."
        self.function_class = FunctionClass(minimisers="unbounded")

    def value(self, x: Tensor) -> Tensor:
        gap = 1 - x @ x
        if float(gap.detach()) <= 0:
            return 0.0 * x.sum()
        return torch.exp(-1 / gap) * (1 - self._share(gap) * torch.sin(torch.atan2(x[1], x[0]) - 1 / gap))

    def gradient(self, x: Tensor) -> Tensor:
        """By the chain rule through s = r^2 and the angle a."""
        a, b = float(x[0]), float(x[1])
        s = a * a + b * b
        gap = 1 - s
        if gap <= 1e-3 or s == 0:  # e^(-1/gap) underflows
            return torch.zeros(2, dtype=torch.float64)
        below = 4 * s * s + gap**4
        m = 4 * s * s / below
        m_s = (8 * s * below - 4 * s * s * (8 * s - 4 * gap**3)) / below**2
        phase = math.atan2(b, a) - 1 / gap
        e = math.exp(-1 / gap)
        by_s = e * (-(1 - m * math.sin(phase)) / gap**2 - m_s * math.sin(phase) + m * math.cos(phase) / gap**2)
        by_angle = -e * m * math.cos(phase)
        return torch.tensor([2 * a * by_s - b * by_angle / s, 2 * b * by_s + a * by_angle / s], dtype=torch.float64)

    def distance(self, x: Tensor) -> float:
        return max(0.0, 1 - float(x.norm()))

    def start(self) -> Tensor:
        return torch.tensor([0.4, 0.0], dtype=torch.float64)

    @staticmethod
    def _share(gap: Tensor) -> Tensor:
        s4 = 4 * (1 - gap) ** 2
        return s4 / (s4 + gap**4)
