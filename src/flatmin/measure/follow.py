"""The largest eigenvalue along a training run, and what SAM does in its direction."""

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
    r"""The curvature above which gradient descent on a quadratic diverges: (2 + 2 beta) / eta.

    Args:
        lr: eta > 0.
        momentum: beta of heavy ball, in [0, 1). Default 0.

    Raises:
        ValueError: out of range.

    Source: Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability, ICLR 2021.
    """
    if not lr > 0 or not 0 <= momentum < 1:
        raise ValueError(f"edge() needs lr > 0 and momentum in [0, 1), got {lr!r} and {momentum!r}.")
    return (2.0 + 2.0 * momentum) / lr


def sam_edge(lr: float, rho: float, gradient_norm: float) -> float:
    r"""The same for SAM: the root of eta lambda (1 + rho lambda / ||g||) = 2.

    .. math::
        \lambda = \frac{\|g\|}{2 \rho} \left(\sqrt{1 + \frac{8 \rho}{\eta \|g\|}} - 1\right)

    It falls with the gradient: SAM stays where the curvature is far below 2 / eta. rho = 0 gives 2 / eta.

    Args:
        lr: eta > 0.
        rho: >= 0.
        gradient_norm: ||g|| > 0 at w.

    Raises:
        ValueError: out of range.

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
    """One look.

    Args:
        step: of the training.
        largest: lambda_max of the Hessian.
        residual: relative; see `Spectrum`.
        products: that it took.
        converged: see `Spectrum`.
        edge: (2 + 2 beta) / eta; NaN if no lr was given.
        sam_edge: SAM's; NaN if no rho or gradient norm was given.
        alignment: |cos(eps, v)| of the ascent with the top eigenvector; NaN if no eps was given.
        extra: what else the caller recorded, such as an optimizer's diagnostics.
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
    r"""Follows lambda_max through training: every n-th step a Krylov run that starts from the last eigenvector.

        >>> import torch
        >>> from flatmin.measure.follow import Follow
        >>> from flatmin.measure.problem import Problem
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
        >>> follow = Follow(Problem(model, torch.nn.MSELoss(), (x, y)), every=10)
        >>> for step in range(30):
        ...     point = follow(step, lr=0.1)      # None but at every tenth step
        >>> [point.step for point in follow.points]
        [0, 10, 20]

    The problem reads the model's weights as they are, so one made before the training serves it all, as long as the
    weights are changed in place and the problem has their dtype.

    Args:
        problem: whose Hessian; a few hundred examples keep it light.
        every: n >= 1. Default 100.
        tol: relative residual. Default 3e-2, which is enough for a curve.
        max_products: most of them for one look. Default 40.

    Attributes:
        points: what was seen.

    Raises:
        ValueError: every below 1.
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
        """Look, if it is time.

        Args:
            step: of the training; looks where it is a multiple of `every`.
            lr: of the base, for the edges.
            momentum: of the base. Default 0.
            rho: for SAM's edge.
            gradient_norm: ||g|| at w, for SAM's edge.
            epsilon: the ascent, tensors shaped like the problem's weights, for its alignment.
            extra: kept with the point.

        Returns:
            The point, or None between the looks.

        Raises:
            ValueError: an epsilon of another shape.
            ArithmeticError: a Hessian that is not finite.
        """
        if step % self.every:
            return None
        # The derivatives are tried at the first look.
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
            raise ValueError(f"epsilon must be shaped like the problem's weights, got shapes {shapes}.")
        assert self._vector is not None
        eps, v = self.problem.flat(epsilon).double(), self._vector.double()
        size = float(eps.norm() * v.norm())
        return abs(float(torch.dot(eps, v))) / size if size else 0.0
