"""Track the largest eigenvalue of the Hessian during training, and compare it with the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flatmin.measure.curvature import Form, Hessian
from flatmin.measure.krylov import spectrum
from flatmin.measure.problem import Problem


def edge(lr: float, momentum: float = 0.0) -> float:
    """The curvature above which gradient descent diverges on a quadratic function (the edge of stability).

        lambda = (2 + 2 beta) / eta

    Args:
        lr: learning rate eta, > 0.
        momentum: heavy-ball momentum beta, in [0, 1). Default 0.

    Raises:
        ValueError: an argument is out of range.

    Source: Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability, ICLR 2021.
    """
    if not lr > 0 or not 0 <= momentum < 1:
        raise ValueError(f"edge() needs lr > 0 and momentum in [0, 1), got {lr!r} and {momentum!r}.")
    return (2.0 + 2.0 * momentum) / lr


def sam_edge(lr: float, rho: float, gradient_norm: float) -> float:
    """The edge of stability of SAM: the root of eta lambda (1 + rho lambda / ||g||) = 2.

        lambda = ||g|| / (2 rho) (sqrt(1 + 8 rho / (eta ||g||)) - 1)

    It decreases with the gradient norm, so SAM trains where the curvature is far below 2 / eta. For rho = 0 it is
    2 / eta.

    Args:
        lr: learning rate eta, > 0.
        rho: radius, >= 0.
        gradient_norm: ||g|| at w, > 0.

    Raises:
        ValueError: an argument is out of range.

    Source: Long & Bartlett, Sharpness-Aware Minimization and the Edge of Stability, JMLR 2024.
    """
    if not lr > 0 or rho < 0 or not gradient_norm > 0:
        raise ValueError(
            f"sam_edge() needs lr > 0, rho >= 0 and a positive gradient norm, got {lr!r}, {rho!r}, {gradient_norm!r}."
        )
    if rho == 0:
        return 2.0 / lr
    x = 8.0 * rho / (lr * gradient_norm)
    # (sqrt(1 + x) - 1) without the cancellation for small x.
    return gradient_norm / (2.0 * rho) * x / (math.sqrt(1.0 + x) + 1.0)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measurement at one training step.

    Args:
        step: number of the training step.
        largest: lambda_max of the Hessian.
        residual: relative residual of lambda_max; see `Spectrum`.
        products: number of products with the Hessian.
        converged: whether lambda_max converged; see `Spectrum`.
        edge: (2 + 2 beta) / eta; NaN if `lr` was not given.
        sam_edge: edge of stability of SAM; NaN if `lr`, `rho` or `gradient_norm` was not given.
        alignment: |cos(eps, v)| of the ascent eps with the top eigenvector v; NaN if `epsilon` was not given.
        extra: further numbers from the caller, such as an optimizer's diagnostics.
    """

    step: int
    largest: float
    residual: float
    products: int
    converged: bool
    edge: float = math.nan
    sam_edge: float = math.nan
    alignment: float = math.nan
    extra: Mapping[str, float] = field(default_factory=dict)


class Follow:
    """Tracks lambda_max during training: a Lanczos run at every n-th step, started from the last eigenvector.

        >>> import torch
        >>> from flatmin.measure.follow import Follow
        >>> from flatmin.measure.problem import Problem
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
        >>> follow = Follow(Problem(model, torch.nn.MSELoss(), (x, y)), every=10)
        >>> for step in range(30):
        ...     point = follow(step, lr=0.1)      # None except at every tenth step
        >>> [point.step for point in follow.points]
        [0, 10, 20]

    A problem made before training can be used throughout, because it reads the current weights of the model. This
    requires that the weights are changed in place and have the dtype of the problem.

    Args:
        problem: the function whose Hessian is tracked. A few hundred examples keep the cost low.
        every: measure at every n-th step, n >= 1. Default 100.
        tol: relative residual. Default 3e-2, which is sufficient for a curve.
        max_products: maximum number of products per measurement. Default 40.

    Attributes:
        points: list of the measurements so far.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(self, problem: Problem, *, every: int = 100, tol: float = 3e-2, max_products: int = 40) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every!r}.")
        self.problem, self.every, self._tol, self._most = problem, every, tol, max_products
        self.points: list[Point] = []
        self._vector: Tensor | None = None
        self._form: Form | Literal["auto"] = "auto"

    def __call__(
        self,
        step: int,
        *,
        lr: float | None = None,
        momentum: float = 0.0,
        rho: float | None = None,
        gradient_norm: float | None = None,
        epsilon: Sequence[Tensor] | None = None,
        extra: Mapping[str, float] | None = None,
    ) -> Point | None:
        """Measure if `step` is a multiple of `every`.

        Args:
            step: number of the training step.
            lr: learning rate of the base optimizer, for both edges. Default None: the edges are NaN.
            momentum: momentum of the base optimizer. Default 0.
            rho: radius, for the edge of SAM. Default None.
            gradient_norm: ||g|| at w, for the edge of SAM. Default None.
            epsilon: the ascent as tensors shaped like the problem's weights, for its alignment. Default None.
            extra: further numbers to store with the point. Default None.

        Returns:
            The measurement, or None at other steps.

        Raises:
            ValueError: `epsilon` has other shapes than the weights.
            ArithmeticError: the Hessian is not finite.
        """
        if step % self.every:
            return None
        # The form of the derivatives is chosen at the first measurement.
        with_graphs = Hessian(self.problem, form=self._form)
        self._form = with_graphs.form
        eigen = spectrum(with_graphs, tol=self._tol, max_products=self._most, seed=step, start=self._vector)
        with_graphs.close()
        self._vector = eigen.top_vectors[0]
        point = Point(
            step=step,
            largest=eigen.largest,
            residual=float(eigen.top_residuals[0]),
            products=eigen.products,
            converged=eigen.converged,
            edge=math.nan if lr is None else edge(lr, momentum),
            sam_edge=math.nan
            if lr is None or rho is None or gradient_norm is None
            else sam_edge(lr, rho, gradient_norm),
            alignment=math.nan if epsilon is None else self._alignment(epsilon),
            extra=dict(extra or {}),
        )
        self.points.append(point)
        return point

    def _alignment(self, epsilon: Sequence[Tensor]) -> float:
        shapes = [tuple(e.shape) for e in epsilon]
        if shapes != [tuple(w.shape) for w in self.problem.weights]:
            raise ValueError(f"epsilon must have the shapes of the problem's weights, got {shapes}.")
        assert self._vector is not None
        eps, v = self.problem.flat(epsilon).double(), self._vector.double()
        size = float(eps.norm() * v.norm())
        return abs(float(torch.dot(eps, v))) / size if size else 0.0
