"""Logistic regression with known constants, also on real data sets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatmin.theory.classes import FunctionClass
from flatmin.theory.functions import Function
from flatmin.words import install


class Logistic(Function):
    """f(w) = mean_i log(1 + exp(-y_i x_i^T w)) + l2 ||w||^2 / 2, convex.

    The Hessian is X^T D X / m + l2 with D_i = s (1 - s) <= 1/4, so L = sigma_max(X)^2 / (4 m) + l2, attained at w = 0.
    With l2 > 0 f is strongly convex: one minimiser, found here by Newton's method, and KL with q = 1/2. With l2 = 0 f
    is analytic and has a minimiser only where the classes are not separable.

    Args:
        X: features, shape (m, dim).
        y: labels -1 and +1, shape (m,).
        l2: weight of the regularisation, >= 0. Default: 0.001.
        name: name in tables. Default: "logistic regression".

    Attributes:
        mu: l2, a lower bound on the Hessian's eigenvalues.

    Raises:
        ValueError: labels other than -1 and 1, l2 < 0, or shapes that do not match.
    """

    def __init__(self, X: Tensor, y: Tensor, l2: float = 1e-3, *, name: str = "logistic regression") -> None:
        self.X, self.y = X.to(torch.float64), y.to(torch.float64)
        if self.X.ndim != 2 or self.y.shape != self.X.shape[:1]:
            raise ValueError(f"X must be (m, dim) and y (m,), got {tuple(X.shape)} and {tuple(y.shape)}.")
        if not bool((self.y.abs() == 1).all()):
            raise ValueError("the labels y must be -1 and +1.")
        if not l2 >= 0:
            raise ValueError(f"l2 must be >= 0, got {l2!r}.")
        self.name, self.dim, self.l2, self.mu = name, self.X.shape[1], float(l2), float(l2)
        self._signed = self.X * self.y[:, None]
        self.solution = self._newton() if l2 > 0 else None
        self.f_star = None if self.solution is None else float(self.value(self.solution))
        self.why = "L = sigma_max(X)^2 / (4 m) + l2, attained at 0; q = 1/2 for l2 > 0, else analytic."
        self.function_class = FunctionClass(
            L=float(torch.linalg.matrix_norm(self.X, 2)) ** 2 / (4 * len(self.y)) + self.l2,
            convex=True,
            minimisers="unique" if l2 > 0 else "unknown",
            bounded_levels=l2 > 0,
            kl=0.5 if l2 > 0 else None,
            has_kl=True,
        )

    def value(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-(self._signed @ x)).mean() + 0.5 * self.l2 * x @ x

    def gradient(self, x: Tensor) -> Tensor:
        wrong = torch.sigmoid(-(self._signed @ x))
        return -(self._signed.T @ wrong) / len(self.y) + self.l2 * x

    def distance(self, x: Tensor) -> float:
        return float("nan") if self.solution is None else float((x - self.solution).norm())

    def start(self) -> Tensor:
        return torch.zeros(self.dim, dtype=torch.float64)

    def _newton(self) -> Tensor:
        """Damped Newton steps until the gradient is at rounding level."""
        w = torch.zeros(self.dim, dtype=torch.float64)
        for _ in range(100):
            g = self.gradient(w)
            s = torch.sigmoid(self.X @ w)
            H = (self.X.T * (s * (1 - s))) @ self.X / len(self.y) + self.l2 * torch.eye(self.dim, dtype=torch.float64)
            d = torch.linalg.solve(H, g)
            t = 1.0
            while float(self.value(w - t * d)) > float(self.value(w)) - 1e-4 * t * float(g @ d) and t > 1e-6:
                t /= 2
            w = w - t * d
            if float(g.norm()) < 1e-13:
                break
        return w


def breast_cancer(l2: float = 1e-3) -> Logistic:
    """Logistic regression on the Wisconsin diagnostic breast cancer data: 569 samples, 30 features and a constant.

    Features are shifted and scaled to mean 0 and standard deviation 1; malignant is +1.

    Args:
        l2: weight of the regularisation. Default: 0.001.

    Raises:
        ModuleNotFoundError: scikit-learn, which provides the data, is not installed.

    Source: Wolberg, Mangasarian, Street & Street, UCI 1995, as packed by scikit-learn.
    """
    data = _sklearn().load_breast_cancer()
    return _standardised(data.data, data.target == 0, l2, "logistic regression, breast cancer")


def digits_pair(one: int = 3, other: int = 8, l2: float = 1e-3) -> Logistic:
    """Logistic regression between two handwritten digits of scikit-learn's 8x8 images, `one` being +1.

    Args:
        one: the digit with label +1. Default: 3.
        other: the digit with label -1. Default: 8.
        l2: weight of the regularisation. Default: 0.001.

    Raises:
        ValueError: the arguments are not two different digits.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if one == other or not {one, other} <= set(range(10)):
        raise ValueError(f"two different digits from 0 to 9 are needed, got {one!r} and {other!r}.")
    data = _sklearn().load_digits()
    chosen = (data.target == one) | (data.target == other)
    name = f"logistic regression, digits {one} and {other}"
    return _standardised(data.data[chosen], data.target[chosen] == one, l2, name)


def _standardised(features: Any, positive: Any, l2: float, name: str) -> Logistic:
    X = torch.as_tensor(features, dtype=torch.float64)
    X = X[:, X.std(dim=0) > 0]
    X = (X - X.mean(dim=0)) / X.std(dim=0)
    X = torch.cat([X, torch.ones(len(X), 1, dtype=torch.float64)], dim=1)
    y = 2 * torch.as_tensor(positive, dtype=torch.float64) - 1
    return Logistic(X, y, l2, name=name)


def _sklearn() -> Any:
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this data set needs scikit-learn, which is not installed; run: {install('digits')}"
        ) from error
    return datasets
